"""python -m torch_impl.evaluate [CHECKPOINT]: accuracy on fresh scenes, greedy.

From the command line the PyTorch twin answers; `measure` takes any engine.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref import checkpoint, cli, detection
from numpy_ref.generate import answers, generate
from numpy_ref.image import preprocess
from numpy_ref.tokenizer import Tokenizer

from . import scenes

PROG = "python -m torch_impl.evaluate"
HELD_OUT_SEED = 1_000_003  # training draws from [seed, worker]; this stream is another
BATCH = 50
NEW_TOKENS = 48


def held_out(seed: int, count: int, task: str) -> list[tuple[scenes.Scene, str, str]]:
    """Scenes with one question each and its right answer: (scene, prefix, suffix)."""
    rng = np.random.default_rng([HELD_OUT_SEED, seed, scenes.TASKS.index(task)])
    examples = []
    for _ in range(count):
        scene = scenes.random_scene(rng)
        examples.append((scene, *scenes.random_question(rng, scene, task)))
    return examples


def measure(engine, tokenizer, seed: int, count: int) -> dict:
    """Fractions right: caption and answer by exact match, detect_f1 by boxes at IoU 0.5 with the right label."""
    results = {}
    for task in ("caption", "answer", "detect"):
        examples = held_out(seed, count, task)
        texts = answer_all(engine, tokenizer, examples, task)
        if task == "detect":
            results["detect_f1"] = round(f1(texts, [suffix for *_, suffix in examples]), 4)
        else:
            right = sum(text == suffix for text, (*_, suffix) in zip(texts, examples, strict=True))
            results[task] = round(right / count, 4)
    return results


def answer_all(engine, tokenizer, examples, label="") -> list[str]:
    """The engine's greedy answers, in batches."""
    size, texts = engine.config.vision.image_size, []
    for start in tqdm(range(0, len(examples), BATCH), desc=label, leave=False, disable=None):
        batch = examples[start : start + BATCH]
        pixels = np.concatenate([preprocess(scenes.draw(scene), size, resize=engine.resize) for scene, *_ in batch])
        prompts = [tokenizer.prompt(prefix) for _, prefix, _ in batch]
        tokens = list(generate(engine, pixels, prompts, tokenizer.known(), NEW_TOKENS))
        texts += [tokenizer.decode(row) for row in answers(tokens, engine.config.eos)]
    return texts


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


def main(argv=None):
    options = argparse.ArgumentParser(prog=PROG, description="Measure a model's accuracy on held-out scenes.")
    options.add_argument("model", nargs="?", type=Path, default=checkpoint.SHIPPED, help="a checkpoint directory")
    options.add_argument("--seed", type=int, default=0, help="of the held-out scenes (0)")
    options.add_argument("--scenes", type=int, default=500, help="scenes a task (500)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    from .load import TorchEngine

    loaded = checkpoint.load(arguments.model)
    tokenizer = Tokenizer.load(loaded.folder, loaded.config)
    results = measure(TorchEngine(loaded), tokenizer, arguments.seed, arguments.scenes)
    if arguments.json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:<12} {value:6.1%}")


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
