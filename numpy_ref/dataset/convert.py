"""Reading a data set of any of the formats, and writing it as lines to train on."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import detection
from ..answer import paint
from ..engine import MaskDecoder
from ..errors import PaliGemmaError, note, plural
from ..files import new_directory
from ..image import decode_image, open_image
from ..model import segmentation
from ..model.layers import Params
from . import coco, shards, tables, voc
from .rows import Options, Problem, Row, rows_of

if TYPE_CHECKING:
    from PIL import Image

ROWS, IMAGES = "rows.jsonl", "images"
MOST_LINES = 20  # about rows that are left out, on stderr
SHOWN, COLUMNS, TILE = 12, 4, 320  # rows of a preview, columns, and pixels of a tile's side


class Problems:
    """Called with what is wrong with a row that is left out: a line on stderr, up to MOST_LINES of them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, message: str) -> None:
        self.count += 1
        if self.count <= MOST_LINES:
            note(f"left out: {message}")


def speller(codec: Params) -> Callable[[np.ndarray, tuple[float, float, float, float]], str]:
    """What spells a mask in its box by a codec's code words."""

    def spell(mask, box):
        return segmentation.spell(segmentation.encode(codec, segmentation.crop(mask, box)[None])[0])

    return spell


def open_rows(source: Path, images: Path | None, options: Options, all_labels: bool, problem: Problem) -> Iterator[Row]:
    """The rows of a data set; its format is told by what it is. Raises PaliGemmaError if it is none."""
    if source.is_dir() and (source / voc.ANNOTATIONS).is_dir():
        return _annotated(voc.read(source, images, problem), options, all_labels, problem)
    if source.suffix == ".json" and source.is_file():
        return _annotated(coco.read(source, images, problem), options, all_labels, problem)
    for ending, reader in ((".parquet", tables.read), (".tar", shards.read)):
        files = sorted(source.glob(f"*{ending}")) if source.is_dir() else [source]
        if files and all(file.is_file() and file.suffix == ending for file in files):
            return reader(files, options, problem)
    if not source.exists():
        raise PaliGemmaError(f"{source}: no such file or folder")
    raise PaliGemmaError(
        f"{source}: not COCO's FILE.json, nor a folder with {voc.ANNOTATIONS} (Pascal VOC), nor a file or folder of "
        ".parquet or .tar (WebDataset)"
    )


def _annotated(found, options, all_labels, problem):
    labels, pictures = found
    options = replace(options, labels=tuple(labels) if all_labels else ())
    for picture in pictures:
        yield from rows_of(picture, options, problem)


def convert(rows: Iterator[Row], output: Path, problem: Problem) -> list[dict]:
    """Write rows into a new folder; the lines. Raises PaliGemmaError if the folder exists, or no row is left.

    Pictures that are files stay where they are and are named from the folder.
    """
    lines: list[dict] = []
    home = output.resolve()
    with new_directory(output) as folder:
        with (folder / ROWS).open("w", encoding="utf-8") as stream:
            for row in rows:
                try:
                    name = _write_image(row, folder, len(lines)) if isinstance(row.image, bytes) else _named(row, home)
                    text = json.dumps({"image": name, "prefix": row.prefix, "suffix": row.suffix}, ensure_ascii=False)
                    stream.write(text + "\n")
                except (PaliGemmaError, UnicodeEncodeError) as error:
                    problem(f"{row.where}: {error}")
                else:
                    lines.append(json.loads(text))
        if not lines:
            raise PaliGemmaError(f"{output}: nothing to write: not one row could be used")
    return lines


def _write_image(row, folder, number) -> str:
    from PIL import Image

    decode_image(BytesIO(row.image), "the picture")  # which says in one line what is wrong with it
    with Image.open(BytesIO(row.image)) as image:
        ending = (image.format or "picture").lower()
    (folder / IMAGES).mkdir(exist_ok=True)
    name = f"{IMAGES}/{number:06d}.{ending}"
    (folder / name).write_bytes(row.image)
    return name


def _named(row, home) -> str:
    try:
        return Path(os.path.relpath(row.image, home)).as_posix()
    except ValueError:  # another drive
        return str(row.image)


def preview(folder: Path, lines: list[dict], masks: MaskDecoder | None) -> "Image.Image":
    """The first rows of a folder, each drawn with its boxes and masks, and prefix and text below."""
    from PIL import Image

    tiles = [_tile(folder, line, masks) for line in lines[:SHOWN]]
    columns = min(COLUMNS, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = Image.new("RGB", (columns * TILE, sum(heights)), "white")
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            sheet.paste(tile, (j * TILE, sum(heights[:i])))
    return sheet


def _tile(folder, line, masks):
    picture = open_image(folder / line["image"])
    boxes = detection.parse(line["suffix"], picture.width, picture.height)
    painted = [paint(masks, box, picture.width, picture.height) for box in boxes]
    drawn = detection.draw(picture, boxes, line["prefix"], "" if boxes else line["suffix"], painted)
    return drawn.resize((TILE, max(1, round(drawn.height * TILE / drawn.width))))


def summary(lines: list[dict], left_out: int, output: Path) -> str:
    """What was written, in one line."""
    pictures = len({line["image"] for line in lines})
    rest = f"; {plural(left_out, 'row')} left out" if left_out else ""
    return f"wrote {output / ROWS}, {plural(len(lines), 'line')} about {plural(pictures, 'picture')}{rest}"


def codec_of(folder: Path) -> tuple[Params, MaskDecoder]:
    """The mask codec beside a checkpoint. Raises PaliGemmaError if there is none."""
    if (file := segmentation.find(folder)) is None:
        raise PaliGemmaError(
            f"{folder}: no {' or '.join(segmentation.FILES)} to spell masks with; name another --codec"
        )
    params = segmentation.load(file)
    return params, partial(segmentation.decode, params)
