"""The argument parser of every command, and the types of its options.

A type raises ArgumentTypeError that says what the value must be; argparse puts the option's name in front.
"""

import argparse
import difflib
import math
import os
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import NoReturn

from .. import __version__
from ..errors import one_line, quote, shortened
from ..model.sampling import COLDEST

LARGEST = 2**31 - 1  # of whole numbers: what every library, graph and host takes
MOST_PER_CORE = 4  # threads, or processes: beyond, each only waits and takes memory


class Parser(argparse.ArgumentParser):
    """An argparse parser with `--version`, without abbreviations, that guesses what a misspelt option should be."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords | {"allow_abbrev": False})
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        """Print usage and message, which may quote anything, and exit with 2."""
        super().error(shortened(one_line(message + self._suggestion(message))))

    def _print_message(self, message, file=None):  # argparse's own takes an output that nobody takes for a success
        if message:
            (file or sys.stderr).write(message)

    def _suggestion(self, message) -> str:
        if not message.startswith("unrecognized arguments"):
            return ""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            option = word.partition("=")[0]
            if not option.startswith("--"):
                continue
            longer = [name for name in known if name.startswith(option)]
            close = longer or difflib.get_close_matches(option, known, 1)
            if close and close[0] != option:
                return f" (did you mean {close[0]}?)"
        return ""


def whole(least: int, most: int | None = None, why: str = "") -> Callable[[str], int]:
    """The type of a whole number from `least` on, or to `most`, which `why` explains."""
    limits = f"from {least} to {most}{why}" if most is not None else f"of at least {least}"

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < least or (most is not None and value > most):
            raise ArgumentTypeError(f"must be a whole number {limits}, not {quote(text)}")
        if value > LARGEST:
            raise ArgumentTypeError(f"must be a whole number from {least} to {LARGEST}, not {quote(text)}")
        return value

    return parse


def temperature(text: str) -> float:
    """The type of a temperature: 0, or a number with which no logits grow out of float32."""
    value = real(0, COLDEST**-1)(text)
    if 0 < value < COLDEST:
        raise ArgumentTypeError(f"must be a number from {COLDEST:g} to {1 / COLDEST:g}, or 0, not {quote(text)}")
    return value


def on_cores(least: int) -> Callable[[str], int]:
    """The type of a number of threads or processes on this machine."""
    why = f" ({MOST_PER_CORE} for each of this machine's cores)"
    return whole(least, MOST_PER_CORE * (os.cpu_count() or 1), why)


def check_on_cores(options: Parser, arguments: Namespace, *names: str) -> None:
    """Check numbers that were parsed before it was known that they are for this machine."""
    for name in names:
        try:
            on_cores(0)(str(getattr(arguments, name)))
        except ArgumentTypeError as error:
            options.error(f"argument --{name}: {error}")


def real(least: float, most: float = math.inf) -> Callable[[str], float]:
    """The type of a finite number from `least` on, or to `most`."""
    limits = f"from {least} to {most:g}" if math.isfinite(most) else f"of at least {least}"

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            raise ArgumentTypeError(f"must be a number {limits}, not {quote(text)}")
        return value

    return parse


def pair(text: str) -> tuple[str, str]:
    """The type of KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ArgumentTypeError(f"must be KEY=VALUE, not {quote(text)}")
    return key, value
