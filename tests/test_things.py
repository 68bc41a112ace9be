"""Scenes of everyday things: they repeat, boxes and masks fit what is drawn, answers follow from the scene."""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from numpy_ref import detection, scenes, things
from numpy_ref.checkpoint import SHIPPED, parameters
from numpy_ref.image import preprocess
from numpy_ref.model import segmentation
from numpy_ref.scenes import evaluate as scores
from numpy_ref.things import Scene, Thing, catalogue, demo, evaluate, grounds, names, questions, stamps
from numpy_ref.tokenizer import SentencePiece, Tokenizer
from torch_impl.model.paligemma import PaliGemma
from torch_impl.model.segmentation import Speller
from torch_impl.train import data, loop, pretrain
from torch_impl.train import things as recipe
from torch_impl.train.finetune import prefix_lm_loss
from torch_impl.train.tokenizer import train_tokenizer

TONES = ((150, 150, 150), (170, 170, 170))


def no_mask(mask, box):
    return ""


def some(count, seed=5, **options):
    rng = np.random.default_rng(seed)
    return [things.random_scene(rng, **options) for _ in range(count)]


def test_scenes_repeat():
    first, again = some(3), some(3)
    assert first == again
    assert len(set(first)) == 3
    assert all(np.array_equal(a.draw(96), b.draw(96)) for a, b in zip(first, again, strict=True))


def test_what_there_is_to_see():
    """Enough things, each with a picture of its own that fills its cell one way, and names that fit no other."""
    kinds = Counter(entry.kind for entry in catalogue.ENTRIES)
    assert len(catalogue.ENTRIES) >= 96
    assert set(kinds) == {"animal", "food", "vehicle", "tool", "sign"}
    pictures = [np.asarray(stamps.stamp(entry.name)) for entry in catalogue.ENTRIES]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    assert all(picture.shape[2] == 4 and max(picture.shape[:2]) >= stamps.CELL - 2 for picture in pictures)
    for language in catalogue.LANGUAGES:
        nouns = [nouns[language] for nouns in catalogue.NOUNS.values()]
        assert language == "en" or all(noun.gender in ("m", "f", "n") for noun in nouns)
        assert len({noun.one for noun in nouns}) >= len(nouns) - 1  # Spanish has one word for some two things
    assert sum(file.stat().st_size for file in catalogue.DATA.iterdir()) < 1.5e6
    assert {"LICENSE-APACHE.txt", "LICENSE-OFL.txt", "README.md"} <= {file.name for file in catalogue.DATA.iterdir()}


def test_every_letter_is_drawn_in_every_font():
    for font in range(stamps.fonts()):
        letters = [np.asarray(stamps.stamp("word", letter, font)) for letter in stamps.LETTERS]
        assert len({letter.tobytes() for letter in letters}) == 26
        assert all((letter > 200).any() for letter in letters)
        wide = stamps.stamp("word", "MOW", font)
        assert 1.5 < wide.width / wide.height < 6


# --- the splits --------------------------------------------------------------------------------------------


def test_training_shows_everything_but_new_compositions():
    seen = some(1500)
    every = [thing for scene in seen for thing in scene.things]
    assert {thing.name for thing in every} == {*catalogue.NOUNS}
    assert {thing.color for thing in every} == {"", *scenes.COLORS}
    assert {scene.ground for scene in seen} == set(grounds.KINDS)
    assert not any(scene.novelty(i) for scene in seen for i in range(len(scene.things)))
    for thing in every:
        assert (thing.color, thing.name) not in things.HELD_OUT
        if thing.name in catalogue.PICTURED and not thing.color:
            assert thing.place != things.held_out_place(thing.name)
    assert {thing.place for thing in every} == {0, 1, 2, 3}
    assert not {thing.text for thing in every} & set(catalogue.NEW_WORDS)


