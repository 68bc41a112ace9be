"""An engine with a scheduler in a thread of its own: requests come in, and what becomes of them goes out as events."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from numpy_ref import answer as answering
from numpy_ref import cli
from numpy_ref.answer import Answer, Picture
from numpy_ref.errors import PaliGemmaError, explained
from numpy_ref.generate import Timings
from numpy_ref.grammar import GRAMMARS, Grammar
from numpy_ref.grammar import State as GrammarState
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer, beginnings

from ..session import Session
from . import pictures
from .pictures import PictureCache
from .scheduler import FAILED, GAP_S, LENGTH, STOP, Answering, End, Piece, Scheduler
from .slots import Slots
from .text import StoppingText

PREPARING = 2  # threads that decode pictures: the engine needs the cores too
BROKEN_AFTER = 5  # failures in a row, from which on it is the engine that is broken and not the requests


@dataclass(frozen=True)
class Settings:
    """How a worker answers."""

    slots: int = 8
    positions: int = 1024  # of a row of the cache: a prompt with its pictures, and its answer
    gap_s: float = GAP_S
    picture_bytes: int = 256 * 2**20


@dataclass(frozen=True)
class Request:
    """A prompt about pictures, and how it is to be answered, once for each of `seeds`."""

    pictures: tuple[bytes, ...]
    prompt: str
    new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seeds: tuple[Any, ...] = (0,)
    stops: tuple[str, ...] = ()
    constrain: str | None = None  # one of the grammars of grammar.HELP
    logprobs: bool = False  # whether the texts of single tokens are wanted
    top: int = 0  # of how many of the likeliest ids beside
    streamed: bool = False  # whether tokens are sent as they come
    as_json: bool = False  # whether the object of --json is wanted in the end
    boxes: str = "big_vision"
    transparency: str = "white"
    timeout_s: float = 60.0


@dataclass(frozen=True)
class Accepted:
    """A request that is answered now: how many ids its prompt has."""

    prompt_tokens: int


@dataclass(frozen=True)
class Token:
    """A token of one of the answers, `choice` says of which; the texts of it and of its likeliest ids if wanted."""

    choice: int
    piece: Piece
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of one of the answers.

    `text` is all of it, or of a streamed one what was not sent before; `tokens` are all of them, or none of a streamed
    one. `result` is the object of --json if that was asked for. Times are from when the request came to the worker.
    """

    choice: int
    reason: str
    text: str = ""
    error: str = ""
    count: int = 0  # tokens
    tokens: tuple[Token, ...] = ()
    result: dict | None = None
    first_s: float = 0.0  # until the first token was there


@dataclass(frozen=True)
class Refused:
    """A request that cannot be answered, and why; `is_fault` if that is no mistake of whoever asks."""

    message: str
    is_fault: bool = False


Event = Accepted | Token | Done | Refused


@dataclass(frozen=True)
class State:
    """What a worker is at, for the metrics."""

    live: int = 0
    waiting: int = 0
    steps: int = 0
    prefills: int = 0
    picture_hits: int = 0
    picture_misses: int = 0
    picture_bytes: int = 0
    encodes: int = 0


class Constraint:
    """A grammar, and how far an answer of at most so many tokens has come in it."""

    def __init__(self, grammar: Grammar, new_tokens: int):
        self.grammar, self.left, self.state = grammar, new_tokens, GrammarState()

    def allowed(self) -> np.ndarray:
        """Which ids may come next: [V] bool."""
        return self.grammar.allowed(self.state, self.left)

    def accept(self, token: int) -> bool:
        """Take the next token; whether nothing can follow it. Raises PaliGemmaError if it may not come there."""
        following = self.grammar.advance(self.state, token)
        if following is None:
            raise PaliGemmaError("a token was drawn that the grammar does not allow")
        self.state, self.left = following, self.left - 1
        return self.grammar.is_complete(following)


