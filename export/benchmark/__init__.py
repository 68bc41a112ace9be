"""python -m export.benchmark: this project's bundle against other libraries, on this machine in one run.

Writes a random checkpoint of the shape asked for, exports it, and lets processes answer about a picture in turns: one
with the bundle, one with Hugging Face transformers, and those of other libraries that are asked for (`--peers`), all on
the same weights, with the same ids and as many threads. Prints medians and ratios: the time from the picture to the
first token, the time of a further token, load time, and the most memory; beside ours the bound, which is what the
products of a prefill and the reading of a step's weights take at rates that are measured in the same run. Several
shapes make one table; `--matrix` is PaliGemma 1 and 2 with 3B at three sizes, with fewer layers where two cores
would take too long. It says how many answers a minute that is of three jobs.

Of our bundle alone: `--questions` times a second question about a picture, `--objects` answers with boxes, with guesses
and without (objects.py), `--memory` what exporting, loading and running a model take; with `--plan` it tells what
sizes say of that.
"""

import argparse
import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from numpy_ref import cli
from numpy_ref.checkpoint.synthetic import shallower
from numpy_ref.cli.options import on_cores
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError, plural

from ..bundle.weights import PRECISIONS
from . import compare, footprint, objects, report
from .peers import PEERS, TRANSFORMERS
from .workers import OBJECTS, OURS, SECOND, Worker, work

PROG = "python -m export.benchmark"
#: The rows of --matrix, and how many layers of each tower are left where the whole would take too long.
MATRIX = {
    "paligemma-3b-224": None, "paligemma2-3b-224": None, "paligemma-3b-448": 8, "paligemma2-3b-448": None,
    "paligemma-3b-896": 4, "paligemma2-3b-896": 4,
}  # fmt: skip
DEFAULT, ROUNDS, MATRIX_ROUNDS = "paligemma-3b-224", 5, 3


def questions(folder: Path, variant: str, layers: int | None, arguments: Namespace, threads: int) -> dict:
    """A second question about a picture against a first one, by our bundle alone."""
    _, bundle, _ = compare.written(folder, variant, layers, arguments)
    with Worker(OURS, bundle, arguments.tokens, threads) as worker:
        worker.ask(SECOND)  # opens the graphs
        return {"variant": variant, "layers": layers, **compare.second(worker, arguments.rounds)}


def answers_with_boxes(folder: Path, variant: str, layers: int | None, arguments: Namespace, threads: int) -> dict:
    """Answers with boxes, token by token and with guesses, by our bundle alone."""
    _, bundle, _ = compare.written(folder, variant, layers, arguments)
    with Worker(OURS, bundle, arguments.rounds, threads) as worker:
        return {"variant": variant, "layers": layers, OBJECTS: worker.ask(OBJECTS)}


def objects_table(results: dict) -> str:
    """What `answers_with_boxes` found, as text."""
    row, prepacked = results["rows"][0], ", prepacked" if results["prepack"] else ""
    turns = f"{plural(results['threads'], 'thread')}, medians of {plural(results['rounds'], 'round')}"
    return f"{report.shape(row)}, {results['precision']}{prepacked}, {turns}\n{objects.table(row[OBJECTS])}"


