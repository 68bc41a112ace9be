"""python -m export.evaluate [BUNDLE]: how often a model is right about fresh scenes, greedy, and if it knows when.

The scenes are of the kind that the model was taught, as its knows.json says: drawn shapes, or everyday things. A
checkpoint is exported into a temporary bundle first.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from numpy_ref import checkpoint, cli
from numpy_ref.checkpoint import hub
from numpy_ref.engine import Engine
from numpy_ref.scenes import evaluate
from numpy_ref.things import evaluate as things
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


def suite_of(path: Path | None) -> evaluate.Suite:
    """What a bundle or checkpoint is measured on; None is the shipped model."""
    return things.suite_of(checkpoint.SHIPPED if path is None else hub.directory(path))


def mean(results: list[dict]) -> dict:
    """The means of what was measured with several seeds."""
    scores = [name for name, value in results[0].items() if isinstance(value, float)]
    found = {name: round(float(np.mean([each[name] for each in results])), 4) for name in scores}
    new = [each["compositional"] for each in results if "compositional" in each]
    return {**found, "compositional": mean(new)} if new else found


def table(results: dict, lowest: dict | None = None) -> str:
    """The accuracies as text; with several seeds their means, and beside them the lowest of each."""
    lines = [f"{'':<16}{'seen':>12}{'new':>12}" + (f"{'lowest':>12}{'goal':>12}" if lowest else "")]
    for name in (name for name, value in results.items() if isinstance(value, float)):
        lines.append(f"{name:<16}{results[name]:>12.1%}{results['compositional'][name]:>12.1%}")
        if lowest:
            goal = f"{things.GOALS[name]:>12.0%}{_verdict(results, name)}" if name in things.GOALS else ""
            lines[-1] += f"{lowest[name]:>12.1%}{goal}"
    return "\n".join([*lines, *confidence_table(results.get("confidence", {}))])


def _verdict(results, name) -> str:
    lost = results[name] - results["compositional"][name]
    missed = ["  below"] if results[name] < things.GOALS[name] else []
    if lost > things.MOST_LOST:
        missed.append(f"  new ones lose {lost:.1%}")
    return ",".join(missed)


def confidence_table(confidence: dict) -> list[str]:
    """How sure the answers on the first split are, as lines: figures, then for each range of confidence how many."""
    lines = ["", f"{'seen':<16}" + "".join(f"{task:>18}" for task in confidence)] if confidence else []
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
    options.add_argument(
        "--seed", type=cli.whole(0), nargs="+", default=[0],
        help="of the held-out scenes (0); of several the means are printed, and the lowest",
    )  # fmt: skip
    options.add_argument("--scenes", type=cli.whole(1), default=500, help="scenes a task and split (500)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    suite, seeds = suite_of(arguments.model), arguments.seed
    with opened(arguments.model) as (engine, tokenizer):
        results = [
            evaluate.measure(engine, tokenizer, seed, arguments.scenes, with_confidence=len(seeds) == 1, suite=suite)
            for seed in seeds
        ]
    if arguments.json:
        by_seed = {str(seed): each for seed, each in zip(seeds, results, strict=True)}
        print(json.dumps(results[0] if len(seeds) == 1 else {"mean": mean(results), "seeds": by_seed}))
    elif len(seeds) == 1:
        print(table(results[0]))
    else:
        print(table(mean(results), _lowest(results)))
    return 0


def _lowest(results) -> dict:
    return {name: min(each[name] for each in results) for name, value in results[0].items() if isinstance(value, float)}


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
