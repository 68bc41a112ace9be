"""What must hold of any correct implementation, checked on each engine through prefill and decode alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export import bundle, runtime
from export.session import Session
from export.session import engine as session_engine
from numpy_ref import checkpoint
from numpy_ref.engine import NumpyEngine
from numpy_ref.model import paligemma
from torch_impl.load import TorchEngine, to_tensor

from .models import CONFIGS, random_batch, random_params

CAPACITY, STEPS = 31, 4
# float64 for NumPy and PyTorch; the bundle is float32. Of the largest logit; measured 3e-15 and 1.5e-6.
TOLERANCES = {"numpy": 1e-12, "torch": 1e-12, "onnx": 2e-5}
NAMES = [(name, kind) for name in CONFIGS for kind in TOLERANCES]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Each engine over each small model, made once."""
    made = {}
    for name, config in CONFIGS.items():
        # No tokenizer: every row may be drawn, and none ends an answer.
        config = replace(config, eos=2**30)
        loaded = checkpoint.Checkpoint(tmp_path_factory.mktemp(name), config, random_params(config), np.dtype("f8"))
        folder = tmp_path_factory.mktemp("bundles") / name
        bundle.write(replace(loaded, config=CONFIGS[name]), folder)
        made[name, "numpy"] = NumpyEngine(loaded)
        made[name, "torch"] = TorchEngine(loaded, torch.float64)
        made[name, "onnx"] = Session(bundle.load(folder), "cpu")
    return made


@pytest.fixture(params=NAMES, ids=lambda pair: "-".join(pair))
def engine(request, engines):
    return engines[request.param]


def tolerance(engine):
    return TOLERANCES[engine.name]


def dtype(engine):
    return np.float32 if engine.name == "onnx" else np.float64


def batch(engine, prefix_sizes=(3, 7, 5), seed=1):
    pixel_values, input_ids, lengths = random_batch(engine.config, prefix_sizes, seed)
    return pixel_values.astype(dtype(engine)), input_ids, lengths


def assert_close(engine, a, b):
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance(engine) * np.abs(b).max()


def as_numpy(engine, cache):
    """Any engine's cache as {name: [B, K, C, H]}."""
    if engine.name == "onnx":
        return cache.numpy()
    return {
        f"{i}.{kind}": np.asarray(array)
        for i, layer in enumerate(cache)
        for kind, array in zip(("key", "value"), layer, strict=True)
    }


def replace_cache(engine, cache, function):
    """The cache with every array passed through `function`, in the engine's own form."""
    if engine.name == "onnx":
        for value in cache.buffers.values():
            value.update_inplace(np.ascontiguousarray(function(value.numpy())))
        return cache
    arrays = [tuple(function(np.asarray(array)) for array in layer) for layer in cache]
    if engine.name == "torch":
        return [tuple(to_tensor(array) for array in layer) for layer in arrays]
    return arrays


def decode_all(engine, tokens, lengths, cache):
    """Decode the columns of tokens [B, n] one after another: logits [B, n, V] and the last cache."""
    logits = []
    for step in range(tokens.shape[1]):
        row, cache = engine.decode(tokens[:, step : step + 1], (lengths + step).astype(np.int32), cache)
        logits.append(row.copy())
    return np.stack(logits, 1), cache


def test_prefill_and_decodes_equal_one_forward(engine):
    """Each decoded token gives the logits that one pass over the whole row gives at its place."""
    config = engine.config
    pixel_values, input_ids, lengths = batch(engine)
    suffix = np.random.default_rng(5).integers(3, 50, (3, STEPS))
    first, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    first = first.copy()
    decoded, _ = decode_all(engine, suffix, lengths, cache)

    whole = np.zeros((3, int(lengths.max()) + STEPS), np.int64)
    for row, ids, length, tail in zip(whole, input_ids, lengths, suffix, strict=True):
        row[: length + STEPS] = [*ids[:length], *tail]
    full = paligemma.forward(
        random_params(config), config, pixel_values.astype(np.float64), whole, lengths + STEPS, lengths
    )
    for row, length in enumerate(lengths):
        assert_close(engine, first[row], full[row, length - 1])
        assert_close(engine, decoded[row], full[row, length : length + STEPS])


def test_several_at_once_equal_one_after_another(engine):
    """Logits and cache; and what was written behind the tokens that count is written over."""
    pixel_values, input_ids, lengths = batch(engine)
    suffix = np.random.default_rng(5).integers(3, 50, (3, STEPS))
    _, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    expected, cache = decode_all(engine, suffix, lengths, cache)
    slots = {name: array.copy() for name, array in as_numpy(engine, cache).items()}
    _, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    wrong = np.concatenate([suffix[:, :1], suffix[:, 1:] + 1], axis=1)
    first, cache = engine.extend(wrong, lengths, cache)
    assert_close(engine, first[:, 0], expected[:, 0])
    rest, cache = engine.extend(suffix[:, 1:], (lengths + 1).astype(np.int32), cache)
    assert_close(engine, rest, expected[:, 1:])
    for name, array in as_numpy(engine, cache).items():
        for row, length in enumerate(lengths):
            assert_close(engine, array[row, :, : length + STEPS], slots[name][row, :, : length + STEPS])


