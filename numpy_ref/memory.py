"""Whether there is memory for what a file or an option declares, asked before any of it is made."""

import sys
from contextlib import suppress
from pathlib import Path

from .errors import PaliGemmaError

_KIBI = 1024


def check(needed: int, what: str) -> None:
    """Raise PaliGemmaError if `needed` bytes for `what` are more than this process can have."""
    if needed > (free := available()):
        raise PaliGemmaError(
            f"there is not enough memory: {what} takes {needed / 1e9:.1f} GB, and {max(0, free) / 1e9:.1f} GB are "
            "free; close other programs, or ask for less at once"
        )


def available() -> float:
    """Bytes that this process may still take, by what the system says and by its own limit; infinite if unknown."""
    return min(_free(), _allowed())


def _free() -> float:
    """What is free on the machine, swap space included (Linux)."""
    fields = _fields("/proc/meminfo")
    if "MemAvailable" not in fields:
        return float("inf")
    return (fields["MemAvailable"] + fields.get("SwapFree", 0)) * _KIBI


def _allowed() -> float:
    """What is left of the limit to the process' address space."""
    if sys.platform == "win32":
        return float("inf")
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    return limit - _fields("/proc/self/status").get("VmSize", 0) * _KIBI


def _fields(file: str) -> dict[str, int]:
    """The lines "name: number kB" of a file of the system; none where there is no such file."""
    found = {}
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            name, _, value = line.partition(":")
            if (number := value.removesuffix("kB").strip()).isdecimal():
                found[name] = int(number)
    return found
