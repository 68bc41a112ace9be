"""Boxes out of answers, and over pictures."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from numpy_ref import detection
from numpy_ref.cli import heatmap
from numpy_ref.detection import Box
from numpy_ref.model import paligemma

from .models import CONFIGS, random_batch, random_params

CODES = "".join(f"<seg{i:03d}>" for i in range(16))


def test_several_objects():
    boxes = detection.parse(
        "<loc0000><loc0512><loc1023><loc1023> red cat ; <loc0100><loc0200><loc0300><loc0400> dog", 200, 100
    )
    assert [box.label for box in boxes] == ["red cat", "dog"]
    assert (boxes[0].x1, boxes[0].y1, boxes[0].x2, boxes[0].y2) == pytest.approx((100.098, 0, 200, 100), abs=1e-3)


def test_conventions():
    text = "<loc0000><loc0000><loc0512><loc0512> x"
    assert detection.parse(text, 1024, 1024, "huggingface")[0].x2 == 512
    assert detection.parse(text, 1023, 1023, "big_vision")[0].x2 == 512


def test_masks_carry_their_codes():
    (box,) = detection.parse(f"<loc0001><loc0002><loc0003><loc0004> {CODES} cat", 10, 10)
    assert (box.label, box.codes) == ("cat", tuple(range(16)))
    assert box.as_json()["codes"] == tuple(range(16))


CASES = json.loads((Path(__file__).parent / "detections.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", CASES, ids=[case["what"] for case in CASES])
def test_how_an_answer_is_read(case):
    """The table that the JavaScript parser is held to as well (test_hosts.py)."""
    found = detection.parse(case["text"], 1023, 1023)
    assert [box.label for box in found] == [box["label"] for box in case["boxes"]]
    assert [list(box.codes) for box in found] == [box.get("codes", []) for box in case["boxes"]]
    places = [(box.y1, box.x1, box.y2, box.x2) for box in found]
    assert np.allclose(np.reshape(places, (-1, 4)), np.reshape([box["locations"] for box in case["boxes"]], (-1, 4)))
    detection.draw(Image.new("RGB", (40, 30)), found)  # inverted and flat ones too


@given(st.text(), st.text(), st.sampled_from([" ; ", ";", " ;"]))
def test_any_label_comes_back(first, second, separator):
    """Whatever a label holds, it ends where the next object begins."""
    first, second = (re.sub("<(loc|seg)|;", "", label) for label in (first, second))
    box = "<loc0001><loc0002><loc0300><loc0400>"
    found = detection.parse(f"{box} {first}{separator}{box} {second}", 10, 10)
    words = [re.findall("[^ \t-\r]+", label) for label in (first, second)]
    assert [each.label for each in found] == [" ".join(each) for each in words]


def test_long_answers_are_read_at_once():
    """Blanks and separators are not tried in a million ways."""
    box, started = "<loc0001><loc0002><loc0300><loc0400>", time.perf_counter()
    for filling in (
        " " * 100_000,
        " ;" * 50_000,
        ";" * 100_000,
        "<seg001>" * 20_000,
        "<loc0001>" * 20_001,
        "<" * 10**5,
    ):
        detection.parse(box + filling, 10, 10)
        detection.parse(filling + box + filling, 10, 10)
    assert time.perf_counter() - started < 10


@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_encoding_inverts_to_half_a_step(corners):
    x1, y1, x2, y2 = corners
    boxes = detection.parse(detection.encode(x1, y1, x2, y2) + " thing", 1, 1)
    (box,) = boxes  # flat and inverted ones are boxes too
    assert np.allclose((box.x1, box.y1, box.x2, box.y2), corners, atol=0.5001 / 1023)


def test_intersection_over_union():
    a = Box("", 0, 0, 2, 2)
    assert detection.intersection_over_union(a, a) == 1
    assert detection.intersection_over_union(a, Box("", 1, 0, 3, 2)) == pytest.approx(2 / 6)
    assert detection.intersection_over_union(a, Box("", 5, 5, 6, 6)) == 0
    inverted = Box("", 2, 2, 0, 0)  # of two negative sides: no area all the same
    assert detection.intersection_over_union(a, inverted) == detection.intersection_over_union(inverted, inverted) == 0


def test_drawing_marks_the_box():
    image = Image.new("RGB", (64, 48), "white")
    drawn = detection.draw(image, [Box("cat", 16, 12, 48, 36)], "detect cat", "1 found")
    assert drawn.width >= 448
    assert drawn.height > 48 * drawn.width // 64  # the caption's strip
    pixels = np.asarray(drawn)
    zoom = drawn.width // 64
    assert (pixels[24 * zoom, 16 * zoom] != 255).any()  # the left edge
    assert (pixels[24 * zoom, 32 * zoom] == 255).all()  # the middle is left as it was


@pytest.mark.parametrize(
    "size", [(3, 3000), (1, 5000), (2, 65000), (5000, 1), (1, 1), (224, 224), (1000, 700), (447, 9000)]
)
def test_a_drawing_is_bounded(size):
    """It is never enlarged beyond a fixed height, whatever the picture's shape; narrow ones get room for the words."""
    drawn = detection.draw(Image.new("RGB", size), [Box("cat", 0, 0, *size)])
    width, height = size
    assert drawn.width >= 448
    assert drawn.height <= max(height, 2048)
    assert drawn.width <= max(width, 2 * 448)
    assert np.asarray(drawn).shape == (drawn.height, drawn.width, 3)


