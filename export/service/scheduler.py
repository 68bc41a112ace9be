"""Continuous batching: requests join and leave a running batch between its steps.

A round is: take in what came and drop what was cancelled or is overdue; prefill some of those that wait; then one
decode step for all that run. So between two tokens of an answer lie one decode step and, at most, the prefills of one
round. A round does one thing for those that wait while a row is free (the vision tower for one picture, or the prefill
of one prompt), and more as long as `gap_s` seconds are not over. Smaller pieces there are not: every position of a
prefix attends to all of it.

A row has its own length, sampling, seed, constraint and end, and a generator of its own to draw from: as if it were
alone.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from numpy_ref.answer import Picture
from numpy_ref.errors import PaliGemmaError, explained
from numpy_ref.model import sampling as sampler
from numpy_ref.model.sampling import Sampling

#: Why an answer ended. The first two are OpenAI's names.
STOP, LENGTH, CANCELLED, OVERDUE, FAILED = "stop", "length", "cancelled", "overdue", "failed"
GAP_S = 0.25
NOT_FINITE = "the logits are not finite numbers; export-onnx --verify says in which layer they arise"


class Cache(Protocol):
    """What the scheduler needs of `slots.Slots`."""

    count: int  # rows
    together: int  # prompts that one prefill takes

    def encode(self, picture: Picture) -> None: ...

    def prefill(self, first: int, pictures: Sequence[Picture], prompts: Sequence[Sequence[int]]) -> Any: ...

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> Any: ...

    def draw(
        self, logits: Any, known: np.ndarray, samplings: Sequence[Sampling], uniform: np.ndarray,
        allowed: Sequence[np.ndarray | None], again: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray | None]: ...  # fmt: skip

    def on_host(self, logits: Any) -> np.ndarray: ...

    def copy(self, source: int, target: int, length: int) -> None: ...


class Constraint(Protocol):
    """What an answer may consist of, token by token."""

    def allowed(self) -> np.ndarray:
        """Which ids may come next: [V] bool."""

    def accept(self, token: int) -> bool:
        """Take the next token; whether nothing can follow it."""


class Text(Protocol):
    """The text of a growing answer; `stopped` is whether a stop string has come."""

    stopped: bool

    def push(self, token: int) -> str:
        """The text that is certain now and was not given before."""

    def close(self) -> str:
        """What is left of it at the end."""


@dataclass(frozen=True)
class Piece:
    """A token of an answer, its log-probability if known, the likeliest ids with theirs, and the text it completes."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    text: str = ""


@dataclass(frozen=True)
class End:
    """The end of an answer: why, the text that was held back until now, and what went wrong if it failed."""

    reason: str
    text: str = ""
    error: str = ""


@dataclass(eq=False)
class Answering:
    """An answer in the making."""

    prompt: list[int]  # ids
    pictures: list[Picture]
    new_tokens: int  # at most
    emit: Callable[[Piece | End], None]  # called by the scheduler's thread
    sampling: Sampling = field(default_factory=Sampling)
    seed: Any = 0
    top: int = 0  # of how many of the likeliest ids the log-probabilities are wanted
    text: Text | None = None
    constraint: Constraint | None = None
    deadline: float = float("inf")  # by time.monotonic
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def __post_init__(self):
        self.generator = np.random.default_rng(self.seed)
        self.second = self.generator.spawn(1)[0]  # for what is drawn again, as in `generate`

    @property
    def length(self) -> int:
        """Positions in the cache: the last token's is written by the step that it is fed to."""
        return len(self.prompt) + len(self.tokens) - 1

    def end(self, reason: str, error: str = "") -> None:
        text = self.text.close() if self.text and reason in (STOP, LENGTH) else ""
        self.emit(End(reason, text, error))


