"""Workers as the application sees them: in this process, or each in a process that is watched.

A process that dies loses what it was answering, which fails at once and may be asked again; another takes its place.
All of this is called in the one thread of the event loop; workers speak from threads of their own.
"""

import asyncio
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from numpy_ref.errors import PaliGemmaError, explained, note
from numpy_ref.tokenizer import Tokenizer

from ..bundle import Bundle
from ..session import make
from .worker import Done, Event, Refused, Request, Settings, State, Worker

PROG, LOST = "serve-onnx", "the process that was answering stopped; ask again"
HANG_S = 15.0  # after a request's time is over: then its worker hangs, and is stopped
FASTEST_S, SLOWEST_S = 0.2, 30.0  # until a process that ended is started again, the faster if it had been of use


class LostError(Exception):
    """The worker that was to answer is gone: to ask again may help."""


@dataclass(frozen=True)
class Load:
    """What a worker loads, and how it answers."""

    bundle: Bundle
    provider: str = "auto"
    provider_options: dict[str, str] = field(default_factory=dict)
    threads: int = 0
    settings: Settings = field(default_factory=Settings)


Deliver = Callable[[list[tuple[int, Event]]], None]


def open_worker(load: Load, deliver: Deliver) -> Worker:
    """A worker that does not run yet. Raises PaliGemmaError if the bundle cannot be run."""
    started = time.perf_counter()
    engine = make(load.bundle, load.provider, load.threads, provider_options=load.provider_options, in_halves=True)
    tokenizer = Tokenizer.load(load.bundle.path, load.bundle.config)
    return Worker(engine, tokenizer, load.settings, deliver, time.perf_counter() - started)


class Asked:
    """A request at a worker: iterate over its events until the end of all its answers.

    Raises LostError if the worker is gone before.
    """

    def __init__(self, link: "Link", number: int, request: Request):
        self.link, self.number, self.request = link, number, request
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Event]:
        ends, until = 0, time.monotonic() + self.request.timeout_s + HANG_S
        while ends < len(self.request.seeds):
            try:
                event = await asyncio.wait_for(self.events.get(), until - time.monotonic())
            except TimeoutError:
                self.link.kill()
                event = None
            if event is None:
                raise LostError
            ends += isinstance(event, Done)
            if isinstance(event, Refused) or ends == len(self.request.seeds):
                self.link.asked.pop(self.number, None)
            yield event
            if isinstance(event, Refused):
                return

    def cancel(self) -> None:
        """Have the worker drop it, unless it is at its end."""
        if self.link.asked.pop(self.number, None):
            self.link.send(("cancel", self.number))


class Link:
    """One worker, wherever it runs: `asked` are the requests that are with it."""

    def __init__(self, load: Load):
        self.load, self.asked, self.state, self.alive = load, dict[int, Asked](), State(), False

    async def start(self) -> None:
        """Have the worker loaded. Raises PaliGemmaError if it cannot be."""
        raise NotImplementedError

    def send(self, message: tuple) -> None:
        """("ask", number, request) or ("cancel", number)."""
        raise NotImplementedError

    def kill(self) -> None:
        """Stop the worker at once, whatever it is at."""

    async def stop(self) -> None:
        """Stop the worker."""

    def receive(self, events: list[tuple[int, Event]], state: State) -> None:
        """Hand events to those that wait for them."""
        self.state = state
        for number, event in events:
            if asked := self.asked.get(number):
                asked.events.put_nowait(event)

    def lose(self) -> None:
        """Let everybody who waits know that the worker is gone."""
        self.alive = False
        for asked in self.asked.values():
            asked.events.put_nowait(None)
        self.asked.clear()

    @property
    def busy(self) -> int:
        """Answers that are with it."""
        return sum(len(asked.request.seeds) for asked in self.asked.values())


class LocalLink(Link):
    """A worker in this process."""

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def deliver(events):
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.receive, events, self.worker.state())

        self.worker = await asyncio.to_thread(open_worker, self.load, deliver)
        self.worker.start()
        self.alive = True

    def send(self, message: tuple) -> None:
        kind, number, *rest = message
        if kind == "ask":
            self.worker.ask(number, *rest)
        else:
            self.worker.cancel(number)

    async def stop(self) -> None:
        if self.alive:
            self.alive = False
            await asyncio.to_thread(self.worker.close)


