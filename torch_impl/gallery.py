"""python -m torch_impl.gallery OUT.png: what the model answers to held-out scenes, drawn side by side."""

import argparse
import sys
from pathlib import Path

from PIL import Image

from numpy_ref import checkpoint, cli, detection
from numpy_ref.tokenizer import Tokenizer

from . import evaluate, scenes
from .load import TorchEngine

PROG = "python -m torch_impl.gallery"
TILE, GAP = 448, 16


def gallery(engine, tokenizer, seed: int, columns: int) -> Image.Image:
    """One row of captions, one of detections; the scenes are the first of the seed, not chosen."""
    rows = []
    for task in ("caption", "detect"):
        examples = evaluate.held_out(seed, columns, task)
        texts = evaluate.answer_all(engine, tokenizer, examples)
        rows.append([_tile(example, text) for example, text in zip(examples, texts, strict=True)])
    heights = [max(tile.height for tile in row) for row in rows]
    width = columns * TILE + (columns - 1) * GAP
    canvas = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, tile in enumerate(row):
            canvas.paste(tile, (i * (TILE + GAP), top))
        top += height + GAP
    return canvas


def _tile(example, text):
    scene, prefix, _ = example
    picture = scenes.draw(scene, TILE)
    boxes = detection.parse(text, picture.width, picture.height)
    return detection.draw(picture, boxes, f"{prefix}: {len(boxes)} found" if boxes else f"{prefix}: {text}")


def main(argv=None):
    options = argparse.ArgumentParser(prog=PROG, description="Draw what the model answers to held-out scenes.")
    options.add_argument("output", type=Path, metavar="OUT.png")
    options.add_argument("--model", type=Path, default=checkpoint.SHIPPED, help="a checkpoint directory")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--columns", type=int, default=4)
    arguments = options.parse_args(argv)
    loaded = checkpoint.load(arguments.model)
    tokenizer = Tokenizer.load(loaded.folder, loaded.config)
    cli.write_drawing(arguments.output, gallery(TorchEngine(loaded), tokenizer, arguments.seed, arguments.columns))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