class Worker:
    """Answers requests: `ask` and `cancel` may be called by any thread.

    What becomes of them is given to `deliver`, a list of (number of the request, event) at a time.
    """

    def __init__(
        self,
        engine: Session,
        tokenizer: Tokenizer,
        settings: Settings,
        deliver: Callable[[list[tuple[int, Event]]], None],
        load_s: float = 0.0,
    ):
        engine.max_length = min(engine.max_length, settings.positions)
        self.engine, self.tokenizer, self.settings, self.load_s = engine, tokenizer, settings, load_s
        self.cache = PictureCache(engine, settings.picture_bytes)
        slots = Slots(engine, settings.slots, engine.max_length)
        self.scheduler = Scheduler(
            slots, tokenizer.known(), engine.config.ends, settings.gap_s, after_round=self._after_round
        )
        self._deliver, self._events = deliver, []
        self._asked: dict[int, list[Answering]] = {}  # number of a request -> its answers that are not at their end
        self._cancelled: set[int] = set()  # of those that are still being prepared
        self._preparing: set[int] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(PREPARING)
        self._grammar = lru_cache(GRAMMARS)(partial(Grammar, tokenizer=tokenizer))
        self.thread = threading.Thread(target=self.scheduler.run, daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self.thread.start()

    def close(self) -> None:
        """Stop, whatever is being answered."""
        self.scheduler.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.thread.is_alive():
            self.thread.join()

    def ask(self, number: int, request: Request) -> None:
        """Have a request answered."""
        with self._lock:
            self._preparing.add(number)
        self._pool.submit(self._prepare, number, request, time.monotonic() + request.timeout_s)

    def cancel(self, number: int) -> None:
        """Drop a request at the next step."""
        with self._lock:
            if number in self._preparing:
                self._cancelled.add(number)
            for each in self._asked.get(number, ()):
                self.scheduler.cancel(each)

    def state(self) -> State:
        """What it is at."""
        scheduler, cache = self.scheduler, self.cache
        return State(
            len(scheduler.live), len(scheduler.waiting), scheduler.steps, scheduler.prefills, cache.hits, cache.misses,
            cache.size, scheduler.encodes,
        )  # fmt: skip

    def _after_round(self):
        """Give out what a round brought."""
        if self._events:
            events, self._events = self._events, []
            self._deliver(events)
        if self.scheduler.failures >= BROKEN_AFTER:
            raise PaliGemmaError("the model failed again and again")

    def _prepare(self, number, request, deadline):
        """From bytes to what the scheduler takes."""
        try:
            made = self._answerings(number, request, deadline)
        except Exception as error:
            with self._lock:
                self._preparing.discard(number)
                self._cancelled.discard(number)
            message = str(explained(error)).replace(str(self.engine.bundle.path), self.engine.bundle.path.name)
            self._deliver([(number, Refused(message, not isinstance(error, PaliGemmaError)))])
            return
        self._deliver([(number, Accepted(len(made[0].prompt)))])
        with self._lock:
            self._preparing.discard(number)
            self._asked[number] = made
            if number in self._cancelled:
                self._cancelled.discard(number)
                for each in made:
                    each.cancelled = True
        for each in made:
            self.scheduler.submit(each)

    def _answerings(self, number, request, deadline) -> list[Answering]:
        """The answers in the making of a request. Raises PaliGemmaError if it cannot be answered."""
        began, count = time.monotonic(), len(request.pictures)
        prompt, new_tokens = answering.fit(self.engine, self.tokenizer, request.prompt, request.new_tokens, count)
        found = [
            pictures.read(self.engine, contents, f"picture {i + 1}", request.transparency, self.cache)
            for i, contents in enumerate(request.pictures)
        ]
        grammar = self._grammar(request.constrain) if request.constrain else None
        if grammar:
            grammar.check_start((), new_tokens)
        made, request = [], replace(request, pictures=())  # its files may go
        for choice, seed in enumerate(request.seeds):
            text = StoppingText(self.tokenizer, request.stops) if request.streamed or request.stops else None
            emitter = _Emitter(self, number, choice, request, found[0], began)
            emitter.answer = Answering(
                prompt, found, new_tokens, emitter, request.sampling, seed, request.top, text,
                Constraint(grammar, new_tokens) if grammar else None, deadline,
            )  # fmt: skip
            made.append(emitter.answer)
        return made

    def _finish(self, number, answer):
        """Forget an answer that is at its end."""
        with self._lock:
            left = [each for each in self._asked.get(number, ()) if each is not answer]
            if left:
                self._asked[number] = left
            else:
                self._asked.pop(number, None)


class _Emitter:
    """From the scheduler's events to a worker's, for one answer. Called in the scheduler's thread."""

    def __init__(self, worker: Worker, number: int, choice: int, request: Request, picture: Picture, began: float):
        self.worker, self.number, self.choice, self.request = worker, number, choice, request
        self.picture, self.began, self.first_s = picture, began, 0.0
        self.answer: Any = None
        self.tokens: list[Token] = []

    def __call__(self, event: Piece | End) -> None:
        if isinstance(event, End):
            self.worker._finish(self.number, self.answer)
            if self.request.as_json and event.reason in (STOP, LENGTH):
                self.worker._pool.submit(self._deliver_result, event)  # masks take their time
            else:
                self._send(self._done(event))
                self.answer = None  # which holds this emitter: neither has to wait for the garbage collector
            return
        self.first_s = self.first_s or time.monotonic() - self.began
        wanted = [event.token, *(token for token, _ in event.top)] if self.request.logprobs else []
        words = tuple(self.worker.tokenizer.decode([token]) for token in wanted)
        self.tokens.append(Token(self.choice, event, words))
        if self.request.streamed:
            self._send(self.tokens[-1])

    def _send(self, event):
        self.worker._events.append((self.number, event))

    def _done(self, end, result=None):
        text = end.text if self.request.streamed else self._text(end)
        tokens = tuple(self.tokens) if self.request.logprobs and not self.request.streamed else ()
        return Done(self.choice, end.reason, text, end.error, len(self.tokens), tokens, result, self.first_s)

    def _text(self, end) -> str:
        """All of the answer's text."""
        if self.answer.text:
            return "".join(token.piece.text for token in self.tokens) + end.text
        return self.worker.tokenizer.decode(self.answer.tokens)

    def _deliver_result(self, end):
        """The object of --json, in a thread of its own."""
        try:
            done = self._done(end, self._result(end))
        except Exception as error:
            done = Done(self.choice, FAILED, error=str(explained(error)))
        self.answer = None
        self.worker._deliver([(self.number, done)])

    def _result(self, end) -> dict:
        worker, ids = self.worker, self.answer.tokens
        logprobs = [token.piece.logprob for token in self.tokens if token.piece.logprob is not None]
        timings = Timings(self.answer.prefill_s, self.answer.decode_s, max(0, len(ids) - 1))
        found = Answer(
            self._text(end), ids, self.picture.width, self.picture.height, self.request.boxes, worker.engine.masks,
            timings, logprobs=logprobs if len(logprobs) == len(ids) else None, begins=beginnings(worker.tokenizer, ids),
        )  # fmt: skip
        return cli.as_json(found, worker.load_s)
