"""How often a model is right about fresh scenes of things: what `scenes.evaluate.measure` is given to measure."""

from pathlib import Path

import numpy as np

from .. import knows
from ..checkpoint import SHIPPED
from ..scenes.evaluate import SHAPES, Suite
from . import questions
from .catalogue import LANGUAGES

#: What the shipped model is to reach, and the most that the compositional split may lose.
GOALS = {"caption": 0.85, "answer": 0.93, "detect_f1": 0.9, "segment_miou": 0.8, "ocr": 0.85, "absent": 0.95}
MOST_LOST = 0.1
SCORES = {
    "caption": "caption", "answer": "answer", "detect": "detect_f1", "segment": "segment_miou", "ocr": "ocr",
    "absent": "absent", "caption de": "caption_de", "caption es": "caption_es",
}  # fmt: skip


def held_out(seed: int, count: int, task: str, compositional: bool = False) -> list[questions.Question]:
    """Scenes that training never saw, with one question of the task each; what a mask is spelled like is left open.

    All but "absent" ask for what is there. Captions are English; "caption de" and "caption es" are in their language.
    """
    rng = np.random.default_rng([questions.HELD_OUT_SEED, seed, 1 + list(SCORES).index(task), compositional])
    kind, _, language = task.partition(" ")
    return [
        questions.random_question(
            rng, lambda mask, box: "", kind, compositional, absent=0.0, language=language or LANGUAGES[0]
        )
        for _ in range(count)
    ]


THINGS = Suite(SCORES, held_out, questions.random_question)
SUITES = {"shapes": SHAPES, "things": THINGS}


def suite_of(folder: Path = SHIPPED) -> Suite:
    """What a bundle or checkpoint is measured on, as its knows.json says; shapes where it does not say."""
    found = knows.load(folder)
    return SUITES[found.scenes if found else "shapes"]
