"""The one exception that the project raises for input that it cannot use, and how it speaks of that input."""

import reprlib
import sys
from collections.abc import Iterable

_QUOTED = reprlib.Repr()
_QUOTED.maxlevel, _QUOTED.maxstring, _QUOTED.maxother, _QUOTED.maxlong = 3, 100, 100, 40

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation")


class PaliGemmaError(Exception):
    """Bad input, in one line: what was wrong, where, and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; PyTorch says it by a RuntimeError."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def out_of_memory(error: BaseException) -> PaliGemmaError:
    """Too little memory as a line: NumPy and PyTorch say what they wanted it for, Python and Pillow do not."""
    detail = f" ({error})" if str(error) else ""
    return PaliGemmaError(f"there is not enough memory{detail}; close other programs, or ask for less at once")


def plural(number: int, noun: str) -> str:
    """A number and its noun: 1 token, 2 tokens."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quote(value: object) -> str:
    """A value out of a file as Python writes it, shortened: it may be deeper than repr can go, or very long."""
    return _QUOTED.repr(value)


def one_line(message: str) -> str:
    """A message without line breaks, and with nothing that a terminal would obey: it quotes names out of files."""
    line = " ".join(message.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def listed(items: Iterable[str], separator: str = ", ", most: int = 10) -> str:
    """Items in a row, cut behind the first ten, with a count of the others."""
    items = list(items)
    rest = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *rest])


def note(message: str) -> None:
    """One line on stderr, about input that is used but perhaps not as its owner thinks."""
    print(one_line(message), file=sys.stderr)
