"""The cache of a service: `count` rows, of which the first are in use.

A request is prefilled into the first free row, and a decode step runs over the rows in use alone, since what it costs
grows with them. When a row in between ends, the last one takes its place.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from numpy_ref.generate import pad_prompts
from numpy_ref.model.sampling import Sampling, log_probability, sample

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

    def prefill(self, first: int, pixel_values: np.ndarray, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Fill rows from `first` on: pixel_values [B*N, 3, S, S], B prompts -> logits [B, V] where the engine has them.

        Where logits come to the host, more than one prompt is one prompt, several times: it is read once and copied.
        """
        copies = len(prompts) - 1 if self.together == 1 else 0
        if copies:
            pixel_values, prompts = pixel_values[: len(pixel_values) // len(prompts)], prompts[:1]
        input_ids, lengths = pad_prompts(prompts, self.engine.config.pad)
        rows = self._at(first, len(prompts))
        logits, _ = self.engine.prefill(pixel_values, input_ids, lengths, self.capacity, rows)
        for i in range(copies):
            self.copy(first, first + 1 + i, len(prompts[0]))
        return np.repeat(logits, 1 + copies, 0) if copies else logits

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """One more token for each of the first B rows: tokens [B] at positions lengths [B] -> logits [B', V].

        Where steps are captured, B' is the next power of two, and what lies in the rows behind B has no meaning.
        """
        batch = self._size(len(tokens))
        input_ids, positions = np.full(batch, self.engine.config.pad, np.int64), np.zeros(batch, np.int32)
        input_ids[: len(tokens)], positions[: len(tokens)] = tokens, lengths
        return self.engine.decode(input_ids[:, None], positions, self._at(0, batch))[0]

    def draw(
        self,
        logits: np.ndarray,
        known: np.ndarray,
        samplings: Sequence[Sampling],
        uniform: np.ndarray,
        allowed: Sequence[np.ndarray | None],
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """A token for each of the first B rows of logits, and its log-probability.

        Each row has a sampling, a uniform number of `uniform` [B] and perhaps `allowed` [V], which ids it may take.
        Rows of one sampling are drawn together.
        """
        tokens, logprobs, complete = np.zeros(len(samplings), np.int64), np.zeros(len(samplings), np.float32), True
        groups: dict[tuple[Sampling, bool], list[int]] = {}
        for row, sampling in enumerate(samplings):
            groups.setdefault((replace(sampling, seed=0), allowed[row] is not None), []).append(row)
        for (sampling, constrained), rows in groups.items():
            if constrained:
                masks = known & np.stack([allowed[row] for row in rows])  # type: ignore[misc]
                chosen = self.on_host(logits)[rows]
                drawn = sample(chosen, masks, sampling.temperature, sampling.top_k, sampling.top_p, uniform[rows])
                found = log_probability(chosen, drawn)
            else:
                drawn, found = self._draw(logits, known, sampling, uniform, rows)
            tokens[rows] = drawn
            if found is None:
                complete = False
            else:
                logprobs[rows] = found
        return tokens, logprobs if complete else None

    def on_host(self, logits: np.ndarray) -> np.ndarray:
        """Logits as an array."""
        return logits if isinstance(logits, np.ndarray) else cuda.on_host(logits)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to another."""
        for value in self.whole.buffers.values():
            if self.on_cuda:
                size = value.tensor_size_in_bytes() // self.count
                places = (ctypes.c_void_p(value.data_ptr() + row * size) for row in (target, source))
                queue = ctypes.c_void_p(getattr(self.engine, "_stream", 0))
                cuda.call("cudaMemcpyAsync", *places, ctypes.c_size_t(size), cuda.ON_DEVICE, queue)
            else:
                array = value.numpy()  # a view of the buffer
                array[target, :, :length] = array[source, :, :length]

    def _draw(self, logits, known, sampling, uniform, rows):
        if isinstance(logits, np.ndarray):
            chosen = slice(0, len(rows)) if rows == list(range(len(rows))) else rows  # a slice needs no copy
            return self.engine.draw(logits[chosen], known, sampling, uniform[rows])
        every = np.zeros(logits.shape()[0], np.float32)  # logits on a device are drawn from all at once
        every[: len(uniform)] = uniform
        drawn, found = self.engine.draw(logits, known, sampling, every)
        return drawn[rows], None if found is None else found[rows]

    def _size(self, batch: int) -> int:
        """How many rows a step over `batch` has: each captured size is a graph of its own, so there are few."""
        return min(self.count, 1 << (batch - 1).bit_length()) if self.engine.captures else batch

    def _at(self, first: int, batch: int) -> Rows:
        if (first, batch) not in self._rows:
            self._rows[first, batch] = Rows(self.engine, self.whole, first, batch)
        return self._rows[first, batch]
