"""Drawn scenes with known contents: the data that the shipped model learns from and is measured on.

A scene is coloured shapes on a patterned ground, on a grid of GRID units a side. What can be asked of it, and
the one right answer, follow from the scene alone, so that exact match means something.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from numpy_ref.detection import encode

GRID = 32
COLORS = {
    "red": (214, 39, 40), "green": (34, 139, 34), "blue": (31, 81, 220), "yellow": (247, 208, 30),
    "purple": (130, 50, 170), "orange": (250, 128, 20), "white": (245, 245, 245), "black": (20, 20, 20),
}  # fmt: skip
SIZES = {"small": (7, 8), "medium": (11, 12), "large": (15, 16)}
TASKS = ("caption", "detect", "answer")
SHARES = (0.4, 0.45, 0.15)
GROUNDS = ("plain", "gradient", "striped", "checkered", "speckled")


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
}


@dataclass(frozen=True)
class Thing:
    """One shape; x, y and side in grid units."""

    color: str
    shape: str
    size: str
    x: int
    y: int
    side: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Fractions of the sides: x1, y1, x2, y2."""
        return self.x / GRID, self.y / GRID, (self.x + self.side) / GRID, (self.y + self.side) / GRID

    def overlaps(self, other) -> bool:
        apart = self.x + self.side < other.x or other.x + other.side < self.x
        return not (apart or self.y + self.side < other.y or other.y + other.side < self.y)


@dataclass(frozen=True)
class Scene:
    """Things from left to right, and the ground they lie on."""

    things: tuple[Thing, ...]
    ground: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    seed: int  # of the ground's texture


def random_scene(rng: np.random.Generator, most: int = 3) -> Scene:
    """Draw the contents of a scene."""
    things: list[Thing] = []
    wanted = rng.integers(1, most + 1)
    for _ in range(40):
        if len(things) == wanted:
            break
        size = _pick(rng, SIZES)
        side = int(_pick(rng, SIZES[size]))
        x, y = (int(v) for v in rng.integers(0, GRID - side + 1, 2))
        thing = Thing(_pick(rng, COLORS), _pick(rng, SHAPES), size, x, y, side)
        if not any(thing.overlaps(other) for other in things):
            things.append(thing)
    things.sort(key=lambda thing: (thing.x, thing.y))
    return Scene(tuple(things), _pick(rng, GROUNDS), _tones(rng), int(rng.integers(2**31)))


def draw(scene: Scene, size: int = 224) -> Image.Image:
    """The scene as a picture of size x size pixels, drawn at twice that and reduced, for smooth edges."""
    side = 2 * size
    picture = Image.fromarray(_ground(scene, side))
    pen, unit = ImageDraw.Draw(picture), side / GRID
    for thing in scene.things:
        left, top, width = thing.x * unit, thing.y * unit, thing.side * unit
        outline = SHAPES[thing.shape]
        if outline is None:
            pen.ellipse([left, top, left + width - 1, top + width - 1], fill=COLORS[thing.color])
        else:
            corners = outline * (width - 1) + np.array([left, top])
            pen.polygon([tuple(corner) for corner in corners], fill=COLORS[thing.color])
    return picture.resize((size, size), Image.Resampling.BOX)


def caption(scene: Scene) -> str:
    """The one caption of a scene, things from left to right."""
    named = [f"a {thing.size} {thing.name}" for thing in scene.things]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"{listed} on a {scene.ground} ground"


def detect(scene: Scene, queries: list[str]) -> str:
    """Boxes of everything that a query names ("star", "red star"), from left to right; "" if there is nothing."""
    found = []
    for thing in scene.things:
        matches = [query for query in queries if query in (thing.shape, thing.name)]
        if matches:
            x1, y1, x2, y2 = thing.box
            found.append(f"{encode(x1, y1, x2, y2)} {matches[0]}")
    return " ; ".join(found)


def random_question(rng: np.random.Generator, scene: Scene, task: str | None = None, shares=SHARES) -> tuple[str, str]:
    """A prefix and its suffix, of a task or of one drawn by the tasks' shares."""
    task = task or rng.choice(TASKS, p=shares)
    if task == "caption":
        return "caption en", caption(scene)
    if task == "answer":
        return _random_answer(rng, scene)
    queries = _random_queries(rng, scene)
    return f"detect {' ; '.join(queries)}", detect(scene, queries)


def _random_answer(rng, scene):
    shapes = [thing.shape for thing in scene.things]
    unique = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    if unique and rng.random() < 0.6:
        thing = unique[rng.integers(len(unique))]
        return f"answer en what color is the {thing.shape}?", thing.color
    return "answer en how many shapes are there?", str(len(scene.things))


def _random_queries(rng, scene):
    if rng.random() < 0.08:  # something that may well be absent
        return [f"{_pick(rng, COLORS)} {_pick(rng, SHAPES)}"]
    order = rng.permutation(len(scene.things))[: 1 if rng.random() < 0.6 else 2]
    chosen = [scene.things[i] for i in order]
    queries = [thing.name if rng.random() < 0.6 else thing.shape for thing in chosen]
    return list(dict.fromkeys(queries))


def _pick(rng, options):
    return list(options)[rng.integers(len(options))]


def _tones(rng):
    """Two muted tones, kept apart from the colours of the things."""
    base = rng.integers(110, 200, 3)
    grey = int(base.mean())
    base = (0.5 * base + 0.5 * grey).astype(int)
    shift = int(rng.integers(18, 36)) * (1 if rng.random() < 0.5 else -1)
    return tuple(int(v) for v in base), tuple(int(v) for v in np.clip(base + shift, 0, 255))


def _ground(scene, side):
    """The ground as bytes [side, side, 3]."""
    first, second = (np.array(tone, np.float32) for tone in scene.tones)
    rng = np.random.default_rng(scene.seed)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    if scene.ground == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        mix = 0.5 + 0.7 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
        first, second = first - 20, second + 20
    elif scene.ground == "striped":
        angle = rng.choice([0, np.pi / 2, np.pi / 4, -np.pi / 4])
        mix = (np.floor((x * np.cos(angle) + y * np.sin(angle)) * rng.integers(8, 12)) % 2).astype(np.float32)
    elif scene.ground == "checkered":
        cells = rng.integers(6, 10)
        mix = ((np.floor(x * cells) + np.floor(y * cells)) % 2).astype(np.float32)
    elif scene.ground == "speckled":
        cells = 64
        grid = (rng.random((cells, cells)) < 0.3).astype(np.float32)
        mix = grid[(y * cells).astype(int), (x * cells).astype(int)]
    else:
        mix = np.zeros_like(x)
    return np.clip(first + (second - first) * mix[..., None], 0, 255).astype(np.uint8)
