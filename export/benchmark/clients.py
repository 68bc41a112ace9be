"""python -m export.benchmark.clients: other people's libraries on the layouts for them, beside this project's hosts.

The shipped model answers the same drawn questions as a bundle, in Python and in Node, in transformers.js in Node, and
in onnxruntime-genai: from a picture file to the first token, and for each further one. Processes take turns, a new one
a round; the first answer of each warms up and is not counted. Libraries that are not installed are left out, and named.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref import checkpoint as checkpoints
from numpy_ref import cli
from numpy_ref.cli.options import on_cores
from numpy_ref.errors import PaliGemmaError, note, plural
from numpy_ref.generate import generate
from numpy_ref.image import open_image
from numpy_ref.scenes import evaluate
from numpy_ref.things.evaluate import suite_of

from .. import bundle as bundles
from .. import layouts
from ..layouts import GENAI, TRANSFORMERS_JS
from ..measure import module
from ..session import load

PROG = "python -m export.benchmark.clients"
CLIENTS = Path(layouts.__file__).parents[1] / "clients"
DTYPES = {"float32": "fp32", "int8": "q8", "int4": "q4"}
TASKS = ("caption", "detect", "answer", "segment")
#: Who is measured, and beside whom of ours.
PYTHON, NODE, JS, GENAI_PYTHON = SIDES = ("bundle, Python", "bundle, Node", "transformers.js, Node", "genai, Python")
OURS = {JS: NODE, GENAI_PYTHON: PYTHON}


def measure(folder: Path, precision: str, questions: int, rounds: int, threads: int) -> dict:
    """Medians by side: seconds to the first token, milliseconds of a further one; and how many answers equal ours."""
    checkpoint = checkpoints.load()
    bundles.write(checkpoint, folder / "bundle", precision)
    layouts.write(checkpoint, folder / "js", TRANSFORMERS_JS, precision)
    layouts.write(checkpoint, folder / "genai", GENAI, precision)
    cases, suite = [], suite_of()
    for i in range(questions + 1):  # one to warm up
        question = suite.held_out(i, 1, TASKS[i % len(TASKS)])[0]
        evaluate.picture(question).save(folder / f"{i}.png")
        cases.append({"picture": str(folder / f"{i}.png"), "prompt": question.prefix})
    sides = commands(folder, cases, precision, threads, checkpoint.config.vision.patches)
    found = {side: [] for side in sides}
    for i in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        order = list(sides)
        for side in order[i % len(order) :] + order[: i % len(order)]:
            found[side].append(sides[side]())
    ends = checkpoint.config.ends
    return {side: summary(found[side], found[PYTHON], ends) for side in sides}


def summary(runs: list[list[dict]], ours: list[list[dict]], ends: tuple[int, ...]) -> dict:
    """The medians over rounds and questions but the first, and how many answers of a round are the bundle's."""

    def tokens(answer):
        return [token for token in answer["tokens"] if token not in ends]

    timed = [answer for answers in runs for answer in answers[1:]]
    same = sum(tokens(a) == tokens(b) for a, b in zip(runs[0], ours[0], strict=True))
    return {
        "first_token_s": float(np.median([answer["first_s"] for answer in timed])),
        "ms_per_token": 1000 * float(np.median([answer["step_s"] for answer in timed if answer["step_s"]])),
        "same": same, "of": len(runs[0]),
    }  # fmt: skip


