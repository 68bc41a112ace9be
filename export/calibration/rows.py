"""The rows that a model is calibrated on: what is asked about which pictures, and what is answered."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from numpy_ref.checkpoint import Checkpoint
from numpy_ref.errors import PaliGemmaError, note, plural, quote
from numpy_ref.image import preprocess
from numpy_ref.tokenizer import Tokenizer

from ..batch.dataset import Row, open_questions

MOST = 256  # rows that are used of a file
AT_ONCE = 2048  # positions of a batch, about


@dataclass(frozen=True)
class Example:
    """A row: the ids of its prompt, and those of its answer where it has one."""

    row: Row
    prompt: list[int]
    answer: list[int] | None

    def pixel_values(self, size: int, resize: str) -> np.ndarray:
        """Its N pictures [N, 3, S, S]; PaliGemmaError if one cannot be read."""
        opened = [self.row.open(image) for image in self.row.images]
        return np.concatenate([preprocess(image, size, resize=resize) for image in opened])


def read(path: Path, checkpoint: Checkpoint) -> list[Example]:
    """MOST rows of a file, evenly spread, or all if it has fewer.

    Raises PaliGemmaError that names the first that cannot be used.
    """
    dataset, tokenizer = open_questions(path), Tokenizer.load(checkpoint.folder, checkpoint.config)
    if len(dataset) > MOST:
        note(f"{path}: {MOST} of its {len(dataset)} rows are used, evenly spread")
    numbers = np.linspace(0, len(dataset) - 1, min(len(dataset), MOST)).round().astype(int).tolist()
    examples = []
    for number in numbers:
        (row,) = dataset.read(number, number + 1)
        try:
            examples.append(_example(row, tokenizer))
        except PaliGemmaError as error:
            raise PaliGemmaError(f"{path}: {error}") from None
    if not any(each.answer is None or each.answer for each in examples):
        raise PaliGemmaError(f"{path}: every answer is empty, and weights are calibrated on what is answered")
    return examples


def _example(row, tokenizer) -> Example:
    prompt = tokenizer.prompt(row.question(None), len(row.images))
    if row.answer is not None and not isinstance(row.answer, str):
        raise PaliGemmaError(f"row {row.number}: its answer is {quote(row.answer)}, not text")
    answer = None if row.answer is None else tokenizer.encode(row.answer)
    needed, longest = len(prompt) + max(1, len(answer or [])), tokenizer.config.max_length
    if needed > longest:
        raise PaliGemmaError(f"row {row.number} has {plural(needed, 'token')}, and the model room for {longest}")
    return Example(row, prompt, answer)


def in_batches(examples: list[Example]) -> Iterator[list[Example]]:
    """Neighbors with equally many pictures, as many as have AT_ONCE positions together, and at least one."""
    for _, group in groupby(examples, lambda example: example.row.count):
        batch: list[Example] = []
        for example in group:
            longest = max(len(each.prompt) for each in [*batch, example])
            if batch and longest * (len(batch) + 1) > AT_ONCE:
                yield batch
                batch = []
            batch.append(example)
        yield batch
