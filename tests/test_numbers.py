"""What is not a number: named where it is read, found where it arises, and never answered from."""

from dataclasses import replace

import numpy as np
import pytest

from export import bundle, verify
from export.bundle import weights
from export.session import Session
from numpy_ref import checkpoint, cli
from numpy_ref.checkpoint import Checkpoint, blocks, flatten, unflatten
from numpy_ref.checkpoint.npz import write_npz
from numpy_ref.engine import Engine, NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.files import new_file
from numpy_ref.generate import generate
from torch_impl.load import TorchEngine

from .models import CONFIGS, random_batch, random_params

CONFIG = CONFIGS["paligemma1"]
KERNEL = "text.blocks.1.mlp.up.kernel"
DTYPES = [np.dtype("f8"), np.dtype("f4"), np.dtype("f2"), blocks.bfloat16()]


def model(tmp_path, dtype="f4", **changed) -> Checkpoint:
    """A small random model; `changed` maps a path, its dots as underscores of two, to what becomes of the array."""
    flat = flatten(random_params(CONFIG, dtype=np.float32))
    flat |= {path: change(flat[path]) for path, change in changed.items()}
    params = unflatten({path: array.astype(dtype) for path, array in flat.items()})
    return Checkpoint(tmp_path, CONFIG, params, np.dtype(dtype))


def put(value, *place):
    """A change that puts a value at a place."""

    def change(array):
        array = array.copy()
        array[place] = value
        return array

    return change


def ask(engine, steps=3):
    pixels, ids, lengths = random_batch(CONFIG)
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    return list(generate(engine, pixels, prompts, np.ones(CONFIG.text.vocab, bool), steps))


# --- looking at numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_first_that_is_none_is_found(dtype, value):
    import ml_dtypes

    array = np.random.default_rng(0).standard_normal((7, 5)).astype(dtype)
    largest = ml_dtypes.finfo(dtype).max
    array[0, 0], array[0, 1] = largest, -largest
    assert blocks.all_finite(array)
    assert blocks.first_not_finite(array) is None
    blocks.check_finite("x", array)
    array[3, 2] = array[5, 1] = value
    for view, place in ((array, (3, 2)), (array.T, (1, 5)), (array[::3], (1, 2)), (array[3, 2], ())):
        assert not blocks.all_finite(view)
        assert blocks.first_not_finite(view) == place
    with pytest.raises(PaliGemmaError, match=r"tensor x holds -?(nan|inf) at \[3, 2\]"):
        blocks.check_finite("x", array)
    assert blocks.all_finite(array[:0])


