"""How often a model is right about fresh scenes, greedy: `measure` takes any engine.

Two splits: pairs of color and shape as in training, and the compositional split, which asks about pairs that training
never showed.
"""

import numpy as np

from .. import detection, scenes
from ..cli import paint
from ..generate import answers, generate
from ..image import preprocess
from . import questions

BATCH = 50
NEW_TOKENS = 48
DRAWN_AT = 224  # pixels a side of the pictures
MASKED_AT = 256  # and of the masks that are compared
SCORES = {"caption": "caption", "answer": "answer", "detect": "detect_f1", "segment": "segment_miou"}


def held_out(seed: int, count: int, task: str, compositional=False) -> list[questions.Question]:
    """Scenes that training never saw, with one question of the task each; what a mask is spelled like is left open."""
    rng = np.random.default_rng([questions.HELD_OUT_SEED, seed, 1 + questions.TASKS.index(task), compositional])
    return [questions.random_question(rng, lambda mask, box: "", task, compositional) for _ in range(count)]


def measure(engine, tokenizer, seed: int, count: int) -> dict:
    """Fractions right on both splits, over `count` scenes a task.

    caption and answer by exact match; detect_f1 by boxes of the right label at an IoU of a half; segment_miou by the
    mean IoU of the painted mask with what is to be seen of the thing, 0 where no mask was found.
    """

    def split(compositional):
        results = {}
        for task, name in SCORES.items():
            asked = held_out(seed, count, task, compositional)
            texts = answer_all(engine, tokenizer, asked, task)
            results[name] = round(score(task, texts, asked, engine.masks), 4)
        return results

    return {**split(False), "compositional": split(True)}


def answer_all(engine, tokenizer, asked, label="") -> list[str]:
    """The engine's greedy answers, in batches."""
    from tqdm import tqdm

    size, texts = engine.config.vision.image_size, []
    for start in tqdm(range(0, len(asked), BATCH), desc=label, leave=False, disable=None):
        batch = asked[start : start + BATCH]
        pixels = np.concatenate([preprocess(picture(question), size, resize=engine.resize) for question in batch])
        prompts = [tokenizer.prompt(question.prefix) for question in batch]
        tokens = list(generate(engine, pixels, prompts, tokenizer.known(), NEW_TOKENS))
        texts += [tokenizer.decode(row) for row in answers(tokens, engine.config.eos)]
    return texts


def picture(question):
    """The picture that a question is about, larger than the model's, as pictures are."""
    return scenes.draw(question.scene, DRAWN_AT)


def score(task, texts, asked, masks) -> float:
    """The score of a task's answers, in [0, 1]; `masks` is an engine's painter of masks."""
    if task == "detect":
        return f1(texts, [question.suffix for question in asked])
    if task == "segment":
        pairs = zip(texts, asked, strict=True)
        return float(np.mean([mask_iou(text, question, masks) for text, question in pairs]))
    return float(np.mean([text == question.suffix for text, question in zip(texts, asked, strict=True)]))


def mask_iou(text, question, masks) -> float:
    """Overlap over union of the first mask in an answer with what is to be seen of the thing asked for."""
    truth = scenes.visible(question.scene, question.target, MASKED_AT)
    found = [box for box in detection.parse(text, MASKED_AT, MASKED_AT) if box.codes]
    (mask,) = paint(masks, found[:1], MASKED_AT, MASKED_AT) or [None]
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
