"""The cache of a service: `count` rows, of which the first are in use.

A request is prefilled into the first free row, and a decode step runs over the rows in use alone, since what it costs
grows with them. When a row in between ends, the last one takes its place.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from numpy_ref.answer import Picture
from numpy_ref.generate import pad_prompts
from numpy_ref.model.sampling import Sampling

from ..session import CUDA, DeviceSession, Session, cuda
from ..session.engine import Cache, Rows

TOGETHER = 4  # prompts that a device prefills at once; on the CPU nothing is won by more than one


class Slots:
    """Rows of one cache, with the engine that fills them. One thread at a time may use it."""

    def __init__(self, engine: Session, count: int, capacity: int):
        self.engine, self.count, self.capacity = engine, count, min(capacity, engine.max_length)
        self.whole = Cache(engine, count, self.capacity)
        self.on_cuda, logits_stay = engine.provider == CUDA, isinstance(engine, DeviceSession)
        self.together = TOGETHER if logits_stay else 1
        self._rows: dict[tuple[int, int], Rows] = {}

    def encode(self, picture: Picture) -> None:
        """Run a picture through the vision tower, once for all prompts about it."""
        (picture.features,) = self.engine.encode(picture.pixel_values)

    def prefill(self, first: int, pictures: Sequence[Picture], prompts: Sequence[Sequence[int]]) -> Any:
        """Fill rows from `first` on: B*N pictures with features, B prompts -> logits [B, V] where the engine has them.

        Where logits come to the host, more than one prompt is one prompt, several times: it is read once and copied.
        """
        copies = len(prompts) - 1 if self.together == 1 else 0
        if copies:
            pictures, prompts = pictures[: len(pictures) // len(prompts)], prompts[:1]
        input_ids, lengths = pad_prompts(prompts, self.engine.config.pad)
        features = [each.features for each in pictures if each.features]
        logits, _ = self.engine.prefill(features, input_ids, lengths, self.capacity, self._at(first, len(prompts)))
        for i in range(copies):
            self.copy(first, first + 1 + i, len(prompts[0]))
        return np.repeat(logits, 1 + copies, 0) if copies else logits

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> Any:
        """One more token for each of the first B rows: tokens [B] at positions lengths [B] -> logits [B', V].

        Where steps are captured, B' is the next power of two, and what lies in the rows behind B has no meaning.
        """
        batch = self._size(len(tokens))
        input_ids, positions = np.full(batch, self.engine.config.pad, np.int64), np.zeros(batch, np.int32)
        input_ids[: len(tokens)], positions[: len(tokens)] = tokens, lengths
        return self.engine.decode(input_ids[:, None], positions, self._at(0, batch))[0]

    def draw(
        self, logits: Any, known: np.ndarray, samplings: Sequence[Sampling], uniform: np.ndarray,
        allowed: Sequence[np.ndarray | None], again: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
        """A token for each of the first B rows of logits, and its log-probability, or None where that is not known.

        Each row has a sampling, a number of `uniform` [B] and perhaps `allowed` [V], which ids it may take. As in
        `generate`, a token that it may not take is drawn again among those that it may, with its number of `again` [B].
        Rows of one sampling are drawn together.
        """
        tokens, logprobs = np.zeros(len(samplings), np.int64), np.full(len(samplings), np.nan, np.float32)
        has_all = True

        def draw_rows(rows, numbers, masks=None):
            nonlocal has_all
            for sampling, group in _groups(samplings, rows).items():
                drawn, found = self._draw(logits, known, sampling, numbers, group, masks)
                tokens[group] = drawn
                has_all = has_all and found is not None
                if found is not None:
                    logprobs[group] = found

        draw_rows(range(len(samplings)), uniform)
        masks = {row: mask for row, mask in enumerate(allowed) if mask is not None and not mask[tokens[row]]}
        if masks:
            draw_rows(masks, again, masks)
        return tokens, logprobs if has_all else None

    def on_host(self, logits: Any) -> np.ndarray:
        """Logits as an array."""
        return logits if isinstance(logits, np.ndarray) else cuda.on_host(logits)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for value in self.whole.buffers.values():
            if self.on_cuda:
                size = value.tensor_size_in_bytes() // self.count
                target_place, source_place = (value.data_ptr() + row * size for row in (target, source))
                cuda.copy_within(target_place, source_place, size, getattr(self.engine, "_stream", 0))
            else:
                array = value.numpy()  # a view of the buffer
                array[target, :, :length] = array[source, :, :length]

    def _draw(self, logits, known, sampling, numbers, rows, masks):
        """Tokens of some rows, which have `masks` of their own or take all that is known."""
        if isinstance(logits, np.ndarray):
            is_whole = len(rows) == len(logits)
            chosen = logits if is_whole else logits[rows]
            own = known if masks is None else np.stack([masks[row] for row in rows])
            return self.engine.draw(chosen, own, sampling, numbers[rows])
        batch = logits.shape()[0]  # logits on a device are drawn from all at once
        every, own = np.zeros(batch, np.float32), known
        every[: len(numbers)] = numbers
        if masks is not None:
            own = np.tile(known, (batch, 1))
            own[rows] = np.stack([masks[row] for row in rows])
        drawn, found = self.engine.draw(logits, own, sampling, every)
        return drawn[rows], None if found is None else found[rows]

    def _size(self, batch: int) -> int:
        """How many rows a step over `batch` has: each captured size is a graph of its own, so there are few."""
        return min(self.count, 1 << (batch - 1).bit_length()) if self.engine.captures else batch

    def _at(self, first: int, batch: int) -> Rows:
        if (first, batch) not in self._rows:
            self._rows[first, batch] = Rows(self.engine, self.whole, first, batch)
        return self._rows[first, batch]


def _groups(samplings, rows) -> dict[Sampling, list[int]]:
    """Sampling -> its rows; the seed makes no difference here."""
    groups: dict[Sampling, list[int]] = {}
    for row in rows:
        groups.setdefault(replace(samplings[row], seed=0), []).append(row)
    return groups
