"""Grounds that scenes lie on: patterns, and textures made by noise with the spectrum of natural pictures.

Nothing here is a photograph. A texture sums noise over octaves, each twice as fine and weaker (Perlin 1985), stretched
along one side for grain, waves and blades; `blurred` is such noise in three tones, as what is out of focus looks.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

#: How each kind of ground is called in a caption, after "on", by language.
NAMES = {
    "plain": ("a plain ground", "einfarbigem Grund", "un fondo liso"),
    "gradient": ("a gradient ground", "verlaufendem Grund", "un fondo degradado"),
    "striped": ("a striped ground", "gestreiftem Grund", "un fondo rayado"),
    "checkered": ("a checkered ground", "kariertem Grund", "un fondo a cuadros"),
    "speckled": ("a speckled ground", "gesprenkeltem Grund", "un fondo moteado"),
    "blurred": ("a blurred ground", "unscharfem Grund", "un fondo borroso"),
    "grass": ("grass", "Gras", "hierba"),
    "sand": ("sand", "Sand", "arena"),
    "water": ("water", "Wasser", "agua"),
    "wood": ("wood", "Holz", "madera"),
    "bricks": ("bricks", "Ziegeln", "ladrillos"),
    "snow": ("snow", "Schnee", "nieve"),
}
KINDS = tuple(NAMES)
TEXTURES = ("grass", "sand", "water", "wood", "bricks", "snow")
#: Dark and light tone of each texture; more muted than what things are painted in.
TONES = {
    "grass": ((70, 98, 52), (142, 160, 96)),
    "sand": ((176, 154, 118), (222, 204, 168)),
    "water": ((58, 104, 126), (138, 178, 190)),
    "wood": ((112, 80, 54), (184, 146, 106)),
    "bricks": ((140, 84, 70), (176, 118, 100)),
    "snow": ((204, 212, 222), (240, 243, 247)),
}
MORTAR = (178, 172, 164)
_Field = np.ndarray  # float32 [side, side], mostly in [0, 1]


@cache
def _axes(side: int) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    return y, x


def noise(rng: np.random.Generator, side: int, cells: tuple[int, int], octaves: int, fall: float = 0.5) -> _Field:
    """Octaves of smooth noise: the first has `cells` (down, across), each next twice as fine and `fall` as strong."""
    from PIL import Image

    total, weight = np.zeros((side, side), np.float32), 1.0
    for octave in range(octaves):
        shape = [max(2, count << octave) + 1 for count in cells]
        coarse = Image.fromarray(rng.random(shape, np.float32) - np.float32(0.5))
        total += np.float32(weight) * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        weight *= fall
    return np.clip(0.5 + 0.9 * total, 0, 1)


def _blend(tones, mix: _Field) -> np.ndarray:
    first, second = (np.asarray(tone, np.float32) for tone in tones)
    return first + (second - first) * np.asarray(mix, np.float32)[..., None]


def _gradient(rng, side, tones):
    y, x = _axes(side)
    angle = rng.uniform(0, 2 * np.pi)
    mix = 0.5 + 0.7 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    return _blend((np.subtract(tones[0], 20), np.add(tones[1], 20)), mix)


def _striped(rng, side, tones):
    y, x = _axes(side)
    angle = rng.choice([0, np.pi / 2, np.pi / 4, -np.pi / 4])
    return _blend(tones, np.floor((x * np.cos(angle) + y * np.sin(angle)) * rng.integers(8, 12)) % 2)


def _checkered(rng, side, tones):
    y, x = _axes(side)
    cells = int(rng.integers(6, 10))
    return _blend(tones, (np.floor(x * cells) + np.floor(y * cells)) % 2)


def _speckled(rng, side, tones):
    y, x = _axes(side)
    cells = 40
    grid = (rng.random((cells, cells)) < 0.3).astype(np.float32)
    return _blend(tones, grid[(y * cells).astype(int), (x * cells).astype(int)])


def _blurred(rng, side, tones):
    base = np.asarray(tones[0], np.float32)
    third = np.clip(base + rng.integers(-60, 61, 3), 40, 215)
    return _blend((base, tones[1]), noise(rng, side, (2, 2), 2)) * 0.5 + 0.5 * _blend(
        (base, third), noise(rng, side, (3, 3), 2)
    )


def _grass(rng, side, tones):
    return _blend(tones, 0.35 * noise(rng, side, (3, 3), 2) + 0.65 * noise(rng, side, (8, 24), 2, 0.9))


def _sand(rng, side, tones):
    return _blend(tones, 0.6 * noise(rng, side, (3, 2), 2) + 0.4 * noise(rng, side, (36, 36), 1))


def _water(rng, side, tones):
    y, _ = _axes(side)
    waves = noise(rng, side, (9, 3), 3, 0.7)
    return _blend(tones, np.clip(0.8 * waves + 0.3 * y - 0.1, 0, 1))


def _wood(rng, side, tones):
    _, x = _axes(side)
    planks = int(rng.integers(3, 6))
    grain = noise(rng, side, (2, 22), 2, 0.7) if rng.random() < 0.5 else noise(rng, side, (2, 16), 3, 0.6)
    place = x * planks
    shade = rng.random(planks).astype(np.float32)[place.astype(int)]
    mixed = _blend(tones, np.clip(0.65 * grain + 0.35 * shade, 0, 1))
    return mixed * np.where((place % 1) < 0.05, np.float32(0.6), np.float32(1))[..., None]


def _bricks(rng, side, tones):
    y, x = _axes(side)
    rows = int(rng.integers(6, 9))
    row = np.floor(y * rows)
    column = x * rows / 2 + 0.5 * (row % 2)
    shade = rng.random((rows, rows + 2)).astype(np.float32)[row.astype(int), np.floor(column).astype(int)]
    mixed = _blend(tones, np.clip(0.6 * shade + 0.4 * noise(rng, side, (12, 12), 2), 0, 1))
    joint = ((y * rows) % 1 < 0.14) | (column % 1 < 0.07)
    return np.where(joint[..., None], np.array(MORTAR, np.float32), mixed)


def _snow(rng, side, tones):
    return _blend(tones, np.clip(0.7 * noise(rng, side, (2, 2), 3) + 0.4 * noise(rng, side, (40, 40), 1), 0, 1))


_PAINT: dict[str, Callable] = {
    "plain": lambda rng, side, tones: _blend(tones, np.zeros((side, side), np.float32)),
    "gradient": _gradient, "striped": _striped, "checkered": _checkered, "speckled": _speckled, "blurred": _blurred,
    "grass": _grass, "sand": _sand, "water": _water, "wood": _wood, "bricks": _bricks, "snow": _snow,
}  # fmt: skip


def paint(kind: str, tones: tuple, rng: np.random.Generator, side: int) -> np.ndarray:
    """The ground as float32 [side, side, 3], in light that may fall off towards one side."""
    y, x = _axes(side)
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.25)
    light = 1 + fall * ((x - 0.5) * np.float32(np.cos(angle)) + (y - 0.5) * np.float32(np.sin(angle)))
    return _PAINT[kind](rng, side, tones) * light[..., None].astype(np.float32)


def tones_of(kind: str, rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Two tones for a ground of this kind: a texture's own, a little off; else muted ones, apart from all paints."""
    if kind in TONES:
        shift = rng.integers(-12, 13, 3) + rng.integers(-14, 15)
        first, second = (np.clip(np.array(tone) + shift, 0, 255) for tone in TONES[kind])
    else:
        base = rng.integers(100, 205, 3)
        first = (0.5 * base + 0.5 * int(base.mean())).astype(int)
        second = np.clip(first + int(rng.integers(18, 36)) * (1 if rng.random() < 0.5 else -1), 0, 255)
    return _triple(first), _triple(second)


def _triple(tone) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in tone)
    return red, green, blue
