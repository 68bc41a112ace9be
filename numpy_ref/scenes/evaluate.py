"""How often a model is right about fresh scenes, greedy: `measure` takes any engine.

Two splits: pairs of color and shape as in training, and the compositional split, which asks about pairs that training
never showed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .. import detection
from ..answer import Answer, Question, answer_all, ask, fit
from ..engine import Engine
from ..tokenizer import Tokenizer
from . import confidence, questions

if TYPE_CHECKING:
    from PIL import Image

BATCH = 50
NEW_TOKENS = 48
DRAWN_AT = 224  # pixels a side of the pictures
MASKED_AT = 256  # and of the masks that are compared
MASK_OVERLAP = 0.8  # over the union, of a mask that is right
SCORES = {"caption": "caption", "answer": "answer", "detect": "detect_f1", "segment": "segment_miou"}
CONFIDENT = ("caption", "answer", "detect")  # tasks of which an answer, or a box, is right or wrong


class Drawable(Protocol):
    """A scene, of any kind."""

    def draw(self, size: int) -> "Image.Image":
        """It as a picture of size x size pixels."""

    def visible(self, index: int, size: int) -> np.ndarray:
        """Where one of its things is to be seen: bool [size, size]."""


class Asked(Protocol):
    """A question about a scene of any kind."""

    @property
    def scene(self) -> Drawable:
        """What is asked about."""

    @property
    def task(self) -> str:
        """Of which kind it is."""

    @property
    def prefix(self) -> str:
        """What is asked."""

    @property
    def suffix(self) -> str:
        """The right answer."""

    @property
    def target(self) -> int | None:
        """Which thing `segment` means."""


def held_out(seed: int, count: int, task: str, compositional: bool = False) -> list[questions.Question]:
    """Scenes that training never saw, with one question of the task each; what a mask is spelled like is left open."""
    rng = np.random.default_rng([questions.HELD_OUT_SEED, seed, 1 + questions.TASKS.index(task), compositional])
    return [questions.random_question(rng, lambda mask, box: "", task, compositional) for _ in range(count)]


@dataclass(frozen=True)
class Suite:
    """What is measured: the name of each task's score, `held_out` of the scenes, and a random question of any task."""

    scores: dict[str, str]
    held_out: Callable[..., Sequence[Asked]]
    random_question: Callable[..., Asked]


SHAPES = Suite(SCORES, held_out, questions.random_question)


def measure(
    engine: Engine, tokenizer: Tokenizer, seed: int, count: int, with_confidence: bool = False, suite: Suite = SHAPES
) -> dict:
    """Fractions right on both splits, over `count` scenes a task.

    caption and answer by exact match; detect_f1 by boxes of the right label at an IoU of a half; segment_miou by the
    mean IoU of the painted mask with what is to be seen of the thing, 0 where no mask was found. If asked for,
    `confidence` has what `confident` says of each task.
    """

    def split(compositional):
        results, confidences = {}, {}
        for task, name in suite.scores.items():
            asked = suite.held_out(seed, count, task, compositional)
            found = answer_questions(engine, tokenizer, asked, task)
            results[name] = round(score(task, found, asked), 4)
            if task in CONFIDENT and all(answer.logprobs is not None for answer in found):
                confidences[task] = confident(task, found, asked)
        return results | ({"confidence": confidences} if with_confidence else {})

    return {**split(False), "compositional": split(True)}


def answer_questions(engine: Engine, tokenizer: Tokenizer, asked: Sequence[Asked], label: str = "") -> list[Answer]:
    """The engine's greedy answers, in batches."""
    from tqdm import tqdm

    found = []
    for start in tqdm(range(0, len(asked), BATCH), desc=label, leave=False, disable=None):
        batch = [prepare(engine, tokenizer, question) for question in asked[start : start + BATCH]]
        found += answer_all(engine, tokenizer, batch)
    return found


def prepare(engine: Engine, tokenizer: Tokenizer, question: Asked) -> Question:
    """A question about a scene as the engine takes it."""
    return ask(engine, picture(question), *fit(engine, tokenizer, question.prefix, NEW_TOKENS))


def picture(question: Asked) -> "Image.Image":
    """The picture that a question is about, larger than the model's, as pictures are."""
    return question.scene.draw(DRAWN_AT)


def score(task: str, answers: list[Answer], asked: Sequence[Asked]) -> float:
    """The score of a task's answers, in [0, 1]."""
    if task == "detect":
        return f1([answer.text for answer in answers], [question.suffix for question in asked])
    pairs = zip(answers, asked, strict=True)
    if task == "segment":
        return float(np.mean([mask_iou(answer, question) for answer, question in pairs]))
    return float(np.mean([answer.text == question.suffix for answer, question in pairs]))


def confident(task: str, answers: list[Answer], asked: Sequence[Asked]) -> dict:
    """How right the answers to a task are where they are confident.

    The confidence of a box is its score, and that of a text the probability of all its tokens, exp of the sum of their
    log-probabilities.
    """
    if task == "detect":
        boxes = [replace(answer, width=1, height=1).boxes for answer in answers]
        return confidence.of_boxes(boxes, [detection.parse(question.suffix, 1, 1) for question in asked])
    right = [answer.text == question.suffix for answer, question in zip(answers, asked, strict=True)]
    return confidence.of_answers([float(np.exp(np.sum(answer.logprobs or 0.0))) for answer in answers], right)


def is_right(answer: Answer, question: Asked) -> bool:
    """Whether nobody who sees the picture would object: the same text, the same boxes, nearly the same mask."""
    if question.task not in ("detect", "segment"):
        return answer.text == question.suffix
    has_boxes = f1([answer.text], [question.suffix]) == 1
    if question.task == "segment" and question.target is not None:
        return has_boxes and mask_iou(answer, question) >= MASK_OVERLAP
    return has_boxes


def mask_iou(answer: Answer, question: Asked) -> float:
    """Overlap over union of the first mask in an answer with what is to be seen of the thing asked for."""
    assert question.target is not None, "only `segment` asks for a mask, and of one thing"
    truth = question.scene.visible(question.target, MASKED_AT)
    masks = replace(answer, width=MASKED_AT, height=MASKED_AT).masks
    mask = next((mask for mask in masks if mask is not None), None)
    if mask is None:
        return 0.0
    return float((mask & truth).sum() / max(1, (mask | truth).sum()))


def f1(texts: list[str], references: list[str]) -> float:
    """Harmonic mean of precision and recall of boxes: a find has the label and an IoU of at least a half."""
    hits = found = wanted = 0
    for text, reference in zip(texts, references, strict=True):
        boxes, targets = detection.parse(text, 1, 1), detection.parse(reference, 1, 1)
        found, wanted = found + len(boxes), wanted + len(targets)
        for target in targets:
            match = next((box for box in boxes if _finds(box, target)), None)
            if match:
                hits += 1
                boxes.remove(match)
    return 2 * hits / (found + wanted) if found + wanted else 1.0


def _finds(box, target) -> bool:
    return box.label == target.label and detection.intersection_over_union(box, target) >= 0.5
