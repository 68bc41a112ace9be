"""WebDataset shards: tar files in which the files of a sample follow each other and share a name up to its first dot.

A sample has a picture and either a `json` of fields as a parquet row has them (tables.py), or a `txt`, the answer.
Shards are read as streams. Nothing is unpacked under a name that a shard gives, links and devices are passed over, and
a member is read only as far as MAX_MEMBER.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import PaliGemmaError, quote
from ..image import picture_suffixes
from .rows import Options, Problem, Row
from .tables import text_row

MAX_MEMBER = 2**26  # bytes


def read(files: list[Path], options: Options, problem: Problem) -> Iterator[Row]:
    """The rows of shards, one after the other; what a shard that breaks off had before is kept."""
    for file in files:
        try:
            for key, sample in _samples(file, problem):
                where = f"{file.name}, sample {quote(key)}"
                try:
                    yield _row(where, sample, options)
                except PaliGemmaError as error:
                    problem(f"{where}: {error}")
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            problem(f"{file.name}: not a whole tar file ({error})")


def _samples(file, problem) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Each key with its files by their endings."""
    key, sample = None, {}
    with tarfile.open(file, "r|*") as shard:
        for member in shard:
            if not member.isreg():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            found = f"{folder}/{stem}"
            if found != key:
                if key is not None and sample:
                    yield key, sample
                key, sample = found, {}
            if member.size > MAX_MEMBER:
                problem(f"{file.name}, {quote(member.name)}: {member.size} bytes, more than the {MAX_MEMBER} read")
            elif stream := shard.extractfile(member):
                sample[ending.lower()] = stream.read(MAX_MEMBER)
    if key is not None and sample:
        yield key, sample


def _row(where, sample, options) -> Row:
    image = next((contents for ending, contents in sample.items() if f".{ending}" in picture_suffixes()), None)
    if image is None:
        raise PaliGemmaError(f"no picture among its files ({', '.join(map(quote, sample))})")
    try:
        fields = json.loads(sample["json"]) if "json" in sample else {"suffix": sample["txt"].decode()}
    except KeyError:
        raise PaliGemmaError("neither a json nor a txt beside its picture") from None
    except (ValueError, RecursionError):
        raise PaliGemmaError("its json or txt cannot be read") from None
    if not isinstance(fields, dict):
        raise PaliGemmaError("its json is not an object")
    return text_row(where, image, fields, options)
