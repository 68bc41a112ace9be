"""Scenes of everyday things with known contents: what the shipped model learns from and is measured on.

A scene is pictured things, painted shapes and words on a ground, on a grid of GRID units a side. Each thing is turned,
mirrored, large or small; where things overlap, the one further right lies on top. What can be asked of a scene is in
questions.py. A scene follows from its random generator alone.

The compositional split: training shows every thing, color, place and number, but never

    color    a painted thing of a pair in `HELD_OUT`
    place    a pictured thing in its `held_out_place`, a quarter of the picture, for every second one
    number   a pictured thing in its `held_out_number`, twos or threes, for the others
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..scenes import COLORS, pick, shade
from . import grounds, stamps
from .catalogue import ENTRIES, NEW_WORDS, PICTURED, SHAPES, TINTS, WORD, WORDS

if TYPE_CHECKING:
    from PIL import Image

GRID = 32
MOST = 5  # things in a scene
SIDES = {1: (10, 24), 2: (9, 17), 3: (9, 14)}  # of a thing by their number, in grid units; more things are CROWDED
CROWDED_SIDES = (8, 11)
WORD_SIDES = (14, 26)  # of a word
WORD_HEIGHT = 3.2  # at least, so that it can be read
STEP = 2.0  # grid units between the left edges of two things: their order is never in doubt
COVER = 0.2  # the most of the smaller box that two boxes share
TURN, SHAPE_TURN, WORD_TURN = 25, 12, 6  # degrees either way, at most
AGAIN = 0.28  # the chance that a kind comes twice or three times
SHARES = {"pictured": 0.66, "shape": 0.29, "word": 0.05}  # of kinds
TINTED = 0.14  # share of pictured kinds that come in one paint
MADE_UP = 0.4  # share of words that are no words
DARK = 135  # the mean of both tones below which a ground is dark
NOVELTIES = ("color", "place", "number")

_NUMBER = {entry.name: i for i, entry in enumerate(ENTRIES)}
#: Pairs of color and name that training never shows.
HELD_OUT = frozenset(
    [("red", "star"), ("green", "circle"), ("blue", "triangle"), ("yellow", "cross"), ("purple", "square"),
     ("orange", "ring"), ("white", "diamond"), ("black", "heart"), ("blue", "moon"), ("green", "drop"),
     ("purple", "bolt"), ("red", "cloud")]
    + [(color, entry.name) for i, entry in enumerate(ENTRIES) for j, color in enumerate(TINTS)
       if (i + 3 * j) % 9 == 0 and color != entry.color]
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One thing; x, y (of its middle) and side in grid units, its turn in degrees against the clock.

    A pictured thing has a color only where it is painted; `paint` is the RGB of that. A word has a text and a font.
    """

    name: str
    x: float
    y: float
    side: float
    turn: float = 0.0
    mirrored: bool = False
    color: str = ""
    paint: tuple[int, int, int] | None = None
    text: str = ""
    font: int = 0

    @property
    def label(self) -> str:
        return f"{self.color} {self.name}" if self.color else self.name

    @property
    def rgb(self) -> tuple[int, int, int]:
        return self.paint or COLORS[self.color]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Fractions of the sides: x1, y1, x2, y2."""
        x1, y1, x2, y2 = stamps.extent(self.name, self.text, self.font, self.turn, self.mirrored)
        middle, scale = (self.x / GRID, self.y / GRID), self.side / GRID
        return middle[0] + scale * x1, middle[1] + scale * y1, middle[0] + scale * x2, middle[1] + scale * y2

    @property
    def place(self) -> int:
        """The quarter of the picture that its middle is in: 0 and 1 above, 2 and 3 below, from left to right."""
        return 2 * (self.y >= GRID / 2) + (self.x >= GRID / 2)

    def leaves_room_for(self, other: "Thing") -> bool:
        """Whether both can be in one scene: apart from left to right, and with little overlap."""
        (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = self.box, other.box
        across, down = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
        smaller = min((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1))
        most = 0.0 if WORD in (self.name, other.name) else COVER * smaller  # a covered letter could not be read
        return abs(ax1 - bx1) * GRID >= STEP and max(across, 0) * max(down, 0) <= most


@dataclass(frozen=True)
class Scene:
    """Things from left to right by their left edges, each lying over those before it, and the ground below."""

    things: tuple[Thing, ...]
    ground: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    noise: float  # standard deviation, in steps of 255
    seed: int  # of texture and noise

    def novelty(self, index: int) -> str:
        """Which composition that training never shows a thing is part of; "" if none."""
        thing = self.things[index]
        if thing.color:
            return "color" if (thing.color, thing.name) in HELD_OUT else ""
        if thing.name not in PICTURED:
            return ""
        if thing.place == held_out_place(thing.name):
            return "place"
        number = sum(other.label == thing.label for other in self.things)
        return "number" if number == held_out_number(thing.name) else ""

    def draw(self, size: int = 224) -> "Image.Image":
        """The scene as a picture of size x size pixels."""
        from PIL import Image

        rng = np.random.default_rng(self.seed)
        ground = grounds.paint(self.ground, self.tones, rng, size)
        picture = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
        for thing in self.things:
            stamp, corner = _stamped(thing, size)
            if stamp.mode == "RGBA":
                stamp = stamps.painted(stamp, thing.rgb) if thing.color else stamp
                picture.paste(stamp, corner, stamp)
            else:
                picture.paste(thing.rgb, (*corner, corner[0] + stamp.width, corner[1] + stamp.height), stamp)
        noise = rng.standard_normal((size, size, 1), np.float32) * np.float32(self.noise)
        return Image.fromarray(np.clip(np.asarray(picture, np.float32) + noise, 0, 255).astype(np.uint8))

    def visible(self, index: int, size: int) -> np.ndarray:
        """Where a thing is to be seen, what lies over it cut away: bool [size, size]."""
        seen = np.asarray(silhouette(self.things[index], size)) > 0
        for above in self.things[index + 1 :]:
            seen &= np.asarray(silhouette(above, size)) == 0
        return seen


def held_out_place(name: str) -> int | None:
    """The quarter of the picture that training never shows a pictured thing in; None for every second one."""
    number = _NUMBER[name]
    return number // 2 % 4 if number % 2 == 0 else None


def held_out_number(name: str) -> int | None:
    """The number in which training never shows a pictured thing; None for every second one."""
    number = _NUMBER[name]
    return 2 + number // 2 % 2 if number % 2 else None


# --- what is in a scene ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What is to be in a scene, without its places: a name in so many copies, and what is new about it."""

    name: str
    color: str = ""
    number: int = 1
    novelty: str = ""
    text: str = ""
    font: int = 0


