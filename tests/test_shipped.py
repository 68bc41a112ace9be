"""The model that ships: small, answering sensibly, and the same in every implementation."""

import json

import numpy as np
import pytest
import torch

from export import bundle
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.engine import NumpyEngine
from numpy_ref.generate import answers, generate
from numpy_ref.image import preprocess
from numpy_ref.model import segmentation
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer
from torch_impl.load import TorchEngine
from torch_impl.train import recipe

SUITE = suite_of()  # what the shipped model is measured on
COUNT = 50


@pytest.fixture(scope="module")
def shipped():
    return checkpoint.load(SHIPPED)


@pytest.fixture(scope="module")
def codec():
    return segmentation.load(segmentation.find(SHIPPED))


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return Tokenizer.load(SHIPPED, shipped.config)


@pytest.fixture(scope="module")
def asked():
    """50 held-out pictures with a prompt each, of every task."""
    tasks = {"caption": 15, "detect": 15, "answer": 10, "segment": 10}
    return [question for task, count in tasks.items() for question in SUITE.held_out(7, count, task)]


def ask(engine, tokenizer, asked) -> list[list[int]]:
    """Greedy tokens of each picture alone, as the commands run it."""
    rows = []
    for question in asked:
        pixels = preprocess(evaluate.picture(question), engine.config.vision.image_size)
        tokens = list(generate(engine, pixels, [tokenizer.prompt(question.prefix)], tokenizer.known(), 64))
        rows += answers(tokens, engine.config.eos)
    return rows


@pytest.fixture(scope="module")
def reference(shipped, tokenizer, asked):
    return ask(NumpyEngine(shipped), tokenizer, asked)


def test_fifty_questions_one_answer_each(shipped, tokenizer, asked, reference):
    assert len(asked) == COUNT
    assert ask(TorchEngine(shipped), tokenizer, asked) == reference
    assert ask(Session(bundle.shipped(), "cpu"), tokenizer, asked) == reference


@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_the_same_tokens(tokenizer, asked, reference):
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(SHIPPED, attn_implementation="eager").eval()
    size, eos = model.config.vision_config.image_size, model.config.eos_token_id
    for question, expected in zip(asked, reference, strict=True):
        ids = torch.tensor([tokenizer.prompt(question.prefix)])
        pixels = torch.from_numpy(preprocess(evaluate.picture(question), size))
        tokens = model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids),
            max_new_tokens=64, do_sample=False,
        )  # fmt: skip
        row = tokens[0, ids.shape[1] :].tolist()
        assert (row[: row.index(eos)] if eos in row else row) == expected


def test_it_answers_as_well_as_recorded(shipped, tokenizer):
    """Accuracy on 50 other scenes a task and split, no more than four standard errors below training.json's."""
    measured = evaluate.measure(TorchEngine(shipped), tokenizer, seed=11, count=COUNT)
    recorded = json.loads((SHIPPED / "training.json").read_text())["held_out"]
    assert measured.keys() < recorded.keys()
    for split, wanted in ((measured, recorded), (measured["compositional"], recorded["compositional"])):
        for task in evaluate.SCORES.values():
            share = min(wanted[task], 1 - 1 / COUNT)  # a perfect record still leaves room for one miss
            assert split[task] >= share - 4 * np.sqrt(share * (1 - share) / COUNT), task
    assert all(measured[task] > 0.5 for task in evaluate.SCORES.values())


def test_a_batch_of_scenes_answers_as_its_rows(tokenizer, asked, reference):
    engine = Session(bundle.shipped(), "cpu")
    found = evaluate.answer_questions(engine, tokenizer, asked)
    assert [answer.tokens for answer in found] == reference
    assert [answer.text for answer in found] == [tokenizer.decode(row) for row in reference]


def test_masks_are_the_same_in_the_bundle(codec):
    engine = Session(bundle.shipped(), "cpu")
    codes = np.random.default_rng(0).integers(0, 128, (7, 16))
    expected = segmentation.decode(codec, codes)
    assert np.abs(engine.masks(codes) - expected).max() < 1e-5 * np.abs(expected).max()


def test_what_ships_is_small_and_whole():
    files = {file.name: file.stat().st_size for file in SHIPPED.iterdir()}
    assert sum(files.values()) <= 12e6
    assert files.keys() == {
        "config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
        "preprocessor_config.json", "training.json", "vae.npz", "example.png", "knows.json",
    }  # fmt: skip


def test_it_is_what_the_recipe_says(shipped):
    assert shipped.config == recipe.small_config()
    record = json.loads((SHIPPED / "training.json").read_text())
    assert record["stages"].keys() == {"mask codec", "contrastive", "all tasks", "mostly captions"}
    assert record["stages"]["all tasks"]["settings"]["steps"] == recipe.TRAINING.steps
    assert record["stages"]["all tasks"]["curve"]["rows"][-1][0] == recipe.TRAINING.steps
    assert (SHIPPED / "example.png").read_bytes() == recipe.png(recipe.example_picture())
