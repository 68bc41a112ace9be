"""python -m numpy_ref.things.rows --output DIR: scenes that the shipped model knows, and rows.jsonl with questions.

For whatever takes rows of one's own: `export-onnx --calibrate`, `python -m export.drift --data`, `run-onnx-batch`.
Neither training nor any measure has these scenes.
"""

import json
import sys
from pathlib import Path

import numpy as np

from ..cli import Parser, run, whole
from ..errors import one_line
from ..files import new_directory
from ..scenes.evaluate import DRAWN_AT
from .evaluate import suite_of
from .questions import HELD_OUT_SEED

PROG = "python -m numpy_ref.things.rows"


def write(folder: Path, count: int, seed: int) -> None:
    """Write so many pictures into a folder, and rows.jsonl beside them."""
    rng, rows, suite = np.random.default_rng([HELD_OUT_SEED, seed]), [], suite_of()
    for i in range(count):
        question, name = suite.random_question(rng, lambda mask, box: ""), f"{i:04d}.png"
        question.scene.draw(DRAWN_AT).save(folder / name)
        rows.append({"image": name, "prompt": question.prefix})
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def main(argv=None):
    options = Parser(prog=PROG, description="Draw scenes, and ask a question about each.")
    options.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument("--rows", type=whole(1), default=256, metavar="N", help="how many (256)")
    options.add_argument("--seed", type=whole(0), default=0, help="of the scenes (0)")
    arguments = options.parse_args(argv)
    with new_directory(arguments.output) as folder:
        write(folder, arguments.rows, arguments.seed)
    print(one_line(f"wrote {arguments.output}"))
    return 0


if __name__ == "__main__":
    sys.exit(run(PROG, main))
