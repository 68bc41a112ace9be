"""The one exception that the project raises for input that it cannot use, and how it speaks of that input."""

import reprlib
import sys

_QUOTED = reprlib.Repr()
_QUOTED.maxlevel, _QUOTED.maxstring, _QUOTED.maxother, _QUOTED.maxlong = 3, 100, 100, 40


class PaliGemmaError(Exception):
    """Bad input, in one line: what was wrong, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def quote(value) -> str:
    """A value out of a file as Python writes it, shortened: it may be deeper than repr can go, or very long."""
    return _QUOTED.repr(value)


def one_line(message: str) -> str:
    """A message without line breaks, and with nothing that a terminal would obey: it quotes names out of files."""
    line = " ".join(message.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def listed(items, separator=", ", most=10) -> str:
    """Items in a row, cut behind the first ten, with a count of the others."""
    items = list(items)
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *rest])


def note(message: str) -> None:
    """One line on stderr, about input that is used but perhaps not as its owner thinks."""
    print(one_line(message), file=sys.stderr)