class Scheduler:
    """Rows of a cache, shared among the answers in the making.

    `submit` and `cancel` may be called by any thread, `round` by one alone. `known` [V] says which ids may be drawn,
    `ends` are those that end an answer.
    """

    def __init__(
        self, slots: Cache, known: np.ndarray, ends: Sequence[int], gap_s: float = GAP_S,
        after_round: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.slots, self.known, self.ends, self.gap_s, self.after_round = slots, known, set(ends), gap_s, after_round
        self.waiting: deque[Answering] = deque()
        self.live: list[Answering] = []  # row by row
        self.steps = self.prefills = self.encodes = 0  # so far
        self.failures = 0  # since something last succeeded
        self._inbox: deque[Answering] = deque()
        self._wake = threading.Event()
        self._closed = False

    def submit(self, answering: Answering) -> None:
        """Have something answered, as soon as a row is free."""
        self._inbox.append(answering)
        self._wake.set()

    def cancel(self, answering: Answering) -> None:
        """Drop an answer at the next step, wherever it is; its End says so."""
        answering.cancelled = True
        self._wake.set()

    def close(self) -> None:
        """Have `run` return, once the step that it is at is done."""
        self._closed = True
        self._wake.set()

    def run(self) -> None:
        """Round after round until closed."""
        while not self._closed:
            if not self.round():
                self._wake.wait(self._until_overdue())
            self._wake.clear()

    def round(self) -> bool:
        """One round; whether there is more to do."""
        self._take_in()
        self._prefill()
        if self.live:
            self._decode()
        self.after_round()
        return bool(self.live or self.waiting or self._inbox)

    def _until_overdue(self):
        return None if not self.waiting else max(0.0, min(each.deadline for each in self.waiting) - time.monotonic())

    def _take_in(self):
        """Move what came to those that wait, and drop what nobody wants any more."""
        while self._inbox:
            self.waiting.append(self._inbox.popleft())
        now = time.monotonic()
        for answering in [each for each in self.waiting if each.cancelled or each.deadline < now]:
            self.waiting.remove(answering)
            answering.end(CANCELLED if answering.cancelled else OVERDUE)
        for row in reversed(range(len(self.live))):
            answering = self.live[row]
            if answering.cancelled or answering.deadline < now:
                self._free(row, CANCELLED if answering.cancelled else OVERDUE)

    def _prefill(self):
        """Let some of those that wait join: as many as `gap_s` allows, and one in any case."""
        started = time.monotonic()
        while self.waiting and len(self.live) < self.slots.count:
            before = time.monotonic()
            if not self._encode_next():
                self._prefill_group(self._next_group())
            now = time.monotonic()
            if now - started + (now - before) > self.gap_s:  # the next one would take as long again
                return

    def _encode_next(self) -> bool:
        """Look at a picture of the one that waits longest; whether there was one that nobody had looked at."""
        lacking = [each for each in self.waiting[0].pictures if each.features is None]
        if not lacking:
            return False
        try:
            self.slots.encode(lacking[0])
            self.encodes += 1
        except Exception as error:  # the runtime's exceptions have no common class
            self.failures += 1
            self.waiting.popleft().end(FAILED, str(explained(error)))
        return True

    def _next_group(self) -> list[Answering]:
        """Those that are prefilled together, in the order in which they came: the same question asked more than once,
        or, on a device, what has equally many pictures."""
        group, free = [self.waiting.popleft()], self.slots.count - len(self.live)
        while self.waiting and len(group) < free:
            follows = self.waiting[0]
            same = follows.prompt is group[0].prompt
            alike = len(group) < self.slots.together and len(follows.pictures) == len(group[0].pictures)
            if not (same or alike) or any(each.features is None for each in follows.pictures):
                break
            group.append(self.waiting.popleft())
        return group

    def _prefill_group(self, group):
        started, first = time.monotonic(), len(self.live)
        try:
            pictures = [picture for each in group for picture in each.pictures]
            logits = self.slots.prefill(first, pictures, [each.prompt for each in group])
            self.live += group
            self.prefills += 1
            for each in group:
                each.prefill_s = time.monotonic() - started
            self._draw(logits, first)
        except Exception as error:  # the runtime's exceptions have no common class
            del self.live[first:]
            self.failures += 1
            if len(group) > 1:  # it may be one of them alone
                for each in group:
                    self._prefill_group([each])
            else:
                group[0].end(FAILED, str(explained(error)))

    def _decode(self):
        """One more token for every row."""
        started = time.monotonic()
        tokens = np.array([each.tokens[-1] for each in self.live], np.int64)
        lengths = np.array([each.length for each in self.live], np.int32)
        try:
            logits = self.slots.decode(tokens, lengths)
            for each in self.live:
                each.decode_s += time.monotonic() - started
            self._draw(logits, 0)
            self.steps += 1
        except Exception as error:
            self.failures += 1
            for row in reversed(range(len(self.live))):
                self._free(row, FAILED, str(explained(error)))

    def _draw(self, logits, first):
        """Draw for the rows from `first` on, of which the logits are, and free those that end."""
        rows = self.live[first:]
        uniform = np.array([each.generator.random(dtype=np.float32) for each in rows], np.float32)
        again = np.array([each.second.random(dtype=np.float32) for each in rows], np.float32)
        allowed = [each.constraint.allowed() if each.constraint else None for each in rows]
        samplings = [each.sampling for each in rows]
        tokens, logprobs = self.slots.draw(logits, self.known, samplings, uniform, allowed, again)
        tops = self._tops(logits, rows)
        self.failures = 0
        for row in reversed(range(len(rows))):
            logprob = None if logprobs is None else float(logprobs[row])
            try:
                reason, error = self._take(rows[row], int(tokens[row]), logprob, tops.get(row, ())), ""
            except Exception as trouble:  # of this row alone
                reason, error = FAILED, str(explained(trouble))
            if reason:
                self._free(first + row, reason, error)

    def _take(self, answering, token, logprob, top) -> str | None:
        """Give a token to its answer; why that ends, or None."""
        if logprob is not None and not np.isfinite(logprob):
            raise PaliGemmaError(NOT_FINITE)
        if token in self.ends:
            return STOP
        answering.tokens.append(token)
        is_complete = answering.constraint is not None and answering.constraint.accept(token)
        text = answering.text.push(token) if answering.text else ""
        answering.emit(Piece(token, logprob, top, text))
        if is_complete or (answering.text and answering.text.stopped):
            return STOP
        return LENGTH if len(answering.tokens) >= answering.new_tokens else None

    def _tops(self, logits, rows) -> dict[int, tuple[tuple[int, float], ...]]:
        """Row -> its likeliest ids with their log-probabilities, where they are wanted."""
        if not any(each.top for each in rows):
            return {}
        values = self.slots.on_host(logits)
        return {row: likeliest(values[row], each.top) for row, each in enumerate(rows) if each.top}

    def _free(self, row, reason, error=""):
        """End a row; the last one takes its place."""
        answering, last = self.live[row], len(self.live) - 1
        if row != last:
            moved = self.live[last]
            try:
                self.slots.copy(last, row, len(moved.prompt) + len(moved.tokens))
            except PaliGemmaError as trouble:  # of a device
                self.live.pop()
                moved.end(FAILED, str(trouble))
                return self._free(row, reason, error) if row < len(self.live) else None
            self.live[row] = moved
        self.live.pop()
        answering.end(reason, error)
        return None


def likeliest(logits: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest ids of logits [V], each with its log-probability, by `sampling.likeliest`."""
    every, no_ends = np.ones(len(logits), bool), np.zeros(0, np.int64)
    ids, logprobs, _ = sampler.likeliest(logits[None], every, min(count, len(logits)), no_ends)
    return tuple(zip(ids[0].tolist(), logprobs[0].tolist(), strict=True))
