"""Pipes, sockets, devices and folders where a file is read: one line, at once; links are not followed behind a check."""

import json
import os
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from export import batch, bundle
from export.batch import dataset
from numpy_ref import checkpoint, cli, files
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli.drawing import check_drawing
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import open_image
from numpy_ref.tokenizer import Tokenizer
from torch_impl.train import data, loop

from .fuzz import corpus
from .test_security import read_all


def put_socket(path):
    """A name of a socket may have a hundred letters: it is made elsewhere, and moved."""
    short = Path("/tmp") / f"socket-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short))
    shutil.move(short, path)


KINDS = {
    "pipe": os.mkfifo,
    "socket": put_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}


def at_once(function) -> str:
    """The one line that a function ends with, before anybody would call it a hang."""
    messages = []

    def call():
        try:
            function()
        except PaliGemmaError as error:
            messages.append(str(error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    (line,) = messages
    return line


@pytest.fixture
def folder(tmp_path):
    return corpus.whole_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.model", "preprocessor_config.json", "processor_config.json"]
)
def test_in_a_checkpoint(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    at_once(lambda: read_all(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_of_an_index(tmp_path, kind):
    folder = corpus.checkpoint_folder(tmp_path / "checkpoint", shards=2)
    (folder / "model.safetensors.index.json").unlink()
    KINDS[kind](folder / "model.safetensors.index.json")
    at_once(lambda: checkpoint.load(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [bundle.DESCRIPTION, "weights.bin", "prefill.onnx", "tokenizer.model"])
def test_in_a_bundle(copy, name, kind):
    (copy / name).unlink()
    KINDS[kind](copy / name)
    at_once(lambda: bundle.load(copy))


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_of_one_file(tmp_path, kind):
    readers = {
        "model.npz": checkpoint.load,
        "adapter/adapter_config.json": lambda file: checkpoint.load(SHIPPED, file.parent),
        "prompt.txt": lambda file: cli.read_prompt(f"@{file}"),
        "picture.png": open_image,
        "rows.jsonl": lambda file: list(dataset.open_dataset(file, "caption en").read(0, 9)),
        "rows.parquet": lambda file: dataset.open_dataset(file, "caption en"),
        "train.jsonl": lambda file: data.JsonLines(file, Tokenizer.load(SHIPPED, checkpoint.load_config(SHIPPED)), "bicubic", 0),
        "tokenizer.json": lambda file: checkpoint.companions(checkpoint.load(SHIPPED), file),
        "drawing.png": check_drawing,
        "out.jsonl.part": lambda file: enter(batch.work_file(file.with_suffix(""), {})),
        "out2.jsonl.part.json": lambda file: enter(batch.work_file(file.with_name("out2.jsonl"), {})),
        "t.training/state.safetensors": lambda file: train(file.parent),
        "u.training/log.csv": lambda file: train(file.parent),
    }  # fmt: skip
    for name, read in readers.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if kind != "folder" or not name.startswith("rows"):  # a folder of pictures is a data set
            KINDS[kind](tmp_path / name)
            assert name.split("/")[-1] in at_once(lambda read=read, name=name: read(tmp_path / name)), name


def enter(context):
    with context:
        pass


def train(folder):
    model = torch.nn.Module()
    model.kernel = torch.nn.Parameter(torch.zeros(2))
    loop.fit(model, None, [], None, loop.Settings(1, 1), folder)


# --- links -------------------------------------------------------------------------------------------------


def test_a_link_put_behind_the_check_is_not_followed(tmp_path, monkeypatch):
    """Between finding out where a name leads and opening that."""
    (tmp_path / "file").write_text("{}")
    (tmp_path / "secret").write_text('"secret"')
    resolve = os.path.realpath

    def swapped(path):
        found = resolve(path)
        (tmp_path / "file").unlink()
        (tmp_path / "file").symlink_to(tmp_path / "secret")
        return found

    monkeypatch.setattr(os.path, "realpath", swapped)
    with pytest.raises(PaliGemmaError, match="file is not readable JSON"):
        files.read_json(tmp_path / "file")


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("tokenizer.model", 2**40), ("tokenizer.model", 2**28 + 1), ("config.json", 2**40), ("model.safetensors", 2**40)],
)
def test_files_that_are_larger_than_any(folder, name, size):
    """Sparse: they take no room on the disk, and would take all memory."""
    os.truncate(folder / name, size)
    assert name in at_once(lambda: read_all(folder))


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**64], [2**40, 2**40, 0], [-1, 0], [0] * 70])
def test_shapes_that_no_array_has(folder, shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    at_once(lambda: checkpoint.load(folder))


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000 + "b", "\udcff" * 200, "a\nb"])
def test_names_of_any_length(tmp_path, name):
    for read in (open_image, checkpoint.load, bundle.load, lambda path: dataset.open_dataset(path, "caption en")):
        code = cli.run("command", lambda argv, read=read: read(tmp_path / name))
        assert code == 1


def test_arrays_are_views_of_opened_files(folder):
    """What is mapped stays, whatever comes in the file's place."""
    arrays = checkpoint.flatten(checkpoint.load(folder).params)
    before = {name: np.array(array) for name, array in arrays.items()}
    (folder / "model.safetensors").unlink()
    assert all(np.array_equal(before[name], array) for name, array in arrays.items())
