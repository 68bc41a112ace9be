"""Bundles in the oldest runtimes that have their operators, and in the newest; and bundles from before in this one.

The runtimes come from the package index. Where pip cannot have one, its test is skipped and says why;
where REQUIRE_HOSTS is set, as in CI, that is a failure, unless there is no such wheel for this Python.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import bundle
from export.model.layers import FUSED, PORTABLE
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.generate import generate, pad_prompts
from numpy_ref.image import preprocess
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer, known_ids

from .fuzz import corpus
from .models import random_params, with_heads

SUITE = suite_of()  # what the shipped model is measured on
TESTS = Path(__file__).parent
STEPS = 12
NEWEST = ""
#: A version -> what it is the oldest for, as export/README.md says: models, and precisions (fused) or portable operators.
OLDEST = {
    "1.20.1": [("shipped", "float32")],
    "1.23.0": [("shipped", "int8"), ("shipped", "int4")],
    "1.24.4": [("windows", "float32"), ("windows", "int8"), ("windows", "int4")],
    "1.25.1": [("shipped", PORTABLE), ("windows", PORTABLE)],
}
RUNTIMES = {**OLDEST, NEWEST: [each for found in OLDEST.values() for each in found]}
LAST_PYTHON = {"1.20.1": (3, 13), "1.23.0": (3, 13), "1.24.4": (3, 14), "1.25.1": (3, 14)}  # with a wheel of it


def install(version, target):
    """A version of ONNX Runtime, in a folder."""
    if sys.version_info[:2] > LAST_PYTHON.get(version, (99,)):
        pytest.skip(f"onnxruntime {version} has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]}")
    wanted = f"onnxruntime=={version}" if version else "onnxruntime"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--target"]
    result = subprocess.run([*command, str(target), wanted], capture_output=True, text=True)
    if result.returncode:
        reason = f"pip cannot install {wanted}: {(result.stderr.strip().splitlines() or ['it said nothing'])[-1]}"
        (pytest.fail if os.environ.get("REQUIRE_HOSTS") else pytest.skip)(reason)
    return target


def tiny():
    """Windows, soft caps, and heads that GroupQueryAttention takes."""
    config = with_heads("paligemma2")
    return Checkpoint(Path("."), config, random_params(config, 5), np.dtype("f8"))


def questions(loaded):
    """Pictures and padded prompts: of the shipped model scenes, of another noise and random ids."""
    if loaded.folder == checkpoint.SHIPPED:
        tokenizer = Tokenizer.load(loaded.folder, loaded.config)
        asked = [question for task in ("caption", "detect", "answer") for question in SUITE.held_out(7, 2, task)]
        size = loaded.config.vision.image_size
        pixel_values = np.concatenate([preprocess(evaluate.picture(question), size) for question in asked])
        return pixel_values, [tokenizer.prompt(question.prefix) for question in asked]
    config, rng = loaded.config, np.random.default_rng(2)
    size = config.vision.image_size
    image = [config.image_token] * config.vision.patches
    rows = [[*image, config.bos, *rng.integers(3, config.text.vocab - 2, count).tolist()] for count in (3, 9, 5)]
    return rng.uniform(-1, 1, (len(rows), 3, size, size)).astype(np.float32), rows


MODELS = {"shipped": checkpoint.load, "windows": tiny}


@pytest.mark.parametrize("version", RUNTIMES, ids=lambda version: version or "newest")
def test_the_same_tokens(version, tmp_path):
    runtime = install(version, tmp_path / "runtime")
    for model, kind in RUNTIMES[version]:
        loaded, folder = MODELS[model](), tmp_path / f"{model}-{kind}"
        precision, operators = ("float32", PORTABLE) if kind == PORTABLE else (kind, FUSED)
        bundle.write(loaded, folder, precision, operators=operators)
        expected, cases = answers(Session(bundle.load(folder), "cpu", threads=1), loaded)
        np.savez(tmp_path / "cases.npz", **cases)
        result = run(runtime, folder, tmp_path / "cases.npz")
        assert result.returncode == 0, result.stderr[-2000:]
        found = json.loads(result.stdout)
        assert version in (NEWEST, found["version"])
        assert [cut(answer, loaded.config.ends) for answer in found["answers"]] == expected, (model, kind)
    if version == "1.23.0":  # it counts one key too many in windows, so it must not open graphs that have them
        bundle.write(tiny(), tmp_path / "windows")
        result = run(runtime, tmp_path / "windows", tmp_path / "cases.npz")
        assert result.returncode
        assert "Opset 24 is under development" in result.stderr


def answers(session, loaded):
    """Python's greedy answers to questions, and what another runtime is to be asked."""
    pixel_values, rows = questions(loaded)
    has_tokenizer = bundle.TOKENIZER_FILES[0] in session.bundle.description.files
    known = Tokenizer.load(loaded.folder, loaded.config).known() if has_tokenizer else known_ids(loaded.config)
    found = [
        cut([int(token[0]) for token in generate(session, pixels[None], [row], known, STEPS)], loaded.config.ends)
        for pixels, row in zip(pixel_values, rows, strict=True)
    ]
    input_ids, lengths = pad_prompts(rows, loaded.config.pad)
    return found, {"pixel_values": pixel_values, "input_ids": input_ids, "lengths": lengths, "steps": STEPS}