def test_the_prefix_is_bidirectional(engine):
    """A late token of the prefix changes what the first picture position holds in the layers above."""
    pixel_values, input_ids, lengths = batch(engine)
    _, before = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    before = as_numpy(engine, before)
    changed = input_ids.copy()
    changed[:, 9 + 2] = (changed[:, 9 + 2] + 1) % 50
    _, after = engine.prefill(pixel_values, changed, lengths, CAPACITY)
    after = as_numpy(engine, after)
    assert np.array_equal(before["0.value"][:, :, 0], after["0.value"][:, :, 0])  # before any attention
    for layer in range(1, engine.config.text.depth):
        assert (np.abs(before[f"{layer}.value"][:, :, 0] - after[f"{layer}.value"][:, :, 0]).max((1, 2)) > 1e-3).all()


def test_the_suffix_is_causal(engine):
    """Decoding writes its own slot and leaves all that is cached as it was."""
    pixel_values, input_ids, lengths = batch(engine)
    _, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    before = {name: array.copy() for name, array in as_numpy(engine, cache).items()}
    _, cache = engine.decode(np.array([[7], [11], [13]]), lengths, cache)
    for name, after in as_numpy(engine, cache).items():
        for row, length in enumerate(lengths):
            assert np.array_equal(after[row, :, :length], before[name][row, :, :length])
            assert not np.array_equal(after[row, :, length], before[name][row, :, length])
            assert np.array_equal(after[row, :, length + 1 :], before[name][row, :, length + 1 :])


def test_a_batch_is_its_rows_alone(engine):
    pixel_values, input_ids, lengths = batch(engine)
    suffix = np.random.default_rng(6).integers(3, 50, (3, STEPS))
    together, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    together = together.copy()
    decoded, _ = decode_all(engine, suffix, lengths, cache)
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        alone, cache = engine.prefill(pixel_values[one], input_ids[one, :length], lengths[one], CAPACITY)
        assert_close(engine, alone.copy(), together[one])
        assert_close(engine, decode_all(engine, suffix[one], lengths[one], cache)[0], decoded[one])


def test_padding_and_stale_slots_change_nothing(engine):
    pixel_values, input_ids, lengths = batch(engine)
    suffix = np.random.default_rng(6).integers(3, 50, (3, STEPS))
    first, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    first = first.copy()
    expected, _ = decode_all(engine, suffix, lengths, cache)

    padded = np.pad(input_ids, ((0, 0), (0, 3)), constant_values=17)
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = 17
    again, cache = engine.prefill(pixel_values, padded, lengths, CAPACITY)
    assert_close(engine, again.copy(), first)

    def spoil(array):
        stale = np.arange(CAPACITY)[None, None, :, None] >= lengths[:, None, None, None]
        return np.where(stale, 1e4, array).astype(array.dtype)

    assert_close(engine, decode_all(engine, suffix, lengths, replace_cache(engine, cache, spoil))[0], expected)


def test_the_capacity_does_not_matter(engine):
    pixel_values, input_ids, lengths = batch(engine)
    suffix = np.random.default_rng(6).integers(3, 50, (3, STEPS))
    results = []
    for capacity in (int(lengths.max()) + STEPS, CAPACITY + 13):
        _, cache = engine.prefill(pixel_values, input_ids, lengths, capacity)
        results.append(decode_all(engine, suffix, lengths, cache)[0])
    assert_close(engine, *results)


def test_decodes_in_one_buffer_equal_concatenation(engine):
    """After k decodes a row's slots are the prefill's followed by one new slot a token, in order."""
    pixel_values, input_ids, lengths = batch(engine)
    suffix = np.random.default_rng(6).integers(3, 50, (3, STEPS))
    _, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    pieces = {
        name: [row[:, :n] for row, n in zip(a, lengths, strict=True)] for name, a in as_numpy(engine, cache).items()
    }
    pieces = {name: [row.copy() for row in rows] for name, rows in pieces.items()}
    for step in range(STEPS):
        _, cache = engine.decode(suffix[:, step : step + 1], (lengths + step).astype(np.int32), cache)
        for name, array in as_numpy(engine, cache).items():
            for row, length in enumerate(lengths):
                new = array[row, :, length + step : length + step + 1]
                pieces[name][row] = np.concatenate([pieces[name][row], new], axis=1)
    for name, array in as_numpy(engine, cache).items():
        for row, length in enumerate(lengths):
            assert np.array_equal(array[row, :, : length + STEPS], pieces[name][row])


def test_the_bundle_updates_the_cache_in_place(engines, monkeypatch, capfd):
    """Past and present are one buffer: the runtime does not warn of a copy, and the contents change."""
    monkeypatch.setattr(runtime, "LOGGED_FROM", 2)  # let the runtime's warnings through
    monkeypatch.setattr(session_engine, "RUN", runtime.run_options())
    engine = Session(engines["paligemma1", "onnx"].bundle, "cpu")
    pixel_values, input_ids, lengths = batch(engine)
    _, cache = engine.prefill(pixel_values, input_ids, lengths, CAPACITY)
    before = cache.numpy()
    engine.decode(np.array([[7], [11], [13]]), lengths, cache)
    assert capfd.readouterr().err == ""
    assert all(not np.array_equal(after, before[name]) for name, after in cache.numpy().items())

    # The warning exists: it comes as soon as the present is another buffer.
    shape = cache.buffers["0.key"].shape()
    other = runtime.onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cpu", 0)
    cache.binding.bind_ortvalue_output("present.0.key", other)
    engine.decode(np.array([[7], [11], [13]]), lengths, cache)
    assert "in-place" in capfd.readouterr().err
