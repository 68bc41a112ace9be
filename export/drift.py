"""python -m export.drift BUNDLE [CHECKPOINT]: how far a bundle's answers are from those of the float32 model.

Both read the same pictures and are fed the same answers, those of the float32 model; at every token their distributions
are compared: the Kullback-Leibler divergence, and whether the likeliest token is the same. On the drawn scenes that the
shipped model knows, the accuracy of each task is measured too. On rows of one's own (`--data`) both answer freely as
well, and it is counted how many answers differ, and how far the corners of their boxes have moved.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref import checkpoint as checkpoints
from numpy_ref import cli
from numpy_ref.answer import Answer, Question, answer_all, ask, fit
from numpy_ref.engine import Engine
from numpy_ref.errors import PaliGemmaError, plural
from numpy_ref.generate import choose_capacity, pad_prompts
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of
from numpy_ref.tokenizer import Tokenizer

from . import bundle as bundles
from .batch.dataset import JsonLines, Parquet, open_questions
from .session import Session

PROG = "python -m export.drift"
BATCH = 25
NEW_TOKENS = 48
SCENES = 2000  # a task, fewer than which do not tell a point from chance


@dataclass
class Drift:
    """What was seen at each token: divergences in nats, and whether both would have drawn the same one."""

    divergences: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)

    def add(self, reference: np.ndarray, logits: np.ndarray, known: np.ndarray) -> None:
        """Compare logits [B, V] of both; only ids that can be drawn count."""
        expected, found = (_log_softmax(np.asarray(each, np.float64)[:, known]) for each in (reference, logits))
        self.divergences += (np.exp(expected) * (expected - found)).sum(-1).tolist()
        self.agreements += (expected.argmax(-1) == found.argmax(-1)).tolist()

    def figures(self) -> dict:
        """Mean and largest divergence, the share of agreements, and over how many tokens."""
        return {
            "kl_mean": float(f"{np.mean(self.divergences):.3g}"), "kl_max": float(f"{np.max(self.divergences):.3g}"),
            "top_1": round(float(np.mean(self.agreements)), 5), "tokens": len(self.agreements),
        }  # fmt: skip


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def follow(
    reference: Engine,
    engine: Engine,
    pixel_values: np.ndarray,
    prompts: Sequence[Sequence[int]],
    known: np.ndarray,
    drift: Drift,
    new_tokens: int = NEW_TOKENS,
) -> None:
    """Let both engines answer prompts, each fed the greedy answer of `reference`; what differs goes into `drift`."""
    config = reference.config
    input_ids, lengths = pad_prompts(prompts, config.pad)
    capacity = choose_capacity(reference, lengths, new_tokens)
    states = [each.prefill(pixel_values, input_ids, lengths, capacity) for each in (reference, engine)]
    alive = np.ones(len(prompts), bool)
    for step in range(new_tokens):
        (expected, cache), (found, other_cache) = states
        drift.add(expected[alive], found[alive], known)
        token = np.where(known, expected, -np.inf).argmax(-1)
        alive = alive & ~np.isin(token, config.ends)
        if not alive.any() or step == new_tokens - 1:
            return
        ids = np.where(alive, token, config.pad)[:, None]
        states = [reference.decode(ids, lengths, cache), engine.decode(ids, lengths, other_cache)]
        lengths = np.where(alive, lengths + 1, lengths).astype(np.int32)


def on_scenes(
    reference: Engine, engine: Engine, tokenizer: Tokenizer, scenes: int, seed: int, suite: evaluate.Suite
) -> dict:
    """Drift over the answers to held-out scenes of every task of a suite, and both accuracies."""
    drift, known, accuracy = Drift(), tokenizer.known(), {}
    for task, name in suite.scores.items():
        asked = suite.held_out(seed, scenes, task)
        for start in tqdm(range(0, scenes, BATCH), desc=task, leave=False, disable=None):
            batch = [evaluate.prepare(engine, tokenizer, question) for question in asked[start : start + BATCH]]
            pixel_values = np.concatenate([each.pixel_values for question in batch for each in question.pictures])
            follow(reference, engine, pixel_values, [question.prompt for question in batch], known, drift)
        accuracy[name] = {}
        for label, each in (("float32", reference), ("bundle", engine)):
            answers = evaluate.answer_questions(each, tokenizer, asked, task)
            accuracy[name][label] = round(evaluate.score(task, answers, asked), 4)
    return {**drift.figures(), "accuracy": accuracy}


@dataclass
class Changes:
    """What became of the answers: how many there are, how many differ, and by how many pixels corners of boxes moved.

    Boxes are compared where both answers have as many, of the same labels in the same order.
    """

    answers: int = 0
    changed: int = 0
    other_boxes: int = 0  # answers whose boxes cannot be compared
    shifts: list[float] = field(default_factory=list)  # of the corner's coordinate that moved most, of each box

    def add(self, expected: Answer, found: Answer) -> None:
        """Compare two answers to the same question."""
        self.answers += 1
        self.changed += expected.text != found.text
        if [box.label for box in expected.boxes] != [box.label for box in found.boxes]:
            self.other_boxes += 1
            return
        for one, other in zip(expected.boxes, found.boxes, strict=True):
            self.shifts.append(max(abs(a - b) for a, b in zip(one.corners, other.corners, strict=True)))

    def figures(self) -> dict:
        """The counts, and the mean and largest shift; those are left out where there are no boxes."""
        shifts = self.shifts
        moved = {"shift_mean": round(float(np.mean(shifts)), 3), "shift_max": round(max(shifts), 3)} if shifts else {}
        counts = {"answers": self.answers, "changed": self.changed, "other_boxes": self.other_boxes}
        return {**counts, "boxes": len(shifts), **moved}


def on_rows(reference: Engine, engine: Engine, tokenizer: Tokenizer, rows: JsonLines | Parquet) -> dict:
    """Drift over the answers to rows of a data set, and what changed in them.

    Raises PaliGemmaError that names the first row that cannot be asked.
    """
    drift, changes, known = Drift(), Changes(), tokenizer.known()
    with tqdm(total=len(rows), desc="rows", leave=False, disable=None, delay=1) as bar:
        for start in range(0, len(rows), BATCH):
            for count, group in groupby(rows.read(start, start + BATCH), lambda row: row.count):
                batch = [_question(engine, tokenizer, row, count) for row in group]
                pixel_values = np.concatenate([each.pixel_values for asked in batch for each in asked.pictures])
                new_tokens = max(asked.new_tokens for asked in batch)
                prompts = [asked.prompt for asked in batch]
                follow(reference, engine, pixel_values, prompts, known, drift, new_tokens)
                for expected, found in zip(
                    *(answer_all(each, tokenizer, batch) for each in (reference, engine)), strict=True
                ):
                    changes.add(expected, found)
                bar.update(len(batch))
    return {**drift.figures(), **changes.figures()}


def _boxes(count) -> str:
    return "1 box" if count == 1 else f"{count} boxes"


def _question(engine, tokenizer, row, count) -> Question:
    return ask(engine, row.picture(), *fit(engine, tokenizer, row.question(None), pictures=count))


def table(precision: str, results: dict) -> str:
    """The figures as text."""
    lines = [
        f"{precision} against float32 over {results['tokens']} tokens: "
        f"top-1 agreement {results['top_1']:.2%}, KL mean {results['kl_mean']:.2g}, largest {results['kl_max']:.2g}"
    ]
    if "changed" in results:
        lines.append(f"{results['changed']} of {plural(results['answers'], 'answer')} changed")
    if results.get("boxes"):
        lines.append(
            f"corners of {_boxes(results['boxes'])} moved by {results['shift_mean']:.2f} pixels on average, "
            f"by {results['shift_max']:.1f} at most; {plural(results['other_boxes'], 'answer')} with other boxes"
        )
    if "accuracy" in results:
        width = max(10, len(precision) + 3)
        lines.append(f"{'':<16}{'float32':>10}{precision:>{width}}{'points':>9}")
    for task, scores in results.get("accuracy", {}).items():
        points = 100 * (scores["bundle"] - scores["float32"])
        lines.append(f"{task:<16}{scores['float32']:>10.1%}{scores['bundle']:>{width}.1%}{points:>+9.1f}")
    return "\n".join(lines)


def main(argv=None):
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("bundle", type=Path, metavar="BUNDLE", help="of any precision")
    options.add_argument(
        "checkpoint", nargs="?", type=Path, default=checkpoints.SHIPPED, metavar="CHECKPOINT",
        help="what it was made from; left out: the model that ships",
    )  # fmt: skip
    options.add_argument(
        "--data", type=Path, metavar="ROWS.jsonl",
        help='rows with "image" and "prompt" to judge by, or a .parquet file of them; left out: drawn scenes',
    )  # fmt: skip
    options.add_argument("--scenes", type=cli.whole(1), default=SCENES, help=f"held-out scenes a task ({SCENES})")
    options.add_argument("--seed", type=cli.whole(0), default=0, help="of the scenes (0)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    rows = open_questions(arguments.data) if arguments.data else None
    opened, checkpoint = bundles.load(arguments.bundle), checkpoints.load(arguments.checkpoint)
    if opened.config != checkpoint.config:
        raise PaliGemmaError(
            f"{arguments.bundle} was not made from {arguments.checkpoint}: their configurations differ"
        )
    tokenizer = Tokenizer.load(opened.path, opened.config)
    with tempfile.TemporaryDirectory() as folder:
        bundles.write(checkpoint, Path(folder) / "float32")
        reference = Session(bundles.load(Path(folder) / "float32"), "cpu")
        if rows is not None:
            results = on_rows(reference, Session(opened), tokenizer, rows)
        else:
            suite = suite_of(opened.path)
            results = on_scenes(reference, Session(opened), tokenizer, arguments.scenes, arguments.seed, suite)
    precision = opened.description.precision
    print(json.dumps({"precision": precision, **results}) if arguments.json else table(precision, results))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
