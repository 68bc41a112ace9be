"""Several pictures in a prompt: as transformers has them, on every engine; and what does not go together is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export import bundle
from export.model.layers import FUSED, PORTABLE
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import pad_prompts
from torch_impl.load import TorchEngine

from . import make_goldens
from .models import CONFIGS, random_batch, random_params
from .test_golden import greedy

BUDGET = 1e-4  # of the largest logit, in float32; measured 8e-7
PREFIXES = [[2, 31, 37, 41, 108], [2, 43, 108], [2, 53, 59, 61, 67, 71, 108]]
NEW_TOKENS = 8
ENGINES = ["numpy", "torch", PORTABLE, FUSED]


# --- as transformers ---------------------------------------------------------------------------------------


@torch.inference_mode()
def answer(model, pixel_values, ids):
    """transformers' logits after one prompt [V] and its greedy tokens; pixel_values [N, 3, S, S]."""
    ids = torch.tensor([ids])
    arguments = {
        "input_ids": ids, "pixel_values": torch.from_numpy(pixel_values), "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }  # fmt: skip
    logits = model(**arguments).logits[0, -1].float().numpy()
    tokens = model.generate(**arguments, max_new_tokens=NEW_TOKENS, do_sample=False)
    return logits, tokens[0, ids.shape[1] :].tolist()


def prompts(config, count):
    """The ids of PREFIXES about so many pictures."""
    return [make_goldens.row_ids(config, []) * count + prefix for prefix in PREFIXES]


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def models(request, tmp_path_factory):
    """transformers' model, and each engine over its weights, which have no token that ends an answer."""
    transformers = pytest.importorskip("transformers", reason="it is compared with transformers")
    folder = tmp_path_factory.mktemp("pictures")
    make_goldens.build(request.param, text={"head_dim": 16}).save_pretrained(folder / "hf")
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder / "hf", attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    loaded = checkpoint.load(folder / "hf")
    loaded = replace(loaded, config=replace(loaded.config, eos=2**30))
    for operators in (PORTABLE, FUSED):
        bundle.write(loaded, folder / operators, operators=operators)
    sessions = {operators: Session(bundle.load(folder / operators), "cpu") for operators in (PORTABLE, FUSED)}
    return model, {"numpy": NumpyEngine(loaded), "torch": TorchEngine(loaded), **sessions}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_of_unequal_length(models, count):
    model, engines = models
    rows = prompts(model.config, count)
    pixel_values = make_goldens.pixels(model.config, len(rows) * count)
    by_row = pixel_values.reshape(len(rows), count, *pixel_values.shape[1:])
    expected = [answer(model, *pair) for pair in zip(by_row, rows, strict=True)]
    reference = np.stack([logits for logits, _ in expected])
    assert len({token for _, tokens in expected for token in tokens}) > 5  # answers that say something
    for name, engine in engines.items():
        logits, _ = engine.prefill(pixel_values, *pad_prompts(rows, 0), 60)
        assert np.abs(logits - reference).max() <= BUDGET * np.abs(reference).max(), name
        assert greedy(engine, pixel_values, rows, NEW_TOKENS).tolist() == [tokens for _, tokens in expected], name


def test_every_picture_counts_and_so_does_their_order(models):
    _, engines = models
    for name, engine in engines.items():
        ids, lengths = pad_prompts(prompts(models[0].config, 2)[:1], 0)
        pixels = make_goldens.pixels(models[0].config, 2)
        found = [engine.prefill(each, ids, lengths, 40)[0].copy() for each in (pixels, pixels[::-1], pixels[[0, 0]])]
        assert np.abs(found[0] - found[1]).max() > 1e-3, name
        assert np.abs(found[0] - found[2]).max() > 1e-3, name


def test_ids_are_those_of_the_processor():
    """The tokens of all pictures, bos, the prompt, a newline, whatever the prompt."""
    transformers = pytest.importorskip("transformers", reason="it is compared with transformers")
    from PIL import Image

    from numpy_ref.tokenizer import Tokenizer

    config = checkpoint.load_config(checkpoint.SHIPPED)
    ours = Tokenizer.load(checkpoint.SHIPPED, config)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint.SHIPPED / "tokenizer.json"), bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>",
    )  # fmt: skip
    size = config.vision.image_size
    images = transformers.SiglipImageProcessor(size={"height": size, "width": size})
    images.image_seq_length = config.vision.patches
    processor = transformers.PaliGemmaProcessor(images, theirs)
    picture = Image.new("RGB", (40, 20), "teal")
    for count in (1, 2, 3):
        text = f"{'<image>' * count}caption en"
        found = processor(images=[[picture] * count], text=[text], add_special_tokens=False)
        assert ours.prompt("caption en", count) == list(found["input_ids"][0])
        assert len(found["pixel_values"]) == count


