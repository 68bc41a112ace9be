"""Drawn scenes with known contents: the pictures that the shipped model learns from and is measured on.

A scene is coloured shapes on a patterned ground, on a grid of GRID units a side; where shapes overlap, the one
further right lies on top. What can be asked of a scene is in questions.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

Option = TypeVar("Option")

GRID = 32
COLORS = {
    "red": (214, 39, 40), "green": (34, 139, 34), "blue": (31, 81, 220), "yellow": (247, 208, 30),
    "purple": (130, 50, 170), "orange": (250, 128, 20), "white": (245, 245, 245), "black": (20, 20, 20),
}  # fmt: skip
GROUNDS = ("plain", "gradient", "striped", "checkered", "speckled")
MOST = 6  # shapes in a scene
SIDES = (7, 14)  # of a shape, in grid units
CROWDED_SIDES = (7, 10)  # where there are four shapes or more
STEP = 2  # grid units between the left edges of two shapes: their order is never in doubt
COVER = 0.2  # the most of the smaller box that two boxes share
SHADED = 0.6  # the furthest that a shade goes from its color, towards any paint
DISTINCT = 0.8  # how far from its own color a shade may be, as a share of the distance to every other


def _star(points=5, inner=0.45):
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    corners = np.stack([np.cos(angles) * radii, np.sin(angles) * radii], -1)
    low, high = corners.min(0), corners.max(0)
    return (corners - low) / (high - low)


_CROSS = [1 / 3, 0, 2 / 3, 0, 2 / 3, 1 / 3, 1, 1 / 3, 1, 2 / 3, 2 / 3, 2 / 3,
          2 / 3, 1, 1 / 3, 1, 1 / 3, 2 / 3, 0, 2 / 3, 0, 1 / 3, 1 / 3, 1 / 3]  # fmt: skip
#: Outlines in the unit square, touching all four sides, so that the box of a shape is its cell. None: an ellipse.
SHAPES = {
    "circle": None,
    "square": np.array([[0, 0], [1, 0], [1, 1], [0, 1]]),
    "triangle": np.array([[0.5, 0], [1, 1], [0, 1]]),
    "diamond": np.array([[0.5, 0], [1, 0.5], [0.5, 1], [0, 0.5]]),
    "star": _star(),
    "cross": np.array(_CROSS).reshape(-1, 2),
    "ring": None,
}
#: Outlines that no scene of training has: new things, to fine-tune on.
NOVEL = {"arrow": np.array([[0, 0.3], [0.55, 0.3], [0.55, 0], [1, 0.5], [0.55, 1], [0.55, 0.7], [0, 0.7]])}
HOLE = 0.5  # of a ring, as a share of its side

#: The compositional split: pairs that training never shows, although it shows each color and each shape.
HELD_OUT = frozenset(
    [("red", "star"), ("green", "circle"), ("blue", "triangle"), ("yellow", "cross"), ("purple", "square"),
     ("orange", "ring"), ("white", "diamond")]
)  # fmt: skip
SEEN = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    """One shape; x, y (of its upper left corner) and side in grid units. `paint` is RGB, None for the color's own."""

    color: str
    shape: str
    x: int
    y: int
    side: int
    paint: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def rgb(self) -> tuple[int, int, int]:
        return self.paint or COLORS[self.color]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Fractions of the sides: x1, y1, x2, y2."""
        return self.x / GRID, self.y / GRID, (self.x + self.side) / GRID, (self.y + self.side) / GRID

    @property
    def is_held_out(self) -> bool:
        return (self.color, self.shape) in HELD_OUT

    def leaves_room_for(self, other: "Thing") -> bool:
        """Whether both can be in one scene: apart from left to right, and with little overlap."""
        across = min(self.x + self.side, other.x + other.side) - max(self.x, other.x)
        down = min(self.y + self.side, other.y + other.side) - max(self.y, other.y)
        shared = max(across, 0) * max(down, 0) / min(self.side, other.side) ** 2
        return abs(self.x - other.x) >= STEP and shared <= COVER


@dataclass(frozen=True)
class Scene:
    """Things from left to right, each lying over those before it, and the ground below."""

    things: tuple[Thing, ...]
    ground: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    noise: float  # standard deviation, in steps of 255
    seed: int  # of texture and noise

    def draw(self, size: int = 224) -> "Image.Image":
        """The scene as a picture of size x size pixels, drawn at twice that and reduced, for smooth edges."""
        from PIL import Image, ImageDraw

        rng = np.random.default_rng(self.seed)
        ground = Image.fromarray(_ground(self, size, rng))
        picture = ground.resize((2 * size, 2 * size), Image.Resampling.NEAREST)
        for thing in self.things:
            if thing.shape == "ring":  # what is seen through it
                picture.paste(thing.rgb, (0, 0), silhouette(thing, 2 * size))
            else:
                _fill(ImageDraw.Draw(picture), thing, 2 * size / GRID, thing.rgb)
        pixels = np.asarray(picture.reduce(2), np.float32)
        noise = rng.standard_normal((size, size, 1), np.float32) * np.float32(self.noise)
        return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))

    def visible(self, index: int, size: int) -> np.ndarray:
        """Where a thing is to be seen, what lies over it cut away: bool [size, size]."""
        seen = np.asarray(silhouette(self.things[index], size)) > 127
        for above in self.things[index + 1 :]:
            seen &= np.asarray(silhouette(above, size)) <= 127
        return seen


def random_scene(rng: np.random.Generator, most: int = MOST, compositional: bool = False, shaded: float = 0.0) -> Scene:
    """Draw the contents of a scene: of seen pairs only, or with held-out pairs among them.

    In a share `shaded` of the scenes each thing has a shade of its color. In eight paints a tower can learn each
    shape eight times over, and knows no diamond in white if it never saw one; in any paint a diamond is a diamond.
    """
    is_shaded = shaded > 0 and rng.random() < shaded
    wanted = int(rng.integers(1, most + 1))
    low, high = SIDES if wanted < 4 else CROWDED_SIDES
    things: list[Thing] = []
    for _ in range(20 * wanted):
        if len(things) == wanted:
            break
        side = int(rng.integers(low, high + 1))
        x, y = (int(v) for v in rng.integers(0, GRID - side + 1, 2))
        held_out = compositional and (not things or rng.random() < 0.5)
        color, shape = pick(rng, sorted(HELD_OUT) if held_out else SEEN)
        thing = Thing(color, shape, x, y, side)
        if all(thing.leaves_room_for(other) for other in things):
            things.append(thing)
    things.sort(key=lambda thing: thing.x)
    if is_shaded:
        things = [replace(thing, paint=shade(rng, thing.color)) for thing in things]
    noise = float(rng.uniform(0, 8))
    return Scene(tuple(things), pick(rng, GROUNDS), _tones(rng), noise, int(rng.integers(2**31)))


def shade(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    """A paint that is clearly called so: nearer to this color than to any other."""
    own = np.array(COLORS[color])
    while True:
        paint = own + rng.uniform(0, SHADED) * (rng.integers(0, 256, 3) - own)
        away = {name: np.linalg.norm(paint - rgb) for name, rgb in COLORS.items()}
        if away.pop(color) < DISTINCT * min(away.values()):
            red, green, blue = (int(v) for v in paint)
            return red, green, blue


def pick(rng: np.random.Generator, options: Iterable[Option]) -> Option:
    """One of the options."""
    options = list(options)
    return options[rng.integers(len(options))]


# --- pictures ----------------------------------------------------------------------------------------------


def silhouette(thing: Thing, size: int) -> "Image.Image":
    """Where a thing is, on a canvas of size x size: 255 inside, 0 outside (mode L)."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (size, size))
    pen, unit = ImageDraw.Draw(canvas), size / GRID
    _fill(pen, thing, unit, 255)
    if thing.shape == "ring":
        margin = thing.side * unit * (1 - HOLE) / 2
        left, top, width = thing.x * unit + margin, thing.y * unit + margin, thing.side * unit * HOLE
        pen.ellipse([left, top, left + width - 1, top + width - 1], fill=0)
    return canvas


