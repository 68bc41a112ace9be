"""The text of a growing answer, and where a stop string ends it."""

from collections.abc import Sequence

from numpy_ref.tokenizer import Stream, Tokenizer


class StoppingText:
    """Text as tokens come. What may be the beginning of a stop string is held back until that is known.

    `stopped` is whether one has come. The text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.stream, self.stops, self.stopped, self.held = Stream(tokenizer), tuple(stops), False, ""

    def push(self, token: int) -> str:
        """The text that is certain now and was not given before."""
        return self._give(self.stream.push(token))

    def close(self) -> str:
        """What is left of it at the end."""
        if self.stopped:
            return ""
        text = self._give(self.stream.close())
        if self.stopped:
            return text
        held, self.held = self.held, ""
        return text + held

    def _give(self, new: str) -> str:
        text = self.held + new
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text may be the beginning of a stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