def random_scene(
    rng: np.random.Generator,
    most: int = MOST,
    compositional: bool = False,
    shaded: float = 0.0,
    word: bool | None = None,
) -> Scene:
    """Draw the contents of a scene: of compositions that training shows, or with others among them.

    In a share `shaded` of the scenes what is painted has a shade of its color. `word` says whether there is one, or
    that it may be (None); in the compositional split it is one that training never shows.
    """
    while True:
        is_shaded = shaded > 0 and rng.random() < shaded
        kinds = _kinds(rng, most, compositional, word)
        count = sum(kind.number for kind in kinds)
        ground = pick(rng, [name for name in grounds.KINDS if name != "snow" or all(k.color != "white" for k in kinds)])
        tones = grounds.tones_of(ground, rng)
        is_dark = bool(np.mean(tones) < DARK)
        things: list[Thing] = []
        for kind in kinds:
            for _ in range(kind.number):
                thing = _place(rng, kind, count, things, is_shaded, is_dark)
                if thing is not None:
                    things.append(thing)
        ordered = tuple(sorted(things, key=lambda thing: thing.box[0]))
        scene = Scene(ordered, ground, tones, float(rng.uniform(0, 8)), int(rng.integers(2**31)))
        new = [i for i in range(len(ordered)) if scene.novelty(i)]
        has_word = any(thing.name == WORD for thing in ordered)
        if not ordered or (word is not None and word != has_word):
            continue
        if bool(new) == (compositional and not word):
            return scene


def _kinds(rng, most, compositional, word) -> list[Kind]:
    """What a scene shall have, at most so many things."""
    wanted = int(rng.integers(1, most + 1))
    if word:
        kinds = [_word(rng, compositional)]
        wanted = min(wanted, 3)  # beside a word there is room for little
        compositional = False
    else:
        kinds = []
    names = {kind.name for kind in kinds}
    while (left := wanted - sum(kind.number for kind in kinds)) > 0:
        is_new = compositional and (not kinds or rng.random() < 0.5)
        kind = _new_kind(rng, left) if is_new else _kind(rng, left, word is None and not compositional)
        if kind is not None and kind.name not in names:
            kinds.append(kind)
            names.add(kind.name)
    return kinds


def _kind(rng, left, words) -> Kind | None:
    """One that training shows."""
    what = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    if what == "word":
        return _word(rng, False) if words else None
    number = int(rng.integers(2, 4)) if left > 1 and rng.random() < AGAIN else 1
    number = min(number, left)
    if what == "shape":
        color, name = pick(rng, list(COLORS)), pick(rng, SHAPES)
    else:
        name = pick(rng, ENTRIES).name
        color = pick(rng, TINTS) if rng.random() < TINTED else ""
        if color == PICTURED[name].color and color:
            return None
    if (color, name) in HELD_OUT or (not color and number == held_out_number(name)):
        return None
    return Kind(name, color, number)


