"""Parquet files as the Hugging Face Hub has them: a column of pictures, and texts, or objects with boxes.

Texts are a question (`prefix`, `prompt` or `question`) and an answer (`suffix`, `answer`, `caption` or `text`). Objects
are a column `objects` with lists `bbox` ([x, y, width, height] in pixels, as the Hub's detection sets have it) and
`category`, a name or the number of one that the file's metadata name.
"""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from ..errors import PaliGemmaError, quote
from ..image import decode_image, open_image
from .rows import Annotated, Options, Problem, Row, Thing, box_of, inside, label_of, rows_of

PREFIXES, SUFFIXES = ("prefix", "prompt", "question"), ("suffix", "answer", "caption", "text")
OBJECTS = "objects"


def read(files: list[Path], options: Options, problem: Problem) -> Iterator[Row]:
    """The rows of files, one after the other. Raises PaliGemmaError for a file that is none, or lacks columns."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise PaliGemmaError(
            f"{files[0]}: reading it needs pyarrow (the extra `parquet`): pip install pyarrow"
        ) from None
    for file in files:
        try:
            table = parquet.ParquetFile(file, memory_map=True)
            columns = [name for name in table.schema_arrow.names if name in {"image", OBJECTS, *PREFIXES, *SUFFIXES}]
            names = _category_names(table.schema_arrow.metadata or {})
            if "image" not in columns or not {OBJECTS, *SUFFIXES} & {*columns}:
                has = ", ".join(table.schema_arrow.names)
                raise PaliGemmaError(f"{file}: no column image, or neither {OBJECTS} nor an answer; it has {has}")
            number = 0
            for batch in table.iter_batches(16, columns=columns, use_threads=False):
                for i in range(len(batch)):
                    number += 1
                    yield from _rows(f"{file.name}, row {number}", batch.slice(i, 1), file, names, options, problem)
        except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own are kinds of these
            raise PaliGemmaError(f"{file}: cannot read it ({error})") from None


def _category_names(metadata) -> list | None:
    """The names behind the numbers of categories, as `datasets` writes them into a file."""
    try:
        features: Any = json.loads(metadata[b"huggingface"])["info"]["features"][OBJECTS]
        feature = features.get("feature", features)["category"]
        return feature.get("feature", feature)["names"]
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _rows(where, batch, file, names, options, problem):
    try:
        (fields,) = batch.to_pylist()
        image = _image(fields.get("image"), file)
        if fields.get(OBJECTS) is not None:
            things = _things(fields[OBJECTS], image, names, where, problem)
            yield from rows_of(Annotated(where, image, things), options, problem)
        else:
            yield text_row(where, image, fields, options)
    except (PaliGemmaError, ValueError) as error:  # the latter is text that is not UTF-8
        problem(f"{where}: {error}")


def text_row(where: str, image: Path | bytes, fields: dict, options: Options) -> Row:
    """A row of a question and an answer. Raises PaliGemmaError if there is neither, or no prefix for it."""
    prefix = next((fields[name] for name in PREFIXES if fields.get(name) is not None), options.prefix)
    suffix = next((fields[name] for name in SUFFIXES if fields.get(name) is not None), None)
    if isinstance(suffix, list) and suffix:
        suffix = suffix[0]  # of several captions, or answers of several people, the first
    if not isinstance(suffix, str):
        raise PaliGemmaError(f"the answer is {quote(suffix)}, not a text")
    if not isinstance(prefix, str) or not prefix.strip():
        raise PaliGemmaError(f"the prompt is {quote(prefix)}, not a text; --prefix is for rows without one")
    return Row(where, image, prefix, suffix)


def _image(value, file) -> Path | bytes:
    contents = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(contents, bytes):
        return contents
    return inside(file.parent, value.get("path") if isinstance(value, dict) else value)


def _things(objects, image, names, where, problem) -> list[Thing]:
    boxes, categories = (objects.get(name) if isinstance(objects, dict) else None for name in ("bbox", "category"))
    if not isinstance(boxes, list) or not isinstance(categories, list) or len(boxes) != len(categories):
        raise PaliGemmaError(f"its {OBJECTS} are not as many boxes (bbox) as categories (category)")
    picture = decode_image(BytesIO(image), "the picture") if isinstance(image, bytes) else open_image(image)
    things = []
    for number, (box, category) in enumerate(zip(boxes, categories, strict=True), 1):
        try:
            if not isinstance(box, list) or len(box) != 4 or None in box:
                raise PaliGemmaError(f"the box {quote(box)} is not four numbers")
            if isinstance(category, int) and names and 0 <= category < len(names):
                category = names[category]
            corners = box[0], box[1], box[0] + box[2], box[1] + box[3]
            things.append(Thing(label_of(category), box_of(corners, picture.width, picture.height)))
        except PaliGemmaError as error:
            problem(f"{where}, object {number}: {error}")
    return things
