"""Answers as a command prints them: on a terminal boxes are spelled out, a pipe gets the text as the model gave it.

    star at 49, 63, 98, 112  0.93

are x1, y1, x2 and y2 in pixels, as `--json` has them, and the score.
"""

from collections.abc import Callable

from ..answer import Answer
from ..detection import Box


class Piecewise:
    """An answer, written as it comes. For a terminal location tokens are held back until they are boxes."""

    def __init__(self, write: Callable[[str], None], is_terminal: bool):
        self.write, self.is_terminal, self.held, self.started = write, is_terminal, "", False

    def push(self, text: str) -> None:
        """A piece of the text."""
        if self.is_terminal and (self.held or "<" in text):
            self.held += text
        else:
            self.started = self.started or bool(text)
            self.write(text)

    def close(self, answer: Answer) -> None:
        """The whole answer, and a line break."""
        boxes = "\n" * self.started + lines(answer)
        self.write(f"{boxes if self.held and answer.boxes else self.held}\n")


def one_of_several(prompt: str, answer: Answer, is_terminal: bool) -> str:
    """An answer as one line; for a terminal below its prompt, with an empty line behind."""
    if not is_terminal:
        return answer.text.replace("\n", "\\n") + "\n"
    return f"# {prompt}\n{lines(answer) if answer.boxes else answer.text}\n\n"


def lines(answer: Answer) -> str:
    """A line for each box of an answer."""
    return "\n".join(map(line, answer.boxes))


def line(box: Box) -> str:
    """A box to read: star at 49, 63, 98, 112  0.93. The score of a mask comes behind."""
    corners = ", ".join(f"{corner:.0f}" for corner in box.corners)
    scores = [] if box.score is None else [f"{box.score:.2f}"]
    scores += [] if box.mask_score is None else [f"mask {box.mask_score:.2f}"]
    return "  ".join([f"{box.label or 'box'} at {corners}", *scores])