def commands(
    folder: Path, cases: list[dict], precision: str, threads: int, patches: int
) -> dict[str, Callable[[], list[dict]]]:
    """What answers all cases, by side; those that are installed."""
    run = {"cases": cases, "tokens": 64}
    command = module("export.benchmark.clients", "--worker", folder / "bundle", "--threads", threads)
    found: dict[str, Callable[[], list[dict]]] = {PYTHON: partial(_asked, command, **run)}
    node, hosts = shutil.which("node"), CLIENTS.parent / "hosts"
    missing = []
    for side, script, place, needs in [(NODE, "ours.mjs", "bundle", hosts), (JS, "node.mjs", "js", CLIENTS)]:
        if node and (needs / "node_modules").is_dir():
            runs = [{**run, "folder": str(folder / place), "dtype": DTYPES[precision]}]
            found[side] = partial(_asked, [node, str(CLIENTS / script)], key="runs", runs=runs, threads=threads)
        else:
            missing.append(f"{side} (npm ci --prefix {needs})")
    if importlib.util.find_spec("onnxruntime_genai"):
        command = module("export.clients.genai", folder / "genai")
        found[GENAI_PYTHON] = partial(_asked, command, **run, image_tokens=patches, threads=threads)
    else:
        missing.append(f"{GENAI_PYTHON} (export/README.md says how it is installed)")
    if missing:
        note(f"{PROG}: left out: {', '.join(missing)}")
    return found


def _asked(command, key="answers", **arguments) -> list[dict]:
    """The answers of a process to what it is given on its standard input."""
    result = subprocess.run([*map(str, command)], input=json.dumps(arguments), capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.strip().splitlines() or ["it said nothing"]
        raise PaliGemmaError(f"{Path(str(command[1])).name} stopped: {reason[-1]}")
    found = json.loads(result.stdout)[key]
    return found[0]["answers"] if key == "runs" else found


def work(folder: Path, threads: int) -> None:
    """What the process of the bundle in Python does."""
    asked = json.load(sys.stdin)
    engine, tokenizer = load(folder, "cpu", threads)
    found, known = [], tokenizer.known()
    for case in asked["cases"]:
        times = [time.perf_counter()]
        picture, tokens = engine.preprocess(open_image(case["picture"])), []
        for token in generate(engine, picture, [tokenizer.prompt(case["prompt"])], known, asked["tokens"]):
            tokens.append(int(token[0]))
            times.append(time.perf_counter())
        first, *steps = np.diff(times).tolist()
        found.append({"tokens": tokens, "first_s": first, "step_s": float(np.mean(steps)) if steps else None})
    print(json.dumps({"answers": found}))


def table(results: dict, precision: str, questions: int, rounds: int, threads: int) -> str:
    """The figures as text; a ratio is how many times as long as ours beside it."""
    what = plural(questions, "question"), plural(threads, "thread"), plural(rounds, "round")
    lines = ["the shipped model in {}: {}, {}, medians of {}".format(precision, *what)]
    lines.append(
        f"{'':<24}{'first token, ms':>16}{'ratio':>7}{'further token, ms':>19}{'ratio':>7}{'same answers':>15}"
    )
    for side, found in results.items():
        ours = results.get(OURS.get(side, ""))
        row = [f"{side:<24}"]
        for value, name, width in (
            (1000 * found["first_token_s"], "first_token_s", 16), (found["ms_per_token"], "ms_per_token", 19),
        ):  # fmt: skip
            ratio = f"{found[name] / ours[name]:.2f}" if ours else ""
            row.append(f"{value:>{width}.2f}{ratio:>7}")
        row.append(f"{found['same']:>8} of {found['of']}")
        lines.append("".join(row))
    return "\n".join(lines)


def main(argv=None):
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("--precision", choices=DTYPES, default="float32", help="of all sides (float32)")
    options.add_argument("--questions", type=cli.whole(1), default=20, help="timed in each round (20)")
    options.add_argument("--rounds", type=cli.whole(1), default=5, help="of all sides (5)")
    options.add_argument("--threads", type=on_cores(1), default=None, help="of each side (all cores)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--worker", type=Path, metavar="BUNDLE", help="for its own use: answer what stands on stdin")
    arguments = options.parse_args(argv)
    threads = arguments.threads or os.cpu_count() or 1
    if arguments.worker:
        work(arguments.worker, threads)
        return 0
    settings = arguments.precision, arguments.questions, arguments.rounds, threads
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), *settings)
    print(json.dumps(results) if arguments.json else table(results, *settings))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
