"""What can be asked of a scene, and the one right answer, which follows from the scene alone.

caption en                                a red star and a blue circle on a striped ground
answer en how many circles are there?     2
answer en what color is the star?         red
detect star ; blue circle                 <loc…>x4 star ; <loc…>x4 blue circle
segment red star                          <loc…>x4 <seg…>x16 red star
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..detection import encode
from . import COLORS, SHAPES, Scene, Thing, pick, random_scene

TASKS = ("caption", "answer", "detect", "segment")
SHARES = (0.3, 0.2, 0.3, 0.2)
HELD_OUT_SEED = 1_000_003  # of what is measured; training numbers its examples from zero by [seed, number]
ABSENT = 0.05  # share of detections that ask for what is not there, about
MASK_DRAWN_AT = 256  # pixels a side of the picture that masks are cut from
_NAMES = re.compile(rf"\b({'|'.join([*COLORS, *SHAPES])})\b")
#: Called with a mask, bool [S, S], and its box in fractions of the sides, it gives the segmentation tokens.
SpellMask = Callable[[np.ndarray, tuple[float, float, float, float]], str]
ALL = "answer en how many shapes are there?"


@dataclass(frozen=True)
class Question:
    """A scene and what is asked of it: prefix and suffix, and for `segment` the place of the thing meant."""

    scene: Scene
    task: str
    prefix: str
    suffix: str
    target: int | None = None


def random_question(
    rng: np.random.Generator,
    masks: SpellMask,
    task: str | None = None,
    compositional: bool = False,
    shares: Sequence[float] = SHARES,
    shaded: float = 0.0,
) -> Question:
    """A random scene with a random question.

    `masks` spells a mask in segmentation tokens. In the compositional split questions
    are about things of held-out pairs where the task has a subject. `shaded` as for `scenes.random_scene`.
    """
    task = task or str(rng.choice(TASKS, p=shares))
    while True:
        scene = random_scene(rng, compositional=compositional, shaded=shaded)
        subjects = [i for i, thing in enumerate(scene.things) if thing.is_held_out or not compositional]
        question = _ASK[task](rng, scene, subjects, masks)
        if question is not None:
            return Question(scene, task, *question)


def caption(scene: Scene) -> str:
    """The one caption of a scene, things from left to right."""
    named = [f"{'an' if thing.color[0] in 'aeio' else 'a'} {thing.name}" for thing in scene.things]
    listed = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"{listed} on a {scene.ground} ground"


def detect(scene: Scene, queries: list[str]) -> str:
    """Boxes of everything that a query names ("star", "red star"), from left to right; "" if there is nothing."""
    found = []
    for thing in scene.things:
        matches = [query for query in queries if query in (thing.shape, thing.name)]
        if matches:
            found.append(f"{encode(*thing.box)} {matches[0]}")
    return " ; ".join(found)


def misname(rng: np.random.Generator, text: str, share: float) -> str:
    """Each color and each shape in a text, with a probability of `share`, replaced by another at random.

    A model that is never shown a red star also learns to expect no star after "red", and reads one off no picture
    any more. Where names cannot be relied upon it has to look.
    """

    def other(match):
        return pick(rng, COLORS if match[0] in COLORS else SHAPES) if rng.random() < share else match[0]

    return _NAMES.sub(other, text)


def _ask_caption(rng, scene, subjects, masks):
    return "caption en", caption(scene)


def _ask_answer(rng, scene, subjects, masks):
    things = scene.things
    thing = things[subjects[rng.integers(len(subjects))]]
    shapes, colors = Counter(t.shape for t in things), Counter(t.color for t in things)
    kind = rng.random()
    if kind < 0.35 and shapes[thing.shape] == 1:
        return f"answer en what color is the {thing.shape}?", thing.color
    if kind < 0.6 and colors[thing.color] == 1:
        return f"answer en what shape is {thing.color}?", thing.shape
    if kind < 0.7:
        return f"answer en how many {_plural(thing.shape)} are there?", str(shapes[thing.shape])
    if kind < 0.8:
        return f"answer en how many {thing.color} shapes are there?", str(colors[thing.color])
    return ALL, str(len(things))


def _ask_detect(rng, scene, subjects, masks):
    if rng.random() < ABSENT:
        queries = [Thing(pick(rng, COLORS), pick(rng, SHAPES), 0, 0, 0).name]
        if (queries[0] in {thing.name for thing in scene.things}) or _is_held_out(queries[0]):
            return None
        return f"detect {queries[0]}", ""
    order = rng.permutation(len(scene.things)).tolist()
    order.remove(first := subjects[rng.integers(len(subjects))])
    chosen = [scene.things[i] for i in [first, *order]][: 1 if rng.random() < 0.6 else 2]
    queries = list(dict.fromkeys(thing.name if rng.random() < 0.6 else thing.shape for thing in chosen))
    return f"detect {' ; '.join(queries)}", detect(scene, queries)


def _ask_segment(rng, scene, subjects, masks):
    """One thing by a name that fits no other."""
    names, shapes = Counter(t.name for t in scene.things), Counter(t.shape for t in scene.things)
    index = subjects[rng.integers(len(subjects))]
    thing = scene.things[index]
    if names[thing.name] > 1:
        return None
    name = thing.shape if shapes[thing.shape] == 1 and rng.random() < 0.4 else thing.name
    mask = masks(scene.visible(index, MASK_DRAWN_AT), thing.box)
    return f"segment {name}", f"{encode(*thing.box)}{mask} {name}", index


_ASK = {"caption": _ask_caption, "answer": _ask_answer, "detect": _ask_detect, "segment": _ask_segment}


def _plural(shape):
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _is_held_out(name):
    color, shape = name.split()
    return Thing(color, shape, 0, 0, 0).is_held_out