def _fill(pen, thing, unit, color):
    left, top, width = thing.x * unit, thing.y * unit, thing.side * unit
    outline = NOVEL[thing.shape] if thing.shape in NOVEL else SHAPES[thing.shape]
    if outline is None:
        pen.ellipse([left, top, left + width - 1, top + width - 1], fill=color)
    else:
        corners = outline * (width - 1) + np.array([left, top])
        pen.polygon([tuple(corner) for corner in corners], fill=color)


def _tones(rng):
    """Two muted tones, kept apart from the colours of the things."""
    base = rng.integers(110, 200, 3)
    grey = int(base.mean())
    base = (0.5 * base + 0.5 * grey).astype(int)
    shift = int(rng.integers(18, 36)) * (1 if rng.random() < 0.5 else -1)
    return tuple(int(v) for v in base), tuple(int(v) for v in np.clip(base + shift, 0, 255))


@cache
def _coordinates(side):
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    return y, x


def _ground(scene, side, rng):
    """The ground as bytes [side, side, 3]."""
    first, second = (np.array(tone, np.float32) for tone in scene.tones)
    y, x = _coordinates(side)
    if scene.ground == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        mix = 0.5 + 0.7 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
        first, second = first - 20, second + 20
    elif scene.ground == "striped":
        angle = rng.choice([0, np.pi / 2, np.pi / 4, -np.pi / 4])
        mix = np.floor((x * np.cos(angle) + y * np.sin(angle)) * rng.integers(8, 12)) % 2
    elif scene.ground == "checkered":
        cells = rng.integers(6, 10)
        mix = (np.floor(x * cells) + np.floor(y * cells)) % 2
    elif scene.ground == "speckled":
        cells = 48
        grid = (rng.random((cells, cells)) < 0.3).astype(np.float32)
        mix = grid[(y * cells).astype(int), (x * cells).astype(int)]
    else:
        mix = np.zeros_like(x)
    mixed = first + (second - first) * np.asarray(mix, np.float32)[..., None]
    return np.clip(mixed, 0, 255).astype(np.uint8)
