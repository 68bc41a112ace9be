"""Another view of a training picture each time it is seen: moved, zoomed and in other light, its boxes with it.

No box is ever cut, so that boxes and masks in the answer stay true; there are no mirrored views, in which words and
arrows would be wrong. With twenty pictures this is what keeps a model from learning them by heart.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from numpy_ref import detection

if TYPE_CHECKING:
    from PIL import Image

ZOOM = (0.6, 1.4)  # sides of the window, as a share of the picture's
STRETCH = 0.15  # of one side against the other, at most
LIGHT = 0.25  # of each color and of all, at most
_BOX = re.compile("(?:<loc[0-9]{4}>){4}")

Window = tuple[float, float, float, float]  # fractions of the picture's sides: x1, y1, x2, y2; may lie outside


def boxes_of(suffix: str) -> list[Window]:
    """The boxes of an answer, in fractions of the sides."""
    return [box.corners for box in detection.parse(suffix, 1, 1)]


def random_window(rng: np.random.Generator, boxes: list[Window]) -> Window:
    """A window on a picture that holds all boxes whole; the picture itself where there is no room for another."""
    zoom = rng.uniform(*ZOOM)
    stretch = np.exp(rng.uniform(-STRETCH, STRETCH) / 2)
    sides: list[tuple[float, float]] = []
    for axis, length in ((0, zoom * stretch), (1, zoom / stretch)):
        low = min((box[axis] for box in boxes), default=1.0)
        high = max((box[axis + 2] for box in boxes), default=0.0)
        length = max(length, high - low)
        # The start: inside of the picture, or around it where the window is larger, and with every box in it.
        first, last = sorted((0.0, 1 - length))
        start = rng.uniform(max(first, min(high - length, low)), min(last, max(low, high - length)))
        sides.append((float(start), float(start + length)))
    (x1, x2), (y1, y2) = sides
    return x1, y1, x2, y2


def moved(suffix: str, window: Window) -> str:
    """An answer about what a window shows: its boxes counted in the window's sides."""
    x, y, width, height = window[0], window[1], window[2] - window[0], window[3] - window[1]

    def move(match):
        y1, x1, y2, x2 = (int(number) / 1023 for number in re.findall("[0-9]+", match[0]))
        return detection.encode((x1 - x) / width, (y1 - y) / height, (x2 - x) / width, (y2 - y) / height)

    return _BOX.sub(move, suffix)


def seen(picture: "Image.Image", window: Window, rng: np.random.Generator) -> "Image.Image":
    """What a window shows of a picture, in another light; past its edges there is its mean color."""
    from PIL import Image

    width, height = picture.size
    left, top, right, bottom = (round(value * side) for value, side in zip(window, (width, height) * 2, strict=True))
    mean = tuple(np.asarray(picture).reshape(-1, 3).mean(0).round().astype(int).tolist())
    canvas = Image.new("RGB", (max(1, right - left), max(1, bottom - top)), mean)
    canvas.paste(picture, (-left, -top))
    gains = (1 + rng.uniform(-LIGHT, LIGHT)) * (1 + rng.uniform(-LIGHT, LIGHT, 3) / 2)
    return Image.fromarray(np.clip(np.asarray(canvas) * gains, 0, 255).astype(np.uint8))
