"""Examples to show a model by: held-out scenes with prompts that it answers right, which is checked.

The scenes come from a generator of their own, so that neither training nor measuring ever sees them; a model is asked
about one after the other, and those are kept about which every answer is right.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .. import knows
from ..engine import Engine
from ..files import json_bytes
from ..scenes import COLORS, evaluate
from ..tokenizer import Tokenizer
from . import Scene, names_of, random_scene
from .catalogue import LANGUAGES, NOUNS, PICTURED, SHAPES, TINTS, WORD
from .names import article, caption
from .questions import ALL, HELD_OUT_SEED, NONE, Question, detect

KINDS = ("star", "pair", "word")  # of examples, by what their scenes must have; one of each
COUNT, MOST_TRIED = len(KINDS), 150  # examples, and scenes that are tried for each
LEAST, MOST = 3, 5  # things in one
STAR = "star"  # what the documentation asks for


@dataclass(frozen=True)
class Example:
    """A picture and what is asked about it."""

    scene: Scene
    questions: tuple[Question, ...]


def candidates(kind: str) -> Iterator[Scene]:
    """Scenes to choose from, the same each time: with one star, a pair of the same and a painted thing, or a word."""
    rng = np.random.default_rng([HELD_OUT_SEED, 4, KINDS.index(kind)])
    while True:
        scene = random_scene(rng, word=kind == "word")
        counts = Counter(thing.label for thing in scene.things)
        has_pair = any(count > 1 and label in PICTURED for label, count in counts.items())
        fits = {
            "star": names_of(scene)[STAR] == 1 and len(PICTURED.keys() & counts.keys()) > 1,
            "pair": has_pair and any(thing.color for thing in scene.things),
            "word": True,
        }
        if LEAST <= len(scene.things) <= MOST and len(counts) >= LEAST and fits[kind]:
            yield scene


def ask(scene: Scene) -> tuple[Question, ...]:
    """What is asked about a scene: something of every task, and of something that is not there."""
    things, counts = scene.things, Counter(thing.label for thing in scene.things)
    star = next((thing for thing in things if thing.name == STAR), None)
    most = next(thing for thing in things if counts[thing.label] == max(counts.values()))
    others = [label for label in counts if label != most.label]
    missing = next(name for name in PICTURED if name not in names_of(scene))
    found: list[tuple[str, str, str, int | None]] = [("caption", "caption en", caption(scene), None)]
    if star and names_of(scene)[STAR] == 1:
        found += [
            ("detect", f"detect {STAR}", detect(scene, [STAR]), None),
            ("segment", f"segment {STAR}", detect(scene, [STAR]), things.index(star)),
            ("answer", f"answer en what color is the {STAR}?", star.color, None),
        ]
    elif single := [thing for thing in things if counts[thing.label] == 1 and thing.name != WORD]:
        label = single[0].label
        found.append(("segment", f"segment {label}", detect(scene, [label]), things.index(single[0])))
    if words := [thing.text for thing in things if thing.name == WORD]:
        found.append(("ocr", "ocr", words[0], None))
    found += [
        ("detect", f"detect {most.label} ; {others[-1]}", detect(scene, [most.label, others[-1]]), None),
        ("answer", _how_many(most.name), str(names_of(scene)[most.name]), None),
        ("answer", f"answer en is there {article(missing)} {missing}?", "no", None),
        ("absent", f"detect {missing}", NONE, None),
    ]
    return tuple(Question(scene, *each) for each in found)


def _how_many(name: str) -> str:
    return f"answer en how many {NOUNS[name]['en'].many} are there?"


def are_right(engine: Engine, tokenizer: Tokenizer, example: Example) -> bool:
    """Whether the model answers every question of an example right."""
    found = evaluate.answer_questions(engine, tokenizer, example.questions)
    return all(evaluate.is_right(answer, each) for answer, each in zip(found, example.questions, strict=True))


def choose(engine: Engine, tokenizer: Tokenizer) -> list[Example]:
    """The first example of each kind that the model is right about; fewer if it knows too little."""
    return [example for kind in KINDS for example in islice(_right(engine, tokenizer, kind), 1)]


def _right(engine, tokenizer, kind: str) -> Iterator[Example]:
    """Those of the first candidates that the model is right about; captions, the hardest, are asked for first."""
    scenes = islice(candidates(kind), MOST_TRIED)
    while batch := [Example(scene, ask(scene)) for scene in islice(scenes, evaluate.BATCH)]:
        captions = [example.questions[0] for example in batch]
        found = evaluate.answer_questions(engine, tokenizer, captions)
        for example, answer in zip(batch, found, strict=True):
            if evaluate.is_right(answer, example.questions[0]) and are_right(engine, tokenizer, example):
                yield example


# --- what is said of the model -----------------------------------------------------------------------------

ABOUT = (
    f"{len(PICTURED)} pictured things (animals, food, vehicles, tools, signs), {len(SHAPES)} shapes in {len(COLORS)} "
    "colors, and words in capital letters, all of them drawn; no photographs"
)


def knowledge(examples: list[Example]) -> dict:
    """The contents of knows.json for a model that was taught these scenes."""
    painted = [(color, name) for name in SHAPES for color in COLORS] + [(c, name) for name in PICTURED for c in TINTS]
    labels = [*NOUNS, *(f"{color} {name}" for color, name in painted)]
    return {
        "about": ABOUT,
        "scenes": "things",
        "prompts": [
            "caption en", "detect {label}", "segment {label}", "answer en how many {many} are there?", "ocr",
            "detect {label} ; {label}", ALL, "answer en is there a {label}?", "answer en is there an {label}?",
            "answer en what is left of the {label}?", "answer en what is right of the {label}?",
            "answer en what color is the {name}?", "answer en what shape is {color}?",
            *(f"caption {language}" for language in LANGUAGES[1:]),
        ],
        "words": {
            "label": labels, "name": list(NOUNS), "many": [nouns["en"].many for nouns in NOUNS.values()],
            "color": list(COLORS),
        },
        "examples": [
            {"picture": picture_name(i), "prompts": [question.prefix for question in example.questions]}
            for i, example in enumerate(examples)
        ],
    }  # fmt: skip


def picture_name(number: int) -> str:
    """The file of an example's picture."""
    return f"example-{number + 1}.png" if number else "example.png"


def files(examples: list[Example]) -> dict[str, bytes]:
    """knows.json and the examples' pictures, by name."""
    pictures = {}
    for i, example in enumerate(examples):
        stream = io.BytesIO()
        example.scene.draw(224).save(stream, "PNG", optimize=True)
        pictures[picture_name(i)] = stream.getvalue()
    return {knows.FILE: json_bytes(knowledge(examples)), **pictures}