def test_blocks_keep_count(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    array = put(np.nan, 31, 6)(np.zeros((37, 11), np.float32))
    assert blocks.first_not_finite(array) == (31, 6)
    assert blocks.first_not_finite(array.T) == (6, 31)


# --- in a weight -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("precision", weights.PRECISIONS)
@pytest.mark.parametrize("path", [KERNEL, "text.embedding", "vision.norm.scale"])
def test_an_export_names_the_weight(tmp_path, precision, path, value):
    place = (3,) if path.endswith("scale") else (3, 5)
    broken = model(tmp_path, **{path: put(value, *place)})
    with pytest.raises(PaliGemmaError) as error:
        bundle.write(broken, tmp_path / "out", precision)
    assert f"tensor {path} holds {value} at {list(place)}" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", [NumpyEngine, TorchEngine])
def test_an_engine_names_the_weight(tmp_path, engine):
    with pytest.raises(PaliGemmaError, match=r"tensor text\.blocks\.1\.mlp\.up\.kernel holds nan at \[3, 5\]"):
        engine(model(tmp_path, **{KERNEL: put(np.nan, 3, 5)}))


def test_a_conversion_names_the_tensor(tmp_path):
    """By the name that it has in the new file; both kinds of file."""
    broken = model(tmp_path, **{KERNEL: put(np.inf, 3, 5)})
    with pytest.raises(PaliGemmaError, match=r"tensor \S+layers\.1\.mlp\.up_proj\.weight holds inf at \[5, 3\]"):
        checkpoint.save(tmp_path / "out", CONFIG, broken.params)
    assert not list(tmp_path.iterdir())
    whole = np.zeros((7, 11), np.float32)
    with (
        pytest.raises(PaliGemmaError, match=r"tensor stacked holds inf at \[3, 5\]"),
        new_file(tmp_path / "out.npz") as file,
    ):
        write_npz(file, {"stacked": [whole, put(np.inf, 3, 5)(whole)]})
    assert not list(tmp_path.iterdir())


def test_a_weight_that_float16_cannot_hold(tmp_path):
    large = model(tmp_path, **{KERNEL: put(7e4, 3, 5)})
    with pytest.raises(PaliGemmaError, match=r"kernel holds 70000.0 at \[3, 5\], beyond the range of float16"):
        bundle.write(large, tmp_path / "out", "float16")
    bundle.write(large, tmp_path / "out", "bfloat16")


# --- on the way --------------------------------------------------------------------------------------------


def overflowing(tmp_path, factor):
    """A model whose second decoder layer multiplies gate and up beyond a dtype's range."""
    layer = KERNEL.removesuffix("up.kernel")
    return model(
        tmp_path, **{KERNEL: lambda kernel: kernel * factor, f"{layer}gate.kernel": lambda kernel: kernel * factor}
    )


@pytest.mark.parametrize("engine", [NumpyEngine, TorchEngine])
def test_generation_stops_and_names_the_first_value(tmp_path, engine):
    """Two factors of 1e25 are beyond float32."""
    assert len(ask(engine(overflowing(tmp_path, 1)))) == 3
    with pytest.raises(PaliGemmaError) as error:
        ask(engine(overflowing(tmp_path, np.float32(1e25))))
    line = (
        "the logits for token 1 of the answer are not finite numbers; the first value that is not is text.blocks.1.mlp"
    )
    assert str(error.value) == line


@pytest.mark.parametrize("engine", [NumpyEngine, TorchEngine])
def test_generation_stops_at_the_step(tmp_path, engine):
    """The rows of all tokens but those of the prompt overflow: the first answer that is fed back shows it."""
    prompts = set(random_batch(CONFIG)[1].ravel().tolist())
    first = ask(engine(model(tmp_path)), 1)[0]
    fresh = [int(token) for token in first if token not in prompts]
    assert fresh
    loud = model(tmp_path, **{"text.embedding": put(1e38, fresh[0])})
    loud = replace(loud, config=replace(CONFIG, text=replace(CONFIG.text, tied=False)))
    loud.params["text"]["head"] = {"kernel": model(tmp_path).params["text"]["embedding"].T.copy()}
    with pytest.raises(PaliGemmaError, match=r"token 2 of the answer .* is embed$"):
        ask(engine(loud))


def test_rows_that_have_ended_may_say_anything(tmp_path):
    """What a row computes after its end is nobody's answer."""

    class Ended(Engine):
        def prefill(self, pixel_values, input_ids, lengths, capacity):
            return np.eye(2, CONFIG.text.vocab, 1, dtype=np.float32), None

        def decode(self, input_ids, lengths, cache):
            logits = np.eye(2, CONFIG.text.vocab, 1, dtype=np.float32)
            logits[0] = np.nan
            return logits, None

        def reorder(self, cache, rows):
            raise NotImplementedError

    assert len(ask_rows(Ended(replace(CONFIG, eos=1)), 2)) == 3
    with pytest.raises(PaliGemmaError, match=r"token 2 .* export-onnx --verify"):
        ask_rows(Ended(replace(CONFIG, eos=9)), 2)


def ask_rows(engine, rows):
    pixel_values = np.zeros((rows, 3, *[CONFIG.vision.image_size] * 2), np.float32)
    return list(generate(engine, pixel_values, [[5]] * rows, np.ones(CONFIG.text.vocab, bool), 3))


def test_a_float16_bundle_that_overflows(tmp_path):
    """Verification names the product; a bundle with the range for it is written.

    Only part by part: on the CPU the runtime keeps such a product in float32, and a GPU would not.
    """
    loud = overflowing(tmp_path, np.float32(400))
    assert len(ask(NumpyEngine(loud))) == 3
    with pytest.raises(PaliGemmaError) as error:
        bundle.write(loud, tmp_path / "out", "float16", verify=verify.verify)
    assert "prefill text.blocks.1 mlp is not finite where the reference reaches" in str(error.value)
    assert "text.blocks.0" not in str(error.value)
    assert "float16 ends at 65504" in str(error.value)
    assert not list(tmp_path.iterdir())
    bundle.write(loud, tmp_path / "whole", verify=verify.verify)


def test_generation_from_a_bundle_stops(tmp_path):
    bundle.write(overflowing(tmp_path, np.float32(1e25)), tmp_path / "out")
    with pytest.raises(PaliGemmaError, match="token 1 of the answer are not finite numbers; export-onnx --verify"):
        ask(Session(bundle.load(tmp_path / "out"), "cpu"))


def test_one_line_from_the_command(tmp_path, capsys):
    """And no warnings of NumPy's beside it."""
    from numpy_ref.__main__ import main

    loaded = checkpoint.load()
    flat = flatten(loaded.params)
    kernel = "text.blocks.1.mlp.up.kernel"
    for path in (kernel, kernel.replace("up", "gate")):
        flat[path] = flat[path].astype(np.float32) * np.float32(1e25)
    checkpoint.save(
        tmp_path / "loud", loaded.config, unflatten({k: v.astype(np.float32) for k, v in flat.items()}),
        checkpoint.companions(loaded),
    )  # fmt: skip
    arguments = [str(tmp_path / "loud"), str(checkpoint.SHIPPED / "example.png"), "caption en"]
    assert cli.run("program", main, arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "program: error: the logits for token 1 of the answer are not finite numbers; "
        "the first value that is not is text.blocks.1.mlp"
    ]
