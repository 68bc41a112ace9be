"""python -m torch_impl.evaluate [BUNDLE]: how often a model is right about fresh scenes, greedy.

A bundle is run by ONNX Runtime, a checkpoint by the PyTorch twin; `measure` takes any engine. Two splits: pairs of
color and shape as in training, and the compositional split, which asks about pairs that training never showed.
"""

import argparse
import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref import checkpoint, cli, detection, segmentation
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import answers, generate
from numpy_ref.image import preprocess
from numpy_ref.tokenizer import Tokenizer

from . import questions, scenes
from .segmentation import spell_with

PROG = "python -m torch_impl.evaluate"
HELD_OUT_SEED = 1_000_003  # training numbers its examples from zero, by [seed, number]; this stream is another
BATCH = 50
NEW_TOKENS = 48
DRAWN_AT = 224  # pixels a side of the pictures
MASKED_AT = 256  # and of the masks that are compared
SCORES = {"caption": "caption", "answer": "answer", "detect": "detect_f1", "segment": "segment_miou"}


def held_out(seed: int, count: int, task: str, codec: dict, compositional=False) -> list[questions.Question]:
    """Scenes that training never saw, with one question of the task each."""
    rng = np.random.default_rng([HELD_OUT_SEED, seed, questions.TASKS.index(task), compositional])
    masks = spell_with(codec)
    return [questions.random_question(rng, masks, task, compositional) for _ in range(count)]


def measure(engine, tokenizer, codec: dict, seed: int, count: int) -> dict:
    """Fractions right on both splits, over `count` scenes a task.

    caption and answer by exact match; detect_f1 by boxes of the right label at an IoU of a half; segment_miou by the
    mean IoU of the painted mask with what is to be seen of the thing, 0 where no mask was found.
    """

    def split(compositional):
        results = {}
        for task, name in SCORES.items():
            asked = held_out(seed, count, task, codec, compositional)
            texts = answer_all(engine, tokenizer, asked, task)
            results[name] = round(score(task, texts, asked, codec), 4)
        return results

    return {**split(False), "compositional": split(True)}


def answer_all(engine, tokenizer, asked, label="") -> list[str]:
    """The engine's greedy answers, in batches."""
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


def score(task, texts, asked, codec) -> float:
    """The score of a task's answers, in [0, 1]."""
    if task == "detect":
        return f1(texts, [question.suffix for question in asked])
    if task == "segment":
        pairs = zip(texts, asked, strict=True)
        return float(np.mean([mask_iou(text, question, codec) for text, question in pairs]))
    return float(np.mean([text == question.suffix for text, question in zip(texts, asked, strict=True)]))


def mask_iou(text, question, codec) -> float:
    """Overlap over union of the first mask in an answer with what is to be seen of the thing asked for."""
    truth = scenes.visible(question.scene, question.target, MASKED_AT)
    found = [box for box in detection.parse(text, MASKED_AT, MASKED_AT) if box.codes]
    if not found:
        return 0.0
    painted = segmentation.decode(codec, np.array([found[0].codes]))[0]
    mask = segmentation.paste(painted, found[0].corners, MASKED_AT, MASKED_AT)
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


def png(image) -> bytes:
    """A picture as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def load(path: Path | None):
    """Engine, tokenizer and mask codec of a bundle or a checkpoint; None is the shipped model's bundle."""
    if path is None or (path / "bundle.json").is_file():
        # Named, not imported: this command alone reaches across, to measure what is given to users.
        engine, tokenizer = importlib.import_module("export.session").load(path)
        return engine, tokenizer, _shipped_codec()
    from .load import TorchEngine

    loaded = checkpoint.load(path)
    file = segmentation.find(loaded.folder)
    codec = segmentation.load(file) if file else _shipped_codec()
    return TorchEngine(loaded), Tokenizer.load(loaded.folder, loaded.config), codec


def _shipped_codec():
    if (file := segmentation.find(checkpoint.SHIPPED)) is None:
        raise PaliGemmaError(f"{checkpoint.SHIPPED}: no mask codec, without which masks cannot be scored")
    return segmentation.load(file)


def table(results) -> str:
    """The accuracies as text."""
    lines = [f"{'':<16}{'seen pairs':>12}{'new pairs':>12}"]
    lines += [f"{name:<16}{results[name]:>12.1%}{results['compositional'][name]:>12.1%}" for name in SCORES.values()]
    return "\n".join(lines)


def main(argv=None):
    options = argparse.ArgumentParser(prog=PROG, description="Measure a model's accuracy on held-out scenes.")
    options.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="BUNDLE",
        help="a bundle or checkpoint; left out: the model that ships",
    )
    options.add_argument("--seed", type=int, default=0, help="of the held-out scenes (0)")
    options.add_argument("--scenes", type=int, default=500, help="scenes a task and split (500)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    if arguments.scenes < 1:
        raise PaliGemmaError(f"--scenes must be positive, not {arguments.scenes}")
    if arguments.seed < 0:
        raise PaliGemmaError(f"--seed must not be negative, as {arguments.seed} is")
    results = measure(*load(arguments.model), arguments.seed, arguments.scenes)
    print(json.dumps(results) if arguments.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
