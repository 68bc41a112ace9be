"""python -m export.evaluate [BUNDLE]: how often a model is right about fresh scenes, greedy, and if it knows when.

A checkpoint is exported into a temporary bundle first.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from numpy_ref import checkpoint, cli
from numpy_ref.checkpoint import hub
from numpy_ref.engine import Engine
from numpy_ref.scenes import evaluate
from numpy_ref.tokenizer import Tokenizer

from . import bundle as bundles
from . import session

PROG = "python -m export.evaluate"


@contextmanager
def opened(path: Path | None) -> Iterator[tuple[Engine, Tokenizer]]:
    """Engine and tokenizer of a bundle or a checkpoint; None is the shipped model's bundle."""
    if path is not None:
        path = hub.directory(path)
    if path is None or (path / bundles.DESCRIPTION).is_file():
        yield session.load(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        bundles.write(checkpoint.load(path), bundle)
        yield session.load(bundle)


def table(results: dict) -> str:
    """The accuracies as text."""
    lines = [f"{'':<16}{'seen pairs':>12}{'new pairs':>12}"]
    lines += [
        f"{name:<16}{results[name]:>12.1%}{results['compositional'][name]:>12.1%}" for name in evaluate.SCORES.values()
    ]
    return "\n".join([*lines, *confidence_table(results["confidence"])])


def confidence_table(confidence: dict) -> list[str]:
    """How sure the answers on the first split are, as lines: figures, then for each range of confidence how many."""
    lines = ["", f"{'seen pairs':<16}" + "".join(f"{task:>18}" for task in confidence)] if confidence else []
    for name in ("average_precision", "risk_at_100", "risk_at_90", "calibration_error"):
        cells = [f"{one[name]:.1%}" if name in one else "" for one in confidence.values()]
        lines += [f"{name.replace('_', ' '):<16}" + "".join(f"{cell:>18}" for cell in cells)] if any(cells) else []
    tables = [{row["most"]: row for row in one["reliability"]} for one in confidence.values()]
    for most in sorted({most for table in tables for most in table}):
        cells = [f"{row['right']:.0%} of {row['count']}" if (row := table.get(most)) else "" for table in tables]
        lines.append(f"{'sure to ' + format(most, '.1f'):<16}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Measure a model's accuracy on held-out scenes, and its confidence.")
    options.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="BUNDLE",
        help="a bundle or checkpoint; left out: the model that ships",
    )
    options.add_argument("--seed", type=cli.whole(0), default=0, help="of the held-out scenes (0)")
    options.add_argument("--scenes", type=cli.whole(1), default=500, help="scenes a task and split (500)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    with opened(arguments.model) as (engine, tokenizer):
        results = evaluate.measure(engine, tokenizer, arguments.seed, arguments.scenes, with_confidence=True)
    print(json.dumps(results) if arguments.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
