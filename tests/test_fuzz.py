"""Damaged input for every reader, a little of it on every run; what fuzzing found, as cases; and the watcher itself.

`python -m tests.fuzz` is the long way.
"""

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export import bundle, session
from numpy_ref import checkpoint, cli, detection, memory
from numpy_ref.checkpoint.hugging_face import from_hf, to_hf
from numpy_ref.checkpoint.npz import map_npz
from numpy_ref.errors import PaliGemmaError
from numpy_ref.files import MAX_JSON_BYTES
from numpy_ref.tokenizer import Json, SentencePiece

from .fuzz import __main__ as fuzz
from .fuzz import corpus, mutate
from .fuzz.targets import TARGETS

# --- a little of everything --------------------------------------------------------------------------------


def test_every_target_is_run():
    assert set(fuzz.LIST) == set(TARGETS)


@pytest.fixture(scope="module", params=[name for name in TARGETS if name not in ("graph", "sizes")])
def target(request, tmp_path_factory):
    """A target that is ready to read, and its seeds. Graphs take too long for here, and memory is limited for good."""
    target = TARGETS[request.param]
    return target, target.prepare(tmp_path_factory.mktemp("fuzz")), target.seeds()


def test_every_reader_takes_its_seeds(target):
    """At least one, that is: inputs that are all refused at once would test little."""
    _, read, seeds = target
    refusals = [refusal(read, data) for data in seeds]
    assert None in refusals


@given(number=st.integers(0, 2**32), blind=st.booleans())
@settings(deadline=None, max_examples=15)
def test_changed_seeds(target, number, blind):
    target, read, seeds = target
    rng = random.Random(number)
    refusal(read, (mutate.raw if blind else target.mutate)(rng.choice(seeds), rng))


@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=10)
def test_bytes_of_any_kind(target, data):
    refusal(target[1], data)


def refusal(read, data) -> str | None:
    """The line by which an input is refused, None if it is not."""
    try:
        read(data)
    except PaliGemmaError as error:
        line = str(error)
    else:
        return None
    assert line.isprintable()
    return line


# --- what it found -----------------------------------------------------------------------------------------


def tiny_config(**changes) -> dict:
    return {**to_hf(corpus.TINY), **changes}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(text_config={**to_hf(corpus.TINY)["text_config"], "rms_norm_eps": 10**400}),
        tiny_config(vision_config=nested(900)),
        tiny_config(model_type=nested(900)),
        tiny_config(model_type="x" * 10**6),
    ],
    ids=["no float", "too deep to quote", "too deep for a name", "too long to quote"],
)
def test_values_of_a_config(config):
    with pytest.raises(PaliGemmaError) as error:
        from_hf(config)
    assert len(str(error.value)) < 300


def test_a_picture_that_no_prompt_has_room_for():
    """Two billion patches would be two billion ids before any size is compared with a tensor's."""
    config = tiny_config()
    config["vision_config"] |= {"image_size": 2**17}
    with pytest.raises(PaliGemmaError, match="patches of a picture do not fit into 8192 positions"):
        from_hf(config)


@pytest.mark.parametrize("name", ["\x1b[2Jgone", "two\nlines", "x" * 300, "\0", "\ud800", "", "..", "a/b"])
def test_names_of_shards(tmp_path, name):
    """A line that a terminal shows as it is, whatever the name."""
    folder = corpus.checkpoint_folder(tmp_path / "checkpoint", shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PaliGemmaError) as error:
        checkpoint.load(folder)
    assert str(error.value).isprintable()


