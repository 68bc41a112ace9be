"""A command that Ctrl-C ends at any moment, and `--timeout` after its time, whatever a stranger's graph is busy with.

The runtime holds its thread until a graph is loaded or run, and Python hears of Ctrl-C in the first thread alone. So
the work is done in another, and the first waits.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import NoReturn, TypeVar
from weakref import WeakSet

from numpy_ref.errors import PaliGemmaError

GRACE = 2.0  # seconds that a stopped command has to put away what it was writing
Result = TypeVar("Result")
_POLL = 0.5  # seconds; some systems let nobody interrupt a longer wait
RUNS: WeakSet = WeakSet()  # options of the runtime's runs, whose `terminate` ends them
_stops: list[Callable[[], None]] = []
_abandoned = False


def on_stop(stop: Callable[[], None]) -> None:
    """Have something called, from another thread, when the command is to stop: what else would hold it up."""
    _stops.append(stop)


def no_more(stop: Callable[[], None]) -> None:
    """Take back `on_stop`."""
    _stops.remove(stop)


def stoppable(function: Callable[[], Result], seconds: float | None = None) -> Result:
    """Call function() in a thread of its own; its result.

    Raises PaliGemmaError if it takes longer than `seconds`, and KeyboardInterrupt at once. Runs of graphs are stopped
    then, and Python code. What neither stops, a graph that is being loaded, is abandoned: `leave` ends the process.
    """
    outcome: Future = Future()
    thread = threading.Thread(target=_fill, args=(outcome, function), daemon=True)
    thread.start()
    try:
        _wait(outcome, seconds)
    except KeyboardInterrupt:
        _stop(thread)
        raise
    if outcome.done():
        return outcome.result()
    _stop(thread)
    raise PaliGemmaError(f"--timeout {seconds:g}: not done by then; give it more seconds, or ask for less")


def leave(code: int) -> NoReturn:
    """End the process, as sys.exit does, but for threads that never end."""
    if _abandoned:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _fill(outcome, function) -> None:
    try:
        outcome.set_result(function())
    except BaseException as error:  # SystemExit too, which is argparse's
        outcome.set_exception(error)


def _wait(outcome, seconds) -> None:
    """Wait for the outcome, or until the time is over."""
    done = threading.Event()
    outcome.add_done_callback(lambda _: done.set())
    while not done.wait(_POLL if seconds is None else min(_POLL, seconds)):
        if seconds is not None and (seconds := seconds - _POLL) <= 0:
            return


def _stop(thread) -> None:
    """Stop what a thread does, and wait a little for it to end."""
    global _abandoned
    _terminate(True)
    for stop in list(_stops):
        stop()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    thread.join(GRACE)
    if thread.is_alive():
        _abandoned = True
    else:  # sessions that are still open may be used again
        _terminate(False)


def _terminate(stop: bool) -> None:
    for options in list(RUNS):
        options.terminate = stop