def _new_kind(rng, left) -> Kind | None:
    """One that training does not show."""
    what = str(rng.choice(NOVELTIES, p=(0.5, 0.25, 0.25)))
    if what == "color":  # as often a shape as a pictured thing
        shapes = rng.random() < 0.5
        color, name = pick(rng, [pair for pair in sorted(HELD_OUT) if (pair[1] in SHAPES) == shapes])
        return Kind(name, color, novelty=what)
    name = pick(rng, ENTRIES).name
    if what == "place":
        return Kind(name, novelty=what) if held_out_place(name) is not None else None
    number = held_out_number(name)
    return Kind(name, number=number, novelty=what) if number is not None and number <= left else None


def _word(rng, is_new) -> Kind:
    text = pick(rng, NEW_WORDS) if is_new else pick(rng, WORDS) if rng.random() >= MADE_UP else _made_up(rng)
    return Kind(WORD, text=text, font=int(rng.integers(stamps.fonts())))


def _made_up(rng) -> str:
    """Letters that may stand in a row; none of the words that training never shows."""
    while True:
        letters = "".join(
            pick(rng, "BCDFGHJKLMNPQRSTVWXYZ" if i % 2 == 0 else "AEIOUYLRS") for i in range(3 + int(rng.integers(4)))
        )
        if letters not in NEW_WORDS:
            return letters


def _place(rng, kind: Kind, count: int, others: Sequence[Thing], is_shaded: bool, is_dark: bool) -> Thing | None:
    """A thing where it leaves room for the others; None if after some tries there is none."""
    for _ in range(20):
        thing = _pose(rng, kind, count, is_shaded, is_dark)
        x1, y1, x2, y2 = thing.box
        width, height = (x2 - x1) * GRID, (y2 - y1) * GRID
        if max(width, height) > GRID:
            continue
        x = rng.uniform(0, GRID - width) - (x1 * GRID)
        y = rng.uniform(0, GRID - height) - (y1 * GRID)
        thing = replace(thing, x=round(float(x), 2), y=round(float(y), 2))
        if not kind.color and kind.name in PICTURED:
            in_place = thing.place == held_out_place(kind.name)
            if in_place != (kind.novelty == "place"):
                continue
        if all(thing.leaves_room_for(other) for other in others):
            return thing
    return None


def _pose(rng, kind: Kind, count: int, is_shaded: bool, is_dark: bool) -> Thing:
    """A thing of a kind in the upper left corner, with its size and turn."""
    if kind.name == WORD:
        picture = stamps.stamp(WORD, kind.text, kind.font)
        least = WORD_HEIGHT * picture.width / picture.height
        side = rng.uniform(max(least, WORD_SIDES[0] if count < 2 else 10), max(least + 1, WORD_SIDES[1]))
        turn = rng.uniform(-WORD_TURN, WORD_TURN) if rng.random() < 0.5 else 0.0
        paint = _ink(rng, is_dark)
        return Thing(
            WORD, 0, 0, round(float(side), 2), round(float(turn), 1), paint=paint, text=kind.text, font=kind.font
        )
    low, high = SIDES.get(count, CROWDED_SIDES)
    most = SHAPE_TURN if kind.name in SHAPES else TURN
    turn = float(rng.uniform(-most, most)) if rng.random() < 0.6 else 0.0
    mirrored = bool(rng.random() < 0.5) and not is_sign(kind.name)
    shaded = shade(rng, kind.color) if is_shaded and kind.color else None
    return Thing(kind.name, 0, 0, round(float(rng.uniform(low, high)), 2), round(turn, 1), mirrored, kind.color, shaded)


def _ink(rng, is_dark: bool) -> tuple[int, int, int]:
    """What a word is written in: nearly white on dark grounds, dark on light ones."""
    red, green, blue = (int(value) for value in (rng.integers(225, 256, 3) if is_dark else rng.integers(0, 60, 3)))
    return red, green, blue


def is_sign(name: str) -> bool:
    """Whether it is a sign, which is never mirrored."""
    return name in PICTURED and PICTURED[name].kind == "sign"


def names_of(scene: Scene) -> Counter[str]:
    """How many there are of each name."""
    return Counter(thing.name for thing in scene.things)


# --- pictures ----------------------------------------------------------------------------------------------


def _stamped(thing: Thing, size: int) -> "tuple[Image.Image, tuple[int, int]]":
    """A thing's stamp for a picture of size x size, and where its upper left corner is."""
    unit = size / GRID
    stamp = stamps.placed(
        thing.name, thing.text, thing.font, max(1, round(thing.side * unit)), thing.turn, thing.mirrored
    )
    return stamp, (round(thing.x * unit - stamp.width / 2), round(thing.y * unit - stamp.height / 2))


def silhouette(thing: Thing, size: int) -> "Image.Image":
    """Where a thing is, on a canvas of size x size: 255 inside, 0 outside (mode L)."""
    from PIL import Image

    canvas = Image.new("L", (size, size))
    stamp, corner = _stamped(thing, size)
    canvas.paste(stamps.opacity(stamp), corner)
    return canvas.point(lambda value: 255 * (value > stamps.INK))
