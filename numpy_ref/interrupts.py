"""Ctrl-C while a command's modules are loaded, which takes a second: it ends the process without a traceback."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def end_process() -> None:
    """Let Ctrl-C end the process at once, unless it was given another meaning."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """Let it raise KeyboardInterrupt again, if `end_process` was called before."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def while_loading() -> Iterator[None]:
    """Around the imports of a module that a command begins with."""
    before = _handler()
    try:
        end_process()
        yield
    finally:
        if before is not _handler():
            raise_again()


def _handler():
    return signal.getsignal(signal.SIGINT)


def is_command() -> bool:
    """Whether Python is looking for the module of `python -m`: it loads its package first."""
    return sys.argv[:1] == ["-m"]


def caused(error: BaseException | None) -> bool:
    """Whether an exception is an interrupt that some library made another one of."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
