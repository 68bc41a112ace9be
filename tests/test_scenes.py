"""The drawn data: scenes repeat, boxes and masks fit what is drawn, answers follow from the scene."""

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest

from numpy_ref import detection, scenes
from numpy_ref.answer import Answer
from numpy_ref.scenes import Scene, Thing, evaluate, questions


def no_mask(mask, box):
    return ""


def some(count, **options):
    rng = np.random.default_rng(5)
    return [scenes.random_scene(rng, **options) for _ in range(count)]


def test_scenes_repeat():
    first, again = some(2), some(2)
    assert first == again
    assert first[0] != first[1]
    assert np.array_equal(first[0].draw(), again[0].draw())


def test_the_splits():
    """Training shows every color and every shape, but never a held-out pair; the other split always does."""
    seen = [thing for scene in some(600) for thing in scene.things]
    assert {thing.color for thing in seen} == set(scenes.COLORS)
    assert {thing.shape for thing in seen} == set(scenes.SHAPES)
    assert not any(thing.is_held_out for thing in seen)
    assert all(any(thing.is_held_out for thing in scene.things) for scene in some(200, compositional=True))
    assert len(scenes.HELD_OUT) == len({color for color, _ in scenes.HELD_OUT}) == 7


def test_shades():
    """Each is called by the color that is nearest, so no held-out pair comes in by another paint."""
    shaded = [thing for scene in some(300, shaded=1.0) for thing in scene.things]
    for thing in shaded:
        away = {name: np.linalg.norm(np.subtract(thing.rgb, rgb)) for name, rgb in scenes.COLORS.items()}
        assert min(away, key=away.get) == thing.color
        assert not thing.is_held_out
    assert len({thing.rgb for thing in shaded}) > 0.9 * len(shaded)
    share = np.mean([scene.things[0].paint is not None for scene in some(600, shaded=0.6)])
    assert 0.5 < share < 0.7
    assert not any(thing.paint for scene in some(100) for thing in scene.things)  # nor where a model is measured


def test_a_shade_is_what_is_drawn():
    thing = Thing("red", "square", 8, 8, 12, (180, 60, 50))
    picture = np.asarray(Scene((thing,), "plain", ((150,) * 3, (150,) * 3), 0, 1).draw(320))
    assert np.abs(picture[140, 140].astype(int) - thing.paint).max() <= 1


def test_scenes_are_rich():
    counts = Counter(len(scene.things) for scene in some(600))
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert min(counts.values()) > 20
    overlapping = 0
    for scene in some(300):
        for i, a in enumerate(scene.things):
            for b in scene.things[i + 1 :]:
                assert b.x - a.x >= scenes.STEP
                assert a.leaves_room_for(b)
                overlapping += a.x + a.side > b.x and max(a.y, b.y) < min(a.y + a.side, b.y + b.side)
    assert overlapping > 50


def test_boxes_frame_their_shapes():
    """Every box touches its shape on all four sides, within three pixels of a 448 pixel picture."""
    for scene in some(30, most=1):
        (thing,) = scene.things
        bare = np.asarray(Scene((), scene.ground, scene.tones, 0, scene.seed).draw(448)).astype(int)
        full = np.asarray(Scene(scene.things, scene.ground, scene.tones, 0, scene.seed).draw(448)).astype(int)
        rows, columns = np.nonzero(np.abs(full - bare).max(-1) > 12)
        x1, y1, x2, y2 = (448 * fraction for fraction in thing.box)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(np.array(found) - [x1, y1, x2, y2]).max() <= 3, thing


def test_masks_are_what_is_seen():
    """The pixels of a mask have the thing's color; what lies over it is not in the mask."""
    for scene in some(20):
        quiet = Scene(scene.things, scene.ground, scene.tones, 0, scene.seed)
        picture = np.asarray(quiet.draw(224)).astype(int)
        for index, thing in enumerate(scene.things):
            mask = quiet.visible(index, 224)
            right = np.abs(picture[mask] - scenes.COLORS[thing.color]).max(-1) < 12
            assert mask.any()
            assert right.mean() > 0.85  # edges are blended


THINGS = (Thing("red", "star", 4, 8, 7), Thing("orange", "circle", 16, 0, 12), Thing("blue", "star", 20, 20, 9))
SCENE = Scene(THINGS, "plain", ((120, 120, 120), (140, 140, 140)), 0, 0)


def test_answers_follow_from_the_scene():
    assert questions.caption(SCENE) == "a red star, an orange circle and a blue star on a plain ground"
    assert questions.detect(SCENE, ["red star"]) == "<loc0256><loc0128><loc0480><loc0352> red star"
    assert [box.label for box in detection.parse(questions.detect(SCENE, ["circle", "star"]), 1, 1)] == [
        "star", "circle", "star",
    ]  # fmt: skip
    assert questions.detect(SCENE, ["green star"]) == ""


