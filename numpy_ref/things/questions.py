"""What can be asked of a scene, and the one right answer, which follows from the scene alone.

caption en                               two dogs and a red star on grass
answer en how many dogs are there?       2
answer en is there a cat?                no
answer en what is left of the red star?  dog
answer en what color is the star?        red
answer en what shape is red?             star
detect dog ; cat                         <loc…>x4 dog ; <loc…>x4 dog
segment red star                         <loc…>x4 <seg…>x16 red star
ocr                                      EXIT

Of what is not there, detect and segment say "none", and so do questions about it; `ocr` says so without a word.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..detection import encode
from ..scenes import COLORS, pick
from . import HELD_OUT, MOST, Scene, names_of, random_scene
from .catalogue import ENTRIES, LANGUAGES, NOUNS, PICTURED, SHAPES, TINTS, WORD
from .names import article, caption

TASKS = ("caption", "answer", "detect", "segment", "ocr")
MEASURED = (*TASKS, "absent")  # what is not there is measured on its own
SHARES = (0.3, 0.22, 0.22, 0.12, 0.14)
LANGUAGE_SHARES = (0.7, 0.15, 0.15)  # of captions
HELD_OUT_SEED = 1_000_033  # of what is measured; training numbers its examples from zero by [seed, number]
ABSENT = 0.15  # share of questions about what is not there
NONE = "none"
APART = 3.0  # grid units between the middles of two things of which one is left of the other
MASK_DRAWN_AT = 256  # pixels a side of the picture that masks are cut from
ALL = "answer en how many things are there?"
#: Called with a mask, bool [S, S], and its box in fractions of the sides, it gives the segmentation tokens.
SpellMask = Callable[[np.ndarray, tuple[float, float, float, float]], str]
_MANY = {name: NOUNS[name]["en"].many for name in SHAPES}
_NAMES = re.compile(rf"\b({'|'.join([*COLORS, *_MANY, *_MANY.values()])})\b")


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
    most: int = MOST,
    absent: float = ABSENT,
    language: str | None = None,
) -> Question:
    """A random scene with a random question.

    `masks` spells a mask in segmentation tokens. In the compositional split questions are about things of new
    compositions where the task has a subject. A share `absent` of them asks for what is not there, and all do where the
    task is "absent". Captions are in a random language if none is given. `shaded` and `most` as for `random_scene`.
    """
    task = task or str(rng.choice(TASKS, p=shares))
    while True:
        has_word = None
        if task == "ocr":
            has_word = bool(rng.random() >= absent)
        scene = random_scene(rng, most, compositional, shaded, has_word)
        subjects = [i for i in range(len(scene.things)) if scene.novelty(i) or not compositional]
        if task == "caption":
            chosen = language or str(rng.choice(LANGUAGES, p=LANGUAGE_SHARES))
            found = f"caption {chosen}", caption(scene, chosen)
        elif task == "absent":
            found = _absent(rng, scene)
        elif task == "ocr":
            found = "ocr", next((thing.text for thing in scene.things if thing.name == WORD), NONE)
        elif task in ("detect", "segment") and rng.random() < absent:
            found = _nothing(rng, scene, task)
        else:
            found = _ASK[task](rng, scene, subjects, masks)
        if found is not None:
            return Question(scene, task, *found)


def detect(scene: Scene, queries: list[str]) -> str:
    """Boxes of everything that a query names ("star", "red star"), from left to right; "none" if there is nothing."""
    found = []
    for thing in scene.things:
        matches = [query for query in queries if query in (thing.name, thing.label)]
        if matches:
            found.append(f"{encode(*thing.box)} {matches[0]}")
    return " ; ".join(found) or NONE


def misname(rng: np.random.Generator, text: str, share: float) -> str:
    """Each color and each shape in a text, with a probability of `share`, replaced by another at random.

    A model that is never shown a red star also learns to expect no star after "red", and reads one off no picture
    any more. Where names cannot be relied upon it has to look.
    """

    def other(match):
        if rng.random() >= share:
            return match[0]
        return pick(rng, next(kind for kind in (list(COLORS), list(_MANY), list(_MANY.values())) if match[0] in kind))

    return _NAMES.sub(other, text)


# --- of what is there --------------------------------------------------------------------------------------


def _ask_answer(rng, scene, subjects, masks):
    things = scene.things
    thing = things[pick(rng, subjects)]
    kind = rng.random()
    if kind < 0.2:
        return _how_many(rng, scene, thing)
    if kind < 0.28:
        return ALL, str(len(things))
    if kind < 0.34:
        return _nothing_about(rng, scene)
    if kind < 0.54:
        name = thing.label if rng.random() < 0.6 else thing.name
        if rng.random() < 0.5:
            return f"answer en is there {article(name)} {name}?", "yes"
        if (name := _missing(rng, scene)) is None:
            return None
        return f"answer en is there {article(name)} {name}?", "no"
    if kind < 0.74:
        return _beside(rng, scene, thing)
    if kind < 0.92:
        return _what_color(scene, thing)
    shapes = [other for other in things if other.color == thing.color and other.name in SHAPES]
    if len(shapes) != 1 or thing.name not in SHAPES:
        return None
    return f"answer en what shape is {thing.color}?", thing.name


def _how_many(rng, scene, thing):
    if rng.random() < 0.12:
        name = _missing(rng, scene, with_colors=False)
        return name and (f"answer en how many {NOUNS[name]['en'].many} are there?", "0")
    count = names_of(scene)[thing.name]
    return f"answer en how many {NOUNS[thing.name]['en'].many} are there?", str(count)


def _what_color(scene, thing):
    """Of the one thing of its name: its paint, or the color that such a thing has."""
    if names_of(scene)[thing.name] != 1 or thing.name == WORD:
        return None
    color = thing.color or PICTURED[thing.name].color
    return (f"answer en what color is the {thing.name}?", color) if color else None


def _beside(rng, scene, thing):
    """The next thing to the left or right, where that is clear; "none" at the end of the row."""
    if sum(other.label == thing.label for other in scene.things) != 1:
        return None
    side = "left" if rng.random() < 0.5 else "right"
    sign = -1 if side == "left" else 1
    away = sorted((sign * (other.x - thing.x), other.label) for other in scene.things if other is not thing)
    if any(abs(distance) < APART for distance, _ in away):
        return None
    beyond = [(distance, label) for distance, label in away if distance > 0]
    if len(beyond) > 1 and beyond[1][0] - beyond[0][0] < APART:
        return None
    if not beyond and rng.random() < 0.6:  # else there would be too many of these
        return None
    return f"answer en what is {side} of the {thing.label}?", beyond[0][1] if beyond else NONE


def _ask_detect(rng, scene, subjects, masks):
    order = rng.permutation(len(scene.things)).tolist()
    order.remove(first := pick(rng, subjects))
    chosen = [scene.things[i] for i in [first, *order]][: 1 if rng.random() < 0.6 else 2]
    queries = [thing.label if rng.random() < 0.7 else thing.name for thing in chosen]
    if len(queries) == 1 and rng.random() < 0.15 and (missing := _missing(rng, scene)):
        queries.insert(int(rng.integers(2)), missing)  # one that is there, and one that is not
    queries = list(dict.fromkeys(queries))
    return f"detect {' ; '.join(queries)}", detect(scene, queries)


def _ask_segment(rng, scene, subjects, masks):
    """One thing by a name that fits no other."""
    labels, names = Counter(thing.label for thing in scene.things), names_of(scene)
    index = pick(rng, subjects)
    thing = scene.things[index]
    if labels[thing.label] > 1 or thing.name == WORD:
        return None
    name = thing.name if names[thing.name] == 1 and rng.random() < 0.3 else thing.label
    if name == thing.name and names[thing.name] > 1:
        return None
    mask = masks(scene.visible(index, MASK_DRAWN_AT), thing.box)
    return f"segment {name}", f"{encode(*thing.box)}{mask} {name}", index


# --- of what is not there ----------------------------------------------------------------------------------


def _missing(rng, scene: Scene, with_colors: bool = True) -> str | None:
    """A name of nothing in the scene; half of them share a color or an outline with something that is there.

    None where training may not say that this is not there, since it never shows it.
    """
    there = {name for thing in scene.things for name in (thing.name, thing.label)}
    painted = [thing for thing in scene.things if thing.color]
    if with_colors and painted and rng.random() < 0.5:
        thing = pick(rng, painted)
        color, name = thing.color, thing.name
        if rng.random() < 0.5:
            color = pick(rng, TINTS if name in PICTURED else list(COLORS))
        else:
            name = pick(rng, SHAPES)
    elif rng.random() < 0.75:
        color, name = "", pick(rng, ENTRIES).name
    else:
        color, name = pick(rng, list(COLORS)) if with_colors else "", pick(rng, SHAPES)
    label = f"{color} {name}" if color else name
    is_own = name in PICTURED and PICTURED[name].color == color and color
    return None if label in there or name == label in there or (color, name) in HELD_OUT or is_own else label


def _nothing(rng, scene, task):
    count = 2 if task == "detect" and rng.random() < 0.3 else 1
    names = [name for _ in range(count) if (name := _missing(rng, scene))]
    return (f"{task} {' ; '.join(dict.fromkeys(names))}", NONE) if names else None


def _absent(rng, scene):
    """Any question of what is not there."""
    kind = rng.random()
    if kind < 0.5:
        return _nothing(rng, scene, "detect" if kind < 0.25 else "segment")
    if kind < 0.65:
        return _nothing_about(rng, scene)
    if (name := _missing(rng, scene, with_colors=kind < 0.85)) is None:
        return None
    if kind < 0.85:
        return f"answer en is there {article(name)} {name}?", "no"
    return f"answer en how many {NOUNS[name]['en'].many} are there?", "0"


def _nothing_about(rng, scene):
    """What color something is that is not there, or what is beside it."""
    is_color = rng.random() < 0.5
    if (name := _missing(rng, scene, with_colors=not is_color)) is None:
        return None
    if is_color:
        return f"answer en what color is the {name}?", NONE
    return f"answer en what is {'left' if rng.random() < 0.5 else 'right'} of the {name}?", NONE


_ASK: dict[str, Callable] = {"answer": _ask_answer, "detect": _ask_detect, "segment": _ask_segment}