def test_the_other_split_always_has_a_new_composition():
    found = Counter()
    for scene in some(400, compositional=True):
        new = [scene.novelty(i) for i in range(len(scene.things)) if scene.novelty(i)]
        assert new
        found.update(new)
    assert min(found[kind] for kind in things.NOVELTIES) > 50
    words = [thing.text for scene in some(60, compositional=True, word=True) for thing in scene.things if thing.text]
    assert len(words) == 60
    assert set(words) <= set(catalogue.NEW_WORDS)


def test_each_shape_and_color_is_held_out_once_or_more():
    shapes = [pair for pair in things.HELD_OUT if pair[1] in catalogue.SHAPES]
    assert {name for _, name in shapes} == set(catalogue.SHAPES)
    assert {color for color, _ in shapes} == set(scenes.COLORS)
    assert len(shapes) == len(catalogue.SHAPES)
    assert not set(catalogue.WORDS) & set(catalogue.NEW_WORDS)


def test_scenes_are_rich():
    found = some(600)
    counts = Counter(len(scene.things) for scene in found)
    assert set(counts) == set(range(1, things.MOST + 1))
    assert min(counts.values()) > 40
    every = [thing for scene in found for thing in scene.things]
    assert 0.2 < np.mean([thing.turn == 0 for thing in every]) < 0.6
    assert 0.3 < np.mean([thing.mirrored for thing in every]) < 0.6
    assert not any(thing.mirrored for thing in every if things.is_sign(thing.name))
    sides = [thing.side for thing in every if thing.name != "word"]
    assert min(sides) < 9 < 20 < max(sides)
    overlapping = 0
    for scene in found:
        for i, a in enumerate(scene.things):
            for b in scene.things[i + 1 :]:
                assert (b.box[0] - a.box[0]) * things.GRID >= things.STEP
                assert a.leaves_room_for(b)
                overlapping += not apart(a.box, b.box)
    assert overlapping > 60


def apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# --- pictures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [None, True])
def test_boxes_frame_what_is_drawn(word):
    """Turned, mirrored or not: every box touches its thing on all four sides, within three pixels of 448."""
    for scene in some(60, seed=8, most=1, word=word):
        (thing,) = scene.things
        seen = scene.visible(0, 448)
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(np.array(found) - [448 * side for side in thing.box]).max() <= 3, thing
        assert 0 <= min(thing.box) < max(thing.box) <= 1


def test_a_mask_is_what_is_drawn():
    """Where nothing is stamped the picture is the ground; where the mask is, it is not."""
    for scene in some(30, seed=2, most=2):
        quiet = replace(scene, noise=0.0)
        bare, full = (np.asarray(each.draw(224)).astype(int) for each in (replace(quiet, things=()), quiet))
        changed = np.abs(full - bare).max(-1) > 40
        masks = np.any([quiet.visible(i, 224) for i in range(len(quiet.things))], 0)
        assert (changed & ~masks).mean() < 0.01
        assert (changed & masks).sum() > 0.5 * masks.sum()


def test_what_lies_above_is_cut_from_a_mask():
    below, above = Thing("apple", 14, 16, 14), Thing("book", 18, 16, 10)
    scene = Scene((below, above), "plain", TONES, 0, 1)
    assert not (scene.visible(0, 224) & scene.visible(1, 224)).any()
    alone = Scene((below,), "plain", TONES, 0, 1)
    assert scene.visible(0, 224).sum() < 0.8 * alone.visible(0, 224).sum()


def test_paint_is_what_is_seen():
    circle = Thing("circle", 16, 16, 20, color="red", paint=(180, 60, 50))
    picture = np.asarray(Scene((circle,), "plain", TONES, 0, 1).draw(224)).astype(int)
    assert np.abs(picture[112, 112] - circle.rgb).max() <= 2
    cat = Thing("cat", 16, 16, 20, color="purple")
    scene = Scene((cat,), "plain", TONES, 0, 1)
    red, green, blue = np.asarray(scene.draw(224))[scene.visible(0, 224)].astype(float).mean(0)
    assert blue > green + 30
    assert red > green + 15


