"""Several pictures in a prompt: as transformers has them, on every engine; and what does not go together is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from export import bundle
from export.cli import run_onnx
from export.model.layers import FUSED, PORTABLE
from export.session import Session
from numpy_ref import checkpoint, cli, detection
from numpy_ref.__main__ import main as numpy_main
from numpy_ref.cli import inputs
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import pad_prompts
from numpy_ref.model import paligemma
from numpy_ref.tokenizer import Tokenizer
from torch_impl.__main__ import main as torch_main
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
    with pytest.raises(ValueError, match="reshape"):
        paligemma.prefill(numpy.params, config, three, input_ids, lengths, 40)
    with pytest.raises(RuntimeError, match="unflatten"):
        module.model.prefill(torch.from_numpy(three), torch.from_numpy(input_ids), torch.from_numpy(lengths), 40)
    feeds = {"pixel_values": three, "input_ids": input_ids, "lengths": lengths, "capacity": np.array(40)}
    with pytest.raises(Exception, match="Reshape"):  # the runtime's exceptions have no common class
        session._prefill.run(None, feeds)


# --- the commands ------------------------------------------------------------------------------------------

EXAMPLE = str(checkpoint.SHIPPED / "example.png")
MAINS = {"run-onnx": run_onnx, "numpy": numpy_main, "torch": torch_main}


@pytest.fixture
def two(tmp_path):
    """Two pictures of unequal sizes."""
    drawn = Image.new("RGB", (60, 40), "white")
    drawn.paste("red", (10, 10, 30, 30))
    drawn.save(tmp_path / "a.png")
    return [str(tmp_path / "a.png"), EXAMPLE]


def call(main, capsys, *arguments):
    """Exit code, and what was printed."""
    try:
        code = cli.run("command", main, [str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_three_commands_one_answer(two, capsys):
    """With a model in front and without one; the pictures in another order are another prompt."""
    found = []
    for name, main in MAINS.items():
        model = [] if name == "run-onnx" else [checkpoint.SHIPPED]
        for pictures in (two, two[::-1]):
            code, out, _ = call(main, capsys, *model, *pictures, "detect star ; square", "--json")
            assert code == 0
            found.append(json.loads(out))
    assert [each["tokens"] for each in found[:2]] == [each["tokens"] for each in found[2:4]]
    assert [each["tokens"] for each in found[:2]] == [each["tokens"] for each in found[4:]]
    assert found[0].keys() == {"text", "tokens", "logprobs", "boxes", "masks", "timings"}
    for each, (width, height) in zip(found[:2], [(60, 40), (224, 224)], strict=True):
        expected = detection.parse(each["text"], width, height)
        places = [{key: box[key] for key in box if key not in ("score", "uncertainty")} for box in each["boxes"]]
        assert places == json.loads(json.dumps([box.as_json() for box in expected]))
        assert expected


def test_the_first_picture_is_drawn_on(two, tmp_path, capsys):
    assert call(run_onnx, capsys, *two, "detect star", "--draw", tmp_path / "out.png")[0] == 0
    with Image.open(tmp_path / "out.png") as drawing:
        assert drawing.getpixel((drawing.width - 5, 5)) == (255, 255, 255)  # the example has a coloured ground
        picture = (
            drawing.width * 40 // 60
        )  # pixels of height, where the example, which is square, would have as many as width
        assert picture < drawing.height < drawing.width


def test_what_is_for_one_picture(two, tmp_path, capsys):
    code, out, err = call(numpy_main, capsys, *two, "caption en", "--heatmap", tmp_path / "out.png")
    assert (code, out) == (1, "")
    assert err == "command: error: --heatmap draws over one picture; give one, or leave --heatmap out\n"


def test_a_trace_of_two_pictures(two, capsys):
    code, out, _ = call(numpy_main, capsys, *two, "caption en", "--trace", "--max-new-tokens", "2")
    assert code == 0
    lines = out.splitlines()
    assert sum(line.startswith("name ") for line in lines) == 1
    assert [line for line in lines if line.startswith("# picture")] == ["# picture", "# picture 2"]
    shapes = {line.split()[0]: line[36:63].strip() for line in lines if line and not line.startswith("#")}
    assert shapes["vision.patch_embed"] == shapes["projector"] == "[2*B=2, P=64, D=128]"
    assert shapes["vision.blocks.0.attention.scores"] == "[2*B=2, N=4, P=64, P=64]"
    assert shapes["embed_prefix"] == "[B=1, T=132, D=128]"


SHIPPED = str(checkpoint.SHIPPED)  # a checkpoint is as good as a bundle here: no model is opened


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["caption en", EXAMPLE], "example.png: a picture in the place of the prompt"),
        ([EXAMPLE, EXAMPLE], "example.png: a picture in the place of the prompt"),
        ([SHIPPED, EXAMPLE], "example.png: a picture in the place of the prompt"),
        ([EXAMPLE, SHIPPED], "shipped: a folder of a model in the place of the prompt"),
        ([EXAMPLE, SHIPPED, "caption en"], "shipped: a folder of a model in the place of a picture"),
        ([SHIPPED, "caption en"], "shipped: a folder of a model in the place of a picture"),
        ([EXAMPLE, "caption", "en"], 'IMAGE [IMAGE ...] PROMPT, and a prompt of several words is quoted: "caption en"'),
        ([SHIPPED, EXAMPLE, EXAMPLE, "answer", "en", "how?"], 'several words is quoted: "answer en how?"'),
        (["org/model", EXAMPLE, "x" * 9999, "y"], "x: no such picture"),
    ],
)
@pytest.mark.parametrize("name", MAINS)
def test_what_stands_in_the_wrong_place(name, arguments, words, capsys):
    """One line, before any model is opened."""
    code, out, err = call(MAINS[name], capsys, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert words in line
    assert f"the order is [{'BUNDLE' if name == 'run-onnx' else 'CHECKPOINT'}] IMAGE" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([EXAMPLE, "b"], (None, [EXAMPLE], ["b"])),
        ([EXAMPLE, EXAMPLE, "b"], (None, [EXAMPLE, EXAMPLE], ["b"])),
        ([SHIPPED, EXAMPLE, "b"], (SHIPPED, [EXAMPLE], ["b"])),
        (["a.npz", EXAMPLE, EXAMPLE, "b"], ("a.npz", [EXAMPLE, EXAMPLE], ["b"])),
        (["org/model-3b@main", EXAMPLE, "b"], ("org/model-3b@main", [EXAMPLE], ["b"])),
        (["absent", EXAMPLE, "b"], ("absent", [EXAMPLE], ["b"])),
        (["absent.JPG", EXAMPLE, "b"], (None, ["absent.JPG", EXAMPLE], ["b"])),
        ([__file__, EXAMPLE, "b"], (None, [__file__, EXAMPLE], ["b"])),
        ([EXAMPLE, "b c", "d e"], (None, [EXAMPLE], ["b c", "d e"])),
        ([EXAMPLE, EXAMPLE, "b", "c d", "e"], (None, [EXAMPLE, EXAMPLE], ["b", "c d", "e"])),
        ([SHIPPED, EXAMPLE, "b c", "d"], (SHIPPED, [EXAMPLE], ["b c", "d"])),
        ([EXAMPLE, "absent.png", "b c", "d e"], (None, [EXAMPLE, "absent.png"], ["b c", "d e"])),
        ([EXAMPLE, "b c", EXAMPLE, "d e"], (None, [EXAMPLE, "b c", EXAMPLE], ["d e"])),
        ([EXAMPLE, "b c", "like this.png"], (None, [EXAMPLE], ["b c", "like this.png"])),
    ],
)
def test_which_argument_is_which(arguments, expected):
    assert inputs.split(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([EXAMPLE], (None, [EXAMPLE], [])),
        ([SHIPPED, EXAMPLE], (SHIPPED, [EXAMPLE], [])),
        ([EXAMPLE, EXAMPLE], (None, [EXAMPLE, EXAMPLE], [])),
        ([EXAMPLE, "b c"], (None, [EXAMPLE], ["b c"])),
        (["absent", EXAMPLE, "b"], ("absent", [EXAMPLE], ["b"])),
    ],
)
def test_which_argument_is_which_beside_a_file_of_prompts(arguments, expected):
    assert inputs.split(arguments, and_more=True) == expected
    assert inputs.mistake(*expected, "BUNDLE") == ""
