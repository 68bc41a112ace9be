"""The rows of a data set (a folder of pictures, a JSONL file, a parquet file), read a few at a time.

A data set has a length, a `digest` that changes when it does, `read(start, stop)`, which gives its rows of these
numbers, and `left_out`, the names of files that it passes over. It is small and can be sent to another process, which
opens the files again.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from numpy_ref import files
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import decode_image, open_image, picture_suffixes

from ..bundle import sha256

if TYPE_CHECKING:
    from PIL import Image

PROMPTS = ("prompt", "prefix")  # where a row's own prompt may stand; the first counts
ANSWERS = ("answer", "suffix")  # where the right answer may, of which calibration and drift make use
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One question, its fields as the data set has them: they may be missing (None) or nonsense.

    A picture is a path (from `folder`, or whole), the bytes of a file, or {"bytes", "path"} as Hugging Face writes it;
    a list is of several pictures.
    """

    number: int
    folder: Path
    image: Any
    prompt: Any
    problem: str = ""  # why its fields cannot be read
    answer: Any = None

    @property
    def count(self) -> int:
        """How many pictures the row has, or should have."""
        return len(self.image) if isinstance(self.image, list) else 1

    @property
    def image_name(self) -> str | list[str | None] | None:
        """How the data set names the picture, None if it does not; a list of that where the row has a list."""
        return [_name(image) for image in self.image] if isinstance(self.image, list) else _name(self.image)

    @property
    def images(self) -> list:
        """The fields of its pictures, one as a rule; PaliGemmaError if it has an empty list."""
        if isinstance(self.image, list) and not self.image:
            raise PaliGemmaError(f"row {self.number} has no picture: an empty list")
        return self.image if isinstance(self.image, list) else [self.image]

    def picture(self, transparency: str = "white") -> "Image.Image | list[Image.Image]":
        """The picture, as `image.open_image` gives it, or the list of them; PaliGemmaError if one cannot be read."""
        opened = [self.open(image, transparency) for image in self.images]
        return opened if isinstance(self.image, list) else opened[0]

    def key(self, image: Any) -> Hashable:
        """What the fields of one picture have in common in all rows: its path, or the digest of its bytes."""
        contents = image.get("bytes") if isinstance(image, dict) else image
        return hashlib.sha256(contents).digest() if isinstance(contents, bytes) else (self.folder, _name(image))

    def open(self, image: Any, transparency: str = "white") -> "Image.Image":
        """The picture of a field, as `image.open_image` gives it; PaliGemmaError if it cannot be read."""
        contents, name = image.get("bytes") if isinstance(image, dict) else image, _name(image)
        try:
            if isinstance(contents, bytes):
                return decode_image(BytesIO(contents), name or f"the picture of row {self.number}", transparency)
            if name:
                return open_image(self.folder / name, transparency)
        except (PaliGemmaError, MemoryError):
            raise
        except Exception as error:  # Pillow's decoders raise many kinds, and one picture must not stop the others
            raise PaliGemmaError(f"the picture of row {self.number} cannot be read ({error!r})") from None
        raise PaliGemmaError(f"row {self.number} has no picture: neither a path nor bytes")

    def question(self, default: str | None) -> str:
        """The row's own prompt, or the one for rows without; PaliGemmaError if there is neither."""
        if self.problem:
            raise PaliGemmaError(f"row {self.number} cannot be read ({self.problem})")
        prompt = default if self.prompt is None else self.prompt
        if not isinstance(prompt, str) or not prompt.strip():
            raise PaliGemmaError(f"row {self.number} has no prompt")
        return prompt


def open_dataset(path: Path, default_prompt: str | None) -> "Folder | JsonLines | Parquet":
    """The data set at a path. Raises PaliGemmaError if it is none, is empty, or lacks a prompt and the default too."""
    if not os.path.exists(path):
        raise PaliGemmaError(f"{path}: no such folder or file")
    rows: Folder | JsonLines | Parquet
    if path.is_dir():
        rows = Folder(path, default_prompt)
    elif not path.is_file():
        raise PaliGemmaError(f"{path}: neither a folder nor a file")
    elif path.suffix == ".jsonl":
        rows = JsonLines(path, default_prompt)
    elif path.suffix == ".parquet":
        rows = Parquet(path, default_prompt)
    else:
        raise PaliGemmaError(f"{path}: a folder, FILE.jsonl or FILE.parquet is needed")
    if not len(rows):
        raise PaliGemmaError(f"{path}: no pictures in it")
    return rows


def open_questions(path: Path) -> "JsonLines | Parquet":
    """A file whose rows have prompts of their own, which `Row.question` checks. Raises PaliGemmaError if it is none."""
    if path.is_dir():
        raise PaliGemmaError(f"{path}: a folder; FILE.jsonl or FILE.parquet with a prompt in each row is needed")
    rows = open_dataset(path, "")
    assert not isinstance(rows, Folder)
    return rows


class Folder:
    """Every picture in a folder and the folders below it, by name; hidden ones aside.

    `left_out` are the names of the other files, by whose endings nobody would take them for pictures that are read.
    """

    def __init__(self, path: Path, default_prompt: str | None):
        _need_prompt(path, default_prompt)
        self.path, suffixes = path, picture_suffixes()
        names = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        shown = sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
        self.names = [name for name in shown if Path(name).suffix.lower() in suffixes]
        self.left_out = [name for name in shown if Path(name).suffix.lower() not in suffixes]

    def __len__(self):
        return len(self.names)

    @property
    def digest(self) -> str:
        """Of names, sizes and times: to read every picture would take too long."""
        digest = hashlib.sha256()
        with _readable(self.path):
            for name in self.names:
                status = (self.path / name).stat()
                digest.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> list[Row]:
        return [Row(start + i, self.path, name, None) for i, name in enumerate(self.names[start:stop])]