@pytest.mark.parametrize("kind", grounds.KINDS)
def test_grounds(kind):
    """Each in any size, the same in small as reduced; none is as strong in color as what is painted."""
    rng = np.random.default_rng(4)
    scene = Scene((), kind, grounds.tones_of(kind, rng), 0, 7)
    large, small = scene.draw(224), np.asarray(scene.draw(112)).astype(float)
    reduced = np.asarray(large.resize((112, 112), Image.Resampling.BOX)).astype(float)
    assert np.abs(reduced.mean((0, 1)) - small.mean((0, 1))).max() < 12
    spread = np.asarray(large).astype(float)
    assert (spread.max(-1) - spread.min(-1)).mean() < 110


# --- questions ---------------------------------------------------------------------------------------------

SCENE = Scene(
    (
        Thing("dog", 5, 8, 8), Thing("star", 12, 22, 8, color="red"), Thing("dog", 19, 8, 8),
        Thing("word", 26, 24, 9, paint=(0, 0, 0), text="EXIT"),
    ),
    "grass", TONES, 0, 0,
)  # fmt: skip


def test_captions_in_three_languages():
    assert names.caption(SCENE) == "two dogs, a red star and a word on grass"
    assert names.caption(SCENE, "de") == "zwei Hunde, ein roter Stern und ein Wort auf Gras"
    assert names.caption(SCENE, "es") == "dos perros, una estrella roja y una palabra sobre hierba"
    assert names.phrase("apple", "", 1, "en") == "an apple"
    assert names.phrase("umbrella", "orange", 1, "en") == "an orange umbrella"
    assert names.phrase("house", "blue", 3, "de") == "drei blaue Häuser"
    assert names.phrase("house", "blue", 1, "de") == "ein blaues Haus"
    assert names.phrase("axe", "red", 1, "es") == "un hacha roja"
    assert names.phrase("stop sign", "", 2, "es") == "dos señales de stop"


def test_detections_by_hand():
    boxes = detection.parse(questions.detect(SCENE, ["star", "dog"]), 1, 1)
    assert [box.label for box in boxes] == ["dog", "star", "dog"]
    assert boxes[0].corners == pytest.approx(SCENE.things[0].box, abs=1 / 1023)
    assert questions.detect(SCENE, ["cat"]) == questions.detect(SCENE, ["blue star"]) == "none"


@pytest.mark.parametrize("compositional", [False, True])
@pytest.mark.parametrize("task", questions.MEASURED)
def test_every_question_has_one_right_answer(task, compositional):
    """Questions asked of random scenes, answered again from the scene."""
    rng = np.random.default_rng(3)
    for _ in range(150):
        question = questions.random_question(rng, no_mask, task, compositional)
        if question.prefix.startswith("answer"):
            assert question.suffix == answer(question.scene.things, question.prefix), question
        elif question.prefix == "ocr":
            assert question.suffix == next((t.text for t in question.scene.things if t.text), "none")
        elif question.task == "segment" and question.target is not None:
            name = question.prefix.removeprefix("segment ")
            meant = [i for i, t in enumerate(question.scene.things) if name in (t.name, t.label)]
            assert meant == [question.target]
        elif question.task in ("detect", "segment", "absent"):
            queries = question.prefix.partition(" ")[2].split(" ; ")
            wanted = [t for t in question.scene.things if {t.name, t.label} & {*queries}]
            assert [box.label in (t.name, t.label) for box, t in
                    zip(detection.parse(question.suffix, 1, 1), wanted, strict=True)] == [True] * len(wanted)  # fmt: skip
            assert (question.suffix == "none") == (not wanted)
        else:
            language = question.prefix.removeprefix("caption ")
            assert question.suffix == names.caption(question.scene, language)
        if task == "absent":
            assert question.suffix in ("none", "no", "0")