def test_a_json_file_that_is_too_large(tmp_path):
    (tmp_path / "config.json").write_bytes(b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(PaliGemmaError, match=r"config\.json has 16777217 bytes, more than"):
        checkpoint.load_config(tmp_path)


def describe(folder, change) -> None:
    """Change a bundle's description."""
    description = json.loads((folder / bundle.DESCRIPTION).read_text())
    change(description)
    (folder / bundle.DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["files"]["decode.onnx"].update(bytes=float("inf")), "damaged"),
        (lambda d: d["graphs"]["masks"].update(file=1.5), r"graphs\.masks\.file is 1\.5, not text"),
        (lambda d: d["graphs"]["masks"].update(file="other.onnx"), r"no checksum for other\.onnx"),
        (lambda d: d["graphs"].pop("sample"), "damaged .*sample"),
        (lambda d: d["files"].update({"x" * 300: d["files"]["decode.onnx"]}), "not a file name"),
        (lambda d: d.update(max_length=-1), "max_length is -1"),
        (lambda d: d.update(max_length=10**9), "max_length is 1000000000"),
        (lambda d: d.update(version=nested(900)), "bundle version"),
        (lambda d: d["config"]["text_config"].update(vocab_size=0), r"bundle\.json: config\.json: vocab_size"),
    ],
)
def test_descriptions_of_bundles(copy, change, words):
    describe(copy, change)
    with pytest.raises(PaliGemmaError, match=words):
        bundle.load(copy)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("text_config", "vocab_size", 2**31 - 1, "a model of its config has .* GB of weights at least"),
        ("text_config", "num_hidden_layers", 1000, r"prefill\.onnx: present\.1\.key is missing|weights at least"),
        ("text_config", "head_dim", 2**30, "a model of its config has .* GB of weights at least"),
        ("vision_config", "image_size", 40_000, "a model of its config has .* of weights at least"),
        ("text_config", "num_hidden_layers", 2, r"prefill\.onnx: present\.1\.key is missing"),
        ("vision_config", "image_size", 6, r"prefill\.onnx: pixel_values is"),
    ],
)
def test_a_config_that_is_not_its_graphs(copy, section, key, value, words):
    """Buffers are made in the sizes of the config: a description alone must not ask for a terabyte."""
    if key == "image_size" and value > 6:
        describe(copy, lambda d: d["config"]["text_config"].update(max_position_embeddings=2**31 - 1))
    describe(copy, lambda d: d["config"][section].update({key: value}))
    with pytest.raises(PaliGemmaError, match=words):
        session.Session(bundle.load(copy), "cpu", 1)


@pytest.mark.parametrize(
    ("section", "key", "value"), [("text_config", "vocab_size", 2**31 - 1), ("vision_config", "image_size", 40_000)]
)
def test_sizes_beyond_memory(copy, monkeypatch, section, key, value):
    """The weights are there, in a file with holes; what is made in these sizes at once does not fit."""
    monkeypatch.setattr(memory, "available", lambda: 10**10)
    size = 2**42
    os.truncate(copy / "weights.bin", size)
    describe(copy, lambda d: d["config"]["text_config"].update(max_position_embeddings=2**31 - 1))
    describe(copy, lambda d: d["config"][section].update({key: value}))
    describe(copy, lambda d: d["files"]["weights.bin"].update(bytes=size))
    with pytest.raises(PaliGemmaError, match=r"there is not enough memory: .* GB are free"):
        bundle.load_but_weights(copy)


def test_a_cache_beyond_memory(copy, monkeypatch):
    engine = session.Session(bundle.load(copy), "cpu", 1)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    ids = np.zeros((3, 20), np.int64)
    with pytest.raises(PaliGemmaError, match="a cache of 30 positions for 3 rows takes"):
        engine.prefill(np.zeros((3, 3, 8, 8), np.float32), ids, np.full(3, 20, np.int32), 30)


@pytest.mark.parametrize("limit", [2 * 10**9, None])
def test_what_is_available_is_known(limit):
    code = (
        "import resource, sys; from numpy_ref import memory; limit = eval(sys.argv[1])\n"
        "if limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\nprint(memory.available())"
    )
    found = float(subprocess.run([sys.executable, "-c", code, str(limit)], capture_output=True, check=True).stdout)
    assert 10**8 < found < (limit or 2**50)


