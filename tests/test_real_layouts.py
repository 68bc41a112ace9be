"""The layouts that users hold, as transformers writes them: sharded, bfloat16 or float32, tied or not, two resolutions."""

import itertools

import numpy as np
import pytest
import torch

from export import bundle
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.config import VARIANTS
from numpy_ref.engine import NumpyEngine
from numpy_ref.generate import generate, pad_prompts
from torch_impl.load import TorchEngine

from . import make_goldens

LAYOUTS = list(
    itertools.product(["gemma", "gemma2"], [torch.bfloat16, torch.float32], [True, False], [21, 35])
)  # fmt: skip
NEW_TOKENS = 32


def name(layout):
    kind, dtype, tied, size = layout
    return f"{kind}-{str(dtype).split('.')[1]}-{'tied' if tied else 'untied'}-{size}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_logits_and_tokens(layout, tmp_path):
    """Logits within 1e-4 of the largest of transformers' own in float32, and 32 greedy tokens the same.

    Gemma 2 has a window of 5, shorter than every prompt, and a final softcap with the tied head only.
    """
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    kind, dtype, tied, size = layout
    text = {} if kind == "gemma" or tied else {"final_logit_softcapping": None}
    built = make_goldens.build(kind, image_size=size, tie_word_embeddings=tied, text=text).to(dtype)
    built.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    pixel_values = make_goldens.pixels(model.config, 2)
    rows = [make_goldens.row_ids(model.config, prefix) for prefix in make_goldens.PREFIXES]
    expected = [make_goldens.answer(model, *pair, NEW_TOKENS) for pair in zip(pixel_values, rows, strict=True)]
    reference = np.stack([logits for logits, _ in expected])
    tokens = [tokens for _, tokens in expected]

    loaded = checkpoint.load(tmp_path / "hf")
    assert loaded.dtype.name == str(dtype).split(".")[1]
    bundle.write(loaded, tmp_path / "bundle")
    known = np.ones(loaded.config.text.vocab, bool)
    for engine in (NumpyEngine(loaded), TorchEngine(loaded), Session(bundle.load(tmp_path / "bundle"), "cpu")):
        logits, _ = engine.prefill(pixel_values, *pad_prompts(rows, 0), 70)
        assert np.abs(logits - reference).max() <= 1e-4 * np.abs(reference).max(), engine.name
        ours = np.stack(list(generate(engine, pixel_values, rows, known, NEW_TOKENS)), 1)
        assert ours.tolist() == tokens, engine.name


@pytest.mark.parametrize("rows", [257152, 257216])
def test_rows_past_the_tokenizer_are_never_drawn(rows):
    """Google's table ends with the last segmentation token; transformers pads it with an image token and noise."""
    from dataclasses import replace

    from numpy_ref.model.sampling import sample
    from numpy_ref.tokenizer import known_ids

    config = VARIANTS["paligemma-3b-224"]
    config = replace(config, text=replace(config.text, vocab=rows))
    known = known_ids(config, 257152)
    assert known.sum() == 257152
    logits = np.zeros((1, rows), np.float32)
    logits[0, 257000:] = np.arange(rows - 257000)
    assert sample(logits, known).tolist() == [257151]
    assert np.array_equal(known, known_ids(config))  # and the same where no tokenizer is at hand