class JsonLines:
    """Lines {"image": path, or a list of paths, "prompt" or "prefix": text}; blank ones do not count.

    Only places of lines are kept.
    """

    left_out: ClassVar[list[str]] = []

    def __init__(self, path: Path, default_prompt: str | None):
        self.path, digest, places, place = path, hashlib.sha256(), array("q"), 0
        with _readable(path), files.opened(path) as stream:
            for number, line in enumerate(stream, 1):
                digest.update(line)
                if line.strip():
                    self._check(number, line, default_prompt)
                    places.append(place)
                place += len(line)
        self.places, self.digest = places, digest.hexdigest()

    def __len__(self):
        return len(self.places)

    def read(self, start: int, stop: int) -> list[Row]:
        rows = []
        with _readable(self.path), files.opened(self.path) as stream:
            for number in range(start, min(stop, len(self))):
                stream.seek(self.places[number])
                row = _object(stream.readline())
                if row is None:
                    raise PaliGemmaError(f"{self.path} was changed while it was read")
                rows.append(Row(number, self.path.parent, row.get("image"), _prompt(row), answer=_first(row, ANSWERS)))
        return rows

    def _check(self, number, line, default_prompt):
        where, row = f"{self.path}, line {number}", _object(line)
        if row is None or "image" not in row:
            raise PaliGemmaError(f'{where}: not an object with "image"')
        if _prompt(row) is None:
            _need_prompt(where, default_prompt)


class Parquet:
    """Rows of a parquet file with a column `image` and perhaps `prompt` or `prefix`; needs pyarrow.

    Reading goes on where it ended, and past row groups unread. At most a page of the file is held, which pyarrow
    makes of a thousand rows unless it is told a smaller `row_group_size` or `write_batch_size`.
    """

    left_out: ClassVar[list[str]] = []

    def __init__(self, path: Path, default_prompt: str | None):
        self.path, self._next = path, 0
        self._rows: Iterator[tuple] | None = None
        with _readable(path), _open_parquet(path) as file:
            columns = file.schema_arrow.names
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        if "image" not in columns:
            raise PaliGemmaError(f"{path}: no column image; it has {', '.join(columns)}")
        self.columns = ["image", *(name for name in PROMPTS + ANSWERS if name in columns)]
        if not set(self.columns) & set(PROMPTS):
            _need_prompt(path, default_prompt)
        self.ends = np.cumsum(groups, dtype=np.int64)  # the number behind each group's last row

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self):
        return {**vars(self), "_rows": None, "_next": 0}  # an open file stays where it is

    @property
    def digest(self) -> str:
        return sha256(self.path)

    def read(self, start: int, stop: int) -> list[Row]:
        stop = min(stop, len(self))
        with _readable(self.path):
            if self._rows is None or start < self._next or self._group(start) > self._group(self._next):
                group = self._group(start)
                self._rows, self._next = self._from(group), int(self.ends[group - 1]) if group else 0
            rows = []
            while self._next < stop:
                fields = next(self._rows)
                if self._next >= start:
                    rows.append(Row(self._next, self.path.parent, *fields))
                self._next += 1
        return rows

    def _group(self, number) -> int:
        return int(np.searchsorted(self.ends, number, "right"))

    def _from(self, group):
        """Yield (image, prompt, problem, answer) of every row from a row group's first on."""
        with _open_parquet(self.path) as file:
            groups = range(group, len(self.ends))
            for batch in file.iter_batches(16, row_groups=groups, columns=self.columns, use_threads=False):
                for i in range(len(batch)):
                    try:
                        (row,) = batch.slice(i, 1).to_pylist()
                    except Exception as error:  # text that is not UTF-8, for one
                        yield None, None, str(error), None
                    else:
                        yield row["image"], _prompt(row), "", _first(row, ANSWERS)


def _name(image) -> str | None:
    """How a data set names one picture; None if it does not."""
    named = image.get("path") if isinstance(image, dict) else image
    return named if isinstance(named, str) else None


def _open_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise PaliGemmaError(f"{path}: reading it needs pyarrow (the extra `parquet`): pip install pyarrow") from None
    return pyarrow.parquet.ParquetFile(path, memory_map=True)  # else it would hold a whole row group


@contextmanager
def _readable(path):
    """What goes wrong with a file as PaliGemmaError; pyarrow's exceptions are kinds of these."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        raise PaliGemmaError(f"{path}: cannot read it ({error})") from None


def _object(line: bytes) -> dict | None:
    """The object of a line of JSON; None if it is none."""
    try:
        row = json.loads(line.removeprefix(_BOM))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _prompt(row: dict):
    return _first(row, PROMPTS)


def _first(row: dict, names):
    return next((row[name] for name in names if row.get(name) is not None), None)


def _need_prompt(where, default_prompt) -> None:
    if default_prompt is None:
        raise PaliGemmaError(f'{where}: no prompt, neither as "prompt" or "prefix" of a row nor as --prompt')
