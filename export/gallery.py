"""python -m export.gallery OUT.png: what the model answers to held-out scenes, drawn side by side."""

import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from numpy_ref import cli, detection
from numpy_ref.engine import Engine
from numpy_ref.scenes import evaluate
from numpy_ref.tokenizer import Tokenizer

from .evaluate import opened, suite_of

PROG = "python -m export.gallery"
TILE, GAP = 448, 16


def gallery(
    engine: Engine,
    tokenizer: Tokenizer,
    seed: int,
    columns: int,
    compositional: bool = False,
    suite: evaluate.Suite = evaluate.SHAPES,
) -> Image.Image:
    """A row a task; the scenes are the first of the seed, not chosen, and each answer is marked right or wrong."""
    rows = []
    for task in (name for name in suite.scores if " " not in name):  # captions in one language are enough
        asked = suite.held_out(seed, columns, task, compositional)
        answers = evaluate.answer_questions(engine, tokenizer, asked)
        rows.append([_tile(question, answer) for question, answer in zip(asked, answers, strict=True)])
    heights = [max(tile.height for tile in row) for row in rows]
    width = columns * TILE + (columns - 1) * GAP
    canvas = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, tile in enumerate(row):
            canvas.paste(tile, (i * (TILE + GAP), top))
        top += height + GAP
    return canvas


def _tile(question, answer):
    picture = question.scene.draw(TILE)
    answer = replace(answer, width=picture.width, height=picture.height)
    return cli.draw(picture, question.prefix, answer, evaluate.is_right(answer, question), wanted(question))


def wanted(question: evaluate.Asked) -> str:
    """The right answer in words: for boxes what they are of."""
    labels = [box.label for box in detection.parse(question.suffix, 1, 1)]
    return ", ".join(labels) or question.suffix or "nothing"


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Draw what the model answers to held-out scenes.")
    options.add_argument("output", type=Path, metavar="OUT.png")
    options.add_argument("--model", type=Path, help="a bundle or checkpoint; left out: the model that ships")
    options.add_argument("--seed", type=cli.whole(0), default=1)
    options.add_argument("--columns", type=cli.whole(1), default=4)
    options.add_argument("--new-pairs", action="store_true", help="of the compositional split")
    arguments = options.parse_args(argv)
    cli.check_drawing(arguments.output)
    with opened(arguments.model) as (engine, tokenizer):
        drawing = gallery(
            engine, tokenizer, arguments.seed, arguments.columns, arguments.new_pairs, suite_of(arguments.model)
        )
    small = drawing.resize((drawing.width * 3 // 5, drawing.height * 3 // 5), Image.Resampling.LANCZOS)
    if arguments.output.suffix.lower() in ("", ".png"):
        small = small.quantize(256, dither=Image.Dither.NONE)  # noise does not compress; this is a quarter of the bytes
    cli.write_drawing(arguments.output, small)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
