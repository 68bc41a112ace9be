"""What is stamped onto a ground: a picture of a thing, an outline, or a word, all as pixels with transparency.

A stamp touches the sides of its canvas, whose longer side is one unit; a thing is its stamp, mirrored or not, then
turned around its middle. `extent` says how far that reaches, and `placed` is how it looks.
"""

import json
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .. import scenes
from .catalogue import DATA, ENTRIES, PICTURED, WORD

if TYPE_CHECKING:
    from PIL import Image

CELL, COLUMNS = 96, 12  # pixels of a sprite in the sheet, and sprites in a row of it
GLYPH, GLYPH_WIDTH, MARGIN = 48, 72, 4  # pixels of a letter's cell: height, width, and what is left of its letter
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DRAWN_AT = 384  # pixels at which outlines are drawn before they are reduced to CELL
INK = 127  # a pixel belongs to a thing if it is more opaque than this, of 255
_PLACE = {entry.name: i for i, entry in enumerate(ENTRIES)}


def _curve(xs, ys) -> np.ndarray:
    corners = np.stack([xs, ys], -1)
    low, high = corners.min(0), corners.max(0)
    return (corners - low) / (high - low)


def _outlines() -> dict[str, np.ndarray]:
    """Corners [n, 2] in the unit square of each shape but those that are made of ellipses."""
    t = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    heart = _curve(16 * np.sin(t) ** 3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t))
    drop = _curve(np.cos(t + np.pi / 2) * np.sin((t) / 2) ** 1.6, -np.sin(t + np.pi / 2))
    bolt = np.array([[0.62, 0], [0.12, 0.56], [0.46, 0.56], [0.3, 1], [0.88, 0.38], [0.52, 0.38]])
    plain = {name: outline for name, outline in scenes.SHAPES.items() if outline is not None}
    return plain | {"heart": heart, "drop": drop, "bolt": _curve(*bolt.T)}


@cache
def _sheet() -> "Image.Image":
    from PIL import Image

    with Image.open(DATA / "sprites.webp") as sheet:
        return sheet.convert("RGBA")


@cache
def _letters() -> "tuple[Image.Image, list[list[int]]]":
    from PIL import Image

    with Image.open(DATA / "glyphs.png") as picture:
        return picture.convert("L"), list(json.loads((DATA / "glyphs.json").read_text()).values())


def fonts() -> int:
    """How many fonts there are."""
    return len(_letters()[1])


@lru_cache(4096)
def stamp(name: str, text: str = "", font: int = 0) -> "Image.Image":
    """A thing upright, as large as it is kept: RGBA of a pictured one, else its opacity alone (L)."""
    if name in PICTURED:
        row, column = divmod(_PLACE[name], COLUMNS)
        cell = _sheet().crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
        return cell.crop(cell.getchannel("A").point(lambda value: 255 * (value > INK)).getbbox())
    found = _word(text, font) if name == WORD else _shape(name)
    return found.crop(found.point(lambda value: 255 * (value > INK)).getbbox())