def answer(found, prompt):
    """What is right, from the words of the prompt and the things alone."""
    singular = {nouns["en"].many: name for name, nouns in catalogue.NOUNS.items()}

    def called(name):
        return [t for t in found if name in (t.name, t.label)]

    if prompt == questions.ALL:
        return str(len(found))
    if match := re.fullmatch(r"answer en how many (.*) are there\?", prompt):
        return str(len(called(singular[match[1]])))
    if match := re.fullmatch(r"answer en is there an? (.*)\?", prompt):
        return "yes" if called(match[1]) else "no"
    if match := re.fullmatch(r"answer en what color is the (.*)\?", prompt):
        return "none" if not (one := called(match[1])) else one[0].color or catalogue.PICTURED[match[1]].color
    if match := re.fullmatch(r"answer en what shape is (.*)\?", prompt):
        (one,) = [t for t in found if t.color == match[1] and t.name in catalogue.SHAPES]
        return one.name
    side, name = re.fullmatch(r"answer en what is (left|right) of the (.*)\?", prompt).groups()
    if not (one := called(name)):
        return "none"
    sign = 1 if side == "right" else -1
    beyond = sorted((sign * (t.x - one[0].x), t.label) for t in found if sign * (t.x - one[0].x) > 0)
    return beyond[0][1] if beyond else "none"


def test_training_never_says_that_a_new_composition_is_missing():
    """Else it would learn that there are none."""
    rng = np.random.default_rng(1)
    held_out = {f"{color} {name}" for color, name in things.HELD_OUT}
    for _ in range(600):
        question = questions.random_question(rng, no_mask, "absent")
        assert not any(re.search(rf"\b{label}\b", question.prefix) for label in held_out), question.prefix


def test_misnaming():
    rng, text = np.random.default_rng(0), "two red stars, a dog and a blue cross on a striped ground"
    texts = [questions.misname(rng, text, 0.3) for _ in range(600)]
    changed = np.mean([[a != b for a, b in zip(row.split(), text.split(), strict=True)] for row in texts], axis=0)
    kept = [0, 3, 4, 5, 6, 9, 10, 11, 12]
    assert (changed[kept] == 0).all()
    assert (changed[[1, 2, 7, 8]] > 0.2).all()
    assert all(row.split()[2].rstrip(",") in {nouns["en"].many for nouns in catalogue.NOUNS.values()} for row in texts)


# --- measuring, and examples -------------------------------------------------------------------------------


def test_held_out_questions_repeat_and_ask_for_what_is_there():
    for task in evaluate.SCORES:
        first, again = (evaluate.held_out(3, 20, task) for _ in range(2))
        assert first == again
        assert first != evaluate.held_out(4, 20, task)
        assert all((question.task == "absent") == (task == "absent") for question in first)
        if task in ("detect", "ocr"):
            assert not any(question.suffix == "none" for question in first)
        if task == "segment":
            assert all(question.target is not None for question in first)
    assert evaluate.held_out(0, 1, "caption de")[0].prefix == "caption de"
    assert set(evaluate.GOALS) < set(evaluate.SCORES.values())


def test_examples_are_checked():
    """One whose answers are the right ones passes, and one wrong answer is noticed."""
    scene = next(demo.candidates("word"))
    asked = demo.ask(scene)
    assert {question.prefix.split()[0] for question in asked} == {"caption", "detect", "segment", "answer", "ocr"}
    texts = [question for question in asked if question.task != "segment"]
    for question in texts:
        right = scores.Answer(question.suffix, [], 1, 1)
        assert scores.is_right(right, question)
        assert not scores.is_right(replace(right, text=right.text.replace("a", "e", 1) + "x"), question)
    (segment,) = (question for question in asked if question.task == "segment")
    assert not scores.is_right(scores.Answer(segment.suffix, [], 1, 1), segment)  # a box without a mask


# --- learning from them ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SentencePiece(train_tokenizer(0, recipe.VOCAB, recipe.text)), recipe.small_config())