# --- what does not go together -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Each engine over one small model."""
    folder, config = tmp_path_factory.mktemp("small"), CONFIGS["paligemma2"]
    loaded = checkpoint.Checkpoint(folder, config, random_params(config, dtype=np.float32), np.dtype("f4"))
    bundle.write(loaded, folder / "bundle")
    return [NumpyEngine(loaded), TorchEngine(loaded), Session(bundle.load(folder / "bundle"), "cpu")]


def test_pictures_that_do_not_go_with_the_prompts(engines):
    config = CONFIGS["paligemma2"]
    pixel_values, input_ids, lengths = random_batch(config, (3, 5))
    patches = config.vision.patches
    for engine in engines:
        for pictures, words in [(3, "3 pictures for 2 prompts"), (0, "0 pictures for 2 prompts")]:
            with pytest.raises(PaliGemmaError, match=f"{words}: every prompt of a batch needs equally many"):
                engine.prefill(pixel_values[np.arange(pictures) % 2], input_ids, lengths, 40)
        with pytest.raises(PaliGemmaError, match=f"begins with {patches} image tokens, but 2 pictures a prompt take"):
            engine.prefill(np.tile(pixel_values, (2, 1, 1, 1)), input_ids, lengths, 40)
        twice = np.concatenate([input_ids[:, :patches], input_ids], 1)
        with pytest.raises(PaliGemmaError, match=f"{2 * patches} image tokens, but 1 picture a prompt take {patches}"):
            engine.prefill(pixel_values, twice, lengths + patches, 40)
        with pytest.raises(PaliGemmaError, match="image tokens, but 5 pictures a prompt"):  # longer than the prompt
            engine.prefill(np.tile(pixel_values, (5, 1, 1, 1)), input_ids, lengths, 60)
        one_short = np.concatenate([twice[:1], np.pad(input_ids[1:], ((0, 0), (0, patches)))])
        with pytest.raises(PaliGemmaError, match=f"begins with {patches} image tokens, but 2 pictures"):
            engine.prefill(np.tile(pixel_values, (2, 1, 1, 1)), one_short, lengths, 40)


def test_places_that_other_ids_hold(engines):
    """What stands at a picture's places is not looked at, as ever."""
    pixel_values, input_ids, lengths = random_batch(CONFIGS["paligemma2"], (3, 5))
    other = input_ids.copy()
    other[:, : CONFIGS["paligemma2"].vision.patches] = 7
    for engine in engines:
        expected = engine.prefill(pixel_values, input_ids, lengths, 40)[0].copy()
        assert np.array_equal(engine.prefill(pixel_values, other, lengths, 40)[0], expected)


def test_the_model_alone_refuses_what_does_not_divide(engines):
    """Also where nothing checked before: in training, or in a host that feeds the graph itself."""
    config = CONFIGS["paligemma2"]
    pixel_values, input_ids, lengths = random_batch(config, (3, 5))
    three = pixel_values[[0, 1, 0]]
    numpy, module, session = engines
    from numpy_ref.model import paligemma

    with pytest.raises(ValueError, match="reshape"):
        paligemma.prefill(numpy.params, config, three, input_ids, lengths, 40)
    with pytest.raises(RuntimeError, match="unflatten"):
        module.model.prefill(torch.from_numpy(three), torch.from_numpy(input_ids), torch.from_numpy(lengths), 40)
    feeds = {"pixel_values": three, "input_ids": input_ids, "lengths": lengths, "capacity": np.array(40)}
    with pytest.raises(Exception, match="Reshape"):  # the runtime's exceptions have no common class
        session._prefill.run(None, feeds)