def test_a_graph_that_fails_as_it_runs(copy):
    """Its inputs and outputs are right, and what it computes cannot be."""
    import onnx
    from onnx import helper

    outputs = [helper.make_tensor_value_info("masks", onnx.TensorProto.FLOAT, ["B", 64, 64])]
    inputs = [helper.make_tensor_value_info("codes", onnx.TensorProto.INT64, ["B", 16])]
    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [7, 64, 64])
    nodes = [helper.make_node("Cast", ["codes"], ["x"], to=1), helper.make_node("Reshape", ["x", "shape"], ["masks"])]
    model = helper.make_model(
        helper.make_graph(nodes, "masks", inputs, outputs, [shape]),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    corpus.sealed(copy, "masks.onnx", model.SerializeToString())
    engine = session.Session(bundle.load(copy), "cpu", 1)
    with pytest.raises(PaliGemmaError, match=r"masks\.onnx: ONNX Runtime cannot load or run it"):
        engine.masks(np.zeros((1, 16), np.int64))


def test_a_sentencepiece_model_that_is_not_utf8():
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(corpus.tokenizer_model())
    piece = model.pieces[300].piece.encode()
    contents = corpus.tokenizer_model().replace(
        b"\x0a%c" % len(piece) + piece, b"\x0a%c" % len(piece) + b"\xff" * len(piece)
    )
    assert contents != corpus.tokenizer_model()
    with pytest.raises(PaliGemmaError, match="not a SentencePiece model"):
        SentencePiece(contents)


def test_a_tokenizer_json_on_which_its_library_panics():
    tree = json.loads(corpus.tokenizer_json()[0])
    tree["model"]["continuing_subword_prefix"] = "longer than a piece"
    with pytest.raises(PaliGemmaError, match="not a tokenizer"):
        Json(json.dumps(tree).encode())


def test_an_answer_full_of_spaces():
    """Tried in every way to share the spaces among three parts of the pattern, this would take minutes."""
    place = "<loc0001><loc0002><loc0300><loc0400>"
    (box,) = detection.parse(f"{place}{' ' * 20_000}>", 10, 10)
    assert box.label == ">"
    (box,) = detection.parse(f"{place} {' ' * 20_000} red \n cat ; dog", 10, 10)
    assert box.label == "red cat"


def test_an_answer_cannot_command_a_terminal():
    assert cli.printable("a\tb\nc") == "a\tb\nc"
    assert cli.printable("\x1b[2J\r\x07\x9b") == "\N{REPLACEMENT CHARACTER}[2J" + "\N{REPLACEMENT CHARACTER}" * 3


# --- the watcher -------------------------------------------------------------------------------------------


def worker(tmp_path, body) -> tuple[str, ...]:
    """A program in the worker's place that reads three inputs with a function of this body."""
    file = tmp_path / "worker.py"
    file.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom numpy_ref.errors import PaliGemmaError\n"
        f"sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\nfrom tests.fuzz.worker import Reader\n"
        f"def read(data):\n    {body}\n"
        "reader = Reader(read, Path(sys.argv[2]))\nfor data in (b'first', b'second', b'third'):\n    reader(data)\n"
    )
    return sys.executable, str(file)


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("assert data != b'second', 'it is the second'", "AssertionError: it is the second"),
        ("if data == b'second': os.abort()", "crash: exit code -6"),
        ("if data == b'second': time.sleep(60)", "hang: no end after 3 s"),
        ("if data == b'second': x = b'x' * 2 * 10**8; time.sleep(60)", "memory: "),
        ("if data == b'second': sys.exit(0)", "SystemExit: 0"),
        ("if data == b'second': Exception.__init__(error := PaliGemmaError(''), 'a\\nb'); raise error", "not one printable line"),
    ],
)  # fmt: skip
def test_what_leaves_its_bounds_is_found(tmp_path, monkeypatch, body, finding):
    monkeypatch.setattr(fuzz, "KEPT", tmp_path / "kept")
    hang = 3 if "hang" in finding else 60
    result = fuzz.watch("config", 1, 0, hang, memory=150 * 2**20, program=worker(tmp_path, body))
    assert finding in result.finding
    assert result.inputs == 2
    assert Path(result.input).read_bytes() == b"second"
    assert "findings: 1" in fuzz.table([result])


