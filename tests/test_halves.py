"""Prefill in two halves: a picture goes through the vision tower once, and every prompt about it is answered the same."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest

from export import bundle
from export.bundle import prepack
from export.session import DeviceSession, HostSession, Session
from export.session.engine import HALVES
from numpy_ref import checkpoint
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.model import paligemma
from torch_impl.load import TorchEngine

from .models import CONFIGS, random_batch, random_params, with_heads

CAPACITY = 40
BUDGET = 1e-5  # of the largest logit; measured 3e-7
KINDS = {"session": Session, "host": HostSession, "device": DeviceSession}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A small model, and its bundle."""
    folder, config = tmp_path_factory.mktemp("halves"), CONFIGS["paligemma2"]
    made = checkpoint.Checkpoint(folder, config, random_params(config, dtype=np.float32), np.dtype("f4"))
    bundle.write(made, folder / "bundle")
    return made


@pytest.fixture(scope="module")
def older(loaded, tmp_path_factory):
    """The bundle as an older version wrote it: without the halves."""
    path = shutil.copytree(loaded.folder / "bundle", tmp_path_factory.mktemp("older") / "bundle")
    description = json.loads((path / "bundle.json").read_text())
    for name in HALVES:
        del description["graphs"][name], description["files"][f"{name}.onnx"]
        (path / f"{name}.onnx").unlink()
    (path / "bundle.json").write_text(json.dumps(description))
    return path


def opened(loaded, name, **options):
    if name == "numpy":
        return NumpyEngine(loaded)
    if name == "torch":
        return TorchEngine(loaded)
    return KINDS[name](bundle.load(loaded.folder / "bundle"), "cpu", **options)


def read(engine, pictures, ids, lengths):
    """Logits of a batch, and what decode makes of its cache."""
    logits, cache = engine.prefill(pictures, ids, lengths, CAPACITY)
    first = logits.numpy().copy() if isinstance(logits, onnxruntime.OrtValue) else logits.copy()
    more, _ = engine.decode(np.full((len(ids), 1), 7), lengths, cache)
    return np.stack([first, more.numpy().copy() if isinstance(more, onnxruntime.OrtValue) else more])


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= BUDGET * np.abs(expected).max()


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("name", ["numpy", "torch", *KINDS])
def test_the_halves_are_the_whole(loaded, name, pictures):
    """In any order, and each picture as often as it is asked about."""
    pixels, ids, lengths = random_batch(loaded.config, pictures=pictures)
    engine = opened(loaded, name)
    expected = read(engine, pixels, ids, lengths)
    features = engine.encode(pixels)
    assert len(features) == len(pixels)
    assert_close(read(engine, features, ids, lengths), expected)
    order = [*range(len(pixels))[::-1][:pictures], *range(pictures), *range(pictures)]
    expected = read(NumpyEngine(loaded), pixels[order], ids, lengths)
    assert_close(read(engine, [features[i] for i in order], ids, lengths), expected)
    later = engine.encode(pixels[:1])  # beside features of another call
    mixed = [later[0], *features[1:]]
    assert_close(read(engine, mixed, ids, lengths), read(engine, features, ids, lengths))


@pytest.mark.parametrize("name", ["numpy", "torch", *KINDS])
def test_pictures_are_counted_as_ever(loaded, name):
    pixels, ids, lengths = random_batch(loaded.config)
    engine = opened(loaded, name)
    features = engine.encode(pixels)
    with pytest.raises(PaliGemmaError, match="2 pictures for 3 prompts: every prompt of a batch needs equally many"):
        engine.prefill(features[:2], ids, lengths, CAPACITY)
    with pytest.raises(PaliGemmaError, match="but 2 pictures a prompt take 18"):
        engine.prefill(features * 2, ids, lengths, CAPACITY)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_not_held_twice(loaded, kind):
    """Prefill whole is given up for its halves, and never opened where they are wanted from the start."""
    pixels, ids, lengths = random_batch(loaded.config)
    engine = opened(loaded, kind)
    whole = read(engine, pixels, ids, lengths)
    assert engine._prefill is not None
    assert not engine._halves
    engine.encode(pixels)
    assert engine._prefill is None
    assert {*engine._halves} == {*HALVES}
    again = opened(loaded, kind, in_halves=True)
    assert again._prefill is None
    for each in (engine, again):
        assert_close(read(each, pixels, ids, lengths), whole)  # pixels are taken as before


def test_threads_open_the_halves_once(loaded, monkeypatch):
    engine, names = opened(loaded, "session"), []
    open_one = Session._open
    monkeypatch.setattr(
        Session, "_open", lambda self, name, threads: names.append(name) or open_one(self, name, threads)
    )
    pixels, ids, lengths = random_batch(loaded.config)
    expected = read(NumpyEngine(loaded), pixels, ids, lengths)

    def ask(i):
        return read(engine, pixels if i % 2 else engine.encode(pixels), ids, lengths)

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(ask, range(12)):
            assert_close(found, expected)
    assert sorted(names) == sorted(HALVES)


def test_the_vision_tower_runs_once_for_many_prompts(loaded, monkeypatch):
    calls, encode = [], paligemma.encode_image
    monkeypatch.setattr(paligemma, "encode_image", lambda *a, **k: calls.append(len(a[2])) or encode(*a, **k))
    engine = NumpyEngine(loaded)
    pixels, ids, lengths = random_batch(loaded.config)
    (features,) = engine.encode(pixels[:1])
    for _ in range(2):
        engine.prefill([features] * 3, ids, lengths, CAPACITY)
    assert calls == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_bundle_sees_the_picture_again(loaded, older, kind):
    pixels, ids, lengths = random_batch(loaded.config)
    engine = KINDS[kind](bundle.load(older), "cpu", in_halves=True)
    features = engine.encode(pixels)
    assert_close(read(engine, features, ids, lengths), read(NumpyEngine(loaded), pixels, ids, lengths))


def test_repacked_weights_of_the_halves_are_those_of_the_whole(tmp_path, monkeypatch):
    """Nothing is added to the weights file for them."""
    config = with_heads("paligemma1")
    made = checkpoint.Checkpoint(tmp_path, config, random_params(config, dtype=np.float32), np.dtype("f4"))
    bundle.write(made, tmp_path / "all", "int4", prepacked=True)
    monkeypatch.setattr(bundle, "WITH_WEIGHTS", ("prefill", "decode", "extend"))
    bundle.write(made, tmp_path / "two", "int4", prepacked=True)
    sizes = [(tmp_path / name / "weights.bin").stat().st_size for name in ("all", "two")]
    assert sizes[0] == sizes[1]
    entries = {name: prepacked_entries(tmp_path / "all" / f"{name}.onnx") for name in ("prefill", *HALVES)}
    assert entries["vision"]
    assert entries["prefill_text"]
    assert entries["vision"] | entries["prefill_text"] == entries["prefill"]


def prepacked_entries(graph):
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    pairs = [(tensor.name, pair) for tensor in tensors for pair in tensor.external_data]
    return {(name, pair.key, pair.value) for name, pair in pairs if pair.key.startswith(prepack.ENTRY)}
