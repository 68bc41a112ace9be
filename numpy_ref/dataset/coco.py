"""COCO's annotations: one JSON file with images, annotations and categories; pictures in a folder beside it."""

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import PaliGemmaError, quote
from ..files import read_bytes
from .rows import MAX_JSON, Annotated, Problem, Thing, box_of, inside, label_of, side_of

FINE = 4  # parts of a pixel's side that outlines are drawn in
MOST_PIXELS = 50_000_000  # of a mask; the annotations alone say how large it is to be


def read(file: Path, images: Path | None, problem: Problem) -> tuple[list[str], Iterator[Annotated]]:
    """The labels of a file, and its pictures, which lie in `images`.

    By default that is the folder of the file's name without `.json`, or `images`, or the file's own. Crowds
    (`iscrowd`), whose boxes are around several things, are left out without a word. Raises PaliGemmaError if it is no
    such file.
    """
    try:
        found = json.loads(read_bytes(file, MAX_JSON))
        tables = [found[name] for name in ("images", "annotations", "categories")]
        if not all(isinstance(table, list) and all(isinstance(row, dict) for row in table) for table in tables):
            raise TypeError
    except OSError as error:
        raise PaliGemmaError(f"{file}: cannot read it ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PaliGemmaError(f"{file}: not COCO's JSON, with lists of images, annotations and categories") from None
    pictures, annotations, categories = tables
    labels: dict[object, str] = {}
    for row in categories:
        try:
            labels[_id(row.get("id"))] = label_of(row.get("name"))
        except PaliGemmaError as error:
            problem(f"category {quote(row.get('id'))}: {error}")
    usual = [each for each in (file.with_suffix(""), file.parent / "images") if each.is_dir()]
    folder = images or (usual or [file.parent])[0]
    return list(labels.values()), _pictures(folder, pictures, annotations, labels, problem)


def _id(value) -> object:
    return value if isinstance(value, int | str) else quote(value)


def _pictures(folder, pictures, annotations, labels, problem):
    by_picture = defaultdict(list)
    known = {_id(row.get("id")) for row in pictures}
    for row in annotations:
        if _id(row.get("image_id")) in known:
            by_picture[_id(row.get("image_id"))].append(row)
        else:
            problem(f"annotation {quote(row.get('id'))}: there is no image {quote(row.get('image_id'))}")
    for row in pictures:
        where = f"image {quote(row.get('id'))}"
        try:
            image = inside(folder, row.get("file_name"))
            size = side_of(row.get("width")), side_of(row.get("height"))
        except PaliGemmaError as error:
            problem(f"{where}: {error}")
            continue
        things = []
        for annotation in by_picture[_id(row.get("id"))]:
            if annotation.get("iscrowd"):
                continue
            try:
                things.append(_thing(annotation, labels, *size))
            except PaliGemmaError as error:
                problem(f"{where}, annotation {quote(annotation.get('id'))}: {error}")
        yield Annotated(where, image, things)


def _thing(annotation, labels, width, height) -> Thing:
    label, box = labels.get(_id(annotation.get("category_id"))), annotation.get("bbox")
    if label is None:
        raise PaliGemmaError(f"there is no category {quote(annotation.get('category_id'))}")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
        raise PaliGemmaError(f"the box {quote(box)} is not four numbers")
    outline = annotation.get("segmentation")
    mask = partial(mask_of, outline, width, height) if outline else None
    return Thing(label, box_of((box[0], box[1], box[0] + box[2], box[1] + box[3]), width, height), mask)


# --- masks -------------------------------------------------------------------------------------------------


def mask_of(outline: object, width: int, height: int) -> np.ndarray:
    """COCO's `segmentation`, polygons or run lengths, -> bool [height, width].

    Raises PaliGemmaError if it is neither, or of another size.
    """
    if width * height > MOST_PIXELS:
        raise PaliGemmaError(f"a mask of {width} by {height} pixels, more than {MOST_PIXELS}")
    if isinstance(outline, list):
        return _polygons(outline, width, height)
    if not isinstance(outline, dict) or outline.get("size") != [height, width]:
        raise PaliGemmaError(f"the mask {quote(outline)} is neither polygons nor run lengths of {height} by {width}")
    counts = outline.get("counts")
    if isinstance(counts, str):
        counts = run_lengths(counts)
    lengths = counts if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts) else []
    if sum(lengths) != width * height:
        raise PaliGemmaError(f"the run lengths do not add up to {height} by {width} pixels")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape((height, width), order="F")


def run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths -> counts.

    Each number has five bits a character, low ones first, with a sixth that says whether more follow, from "0" on; from
    the fourth number on it is the difference to the last but one (`maskApi.c`, rleFrString).
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise PaliGemmaError("the run lengths are not of COCO's characters")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def _polygons(outlines, width, height):
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (FINE * width, FINE * height))  # a pixel counts if half of it is inside
    pen = ImageDraw.Draw(canvas)
    for outline in outlines:
        numbers = isinstance(outline, list) and all(type(value) in (int, float) for value in outline)
        if not numbers or len(outline) < 6 or len(outline) % 2 or not np.isfinite(outline).all():
            raise PaliGemmaError(f"the polygon {quote(outline)} is not three points or more")
        corners = np.clip(outline, -width - height, 2 * (width + height)) * FINE - 0.5
        pen.polygon(corners.tolist(), fill=255)
    return np.array(canvas.reduce(FINE)) > 127
