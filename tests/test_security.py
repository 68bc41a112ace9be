"""What export/README.md says about files from a stranger, each claim by an attempt at the contrary."""

import ast
import io
import json
import os
import pickle
import shutil
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export import bundle, serve, session
from numpy_ref import checkpoint
from numpy_ref.checkpoint.npz import map_npz
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import FORMATS, open_image
from numpy_ref.model import segmentation
from numpy_ref.tokenizer import Tokenizer

from .fuzz import corpus
from .fuzz.targets import answer

ROOT = Path(__file__).parent.parent
SOURCES = [file for folder in ("numpy_ref", "torch_impl", "export") for file in (ROOT / folder).rglob("*.py")]


# --- nothing in a file is run ------------------------------------------------------------------------------

#: What would run, or could run, what a file says.
RUNNING = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "eval", "exec", "compile",
    "torch.load", "np.load", "numpy.load", "os.system", "register_custom_ops_library", "extractall",
}  # fmt: skip


def mentions(tree) -> set[str]:
    """Modules imported, and names called, in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            # A method of one's own may be called compile or eval; `re.compile` and `model.eval` are no danger.
            found |= {name} | ({name.rsplit(".", 1)[-1]} - {"compile", "eval", "exec", "load"})
    return found


def test_no_source_file_can_run_what_it_reads():
    assert len(SOURCES) > 50
    for file in SOURCES:
        assert not mentions(ast.parse(file.read_text())) & RUNNING, file


@pytest.mark.parametrize("line", ["import pickle", "from torch import load as x; torch.load('a')", "np.load('a')",
                                  "eval('1')", "options.register_custom_ops_library('a.so')"])  # fmt: skip
def test_that_such_a_line_would_be_seen(line):
    assert mentions(ast.parse(line)) & RUNNING


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("read", [checkpoint.load, segmentation.load])
def test_nothing_is_unpickled(tmp_path, read):
    mark, contents = tmp_path / "mark", io.BytesIO()
    np.save(contents, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("a.npy", contents.getvalue())
    with pytest.raises(PaliGemmaError, match="holds objects"):
        read(tmp_path / "model.npz")
    (tmp_path / "model.npz").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(PaliGemmaError, match="not a whole"):
        read(tmp_path / "model.npz")
    assert not mark.exists()


def test_operators_of_other_libraries_do_not_load(copy):
    change_graph(copy, "masks", lambda graph: setattr(graph.node[0], "domain", "stranger"))
    with pytest.raises(PaliGemmaError, match=r"masks\.onnx: ONNX Runtime cannot load"):
        answer(copy, host_graphs=False)


def test_names_that_are_no_text_end_in_the_one_line(copy):
    contents = (copy / "masks.onnx").read_bytes()
    assert b"codes" in contents
    corpus.sealed(copy, "masks.onnx", contents.replace(b"codes", b"\x80odes"))
    with pytest.raises(PaliGemmaError, match=r"masks\.onnx: ONNX Runtime cannot load or run it .*can't decode"):
        answer(copy, host_graphs=False)


def change_graph(folder, name, change) -> None:
    """Change a graph of a bundle, with the right checksum."""
    model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
    change(model.graph)
    corpus.sealed(folder, f"{name}.onnx", model.SerializeToString())


# --- checksums ---------------------------------------------------------------------------------------------

FILES = (
    "weights.bin", "prefill.onnx", "decode.onnx", "extend.onnx", "vision.onnx", "prefill_text.onnx", "masks.onnx",
    "preprocess.onnx", "sample.onnx", "sample_device.onnx", "constrain.onnx", "tokenizer.model", "example.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_stops_loading(copy, name):
    contents = bytearray((copy / name).read_bytes())
    contents[len(contents) // 3] ^= 4
    (copy / name).write_bytes(contents)
    with pytest.raises(PaliGemmaError, match=f"{name}: contents differ from their SHA-256"):
        session.load(copy, "cpu")


def test_every_file_of_a_bundle_has_a_checksum(whole):
    assert {file.name for file in whole.iterdir()} == {*FILES, bundle.DESCRIPTION}
    assert set(bundle.load(whole).description.files) == set(FILES)


# --- no file outside of the folder -------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path, whole):
    """A file that is none of the bundle's business, and would do as its weights."""
    return shutil.copy(whole / "weights.bin", tmp_path / "secret.bin")


