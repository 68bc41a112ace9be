"""Against transformers: recorded answers that are committed, and live where it is installed."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from export import bundle
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.engine import NumpyEngine
from numpy_ref.generate import generate, pad_prompts
from torch_impl.load import TorchEngine

from . import make_goldens
from .make_goldens import GOLDEN, NEW_TOKENS, PREFIXES

NAMES = ["paligemma1", "paligemma2"]
LIVE_BUDGET = 1e-4  # of the largest logit, the contract's; measured 1.5e-6
BUDGET = 1e-5  # the recorded answers are held closer, so that mutants as subtle as another GELU show


def open_engine(kind, loaded, folder):
    """An engine over a loaded checkpoint; "onnx" exports it first."""
    if kind == "onnx":
        if not folder.exists():
            bundle.write(loaded, folder)
        return Session(bundle.load(folder), "cpu")
    return {"numpy": NumpyEngine, "torch": TorchEngine}[kind](loaded)


ENGINES = ["numpy", "torch", "onnx"]


def prompts(config):
    image = [config.image_token] * config.vision.patches
    return [[*image, *prefix] for prefix in PREFIXES]


def greedy(engine, pixel_values, rows, steps):
    """Greedy tokens [B, steps] over the whole vocabulary, as transformers chooses them."""
    known = np.ones(engine.config.text.vocab, bool)
    return np.stack(list(generate(engine, pixel_values, rows, known, steps)), 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_recorded(name, kind, tmp_path):
    loaded, golden = checkpoint.load(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    engine = open_engine(kind, loaded, tmp_path / "bundle")
    rows = prompts(loaded.config)
    logits, _ = engine.prefill(golden["pixel_values"], *pad_prompts(rows, 0), 40)
    assert np.abs(logits - golden["logits"]).max() <= BUDGET * np.abs(golden["logits"]).max()
    assert greedy(engine, golden["pixel_values"], rows, NEW_TOKENS).tolist() == golden["tokens"].tolist()
    assert len(np.unique(golden["tokens"])) > 5  # an answer that says something


# What transformers is asked to build: the table of the real vocabulary, tied and untied, two resolutions.
LIVE = {
    "gemma, vocabulary 257216": {"kind": "gemma", "vocab": 257216},
    "gemma, untied": {"kind": "gemma", "tie_word_embeddings": False, "image_size": 35},
    "gemma, a pooling head that nobody calls": {"kind": "gemma", "pooling": True},
    "gemma2, vocabulary 257216": {"kind": "gemma2", "vocab": 257216},
    "gemma2, untied": {"kind": "gemma2", "tie_word_embeddings": False, "image_size": 35},
    "gemma, a final cap": {"kind": "gemma", "text": {"final_logit_softcapping": 0.5}},
    "gemma2, no caps": {"kind": "gemma2", "text": {"final_logit_softcapping": None, "attn_logit_softcapping": None}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIVE)
def test_live(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    make_goldens.build(**LIVE[name]).save_pretrained(tmp_path / "hf")
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    pixel_values = make_goldens.pixels(model.config, 3)
    prefixes = [*PREFIXES, [2, 53, 59, 61, 67, 71, 108]]
    rows = [make_goldens.row_ids(model.config, prefix) for prefix in prefixes]
    expected = [make_goldens.answer(model, *pair, 16) for pair in zip(pixel_values, rows, strict=True)]
    assert len({token for _, tokens in expected for token in tokens}) > 5  # answers that say something
    loaded = checkpoint.load(tmp_path / "hf")
    for kind in ENGINES:
        engine = open_engine(kind, loaded, tmp_path / "bundle")
        for batch in [slice(0, 1), slice(0, 3)]:  # one row, and three of unequal length
            logits, _ = engine.prefill(pixel_values[batch], *pad_prompts(rows[batch], 0), 60)
            reference = np.stack([logits for logits, _ in expected[batch]])
            assert np.abs(logits - reference).max() <= LIVE_BUDGET * np.abs(reference).max(), kind
            tokens = greedy(engine, pixel_values[batch], rows[batch], 16)
            assert tokens.tolist() == [tokens for _, tokens in expected[batch]], kind