class ProcessLink(Link):
    """A worker in a process of its own, which is started again when it ends."""

    def __init__(self, load: Load):
        super().__init__(load)
        self.process: Any = None
        self.stopping, self.restarts, self._delay = False, 0, FASTEST_S

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")  # a fork would copy the runtime's locks
        connection, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, self.load), daemon=True)
        self.process.start()
        other_end.close()
        ready: asyncio.Future = self.loop.create_future()
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(connection, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(connection, self.process, ready), daemon=True).start()
        await ready
        self.alive = True

    def send(self, message: tuple) -> None:
        self._outbox.put(message)

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.kill()

    async def stop(self) -> None:
        self.stopping = True
        if self.process is not None:
            self.kill()
            await asyncio.to_thread(self.process.join)

    def _write(self, connection, outbox):
        """Send what is to be sent, in a thread of its own: a pipe that is full blocks."""
        while (message := outbox.get()) is not None:
            with suppress(OSError):  # the reader sees that it is broken
                connection.send(message)

    def _read(self, connection, process, ready):
        """Take what comes, in a thread of its own, until the process ends."""
        outbox = self._outbox
        try:
            first = connection.recv()
            self._call(_settle, ready, first)
            while True:
                self._call(self.receive, *connection.recv())
        except (EOFError, OSError):
            pass
        process.join()
        outbox.put(None)
        connection.close()
        error = PaliGemmaError(f"a worker stopped while it was loading (exit code {process.exitcode})")
        self._call(_settle, ready, error)
        self._call(self._ended, process.exitcode)

    def _call(self, function, *arguments):
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(function, *arguments)

    def _ended(self, code):
        """The process is gone: start another, unless it was meant to go or never came to be of use."""
        if not self.alive:
            return
        self.lose()
        if not self.stopping:
            note(f"{PROG}: a worker stopped (exit code {code}); another is started")
            self._restarting = self.loop.create_task(self._restart())

    async def _restart(self):
        while not self.stopping:
            await asyncio.sleep(self._delay)
            self._delay = min(SLOWEST_S, 2 * self._delay)
            try:
                await self.start()
            except PaliGemmaError as error:
                note(f"{PROG}: {error}")
                continue
            self.restarts += 1
            self.loop.call_later(SLOWEST_S, self._forgive)
            return

    def _forgive(self):
        """A worker that lived for a while may be started again at once."""
        if self.alive:
            self._delay = FASTEST_S


class Backend:
    """Requests spread over workers."""

    def __init__(self, links: list[Link]):
        self.links, self._numbers = links, itertools.count()

    async def start(self) -> None:
        """Load every worker. Raises PaliGemmaError if one cannot be."""
        try:
            await asyncio.gather(*(link.start() for link in self.links))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop them, whatever they are at."""
        await asyncio.gather(*(link.stop() for link in self.links))

    def ask(self, request: Request) -> Asked:
        """Give a request to the worker that has least to do. Raises LostError if there is none at the moment."""
        alive = [link for link in self.links if link.alive]
        if not alive:
            raise LostError
        link = min(alive, key=lambda each: each.busy)
        asked = Asked(link, next(self._numbers), request)
        link.asked[asked.number] = asked
        link.send(("ask", asked.number, request))
        return asked

    @property
    def busy(self) -> int:
        """Answers that wait or are in the making."""
        return sum(link.busy for link in self.links)

    @property
    def slots(self) -> int:
        """Answers that can be in the making at once."""
        return sum(link.load.settings.slots for link in self.links)

    @property
    def ready(self) -> bool:
        """Whether there is a worker."""
        return any(link.alive for link in self.links)


def _settle(future, outcome):
    if future.done():
        return
    if isinstance(outcome, PaliGemmaError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _work(connection, load):
    """What the process of a worker does until the connection is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # these reach every process of a group; the first one answers them
        signal.signal(number, signal.SIG_IGN)
    lock = threading.Lock()

    def deliver(events):
        with lock, suppress(OSError):
            connection.send((events, worker.state()))

    def run():
        try:
            worker.scheduler.run()
        finally:
            os._exit(1)  # it runs as long as the process does

    try:
        try:
            worker = open_worker(load, deliver)
        except Exception as error:
            connection.send(explained(error))
            return
        connection.send(None)
        threading.Thread(target=run, daemon=True).start()
        while True:
            kind, *rest = connection.recv()
            (worker.ask if kind == "ask" else worker.cancel)(*rest)
    except (EOFError, OSError):  # the first process is gone
        os._exit(0)
