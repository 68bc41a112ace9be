"""Four-bit weights chosen by rows: the arithmetic, the walk through the layers, and bundles made so."""

import json
import tracemalloc
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from export import bundle, calibration, drift
from export.bundle import weights
from export.calibration import gptq, rows, walk
from export.calibration.rows import Example
from export.calibration.states import EXACT, ROUNDED
from export.cli import export_onnx
from export.model import quantized
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.answer import Answer
from numpy_ref.checkpoint import SHIPPED, Checkpoint
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import pad_prompts
from numpy_ref.model import paligemma
from numpy_ref.things import rows as drawn
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer

from .models import CONFIGS, random_params


def correlated(size, count, seed=0):
    """Inputs [count, size] that go together, some of them large."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, size)) @ rng.standard_normal((size, size)) * rng.lognormal(size=size)).astype(
        np.float32
    )


def errors(rows, found, hessian):
    """(w - w') H (w - w')ᵀ of each row."""
    off = (rows - found).astype(np.float64)
    return np.einsum("oi,ij,oj->o", off, hessian, off)


# --- the arithmetic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("panel", [3, 7, 23, 100])
def test_the_factor_is_one(monkeypatch, panel):
    monkeypatch.setattr(gptq, "PANEL", panel)
    x = correlated(23, 60).astype(np.float64)
    matrix = x.T @ x
    factor, diagonal = gptq.unit_factor(matrix.copy())
    factor = np.triu(factor)
    assert np.allclose(np.diag(factor), 1)
    assert np.allclose(factor * diagonal @ factor.T, matrix)


@pytest.mark.parametrize("panel", [5, 100])
def test_least_squares(monkeypatch, panel):
    monkeypatch.setattr(gptq, "PANEL", panel)
    x, kernel = correlated(32, 90).astype(np.float64), np.random.default_rng(1).standard_normal((32, 3))
    found = gptq.Rounder(x.T @ x, 0.0).solve(x.T @ (x @ kernel))
    assert np.allclose(found, kernel, atol=1e-6)


def by_the_paper(kernel, steps, hessian, bits):
    """Optimal brain quantization in a fixed order: what is left of the inverse makes up for each error."""
    kernel, inverse, q = kernel.astype(np.float64), np.linalg.inv(hessian), np.zeros(kernel.shape, np.int8)
    for k in range(len(kernel)):
        q[k] = np.clip(np.rint(kernel[k] / steps[k]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        off = (kernel[k] - q[k] * steps[k]) / inverse[k, k]
        kernel[k + 1 :] -= np.outer(inverse[k + 1 :, k], off)
        inverse = inverse - np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return q


@pytest.mark.parametrize("panel", [4, 100])
@pytest.mark.parametrize("seed", range(5))
def test_errors_are_made_up_for_as_in_the_paper(monkeypatch, panel, seed):
    monkeypatch.setattr(gptq, "PANEL", panel)
    rng, x = np.random.default_rng(seed), correlated(13, 40, seed).astype(np.float64)
    kernel, steps, hessian = rng.standard_normal((13, 9)), rng.uniform(0.2, 0.4, (13, 9)), x.T @ x
    factor, _ = gptq.unit_factor(hessian.copy())
    found = gptq.round_in_turn(kernel.astype(np.float32), steps.astype(np.float32), factor.astype(np.float32), 4)
    assert (found == by_the_paper(kernel, steps, hessian, 4)).mean() > 0.99  # but for ties in float32
    assert len(np.unique(found)) > 5


def test_between_the_best_and_the_nearest():
    """Of all roundings of a tiny kernel: never better than the best, together better than each weight by itself."""
    rng, x = np.random.default_rng(0), correlated(4, 20).astype(np.float64)
    kernel, step, hessian = rng.standard_normal((4, 30)), 0.35, x.T @ x
    factor, _ = gptq.unit_factor(hessian.copy())
    steps = np.full(kernel.shape, step, np.float32)
    found = gptq.round_in_turn(kernel.astype(np.float32), steps, factor.astype(np.float32), 3)
    nearest = np.clip(np.rint(kernel / step), -4, 3)
    every = np.array(list(product(range(-4, 4), repeat=4)))
    best = np.array([errors(column, every * step, hessian).min() for column in kernel.T])
    ours, plain = (errors(kernel.T, q.T * step, hessian) for q in (found, nearest))
    assert (ours >= best * 0.9999).all()
    assert best.sum() <= ours.sum() < 0.7 * plain.sum()


@pytest.mark.parametrize("size", [48, 256])
def test_kernels_lose_less_than_by_themselves(size):
    """Whatever the order in which inputs are taken, weights and scales are where the kernels look for them."""
    x, weight = correlated(size, 300), np.random.default_rng(2).standard_normal((40, size)).astype(np.float32)
    hessian = (x.T @ x).astype(np.float64)
    values, scales = gptq.Rounder(x.T @ x, 0.01).quantize(weight, 4)
    plain = quantized.quantize_blocks(weight, 4)
    assert (values.shape, values.dtype, scales.shape, scales.dtype) == (
        plain[0].shape, np.uint8, plain[1].shape, np.float32,
    )  # fmt: skip
    ours, theirs = (
        errors(weight, quantized.dequantize_blocks(*each, 4), hessian) for each in ((values, scales), plain)
    )
    assert ours.sum() < 0.4 * theirs.sum()
    assert (ours < theirs).mean() > 0.9


def test_rows_are_rounded_alike_in_pieces(monkeypatch):
    x, weight = correlated(32, 90), np.random.default_rng(3).standard_normal((17, 32)).astype(np.float32)
    whole = gptq.Rounder(x.T @ x, 0.01).quantize(weight, 4, np.float16)
    monkeypatch.setattr(gptq, "STEP", 100)
    pieces = gptq.Rounder(x.T @ x, 0.01).quantize(weight, 4, np.float16)
    assert whole[1].dtype == np.float16
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_inputs_that_never_come_do_no_harm():
    weight = np.random.default_rng(4).standard_normal((5, 32)).astype(np.float32)
    weight[1] = 0
    values, scales = gptq.Rounder(np.zeros((32, 32), np.float32), 0.01).quantize(weight, 4)
    assert np.isfinite(scales).all()
    found = quantized.dequantize_blocks(values, scales, 4)
    assert not found[1].any()
    assert np.abs(found - weight).max() < 0.5


def test_few_tokens_are_trusted_less():
    assert walk.damping(100, 10**6) == walk.DAMPING
    assert walk.damping(100, 10) == 10 * walk.damping(100, 100) > walk.DAMPING


# --- the walk ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked(Example):
    """An example of pixels that are there already."""

    pixels: np.ndarray | None = None

    def pixel_values(self, size, resize):
        return self.pixels


def asked(config, count=5, pictures=1):
    rng, patches, size = np.random.default_rng(5), config.vision.patches, config.vision.image_size
    row = SimpleNamespace(count=pictures)
    return [
        Asked(
            row,
            [*[config.image_token] * (pictures * patches), *rng.integers(3, 50, 2 + i % 3).tolist()],
            rng.integers(3, 50, (i * 2) % 5).tolist(),
            rng.uniform(-1, 1, (pictures, 3, size, size)).astype(np.float32),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("precision", ["int4", "int4-float16"])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_walk_is_the_model(name, pictures, precision, tmp_path, monkeypatch):
    """Where no weight is rounded, as none of these sizes can be, both states are those of the reference."""
    monkeypatch.setattr(rows, "AT_ONCE", 60)
    config = CONFIGS[name]
    model = Checkpoint(tmp_path, config, random_params(config, dtype=np.float32), np.dtype(np.float32))
    examples = asked(config, pictures=pictures)
    with walk.Walk(model, precision, tmp_path) as work:
        assert not work.forms
        work.read(examples)
        assert len(work.batches) > 1
        for layer in range(config.text.depth):
            work.pass_layer(layer)
        work.round_head()
        for layer in range(config.text.depth):
            work.round_layer(layer)
        assert work.apart == (precision == "int4")
    ids, lengths = pad_prompts([each.prompt + each.answer for each in examples], config.pad)
    prompts = np.array([len(each.prompt) for each in examples])
    pixels = np.concatenate([each.pixels for each in examples])
    expected, _ = paligemma.hidden_states(model.params, config, pixels, ids, lengths, prompts)
    scale, row = model.params["text"]["norm"]["scale"], 0
    for batch in work.batches:
        states = [walk.rms_norm(batch.get(state), scale, config.text.eps) for state in (EXACT, ROUNDED)]
        for i in range(len(batch.prompts)):
            first = prompts[row] if work.apart else 0
            wanted = expected[row, first : lengths[row]]
            for state in states:
                assert np.abs(state[i, : len(wanted)] - wanted).max(initial=0) < 1e-4
            row += 1
    assert row == len(examples)


def test_doubt_is_what_the_distributions_say(monkeypatch):
    rng = np.random.default_rng(6)
    x, table = rng.standard_normal((7, 5)).astype(np.float32), rng.standard_normal((23, 5)).astype(np.float32)
    monkeypatch.setattr(walk, "LOGITS", 30)
    found = walk._doubt(x, table, 2.0)
    logits = 2 * np.tanh(x @ table.T / 2)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.allclose(found, 1 - np.square(p).sum(-1), atol=1e-5)


def test_memory_does_not_grow_with_rows(tmp_path, monkeypatch):
    """What is kept of rows lies in files."""
    monkeypatch.setattr(rows, "AT_ONCE", 300)
    monkeypatch.setattr(walk, "LOGITS", 2**16)
    model, peaks = checkpoint.load(), []
    rng, config = np.random.default_rng(7), model.config
    size = config.vision.image_size
    for count in (6, 30):
        examples = [
            Asked(
                SimpleNamespace(count=1), [*[config.image_token] * config.vision.patches, 2, 30, 31, 32],
                rng.integers(3, 900, 12).tolist(), np.zeros((1, 3, size, size), np.float32),
            )
            for _ in range(count)
        ]  # fmt: skip
        folder = tmp_path / str(count)
        folder.mkdir()
        tracemalloc.start()
        calibration.calibrate(model, examples, "int4", folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


# --- bundles -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "drawn"
    assert drawn.main(["--output", str(folder), "--rows", "100"]) == 0
    return folder / "rows.jsonl"


@pytest.fixture(scope="module", params=["int4", "int2", "int4-float16"])
def calibrated(request, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / request.param
    command = ["--output", str(path), "--precision", request.param, "--calibrate", str(data), "--verify"]
    assert export_onnx(command) == 0
    return bundle.load(path)


def test_held_out_answers_drift_half_as_far_at_most(calibrated, tmp_path):
    precision, loaded = calibrated.description.precision, checkpoint.load()
    bundle.write(loaded, tmp_path / "plain", precision)
    tokenizer, reference = Tokenizer.load(SHIPPED, loaded.config), Session(bundle.shipped(), "cpu")
    plain, ours = (
        drift.on_scenes(reference, Session(each, "cpu"), tokenizer, scenes=15, seed=5, suite=suite_of())
        for each in (bundle.load(tmp_path / "plain"), calibrated)
    )
    assert ours["kl_mean"] <= plain["kl_mean"] / 2
    assert ours["tokens"] > 600


def test_it_says_so(calibrated, data, tmp_path):
    """A count and a hash of what it saw, no path; another order or answer is another hash."""
    file = calibrated.path / "bundle.json"
    contents = json.loads(file.read_text())
    assert contents["calibration"].keys() == {"rows", "sha256"}
    assert contents["calibration"]["rows"] == calibrated.description.calibration.rows == 100
    assert str(data.parent) not in file.read_text()
    assert {each.name for each in calibrated.path.iterdir()} == {*contents["files"], "bundle.json"}
    plain = bundle.prepare(checkpoint.load(), "int4").description
    assert plain.calibration is None
    assert "calibration" not in plain.to_json()
    for wrong, words in (
        ({"rows": 0}, "calibration.rows"),
        ({"rows": 3}, "calibration.sha256 is missing"),
        (7, "object"),
    ):
        with pytest.raises(PaliGemmaError, match=words):
            bundle.Description.from_json(contents | {"calibration": wrong}, "bundle.json")


def few(data, tmp_path, count=12, **changes):
    """A file of the first rows, the pictures by whole paths, with changes to each."""
    lines = [json.loads(line) for line in data.read_text().splitlines()[:count]]
    file = tmp_path / "few.jsonl"
    changed = [line | {"image": str(data.parent / line["image"])} | changes for line in lines]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in changed))
    return file


def test_the_same_rows_give_the_same_bytes(data, tmp_path):
    """And answers of their own others."""
    found = {}
    for name, changes in (("a", {}), ("b", {}), ("c", {"answer": "red"})):
        file = few(data, tmp_path, **changes)
        assert export_onnx(["--output", str(tmp_path / name), "--precision", "int4", "--calibrate", str(file)]) == 0
        found[name] = bundle.load(tmp_path / name).description
    assert found["a"].files == found["b"].files
    assert found["a"].calibration == found["b"].calibration != found["c"].calibration
    assert found["a"].files[weights.FILE] != found["c"].files[weights.FILE]


def test_prefill_keeps_its_weights(data, tmp_path):
    """In int4 it has weights in eight bits, which calibration leaves alone."""
    loaded, file = checkpoint.load(), few(data, tmp_path)
    bundle.write(loaded, tmp_path / "plain", "int4")
    bundle.write(loaded, tmp_path / "ours", "int4", calibrate=calibration.by_rows(loaded, file, "int4"))
    placed = weights.plan(loaded.config, "int4", "fused")
    plain, ours = ((tmp_path / name / weights.FILE).read_bytes() for name in ("plain", "ours"))
    for stored in placed.values():
        piece = slice(stored.offset, stored.offset + stored.length)
        assert (plain[piece] == ours[piece]) == (".int4" not in stored.name), stored.name


def test_of_many_rows_some_are_taken(data, monkeypatch, capsys):
    monkeypatch.setattr(rows, "MOST", 7)
    found = rows.read(data, checkpoint.load())
    assert [each.row.number for each in found] == [0, 16, 33, 50, 66, 82, 99]
    assert "7 of its 100 rows are used" in capsys.readouterr().err


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_what_was_cut_short(interrupted, data, tmp_path, monkeypatch):
    def stop(*_):
        raise interrupted

    monkeypatch.setattr(walk.Walk, "round_layer", stop)
    file = few(data, tmp_path)
    with pytest.raises(interrupted):
        export_onnx(["--output", str(tmp_path / "out"), "--precision", "int4", "--calibrate", str(file)])
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "row 0 has no prompt"),
        ({"image": "gone.png"}, "gone.png"),
        ({"image": []}, "row 0 has no picture"),
        ({"answer": 7}, "row 0: its answer is 7, not text"),
        ({"answer": "a red star " * 200}, "row 0 has [0-9]+ tokens, and the model room for"),
        ({"suffix": ""}, "every answer is empty"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(changes, words, data, tmp_path):
    file = few(data, tmp_path, **changes)
    with pytest.raises(PaliGemmaError, match=words):
        export_onnx(["--output", str(tmp_path / "out"), "--precision", "int4", "--calibrate", str(file)])
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_two_bits_need_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        export_onnx(["--output", str(tmp_path / "out"), "--precision", "int2"])
    assert ended.value.code == 2
    assert "--precision int2 needs --calibrate ROWS.jsonl, to choose its weights by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_it_is_for_four_bits(precision, data, tmp_path):
    with pytest.raises(
        PaliGemmaError, match=f"--calibrate: it is for weights in four bits or two .*, not for {precision}"
    ):
        export_onnx(["--output", str(tmp_path / "out"), "--precision", precision, "--calibrate", str(data)])
    with pytest.raises(PaliGemmaError, match=r"a folder; FILE\.jsonl or FILE\.parquet with a prompt in each row"):
        export_onnx(["--output", str(tmp_path / "out"), "--precision", "int4", "--calibrate", str(data.parent)])
    assert not list(tmp_path.iterdir())


# --- drift on rows -----------------------------------------------------------------------------------------


def test_drift_on_rows(calibrated, data, tmp_path, capsys):
    file = few(data, tmp_path)
    assert drift.main([str(calibrated.path), "--data", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 12
    assert found["tokens"] > 12
    assert found["boxes"] > 0
    assert 0 <= found["shift_mean"] <= found["shift_max"]
    assert "accuracy" not in found
    assert drift.main([str(calibrated.path), "--data", str(file)]) == 0
    assert f"{found['changed']} of 12 answers changed" in capsys.readouterr().out
    with pytest.raises(PaliGemmaError, match="row 0 has no prompt"):
        drift.main([str(calibrated.path), "--data", str(few(data, tmp_path, prompt=7))])


def test_changes_are_counted():
    def answer(text):
        return Answer(text, [], 1023, 1023)

    star, moved, cross = (
        answer(f"<loc0010><loc0020><loc{y}><loc0200> {label}")
        for y, label in (("0100", "star"), ("0107", "star"), ("0100", "cross"))
    )
    changes = drift.Changes()
    for found in (star, moved, cross, answer("")):
        changes.add(star, found)
    assert changes.figures() == {
        "answers": 4, "changed": 3, "other_boxes": 2, "boxes": 2, "shift_mean": 3.5, "shift_max": 7.0,
    }  # fmt: skip
    none = drift.Changes()
    none.add(answer("two"), replace(answer("two")))
    assert none.figures() == {"answers": 1, "changed": 0, "other_boxes": 0, "boxes": 0}


def test_scenes_are_drawn_alike(tmp_path):
    for name in ("a", "b"):
        drawn.main(["--output", str(tmp_path / name), "--rows", "3", "--seed", "4"])
    a, b = ({file.name: file.read_bytes() for file in Path(tmp_path / name).iterdir()} for name in ("a", "b"))
    assert a == b
    assert len(a) == 4
