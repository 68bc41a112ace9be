"""python -m export.benchmark.batch [BUNDLE]: pictures a second of run-onnx-batch, by batch size and number of workers.

Answers about the example picture, or a data set, again and again; loading is not counted. The settings take turns,
since the machine's speed drifts, and the median of the rounds is printed.
"""

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref import cli
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli.options import on_cores
from numpy_ref.errors import plural

from .. import batch
from .. import bundle as bundles
from ..batch import dataset

PROG = "python -m export.benchmark.batch"


def measure(
    job: batch.Job, sizes: Sequence[int], counts: Sequence[int], rounds: int, threads: int = 0
) -> dict[tuple[int, int], float]:
    """(workers, batch size) -> pictures a second, the median of `rounds`."""
    rows, speeds = len(job.rows), {setting: [] for setting in itertools.product(counts, sizes)}
    with ExitStack() as stack:
        pools = {count: stack.enter_context(batch.workers(job, count, threads)) for count in counts}
        for _ in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
            for (count, size), found in speeds.items():
                started = time.perf_counter()
                for _ in pools[count](range(0, rows, size), size):
                    pass
                found.append(rows / (time.perf_counter() - started))
    return {setting: float(np.median(found[1:])) for setting, found in speeds.items()}  # the first warms up


def table(speeds: dict[tuple[int, int], float], sizes: Sequence[int], counts: Sequence[int]) -> str:
    """A line for each number of workers, a column for each batch size."""
    lines = [f"{'pictures/s':<12}" + "".join(f"{f'batch {size}':>10}" for size in sizes)]
    for count in counts:
        label = f"{count} worker" + ("s" if count > 1 else "")
        lines.append(f"{label:<12}" + "".join(f"{speeds[count, size]:>10.2f}" for size in sizes))
    return "\n".join(lines)


def repeated(folder: Path, picture: Path, count: int) -> Path:
    """A data set in a folder: one picture, `count` times."""
    file = folder / "rows.jsonl"
    file.write_text(f"{json.dumps({'image': str(picture.resolve())})}\n" * count)
    return file


def main(argv=None):
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="left out: the model that ships")
    options.add_argument("--input", type=Path, metavar="ROWS", help="as of run-onnx-batch (the example picture)")
    options.add_argument("--prompt", default="caption en", help="of rows without, as of run-onnx-batch (caption en)")
    options.add_argument(
        "--pictures", type=cli.whole(1), default=64, help="in each timing, of the example picture (64)"
    )
    options.add_argument("--rounds", type=cli.whole(1), default=5, help="timings of each setting (5)")
    options.add_argument("--batch-sizes", type=cli.whole(1), nargs="+", default=[1, 4, 8], metavar="N")
    options.add_argument("--workers", type=on_cores(1), nargs="+", default=[1, 2], metavar="N")
    options.add_argument("--threads", type=on_cores(0), default=0, help="of all workers together (all cores)")
    options.add_argument("--max-new-tokens", type=cli.whole(1), help="longest answer (64)")
    options.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (auto)")
    arguments = options.parse_args(argv)
    arguments.prompt = cli.read_prompt(arguments.prompt)
    bundle = bundles.load(arguments.bundle) if arguments.bundle else bundles.shipped()
    with tempfile.TemporaryDirectory() as folder:
        rows = arguments.input or repeated(Path(folder), SHIPPED / "example.png", arguments.pictures)
        job = batch.Job(
            dataset.open_dataset(rows, arguments.prompt), bundle, arguments.prompt, arguments.max_new_tokens,
            provider=arguments.provider,
        )  # fmt: skip
        sizes, counts = arguments.batch_sizes, arguments.workers
        speeds = measure(job, sizes, counts, arguments.rounds, arguments.threads)
    threads = arguments.threads or os.cpu_count() or 1
    done = plural(len(job.rows), "picture"), plural(threads, "thread"), plural(arguments.rounds, "round")
    print("{}, {}, medians of {}".format(*done))
    print(table(speeds, sizes, counts))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