def cut(tokens, ends):
    """Tokens up to the first that ends an answer."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def run(runtime, folder, cases):
    """Answer in the runtime that lies in a folder."""
    command = [sys.executable, TESTS / "any_runtime.py", runtime, folder, cases]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def small(**changes):
    """Without windows, unless `changes` has some."""
    config = with_heads("paligemma1", **changes)
    return Checkpoint(Path("."), config, random_params(config, 5), np.dtype("f8"))


@pytest.mark.parametrize(("precision", "operators", "opset", "version"), [
    ("float32", FUSED, 20, 9), ("int8", FUSED, 20, 9), ("int4", FUSED, 20, 9), ("float32", PORTABLE, 24, 11),
    ("float16", FUSED, 23, 11), ("float16", PORTABLE, 24, 11),
])  # fmt: skip
def test_a_bundle_says_its_opset(precision, operators, opset, version, tmp_path):
    bundle.write(small(), tmp_path / "out", precision, operators=operators)
    description = bundle.load(tmp_path / "out").description
    assert description.opset == opset
    found = {name: onnx.load(tmp_path / "out" / graph.file, load_external_data=False)
             for name, graph in description.graphs.items()}  # fmt: skip
    opsets = {name: {entry.domain: entry.version for entry in model.opset_import}[""] for name, model in found.items()}
    assert {opsets.pop(name) for name in ("prefill", "decode", "vision", "prefill_text")} == {opset}
    assert opsets.pop("extend") == 24  # whose attention is portable
    assert set(opsets.values()) == {20}
    assert {found[name].ir_version for name in ("prefill", "decode")} == {version}


def test_windows_decide_the_opset():
    """Those that are shorter than what the model takes."""
    length = with_heads("paligemma1").max_length
    for windows, opset in [((length - 1,) * 3, 24), ((None, None, 3), 24), ((length,) * 3, 20), ((), 20)]:
        assert bundle.prepare(small(windows=windows)).description.opset == opset


def test_a_bundle_from_before_still_runs(tmp_path):
    """Fused graphs as they were written in opset 24, over the weights of today."""
    loaded = tiny()
    bundle.write(loaded, tmp_path / "out")
    now = Session(bundle.load(tmp_path / "out"), "cpu", threads=1)
    older = shutil.copytree(tmp_path / "out", tmp_path / "older")
    for name in ("prefill", "decode"):
        corpus.sealed(older, f"{name}.onnx", (TESTS / "golden" / "opset24" / f"{name}.onnx").read_bytes())
    before = Session(bundle.load(older), "cpu", threads=1)
    assert (older / "decode.onnx").read_bytes() != (tmp_path / "out" / "decode.onnx").read_bytes()
    pixel_values, rows = questions(loaded)
    known = known_ids(loaded.config)
    found = [np.stack(list(generate(each, pixel_values, rows, known, STEPS))) for each in (before, now)]
    assert np.array_equal(*found)
    assert len(np.unique(found[0])) > 5
