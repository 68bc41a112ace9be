"""example.json: what a bundle carries for a host to check itself by."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from export import bundle, verify
from export.bundle import example
from export.cli import export_onnx
from export.session import HostSession, Session
from numpy_ref import checkpoint
from numpy_ref.answer import answer
from numpy_ref.errors import PaliGemmaError
from numpy_ref.tokenizer import Tokenizer

from .fuzz import corpus


@pytest.fixture(scope="module")
def shipped():
    return bundle.shipped()


def read(opened):
    return json.loads((opened.path / example.FILE).read_text())


def picture(found):
    size = found["image"]["height"], found["image"]["width"], 3
    return Image.fromarray(np.frombuffer(base64.b64decode(found["image"]["rgb"]), np.uint8).reshape(size))


def test_both_forms_of_the_picture(shipped):
    found = read(shipped)
    shown = Image.open(io.BytesIO(base64.b64decode(found["image"]["png"])))
    assert np.array_equal(np.asarray(shown), np.asarray(picture(found)))


@pytest.mark.parametrize("engine", [Session, HostSession])
def test_the_bundle_answers_so(shipped, engine):
    found, tokenizer = read(shipped), Tokenizer.load(shipped.path, shipped.config)
    assert found["input_ids"] == tokenizer.prompt(found["prompt"])
    answered = answer(engine(shipped, "cpu"), tokenizer, picture(found), found["prompt"])
    assert answered.tokens == found["answer"]["tokens"]
    assert answered.text == found["answer"]["text"]
    assert answered.logprobs == pytest.approx(found["answer"]["logprobs"], abs=1e-4)


def test_the_shipped_model_is_right(shipped):
    """Of the scene that was drawn: it finds the star, and its mask is most of what is to be seen of it."""
    star = example.SCENE.things[1]
    (box,), (mask,) = (read(shipped)["answer"][name] for name in ("boxes", "masks"))
    assert box["label"] == star.label
    corners = [side * example.SIZE for side in star.box]
    assert [box[name] for name in ("x1", "y1", "x2", "y2")] == pytest.approx(corners, abs=3)
    assert mask["size"] == [example.SIZE, example.SIZE]
    assert sum(mask["counts"][1::2]) > 0.3 * (corners[2] - corners[0]) * (corners[3] - corners[1])


def test_it_is_checked_like_any_file(shipped, tmp_path):
    copy = shutil.copytree(shipped.path, tmp_path / "copy")
    (copy / example.FILE).write_text((copy / example.FILE).read_text().replace("blue", "pink"))
    with pytest.raises(PaliGemmaError, match=f"{example.FILE}: contents differ from their SHA-256"):
        bundle.load(copy)


def test_an_older_bundle_has_none(shipped, tmp_path):
    copy = shutil.copytree(shipped.path, tmp_path / "old")
    description = json.loads((copy / bundle.DESCRIPTION).read_text())
    del description["files"][example.FILE]
    (copy / bundle.DESCRIPTION).write_text(json.dumps(description))
    (copy / example.FILE).unlink()
    assert example.FILE not in bundle.load(copy).description.files


def test_without_a_tokenizer_there_are_ids_alone(tmp_path):
    source = shutil.copytree(checkpoint.SHIPPED, tmp_path / "source")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    bundle.write(checkpoint.load(source), tmp_path / "out", answered=True)
    opened = bundle.load(tmp_path / "out")
    found = read(opened)
    config = opened.config
    assert found["input_ids"] == [config.image_token] * config.vision.patches + [config.bos]
    assert (found["prompt"], found["answer"]) == (None, None)


def test_why_there_is_no_answer(tmp_path, capfd):
    assert export_onnx(["--output", str(tmp_path / "out"), "--precision", "bfloat16"]) == 0
    assert read(bundle.load(tmp_path / "out"))["answer"] is None
    assert "example.json has no answer: the CPU has no kernels for bfloat16" in capfd.readouterr().err


def test_too_little_memory_costs_the_answer_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(example.memory, "available", lambda: 1e6)
    bundle.write(checkpoint.load(), tmp_path / "out", "int8", answered=True)
    assert read(bundle.load(tmp_path / "out"))["answer"] is None
    assert "example.json has no answer: there is not enough memory" in capfd.readouterr().err


def test_verification_notices_a_wrong_token(shipped, tmp_path):
    copy = shutil.copytree(shipped.path, tmp_path / "copy")
    (row,) = verify.compare_example(checkpoint.load(), bundle.load(copy))
    assert (row.error, row.taps) == (0, len(read(shipped)["answer"]["tokens"]) + 1)
    found = read(shipped)
    found["answer"]["tokens"][4] += 1
    corpus.sealed(copy, example.FILE, example.as_json(found))
    (row,) = verify.compare_example(checkpoint.load(), bundle.load(copy))
    assert row.error > 100 * verify.BUDGETS["float32"]
    assert row.worst == "token 5"
    found["answer"]["tokens"] = found["answer"]["tokens"][:4]  # ended too early
    corpus.sealed(copy, example.FILE, example.as_json(found))
    assert verify.compare_example(checkpoint.load(), bundle.load(copy))[0].worst == "token 5"
