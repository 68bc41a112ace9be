"""The one exception that the project raises for input that it cannot use, and how it speaks of that input."""

import errno
import reprlib
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

_QUOTED = reprlib.Repr()
_QUOTED.maxlevel, _QUOTED.maxstring, _QUOTED.maxother, _QUOTED.maxlong = 3, 100, 100, 40

_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation", "array is too big",
    "Maximum allowed dimension exceeded",
)  # fmt: skip
LONGEST = 1900  # letters of a message; with the program's name in front, a line has at most 2,000
_ROOT = Path(__file__).parents[1]


class PaliGemmaError(Exception):
    """Bad input, in one line: what was wrong, where, and what to do. A long one is shortened in the middle."""

    def __init__(self, message: str):
        super().__init__(shortened(one_line(shortened(message, 4 * LONGEST))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; PyTorch says it by a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def out_of_memory(error: BaseException) -> PaliGemmaError:
    """Too little memory as a line: NumPy and PyTorch say what they wanted it for, Python and Pillow do not."""
    detail = f" ({error})" if str(error) else ""
    return PaliGemmaError(f"there is not enough memory{detail}; close other programs, or ask for less at once")


def explained(error: Exception) -> PaliGemmaError:
    """Any exception as a line: bad input as it is; what a system or a library refused; else a fault, and where it is.

    `python -X dev` shows the traceback of a fault.
    """
    if isinstance(error, PaliGemmaError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(error)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return PaliGemmaError(f"{where}{error.strerror}")
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(Path(frame.filename))]
    place = f" at {Path(ours[-1].filename).relative_to(_ROOT).as_posix()}:{ours[-1].lineno}" if ours else ""
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return PaliGemmaError(f"this should not have happened{place} ({shortened(reason, 500)}); python -X dev shows more")


def _is_ours(file: Path) -> bool:
    """Whether a file of code is this project's, and no library's."""
    return file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in ("numpy_ref", "torch_impl", "export")


def shortened(text: str, most: int = LONGEST) -> str:
    """A text of at most `most` letters: what is too long is left out before the end, where the advice stands."""
    if len(text) <= most:
        return text
    tail = most // 5
    return f"{text[: most - tail - 3]} … {text[len(text) - tail :]}"


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
    print(shortened(one_line(message)), file=sys.stderr)
