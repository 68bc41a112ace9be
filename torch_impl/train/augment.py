"""Other views of a training picture each time it is seen, its boxes with it.

    shift      moved by quarters of a patch
    zoom       nearer or further, anywhere, and a little stretched
    light      brighter or darker, and with other shares of the colors
    colors     red, green and blue in another order, for things that may have any color

No box is ever cut, so that boxes and masks in the answer stay true; there are no mirrored views, in which words and
arrows would be wrong. With twenty pictures this is what keeps a model from learning them by heart.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from numpy_ref import detection

if TYPE_CHECKING:
    from PIL import Image

KINDS = ("shift", "zoom", "light", "colors")
STEPS = 4  # of a shift, in a patch
FURTHEST = 0.5  # that a picture is shifted, as a share of its side
ZOOM = (0.6, 1.4)  # sides of the window, as a share of the picture's
STRETCH = 0.15  # of one side against the other, at most
LIGHT = 0.25  # of each color and of all, at most
_BOX = re.compile("(?:<loc[0-9]{4}>){4}")

Window = tuple[float, float, float, float]  # fractions of the picture's sides: x1, y1, x2, y2; may lie outside


def boxes_of(suffix: str) -> list[Window]:
    """The boxes of an answer, in fractions of the sides."""
    return [box.corners for box in detection.parse(suffix, 1, 1)]


def random_window(rng: np.random.Generator, boxes: list[Window], kinds: Sequence[str], patches: int) -> Window:
    """A window on a picture of patches x patches that holds all boxes whole; all of it if kinds ask for no other."""
    zoom, stretch = 1.0, 1.0
    if "zoom" in kinds:
        zoom, stretch = rng.uniform(*ZOOM), float(np.exp(rng.uniform(-STRETCH, STRETCH) / 2))
    sides: list[tuple[float, float]] = []
    for axis, length in ((0, zoom * stretch), (1, zoom / stretch)):
        low = min((box[axis] for box in boxes), default=0.0)
        high = max((box[axis + 2] for box in boxes), default=1.0)
        length = max(length, high - low)
        start = 0.0
        if "zoom" in kinds:
            # Inside of the picture, or around it where the window is larger, and with every box in it.
            first, last = sorted((0.0, 1 - length))
            start = float(rng.uniform(max(first, min(high - length, low)), min(last, max(low, high - length))))
        if "shift" in kinds:
            most = round(FURTHEST * patches * STEPS)
            steps = [n / (patches * STEPS) for n in range(-most, most + 1)]
            start += rng.choice([n for n in steps if start + n <= low + 1e-9 and start + n + length >= high - 1e-9])
        sides.append((start, start + length))
    (x1, x2), (y1, y2) = sides
    return x1, y1, x2, y2


def moved(suffix: str, window: Window) -> str:
    """An answer about what a window shows: its boxes counted in the window's sides."""
    x, y, width, height = window[0], window[1], window[2] - window[0], window[3] - window[1]

    def move(match):
        y1, x1, y2, x2 = (int(number) / 1023 for number in re.findall("[0-9]+", match[0]))
        return detection.encode((x1 - x) / width, (y1 - y) / height, (x2 - x) / width, (y2 - y) / height)

    return _BOX.sub(move, suffix)


def seen(picture: "Image.Image", window: Window) -> "Image.Image":
    """What a window shows of a picture; past its edges there is its mean color."""
    from PIL import Image

    width, height = picture.size
    left, top, right, bottom = (round(value * side) for value, side in zip(window, (width, height) * 2, strict=True))
    mean = tuple(np.asarray(picture).reshape(-1, 3).mean(0).round().astype(int).tolist())
    canvas = Image.new("RGB", (max(1, right - left), max(1, bottom - top)), mean)
    canvas.paste(picture, (-left, -top))
    return canvas


def lit(picture: "Image.Image", rng: np.random.Generator) -> "Image.Image":
    """A picture in another light."""
    from PIL import Image

    gains = (1 + rng.uniform(-LIGHT, LIGHT)) * (1 + rng.uniform(-LIGHT, LIGHT, 3) / 2)
    return Image.fromarray(np.clip(np.asarray(picture) * gains, 0, 255).astype(np.uint8))


def view(
    picture: "Image.Image", suffix: str, kinds: Sequence[str], patches: int, rng: np.random.Generator
) -> tuple["Image.Image", str]:
    """A random view of a picture of patches x patches, and the answer about it."""
    from PIL import Image

    window = random_window(rng, boxes_of(suffix), kinds, patches)
    picture, suffix = seen(picture, window), moved(suffix, window)
    if "light" in kinds:
        picture = lit(picture, rng)
    if "colors" in kinds:
        picture = Image.fromarray(np.asarray(picture)[..., rng.permutation(3)])
    return picture, suffix