def test_words_are_read_letter_by_letter_and_names_are_pieces(tokenizer):
    for text in (*catalogue.WORDS[:20], *catalogue.NEW_WORDS[:20]):
        assert [tokenizer.decode([piece]) for piece in tokenizer.encode(text)] == list(text)
    for name in catalogue.PICTURED:
        assert len(tokenizer.encode(f"a {name}")) == 1 + len(name.split()), name
    for language in catalogue.LANGUAGES:
        assert tokenizer.decode(tokenizer.encode(names.caption(SCENE, language))) == names.caption(SCENE, language)


def test_an_example_is_the_same_each_time(tokenizer):
    codec = segmentation.load(segmentation.find(SHIPPED))
    course = data.Course(growing=100, misnamed=0.5, misnamed_from=40)
    first, again = (data.Things(tokenizer, codec, 56, 3, course) for _ in range(2))
    clean = data.Things(tokenizer, codec, 56, 3, replace(course, misnamed=0.0))
    different = []
    for i in range(80):
        (pixels, prompt, suffix), (same_pixels, same_prompt, same_suffix) = first[i], again[i]
        assert np.array_equal(pixels, same_pixels)
        assert (prompt, suffix) == (same_prompt, same_suffix)
        assert pixels.shape == (3, 56, 56)
        assert suffix[-1] == tokenizer.config.eos
        assert len(prompt) + len(suffix) <= tokenizer.config.max_length
        different += [i] if clean[i][2] != suffix else []
    assert different
    assert min(different) >= 40


def test_scenes_grow():
    course = data.Course(growing=1000)
    assert [course.most(i) for i in (0, 199, 200, 799, 800, 10**6)] == [1, 1, 2, 4, 5, 5]
    assert data.Course().most(0) == things.MOST


def test_the_stages(tokenizer):
    """What is shipped stays small; a trial has the same stages with fewer steps; every stage has scenes of its own."""
    config = recipe.small_config()
    weights = 4 * sum(math.prod(parameter.shape) for parameter in parameters(config))
    beside = sum(file.stat().st_size for file in catalogue.DATA.iterdir()) + 1.2e6  # codec, tokenizers, examples
    assert weights + beside < 16e6
    plan = recipe.Plan().scaled(0.01, 7)
    assert (plan.training.steps, plan.training.seed) == (96, 7)
    run = recipe.Run(SHIPPED, 0, plan, "cpu")
    codec = segmentation.load(segmentation.find(SHIPPED))
    assert [run.examples(stage, codec).seed for stage in run.stages] == [0, 1, 2]
    assert sum(run.courses["finishing"].shares) == pytest.approx(1)
    assert sum(questions.SHARES) == pytest.approx(1)


def test_a_few_steps_lower_the_loss_of_every_task(tokenizer):
    """Of the recipe's own model, from nothing, on one batch that has all tasks."""
    torch.manual_seed(0)
    model = PaliGemma(recipe.small_config())
    pretrain.initialise(model)
    codec = segmentation.load(segmentation.find(SHIPPED))
    rng, masks = np.random.default_rng(0), Speller(codec)
    rows = [
        (
            preprocess(question.scene.draw(112), 112)[0],
            tokenizer.prompt(question.prefix),
            [*tokenizer.encode(question.suffix), tokenizer.config.eos],
        )
        for question in (questions.random_question(rng, masks, task) for task in questions.MEASURED)
    ]
    before = losses(model, rows)
    settings = loop.Settings(25, len(rows), peak=2e-3, warmup=5, optimizer="muon", bfloat16=False)
    optimizers, objective = loop.optimizers_for(model, settings), loop.Objective(model, prefix_lm_loss)
    for step in range(settings.steps):
        loop.take_step(
            objective, iter([data.collate(rows, 0)]), optimizers, settings, loop.learning_rate(step, settings)
        )
    assert all(after < 0.5 * first for first, after in zip(before, losses(model, rows), strict=True))


@torch.inference_mode()
def losses(model, rows):
    return [prefix_lm_loss(model, data.collate([row], 0)).item() for row in rows]