@pytest.mark.parametrize("compositional", [False, True])
def test_every_question_has_one_right_answer(compositional):
    """Questions asked of random scenes, answered again from the scene."""
    rng = np.random.default_rng(3)
    kinds = Counter()
    for _ in range(400):
        question = questions.random_question(rng, no_mask, compositional=compositional)
        things, words = question.scene.things, question.prefix.removesuffix("?").split()
        kinds[question.task, *words[2:4]] += 1
        if question.task == "answer":
            assert question.suffix == answer(things, words)
        elif question.task == "segment":
            name = question.prefix.removeprefix("segment ")
            meant = [i for i, thing in enumerate(things) if name in (thing.shape, thing.name)]
            assert meant == [question.target]
        if compositional and question.task in ("detect", "segment") and question.suffix:
            labels = [box.label for box in detection.parse(question.suffix, 1, 1)]
            assert any(thing.is_held_out and label in (thing.name, thing.shape) for thing in things for label in labels)
    assert {task for task, *_ in kinds} == set(questions.TASKS)
    assert kinds["answer", "what", "color"] > 5
    assert kinds["answer", "how", "many"] > 5


def answer(things, words):
    kind, subject = words[2:4]
    if kind == "how":
        name = words[4]
        singular = {f"{shape}es" if shape == "cross" else f"{shape}s": shape for shape in scenes.SHAPES}
        found = [t for t in things if name in ("shapes", t.color) or singular.get(name) == t.shape]
        return str(len(found))
    (thing,) = [t for t in things if words[-1] in (t.color, t.shape)]
    return thing.color if subject == "color" else thing.shape


def test_misnaming():
    """One name in seven or so is another, of its own kind; all other words stay."""
    rng, text = np.random.default_rng(0), "a red square, an orange circle and a black ring on a striped ground"
    texts = [questions.misname(rng, text, 0.15) for _ in range(1000)]
    places = [np.array([word.strip(",") for word in row.split()]) for row in (text, *texts)]
    changed = np.mean([row != places[0] for row in places[1:]], axis=0)
    names = [word in scenes.COLORS or word in scenes.SHAPES for word in places[0]]
    assert (changed[~np.array(names)] == 0).all()
    assert np.abs(changed[names] - 0.15 * 7 / 8).max() < 0.04
    for row in places[1:]:
        kinds = [set(scenes.COLORS) if word in scenes.COLORS else set(scenes.SHAPES) for word in places[0][names]]
        assert all(word in kind for word, kind in zip(row[names], kinds, strict=True))
    assert questions.misname(rng, text, 0) == text


def test_misnaming_begins_where_it_should():
    """Before that, and where a suffix repeats the prefix, every name is right."""
    from numpy_ref.checkpoint import SHIPPED, load_config
    from numpy_ref.model.segmentation import find, load
    from numpy_ref.tokenizer import Tokenizer
    from torch_impl.train.data import Scenes

    tokenizer, codec = Tokenizer.load(SHIPPED, load_config(SHIPPED)), load(find(SHIPPED))
    clean, later = (
        Scenes(tokenizer, codec, 24, seed=2, **more) for more in ({}, {"misnamed": 0.15, "misnamed_from": 60})
    )
    different = []
    for i in range(120):
        (_, prompt, suffix), (_, same, other) = clean[i], later[i]
        assert prompt == same
        if suffix != other:
            different.append(i)
            assert tokenizer.decode(prompt).split()[0] in ("caption", "answer")
    assert len(different) > 10
    assert min(different) >= 60


def test_f1_by_hand():
    box, moved = "<loc0000><loc0000><loc0512><loc0512> star", "<loc0000><loc0100><loc0512><loc0612> star"
    far, other = "<loc0600><loc0600><loc0900><loc0900> star", "<loc0000><loc0000><loc0512><loc0512> circle"
    assert evaluate.f1([box], [box]) == 1
    assert evaluate.f1([moved], [box]) == 1  # an overlap of 0.67
    assert evaluate.f1([far], [box]) == 0
    assert evaluate.f1([other], [box]) == 0
    assert evaluate.f1([f"{box} ; {far}"], [box]) == pytest.approx(2 / 3)
    assert evaluate.f1([""], [""]) == 1


def test_mask_iou_of_right_and_wrong_answers(monkeypatch):
    from numpy_ref.checkpoint import SHIPPED
    from numpy_ref.model import segmentation
    from torch_impl.model.segmentation import Speller

    codec = segmentation.load(segmentation.find(SHIPPED))
    masks = partial(segmentation.decode, codec)
    rng = np.random.default_rng(8)
    monkeypatch.setattr(evaluate, "MASKED_AT", 1024)  # in small pictures whole pixels cost more: 0.94 at 256
    asked = [questions.random_question(rng, Speller(codec), "segment") for _ in range(20)]

    def iou(text, question, decode=masks):
        return evaluate.mask_iou(Answer(text, [], 1, 1, decode_masks=decode), question)

    right = [iou(question.suffix, question) for question in asked]
    assert np.mean(right) > 0.95  # what the codec itself can do
    shifted = [iou(b.suffix, a) for a, b in itertools.pairwise(asked)]
    assert np.mean(shifted) < 0.3
    assert iou("", asked[0]) == 0
    assert iou(asked[0].suffix, asked[0], None) == 0