@pytest.mark.parametrize(
    "location", ["../secret.bin", "{secret}", "./../secret.bin", "*/_ORT_MEM_ADDR_/*", "bundle/../../secret.bin"]
)
@pytest.mark.parametrize("name", ["prefill", "decode", "extend"])
def test_external_data_lies_in_the_folder(copy, secret, name, location):
    """Paths that lead out, and the tag by which ONNX Runtime means an address in memory."""

    def redirect(graph):
        entries = [entry for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"]
        assert entries
        for entry in entries:
            entry.value = location.format(secret=secret)

    change_graph(copy, name, redirect)
    with pytest.raises(PaliGemmaError, match=f"{name}.onnx: ONNX Runtime cannot load"):
        session.load(copy, "cpu")[0]._open(name, 1)  # if it is not opened from the first


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_external_data_does_not_follow_links_out(copy, secret, tmp_path, where):
    """Of a file, that is, which bundle.json does not list, so that nothing else looks at it."""

    def redirect(graph):
        for entry in (entry for tensor in graph.initializer for entry in tensor.external_data):
            entry.value = "extra.bin" if entry.key == "location" else entry.value

    change_graph(copy, "prefill", redirect)
    folder = copy if where == "folder" else as_in_a_cache(copy, tmp_path / "cache")
    (folder / "extra.bin").symlink_to(secret)
    with pytest.raises(PaliGemmaError, match=r"prefill\.onnx: ONNX Runtime cannot load"):
        session.load(folder, "cpu")


@pytest.mark.parametrize("offset", ["999999999999", "-1"])
def test_external_data_ends_with_its_file(copy, offset):
    def move(graph):
        entry = next(e for tensor in graph.initializer for e in tensor.external_data if e.key == "offset")
        entry.value = offset

    change_graph(copy, "prefill", move)
    with pytest.raises(PaliGemmaError, match=r"prefill\.onnx: ONNX Runtime cannot load"):
        session.load(copy, "cpu")


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/hostname", "..", "", "a/../weights.bin"])
def test_files_of_a_bundle_are_names(copy, secret, name):
    description = json.loads((copy / bundle.DESCRIPTION).read_text())
    description["files"][name] = {"bytes": 1, "sha256": ""}
    (copy / bundle.DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(PaliGemmaError, match="not a file name of this folder"):
        bundle.load(copy)


def test_an_archive_writes_nothing(tmp_path):
    """The members of an npz are read where they lie; their names are never paths."""
    (tmp_path / "inside").mkdir()
    contents = io.BytesIO()
    np.save(contents, np.ones(3, np.float32))
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "inside" / "model.npz", "w", compression) as archive:
            archive.writestr("../../escaped.npy", contents.getvalue())
        assert list(map_npz(tmp_path / "inside" / "model.npz")) == ["../../escaped"]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["inside", "model.npz"]


# --- links -------------------------------------------------------------------------------------------------


def as_in_a_cache(source: Path, cache: Path) -> Path:
    """The files of a folder as the Hugging Face hub's cache has them: links from a snapshot to blobs."""
    snapshot = cache / "models--someone--tiny" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        shutil.copy(file, blobs / f"blob-of-{file.stem}{len(file.name)}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.stem}{len(file.name)}")
    return snapshot


@pytest.fixture
def folder(tmp_path):
    return corpus.whole_checkpoint(tmp_path / "checkpoint")


def read_all(folder) -> None:
    """Everything that is read of a checkpoint directory."""
    loaded = checkpoint.load(folder)
    Tokenizer.load(folder, loaded.config)
    segmentation.load(segmentation.find(folder))


def test_links_of_a_hugging_face_cache_work(folder, whole, tmp_path):
    read_all(as_in_a_cache(folder, tmp_path / "checkpoints"))
    answer(as_in_a_cache(whole, tmp_path / "bundles"), host_graphs=True)


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    """Whoever runs the command has chosen where it leads."""
    (tmp_path / "link").symlink_to(folder)
    read_all(tmp_path / "link")


def test_shards_in_a_cache_work(tmp_path):
    read = checkpoint.load(as_in_a_cache(corpus.checkpoint_folder(tmp_path / "out", shards=2), tmp_path / "cache"))
    assert read.config == corpus.TINY


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.model", "preprocessor_config.json", "vae.npz"]
)
@pytest.mark.parametrize("where", ["folder", "cache"])
def test_other_links_are_refused(folder, tmp_path, name, where):
    if where == "cache":  # out of the cache, and not to blobs
        folder = as_in_a_cache(folder, tmp_path / "cache")
    outside = shutil.copy((folder / name).resolve(), tmp_path / f"outside-{name}")
    (folder / name).unlink()
    (folder / name).symlink_to(outside)
    with pytest.raises(PaliGemmaError, match=f"{name}: this link leads out of its folder"):
        read_all(folder)


