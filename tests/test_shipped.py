"""The model that ships: small, answering sensibly, and the same in every implementation."""

import json

import numpy as np
import pytest
import torch

from export import bundle
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.generate import NumpyEngine, answers, generate
from numpy_ref.image import preprocess
from numpy_ref.tokenizer import Tokenizer
from torch_impl import evaluate, scenes
from torch_impl.load import TorchEngine

COUNT = 50


@pytest.fixture(scope="module")
def shipped():
    return checkpoint.load(SHIPPED)


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return Tokenizer.load(SHIPPED, shipped.config)


@pytest.fixture(scope="module")
def questions():
    """50 held-out pictures with a prompt each, of every task."""
    tasks = {"caption": 20, "detect": 20, "answer": 10}
    return [example for task, count in tasks.items() for example in evaluate.held_out(7, count, task)]


def ask(engine, tokenizer, questions) -> list[list[int]]:
    """Greedy tokens of each picture alone, as the commands run it."""
    rows = []
    for scene, prefix, _ in questions:
        pixels = preprocess(scenes.draw(scene), engine.config.vision.image_size)
        tokens = list(generate(engine, pixels, [tokenizer.prompt(prefix)], tokenizer.known(), 64))
        rows += answers(tokens, engine.config.eos)
    return rows


@pytest.fixture(scope="module")
def reference(shipped, tokenizer, questions):
    return ask(NumpyEngine(shipped), tokenizer, questions)


def test_fifty_questions_one_answer_each(shipped, tokenizer, questions, reference):
    assert len(questions) == COUNT
    assert ask(TorchEngine(shipped), tokenizer, questions) == reference
    assert ask(Session(bundle.load(bundle.shipped()), "cpu"), tokenizer, questions) == reference


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_tokens(tokenizer, questions, reference):
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(SHIPPED, attn_implementation="eager").eval()
    size, eos = model.config.vision_config.image_size, model.config.eos_token_id
    for (scene, prefix, _), expected in zip(questions, reference, strict=True):
        ids = torch.tensor([tokenizer.prompt(prefix)])
        pixels = torch.from_numpy(preprocess(scenes.draw(scene), size))
        tokens = model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids),
            max_new_tokens=64, do_sample=False,
        )  # fmt: skip
        row = tokens[0, ids.shape[1] :].tolist()
        assert (row[: row.index(eos)] if eos in row else row) == expected


def test_it_answers_sensibly(shipped, tokenizer):
    """Held-out accuracy on 50 scenes a task, below what training.json records by four standard errors at most."""
    measured = evaluate.measure(TorchEngine(shipped), tokenizer, seed=11, count=COUNT)
    recorded = json.loads((SHIPPED / "training.json").read_text())["held_out"]
    for task, value in measured.items():
        assert value >= recorded[task] - 4 * np.sqrt(0.25 / COUNT), task
        assert value > 0.5, task


def test_a_batch_of_scenes_answers_as_its_rows(shipped, tokenizer, questions, reference):
    engine = Session(bundle.load(bundle.shipped()), "cpu")
    texts = evaluate.answer_all(engine, tokenizer, questions)
    assert texts == [tokenizer.decode(row) for row in reference]


def test_the_size_of_what_ships():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 12e6
    names = {file.name for file in SHIPPED.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer.json",
        "training.json",
        "example.png",
    } <= names


# --- the data it learned from ------------------------------------------------------------------------------


def test_scenes_repeat():
    first = [scenes.random_scene(np.random.default_rng(5)) for _ in range(2)]
    assert first[0] == first[1]
    assert np.array_equal(*[np.asarray(scenes.draw(scene)) for scene in first])


def test_boxes_frame_their_shapes():
    """Every box touches its shape on all four sides, within two pixels of a 448 pixel picture."""
    for seed in range(30):
        scene = scenes.random_scene(np.random.default_rng(seed), most=1)
        (thing,) = scene.things
        bare = np.asarray(scenes.draw(scenes.Scene((), scene.ground, scene.tones, scene.seed), 448)).astype(int)
        rows, columns = np.nonzero(np.abs(np.asarray(scenes.draw(scene, 448)) - bare).max(-1) > 12)
        x1, y1, x2, y2 = (448 * fraction for fraction in thing.box)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.array(found) - [x1, y1, x2, y2]).max() <= 3, thing


def test_answers_follow_from_the_scene():
    thing = scenes.Thing("red", "star", "small", 4, 8, 7)
    other = scenes.Thing("blue", "circle", "large", 16, 0, 16)
    scene = scenes.Scene((thing, other), "plain", ((120, 120, 120), (140, 140, 140)), 0)
    assert scenes.caption(scene) == "a small red star and a large blue circle on a plain ground"
    assert scenes.detect(scene, ["red star"]) == "<loc0256><loc0128><loc0480><loc0352> red star"
    assert scenes.detect(scene, ["circle", "star"]).count(" ; ") == 1
    assert scenes.detect(scene, ["green star"]) == ""


def test_f1_by_hand():
    box, moved = "<loc0000><loc0000><loc0512><loc0512> star", "<loc0000><loc0100><loc0512><loc0612> star"
    far, other = "<loc0600><loc0600><loc0900><loc0900> star", "<loc0000><loc0000><loc0512><loc0512> circle"
    assert evaluate.f1([box], [box]) == 1
    assert evaluate.f1([moved], [box]) == 1  # an overlap of 0.67
    assert evaluate.f1([far], [box]) == 0
    assert evaluate.f1([other], [box]) == 0
    assert evaluate.f1([f"{box} ; {far}"], [box]) == pytest.approx(2 / 3)
    assert evaluate.f1([""], [""]) == 1
