"""Stage 8: the peer once more, as its library compiles it for a static cache. Last, since compiling takes long."""

from .peer import lines, run
from .stage import Settings

LIMIT, PART_LIMIT = 150, 140

__all__ = ["LIMIT", "PART_LIMIT", "lines", "parts", "run"]


def parts(settings: Settings) -> list[str]:
    return ["generate, static cache"]