def _shape(name: str) -> "Image.Image":
    from PIL import Image, ImageChops, ImageDraw

    side = DRAWN_AT
    canvas = Image.new("L", (side, side))
    pen, outlines = ImageDraw.Draw(canvas), _outlines()
    whole = (0, 0, side - 1, side - 1)
    if name in outlines:
        pen.polygon([tuple(corner) for corner in (outlines[name] * (side - 1)).tolist()], fill=255)
    elif name == "cloud":
        for box in ((0, 0.42, 0.46, 0.86), (0.2, 0.14, 0.74, 0.74), (0.52, 0.36, 1, 0.86), (0.2, 0.5, 0.78, 0.86)):
            pen.ellipse([value * (side - 1) for value in box], fill=255)
    elif name == "moon":
        pen.ellipse(whole, fill=255)
        bite = Image.new("L", (side, side))
        ImageDraw.Draw(bite).ellipse([0.34 * side, -0.06 * side, 1.2 * side, 0.8 * side], fill=255)
        canvas = ImageChops.subtract(canvas, bite)
    else:
        pen.ellipse(whole, fill=255)
        if name == "ring":
            edge = side * (1 - scenes.HOLE) / 2
            pen.ellipse([edge, edge, side - 1 - edge, side - 1 - edge], fill=0)
    return canvas.reduce(side // CELL)


def _word(text: str, font: int) -> "Image.Image":
    from PIL import Image, ImageChops

    letters, advances = _letters()
    places = [LETTERS.index(letter) for letter in text]
    width = sum(advances[font][place] for place in places) + 2 * GLYPH_WIDTH
    canvas, left = Image.new("L", (width, GLYPH)), GLYPH // 2
    for place in places:
        cell = letters.crop((place * GLYPH_WIDTH, font * GLYPH, (place + 1) * GLYPH_WIDTH, (font + 1) * GLYPH))
        box = (left - MARGIN, 0, left - MARGIN + GLYPH_WIDTH, GLYPH)
        canvas.paste(ImageChops.lighter(canvas.crop(box), cell), box)  # a letter's cell reaches over the next
        left += advances[font][place]
    return canvas


# --- where it lies -----------------------------------------------------------------------------------------


@lru_cache(4096)
def _edge(name: str, text: str, font: int) -> np.ndarray:
    """Points [n, 2] around the ink of a stamp, from its middle, in shares of its longer side."""
    ink = _opacity(stamp(name, text, font)) > INK
    height, width = ink.shape
    rows = np.flatnonzero(ink.any(1))
    first, last = ink.argmax(1)[rows], width - ink[:, ::-1].argmax(1)[rows]
    points = [(x, y) for x, y in zip((*first, *last), (*rows, *rows), strict=True)]
    corners = np.array([*points, *((x, y + 1) for x, y in points)], float)
    return (corners - [width / 2, height / 2]) / max(width, height)


@lru_cache(65536)
def extent(name: str, text: str, font: int, turn: float, mirrored: bool) -> tuple[float, float, float, float]:
    """How far a thing reaches from its middle, in shares of its side: x1, y1, x2, y2.

    `turn` is in degrees against the clock, after it was mirrored from left to right.
    """
    angle, points = np.deg2rad(turn), _edge(name, text, font) * [-1 if mirrored else 1, 1]
    turned = points @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    (x1, y1), (x2, y2) = turned.min(0).tolist(), turned.max(0).tolist()
    return x1, y1, x2, y2


# --- how it looks ------------------------------------------------------------------------------------------


@lru_cache(8192)
def _sized(name: str, text: str, font: int, side: int, mirrored: bool) -> "Image.Image":
    """A stamp whose longer side has so many pixels."""
    from PIL import Image

    found = stamp(name, text, font)
    scale = side / max(found.size)
    width, height = (max(1, round(length * scale)) for length in found.size)
    sized = found.resize((width, height), Image.Resampling.BICUBIC)
    return sized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else sized


def placed(name: str, text: str, font: int, side: int, turn: float, mirrored: bool) -> "Image.Image":
    """A thing as it is pasted, `side` pixels long before it is turned: RGBA, or its opacity alone (L)."""
    from PIL import Image

    sized = _sized(name, text, font, side, mirrored)
    return sized.rotate(turn, Image.Resampling.BICUBIC, expand=True) if turn else sized


def painted(picture: "Image.Image", paint: tuple[int, int, int]) -> "Image.Image":
    """A pictured thing (RGBA) in one paint: light and dark stay, its own colors go."""
    from PIL import Image

    pixels = np.asarray(picture, np.float32)
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    full = np.array(paint, np.float32)
    shaded = full * (0.35 + 0.65 * np.minimum(1, 1.4 * light))[..., None]
    shaded += (255 - full) * (0.75 * np.maximum(0, light - 0.6))[..., None]
    return Image.fromarray(np.dstack([np.clip(shaded, 0, 255), pixels[..., 3]]).astype(np.uint8))


def _opacity(picture: "Image.Image") -> np.ndarray:
    """uint8 [height, width]."""
    return np.asarray(picture.getchannel("A") if picture.mode == "RGBA" else picture)


def opacity(picture: "Image.Image") -> "Image.Image":
    """Where something that `placed` gave is, as mode L."""
    return picture.getchannel("A") if picture.mode == "RGBA" else picture