def parser() -> cli.Parser:
    """The options of the command."""
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument(
        "--variant", nargs="+", choices=VARIANTS, metavar="VARIANT",
        help=f"shapes, one table for all ({DEFAULT}, or those of --matrix): paligemma-3b-224 … paligemma2-28b-896",
    )  # fmt: skip
    options.add_argument("--matrix", action="store_true", help="PaliGemma 1 and 2 with 3B at 224, 448 and 896 pixels")
    options.add_argument("--layers", type=cli.whole(1), help="keep only so many layers of each tower")
    options.add_argument("--precision", choices=PRECISIONS, default="float32", help="of our bundle (float32)")
    options.add_argument("--prepack", action="store_true", help="export with --prepack")
    options.add_argument(
        "--against",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="what transformers computes in (bfloat16)",
    )
    options.add_argument(
        "--peers", nargs="+", choices=[*PEERS, "all"], default=[TRANSFORMERS], metavar="NAME",
        help=f"what else answers ({TRANSFORMERS}): {', '.join(PEERS)}; or all",
    )  # fmt: skip
    options.add_argument(
        "--rounds", type=cli.whole(1), help=f"timed answers of each side ({ROUNDS}; with --matrix {MATRIX_ROUNDS})"
    )
    options.add_argument("--tokens", type=cli.whole(1), default=16, help="further tokens a timed answer (16)")
    options.add_argument("--threads", type=on_cores(1), default=None, help="of each side (all cores)")
    options.add_argument(
        "--folder", type=Path, help="where to work: a new folder, removed at the end (a temporary one)"
    )
    only = options.add_mutually_exclusive_group()
    only.add_argument("--questions", action="store_true", help="only time a second question about a picture, by ours")
    only.add_argument(
        "--objects", action="store_true", help="only time answers with boxes, token by token and with guesses, by ours"
    )
    only.add_argument("--memory", action="store_true", help="only the memory that export, loading and answers take")
    options.add_argument("--plan", action="store_true", help="with --memory: from the sizes alone, without a run")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--worker", nargs=2, metavar=("SIDE", "DIR"), help=argparse.SUPPRESS)
    options.add_argument("--make", nargs=3, metavar=("SIDE", "DIR", "CHECKPOINT"), help=argparse.SUPPRESS)
    return options


def main(argv=None):
    options = parser()
    arguments = options.parse_args(argv)
    threads = arguments.threads or os.cpu_count() or 1
    if arguments.worker:
        side, folder = arguments.worker
        work(side, Path(folder), arguments.tokens, threads, arguments.against)
        return 0
    if arguments.make:
        side, folder, checkpoint = arguments.make
        make = PEERS[side].make
        assert make is not None
        make(Path(folder), Path(checkpoint))
        return 0
    if arguments.precision.endswith("bfloat16"):
        raise PaliGemmaError("a bfloat16 bundle needs CUDA; this benchmark is about the CPU")
    if arguments.plan and not arguments.memory:
        options.error("argument --plan: only with --memory")
    variants = arguments.variant or (list(MATRIX) if arguments.matrix else [DEFAULT])
    alone = arguments.questions or arguments.objects or (arguments.memory and not arguments.plan)
    if alone and len(variants) > 1:
        options.error("--questions, --objects and --memory take one --variant")
    arguments.peers = list(PEERS) if "all" in arguments.peers else list(dict.fromkeys(arguments.peers))
    arguments.rounds = arguments.rounds or (MATRIX_ROUNDS if arguments.matrix else ROUNDS)
    if arguments.folder and arguments.folder.exists():
        raise PaliGemmaError(f"{arguments.folder}: exists already; name a new folder")
    results = {key: getattr(arguments, key) for key in ("precision", "prepack", "against", "rounds")}
    results |= {"threads": threads, "rows": rows(variants, arguments, threads)}
    print(json.dumps(results) if arguments.json else shown(arguments)(results))
    return 0


def rows(variants: list[str], arguments: Namespace, threads: int) -> list[dict]:
    """What is found of each shape, in a folder that is removed."""
    layers = {variant: arguments.layers or (MATRIX.get(variant) if arguments.matrix else None) for variant in variants}
    if arguments.plan:
        return [
            footprint.plan(
                variant, shallower(VARIANTS[variant], layers[variant]), arguments.precision, arguments.prepack
            )
            for variant in variants
        ]
    measure: Callable[..., dict] = partial(compare.measure, more=len(variants) == 1)
    if arguments.questions:
        measure = questions
    elif arguments.objects:
        measure = answers_with_boxes
    elif arguments.memory:
        measure = footprint.measure
    folder, found = arguments.folder or Path(tempfile.mkdtemp(prefix="paligemma-benchmark-")), []
    try:
        for variant in variants:
            (folder / variant).mkdir(parents=True)
            found.append(measure(folder / variant, variant, layers[variant], arguments, threads))
            shutil.rmtree(folder / variant)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def shown(arguments: Namespace) -> Callable[[dict], str]:
    """What makes a text of what was found."""
    if arguments.memory:
        return footprint.plan_table if arguments.plan else footprint.table
    if arguments.questions:
        return lambda results: report.second_line(results["rows"][0])
    return objects_table if arguments.objects else report.table
