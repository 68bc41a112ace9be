"""knows.json beside a checkpoint or in a bundle: what a model was taught, and by what pictures to show it.

    about      one line that says what the model knows
    scenes     which scenes it learned from and is measured on: "shapes" or "things"
    prompts    what it was taught to answer, with places for words: "detect {label} ; {label}"
    words      {"label": ["dog", "red star", …], …}
    examples   [{"picture": "example.png", "prompts": ["caption en", …]}, …]

A model without the file may have been taught anything. The file may come from a stranger, so prompts are no patterns of
a language of its own: a place takes one of its words, and there are at most MOST_PLACES in a prompt.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from .errors import PaliGemmaError
from .files import read_json, within

FILE = "knows.json"
SCENES = ("shapes", "things")
MOST_PLACES = 2  # so that no prompt takes long to compare
_PLACE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True)
class Knowledge:
    """The contents of knows.json."""

    about: str
    scenes: str
    prompts: tuple[str, ...]
    words: dict[str, frozenset[str]]
    examples: tuple[dict, ...] = ()

    def covers(self, prompt: str) -> bool:
        """Whether the model was taught to answer such a prompt."""
        return any(_fits(_PLACE.split(template), prompt, self.words) for template in self.prompts)

    def hint(self, prompt: str) -> str | None:
        """A line for a prompt that the model was never taught, which it answers all the same; None for others."""
        if self.covers(prompt):
            return None
        shown = ", ".join(f'"{_PLACE.sub(self._first, template)}"' for template in self.prompts[:4])
        return (
            f"this model was not taught such a prompt, so do not rely on the answer; it knows {self.about}; try {shown}"
        )

    def _first(self, place) -> str:
        return min(self.words[place[1]])


def _fits(parts: list[str], text: str, words: dict[str, frozenset[str]]) -> bool:
    """Whether a text is a template's parts, literal ones and names of places by turns."""
    if not text.startswith(parts[0]):
        return False
    rest = text[len(parts[0]) :]
    if len(parts) == 1:
        return not rest
    # A word ends where the next literal part begins, so only the ends of the text that are words are tried.
    return any(rest[:end] in words[parts[1]] and _fits(parts[2:], rest[end:], words) for end in range(1, len(rest) + 1))


def load(folder: Path) -> Knowledge | None:
    """The file of a checkpoint or bundle; None if it has none. Raises PaliGemmaError that names what is wrong."""
    file = within(folder, FILE)
    return parse(read_json(file), file) if file.is_file() else None


def parse(data: object, source: object) -> Knowledge:
    """From the parsed file. Raises PaliGemmaError that names `source` and the field that is wrong."""

    def check(holds, field, wanted):
        if not holds:
            raise PaliGemmaError(f"{source}: {field} is not {wanted}")

    check(isinstance(data, dict), "it", "an object")
    assert isinstance(data, dict)
    about, scenes = data.get("about"), data.get("scenes")
    check(isinstance(about, str) and about and "\n" not in about, "about", "one line of text")
    check(scenes in SCENES, "scenes", f"one of {', '.join(SCENES)}")
    words, prompts, examples = data.get("words", {}), data.get("prompts"), data.get("examples", [])
    check(isinstance(words, dict) and all(map(_are_texts, words.values())), "words", "an object of lists of texts")
    check(_are_texts(prompts), "prompts", "a list of texts")
    assert isinstance(prompts, list)
    for prompt in prompts:
        places = _PLACE.findall(prompt)
        check(
            len(places) <= MOST_PLACES and set(places) <= words.keys(), "prompts", f"with known places: {prompt!r:.80}"
        )
    known = isinstance(examples, list) and all(
        isinstance(each, dict) and isinstance(each.get("picture"), str) and _are_texts(each.get("prompts"))
        for each in examples
    )
    check(known, "examples", "a list of objects with picture and prompts")
    kept = {name: frozenset(texts) for name, texts in words.items()}
    return Knowledge(str(about), str(scenes), tuple(prompts), kept, tuple(examples))


def _are_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)
