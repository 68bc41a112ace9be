"""Standard output and standard errors of a command: never a reason for a traceback."""

import errno
import io
import os
import sys
from contextlib import suppress

_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_ESCAPING = ("backslashreplace", "namereplace", "xmlcharrefreplace", "replace", "ignore")


def prepare() -> None:
    """Have streams that are closed swallow what they get, and letters that an encoding lacks written as escapes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # and the next file that is opened would take its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors not in _ESCAPING:
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write out what was printed. Raises OSError if standard output does not take it."""
    with suppress(ValueError):  # it was closed
        sys.stdout.flush()


def is_refusal(error: Exception) -> bool:
    """Whether an error is standard output's: of opened files it alone is written to without its name being told."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _REFUSALS


def close_broken() -> None:
    """Give up standard output if it takes nothing any more, or Python would complain at the end."""
    try:
        flush()
    except OSError:
        with suppress(OSError, ValueError):  # of what is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(line: str) -> None:
    """Print a line on standard errors, if they take one."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