def test_what_keeps_its_bounds_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "KEPT", tmp_path / "kept")
    result = fuzz.watch("config", 1, 0, program=worker(tmp_path, "if data == b'second': raise PaliGemmaError('no')"))
    assert (result.finding, result.inputs) == (None, 3)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(("found", "code"), [(None, 0), ("crash", 1)])
def test_the_exit_code_tells(monkeypatch, capsys, found, code):
    monkeypatch.setattr(fuzz, "watch", lambda target, *_: fuzz.Result(target, 7, 1.0, 9, found, "file"))
    assert fuzz.main(["config", "npz", "--json"]) == code
    assert [row["target"] for row in json.loads(capsys.readouterr().out)] == ["config", "npz"]


# --- bounds of npz files -----------------------------------------------------------------------------------


def npy(shape, version=(1, 0), size=None) -> bytes:
    """An array of zeros as NumPy writes it."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return (
        b"\x93NUMPY" + bytes(version) + length + header + bytes(size if size is not None else 4 * int(np.prod(shape)))
    )


def archive(file, contents, compression=zipfile.ZIP_DEFLATED, name="a.npy"):
    with zipfile.ZipFile(file, "w", compression) as target:
        target.writestr(name, contents)
    return file


@contextmanager
def small_memory():
    """What is done here takes less than a megabyte."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_a_bomb_is_not_inflated(tmp_path):
    """64 MB of zeros in 64 kB: refused by what the archive says of itself, before a byte is unfolded."""
    file = archive(tmp_path / "model.npz", npy((2**24,)))
    assert file.stat().st_size < 70_000
    with small_memory(), pytest.raises(PaliGemmaError, match=r"unfold to 0\.1 GB, 100 times the file or more"):
        map_npz(file)


def test_a_bomb_that_lies_about_its_size_is_cut_off(tmp_path):
    """The archive says four kilobytes where sixteen million are packed: no more than it says are ever unfolded."""
    file = archive(tmp_path / "model.npz", npy((2**22,)))
    contents = bytearray(file.read_bytes())
    directory = contents.index(b"PK\x01\x02")
    struct.pack_into("<I", contents, directory + 24, 4096)
    file.write_bytes(contents)
    with small_memory(), pytest.raises(PaliGemmaError, match=r"not a whole \.npz file"):
        map_npz(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, compression):
    """zipfile unfolds these without a bound on memory, and NumPy never writes them."""
    with pytest.raises(PaliGemmaError, match="compressed as NumPy never does"):
        map_npz(archive(tmp_path / "model.npz", npy((4,)), compression))


def test_long_headers_are_refused(tmp_path):
    with pytest.raises(PaliGemmaError, match=r"npy version \(2, 0\)"):
        map_npz(archive(tmp_path / "model.npz", npy((4,), version=(2, 0))))


def test_what_numpy_compresses_loads(tmp_path):
    values = np.random.default_rng(0).standard_normal((50, 7), np.float32)
    np.savez_compressed(tmp_path / "model.npz", a=values)
    assert np.array_equal(map_npz(tmp_path / "model.npz")["a"], values)


def test_zeros_that_were_compressed_still_load(tmp_path):
    """A new model's biases: no more than a hundred times smaller, all in all."""
    arrays = {"a": np.zeros(10_000, np.float32), "b": np.random.default_rng(0).standard_normal(1000)}
    np.savez_compressed(tmp_path / "model.npz", **arrays)
    assert map_npz(tmp_path / "model.npz").keys() == arrays.keys()


def test_tiny_models_are_sound():
    assert from_hf(to_hf(corpus.TINY)) == replace(corpus.TINY)