def test_mask_tokens_that_do_not_exist():
    """Spelled from letters, `<seg900>` can come out of a model; a box with such codes is a box without a mask."""
    text = f"<loc0001><loc0002><loc0300><loc0400>{'<seg900>' * 16} cat"
    assert [box.codes for box in detection.parse(text, 10, 10)] == [()]


def test_a_label_is_one_line():
    (box,) = detection.parse("<loc0001><loc0002><loc0300><loc0400> black\n  cat", 10, 10)
    assert box.label == "black cat"
    detection.draw(Image.new("RGB", (40, 30)), [box])


def test_masks_are_drawn_over_the_picture():
    mask = np.zeros((30, 40), bool)
    mask[10:20, 5:25] = True
    boxes = [Box("cat", 5, 10, 25, 20), Box("dog", 30, 2, 38, 9)]
    drawn = np.asarray(detection.draw(Image.new("RGB", (40, 30), "gray"), boxes, masks=[mask, None]))
    assert (drawn[15 * 12, 15 * 12] != 128).any()
    assert (drawn[25 * 12, 35 * 12] == 128).all()


# --- what an answer looked at ------------------------------------------------------------------------------


def test_attention_over_the_picture():
    """A map a token; what the picture gets is a share of one, and depends on the picture."""
    config = CONFIGS["paligemma2"]
    params = random_params(config)
    pixels, _, _ = random_batch(config)
    prompt, answer = [*[config.image_token] * config.vision.patches, 2, 7, 9], [11, 13, 17, 19]
    maps = [
        heatmap.attention_over_picture(params, config, picture[None].astype(np.float64), prompt, answer)
        for picture in pixels[:2]
    ]
    assert maps[0].shape == (4, 3, 3)
    assert (maps[0] > 0).all()
    assert (maps[0].sum((1, 2)) < 1).all()
    assert not np.allclose(*maps)
    drawn = heatmap.draw(Image.new("RGB", (40, 30), "white"), maps[0], ["a", "b", "c", "d"])
    assert drawn.width == 4 * 200 - 8


def test_the_first_map_is_the_prefills():
    """The token that prefill chooses was chosen from what the last position of the prompt attended to."""
    config = CONFIGS["paligemma1"]
    params = random_params(config)
    pixels, ids, lengths = random_batch(config, prefix_sizes=(5,))
    weights = []

    def tap(name, value):
        if name.endswith("attention.weights") and name.startswith("text."):
            weights.append(value[0, :, -1, : config.vision.patches].mean(0))
        return value

    pixels = pixels.astype(np.float64)
    paligemma.prefill(params, config, pixels, ids, lengths, 40, tap)
    maps = heatmap.attention_over_picture(params, config, pixels, ids[0].tolist(), [7, 11])
    assert np.allclose(maps[0].ravel(), np.mean(weights, axis=0))
