"""python -m export.measure FOLDER: what exporting and running a model of full size costs.

Writes a random checkpoint into FOLDER, exports it, answers with the float32 bundle, verifies it in one more export, and
prints seconds, GB/s against a plain copy of the same bytes, and the peak of anonymous memory (what the system cannot
drop and read again; Linux only).
FOLDER must not exist and is removed at the end. `--sizes` instead prints how large every release is in every precision,
from its configuration alone.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from numpy_ref import cli
from numpy_ref.checkpoint import SHIPPED, parameters
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError

from .bundle import weights
from .bundle.weights import PRECISIONS
from .model.layers import FUSED

PROG = "python -m export.measure"


def sizes() -> str:
    """A table of the releases: weights, and bytes of a checkpoint in bfloat16 and of a bundle's weights by precision.

    Their sizes in pixels change no more than the table of positions. --prepack adds the same again.
    """
    lines = [f"{'GB':<16}{'weights':>9}{'checkpoint':>12}" + "".join(f"{name:>15}" for name in PRECISIONS)]
    for name in (name for name in VARIANTS if name.endswith("-224")):
        config = VARIANTS[name]
        count = sum(math.prod(parameter.shape) for parameter in parameters(config))
        row = f"{name.removesuffix('-224'):<16}{count / 1e9:>8.2f}B{2 * count / 1e9:>12.1f}"
        for precision in PRECISIONS:
            placed = weights.plan(config, precision, FUSED)
            row += f"{weights.size(placed) / 1e9:>15.1f}"
        lines.append(row)
    return "\n".join(lines)


def watch(command: Sequence[str | Path]) -> tuple[float, float, str]:
    """Run a command: seconds, peak anonymous GiB, and what it printed."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    output, errors = process.communicate()
    if process.returncode:
        raise PaliGemmaError(f"{' '.join(map(str, command))} failed: {errors}")
    return seconds, peak / 2**30, output


def anonymous(pid: int) -> int:
    """Bytes of a process's resident memory that no file backs; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def copy_seconds(source: Path, target: Path) -> float:
    """A plain copy of the same bytes in blocks, timed, and removed."""
    started = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 32 * 2**20)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def module(name: str, *arguments: object) -> list[str]:
    """A command that runs a module of this project."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def entry(name: str, *arguments: object) -> list[str]:
    """A command that runs `export_main` or `run_main`."""
    return [sys.executable, "-c", f"from export.cli import {name}; {name}()", *map(str, arguments)]


def synthetic(checkpoint: Path, variant: str, layers: int | None, *options: str, with_tokenizer: bool = False) -> None:
    """Write a random checkpoint of a released shape, with so many layers of each tower if they are given.

    It has no tokenizer of its own; the shipped model's may stand in, where only ids matter.
    """
    cut = ["--layers", layers] if layers else []
    watch(module("numpy_ref.checkpoint.synthetic", variant, checkpoint, *options, *cut))
    if with_tokenizer:
        shutil.copyfile(SHIPPED / "tokenizer.model", checkpoint / "tokenizer.model")


def measure(folder: Path, variant: str, layers: int | None, precisions: Sequence[str], runs: int) -> dict:
    """Everything, into one dict."""
    checkpoint, picture = folder / "checkpoint", SHIPPED / "example.png"
    synthetic(checkpoint, variant, layers, with_tokenizer=True)
    results = {}
    for precision in precisions:
        bundle = folder / precision
        times, copies, peaks = [], [], []
        for _ in range(runs):  # interleaved, since the machine's speed drifts
            shutil.rmtree(bundle, ignore_errors=True)
            seconds, peak, _ = watch(entry("export_main", checkpoint, "--output", bundle, "--precision", precision))
            times.append(seconds)
            peaks.append(peak)
            copies.append(copy_seconds(bundle / "weights.bin", folder / "copy"))
        size = (bundle / "weights.bin").stat().st_size
        results[precision] = {
            "bytes": size,
            "export_s": round(float(np.median(times)), 1),
            "export_gb_per_s": round(size / 1e9 / float(np.median(times)), 3),
            "copy_s": round(float(np.median(copies)), 1),
            "export_over_copy": round(float(np.median(np.array(times) / np.array(copies))), 2),
            "export_peak_anonymous_gib": round(max(peaks), 2),
        }
        if precision == "float32":
            command = entry("run_main", bundle, picture, "caption en", "--provider", "cpu", "--max-new-tokens", 8)
            _, peak, output = watch([*command, "--json"])
            results[precision] |= {"run_peak_anonymous_gib": round(peak, 2), **json.loads(output)["timings"]}
            shutil.rmtree(bundle)
            seconds, peak, _ = watch(entry("export_main", checkpoint, "--output", bundle, "--verify"))
            results[precision] |= {"verify_s": round(seconds, 1), "verify_peak_anonymous_gib": round(peak, 2)}
        shutil.rmtree(bundle)
    return results


def main(argv=None):
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="new, with room for three copies")
    options.add_argument("--sizes", action="store_true", help="print the sizes of all releases, and measure nothing")
    options.add_argument("--variant", choices=VARIANTS, default="paligemma-3b-224")
    options.add_argument("--layers", type=cli.whole(1), help="keep only so many layers of each tower")
    options.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["float32", "bfloat16"], dest="precisions"
    )
    options.add_argument(
        "--runs", type=cli.whole(1), default=1, help="exports of each precision; medians are printed (1)"
    )
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    if arguments.sizes:
        print(sizes())
        return 0
    if not arguments.folder:
        options.error("FOLDER is needed (or --sizes)")
    if arguments.folder.exists():
        raise PaliGemmaError(f"{arguments.folder}: exists already; name a new folder")
    try:
        arguments.folder.mkdir(parents=True)
        results = measure(arguments.folder, arguments.variant, arguments.layers, arguments.precisions, arguments.runs)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps({"variant": arguments.variant, "layers": arguments.layers, **results}))
    else:
        for precision, figures in results.items():
            print(f"{arguments.variant} {precision}")
            for name, value in figures.items():
                print(f"  {name:<28}{value:>16,}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
