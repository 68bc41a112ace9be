"""What every format is read into: rows of a picture, a prefix and a suffix; how boxes and masks become such rows."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..detection import encode
from ..errors import PaliGemmaError, quote
from ..image import MAX_SIDE

TASKS = ("detect", "segment")
MAX_JSON = 2**31  # bytes of annotations that are read whole; those of COCO's largest set have a fifth
#: Called with what is wrong with a row that is left out, and where it stands.
Problem = Callable[[str], None]
#: Called with a mask, bool [height, width], and its box in fractions of the sides, it gives the mask's tokens.
SpellMask = Callable[[np.ndarray, tuple[float, float, float, float]], str]


@dataclass(frozen=True)
class Row:
    """A line to be: where it stood, its picture (a file, or the bytes of one), prefix and suffix."""

    where: str
    image: Path | bytes
    prefix: str
    suffix: str


@dataclass(frozen=True)
class Thing:
    """A thing in a picture: its label, its box in fractions of the sides (x1, y1, x2, y2), and how to get its mask."""

    label: str
    box: tuple[float, float, float, float]
    mask: Callable[[], np.ndarray] | None = None  # bool [height, width]


@dataclass(frozen=True)
class Annotated:
    """A picture with all that is annotated in it."""

    where: str
    image: Path | bytes
    things: list[Thing]


@dataclass(frozen=True)
class Options:
    """What becomes of things and texts.

    `labels` are those that every detection asks for; without them it asks for those of its picture. `prefix` is for
    rows without one of their own.
    """

    task: str = "detect"
    labels: tuple[str, ...] = ()
    prefix: str | None = None
    spell: SpellMask | None = None


def rows_of(picture: Annotated, options: Options, problem: Problem) -> Iterator[Row]:
    """One row to detect everything in a picture, or one a label to segment all of that label, from left to right."""
    things = sorted(picture.things, key=lambda thing: thing.box[:2])
    found = list(dict.fromkeys(thing.label for thing in things))
    if options.task == "detect":
        if wanted := options.labels or found:
            suffix = " ; ".join(f"{encode(*thing.box)} {thing.label}" for thing in things)
            yield Row(picture.where, picture.image, f"detect {' ; '.join(wanted)}", suffix)
        return
    for label in found:
        try:
            parts = [_with_mask(thing, options) for thing in things if thing.label == label]
        except PaliGemmaError as error:
            problem(f"{picture.where}: {error}")
        else:
            yield Row(picture.where, picture.image, f"segment {label}", " ; ".join(parts))


def _with_mask(thing, options) -> str:
    if thing.mask is None or options.spell is None:
        raise PaliGemmaError(f"{quote(thing.label)} has no mask")
    return f"{encode(*thing.box)}{options.spell(thing.mask(), thing.box)} {thing.label}"


# --- checking ----------------------------------------------------------------------------------------------


def label_of(value: object) -> str:
    """A label as an answer can have it. Raises PaliGemmaError if it is none, or has what ends one."""
    label = " ".join(value.split()) if isinstance(value, str) else ""
    if not label or ";" in label or "<" in label:
        raise PaliGemmaError(f"the label {quote(value)} is empty, no text, or has a ; or <, which end a label")
    return label


def box_of(corners: Iterable[object], width: int, height: int) -> tuple[float, float, float, float]:
    """Corners in pixels (x1, y1, x2, y2), cut at the picture's edges -> fractions of its sides.

    Raises PaliGemmaError if they are not four finite numbers, or nothing of the box is in the picture.
    """
    values = list(corners)
    is_number = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
    if len(values) != 4 or not all(is_number) or not np.isfinite(np.array(values, float)).all():
        raise PaliGemmaError(f"the box {quote(values)} is not four numbers")
    x1, y1, x2, y2 = np.clip(np.array(values, float) / [width, height, width, height], 0, 1).tolist()
    if x1 >= x2 or y1 >= y2:
        raise PaliGemmaError(f"the box {quote(values)} has no area in a picture of {width} by {height}")
    return x1, y1, x2, y2


def side_of(value: object) -> int:
    """A picture's width or height in pixels. Raises PaliGemmaError if none can be so."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIDE:
        raise PaliGemmaError(f"a side of {quote(value)} pixels; it must be a whole number from 1 to {MAX_SIDE}")
    return value


def inside(folder: Path, name: object) -> Path:
    """The file of a name, perhaps in folders below, that a stranger wrote. Raises PaliGemmaError if it leads out."""
    if not isinstance(name, str) or not name:
        raise PaliGemmaError(f"the picture's name is {quote(name)}, not a text")
    try:
        file = (folder / name).resolve()
        exists = file.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, a circle of links
        raise PaliGemmaError(f"{quote(name)} is no name of a file") from None
    if not file.is_relative_to(folder.resolve()):
        raise PaliGemmaError(f"the picture {quote(name)} lies outside of {folder}")
    if not exists:
        raise PaliGemmaError(f"no picture {quote(name)} in {folder}")
    return file