@pytest.mark.parametrize("name", [bundle.DESCRIPTION, *FILES])
def test_other_links_of_a_bundle_are_refused(copy, tmp_path, name):
    outside = shutil.move(copy / name, tmp_path / f"outside-{name}")
    (copy / name).symlink_to(outside)
    with pytest.raises(PaliGemmaError, match=f"{name}: this link leads out of its folder"):
        bundle.load(copy)


def test_links_in_a_circle_are_refused(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(PaliGemmaError, match=r"config\.json"):
        checkpoint.load(folder)


def test_what_is_linked_is_not_packed_into_a_bundle(folder, tmp_path):
    """A stranger's checkpoint must not carry a file of this machine into what is passed on."""
    (tmp_path / "private").write_text("private")
    (folder / "tokenizer.json").symlink_to(tmp_path / "private")
    with pytest.raises(PaliGemmaError, match=r"tokenizer\.json: this link leads out"):
        bundle.write(checkpoint.load(folder), tmp_path / "out")
    with pytest.raises(PaliGemmaError, match=r"tokenizer\.json: this link leads out"):
        checkpoint.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- pictures ----------------------------------------------------------------------------------------------


def png(width, height, packed) -> bytes:
    """A grey PNG of a size that it claims, with these bytes as its picture."""

    def chunk(kind, contents):
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_500, 20_000, 2**31 - 1])
def test_a_picture_bomb_is_refused_before_it_unfolds(tmp_path, side):
    """90 million pixels and more, between Pillow's warning and its refusal too."""
    (tmp_path / "bomb.png").write_bytes(png(side, side, b""))
    with pytest.raises(PaliGemmaError, match=r"bomb\.png: the picture has more than 89478485 pixels"):
        open_image(tmp_path / "bomb.png")


def test_a_picture_that_unfolds_past_its_size_is_cut_off(tmp_path):
    """Its size counts, whatever is packed behind it."""
    (tmp_path / "bomb.png").write_bytes(png(3, 2, zlib.compress(bytes(10**7), 9)))
    assert open_image(tmp_path / "bomb.png").size == (3, 2)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "EPS", "PCX", "SGI", "DDS"])
def test_other_formats_are_not_opened(tmp_path, kind):
    """EPS would start Ghostscript; the others are readers that nobody needs."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture", kind)
    with pytest.raises(PaliGemmaError, match="not a picture of a known format"):
        open_image(tmp_path / "picture")


@pytest.mark.parametrize("kind", FORMATS)
def test_known_formats_open(tmp_path, kind):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "picture", kind)
    assert np.asarray(open_image(tmp_path / "picture")).shape == (8, 8, 3)


# --- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["<image>", "<bos>", "<eos>", "<pad>", "<unk>"])
def test_control_tokens_in_a_prompt_stay_text(word):
    """Also inside out, doubled, and beside content tokens, for both tokenizer files."""
    config = checkpoint.load_config(checkpoint.SHIPPED)
    for folder in (checkpoint.SHIPPED,):
        tokenizer = Tokenizer.load(folder, config)
        for text in (word, word * 3, f"<{word}>", f"<loc0001>{word}<seg001>", f"a\n{word}\n"):
            ids = tokenizer.prompt(text)[config.vision.patches + 1 :]
            assert not {config.image_token, config.bos, config.eos, config.pad} & set(ids)
            assert tokenizer.decode(ids) == text + "\n"


# --- the page's server -------------------------------------------------------------------------------------


def test_the_server_listens_on_this_machine_alone(whole, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "LIBRARIES", ())
    with serve.open_server(bundle.load(whole)) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        assert server.socket.family == socket.AF_INET


def test_the_server_has_a_list_and_nothing_else(whole, monkeypatch):
    """Every path that it answers is a file of the page or of the bundle."""
    monkeypatch.setattr(serve, "LIBRARIES", ())
    files = serve.files_of(bundle.load(whole))
    homes = {
        whole.resolve(),
        checkpoint.SHIPPED.resolve(),
        (serve.HOSTS / "common").resolve(),
        (serve.HOSTS / "web").resolve(),
    }
    assert {served.file.resolve().parent for served in files.values()} == homes
