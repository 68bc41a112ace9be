"""What a model of any size costs in memory: to export, to load and to run; or what it would, from its sizes alone."""

import math
import shutil
import subprocess
import time
from argparse import Namespace
from pathlib import Path

from numpy_ref.checkpoint import parameters
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError, plural

from ..bundle import weights
from ..measure import entry, synthetic
from ..model.layers import FUSED
from .compare import export_options, medians
from .workers import OURS, Peak, Worker, last_line


def measure(folder: Path, variant: str, layers: int | None, arguments: Namespace, threads: int) -> dict:
    """Export a random checkpoint, which is removed then, and answer with the bundle; memory and seconds of each."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    synthetic(checkpoint, variant, layers, "--dtype", "bfloat16")
    exported = watched(entry("export_main", checkpoint, "--output", bundle, *export_options(arguments)))
    shutil.rmtree(checkpoint)
    with Worker(OURS, bundle, arguments.tokens, threads) as worker, Peak(worker.process.pid) as peak:
        runs = [worker.ask() for _ in range(arguments.rounds)]
        loaded = worker.figures
    most = {name: max(loaded[name], value) for name, value in peak.figures().items()}
    return {
        "variant": variant, "layers": layers, "bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        "export": exported, "run": {"load_s": loaded["load_s"], **medians(runs), **most},
    }  # fmt: skip


def watched(command: list[str]) -> dict:
    """Run a command: its seconds, and the most memory that it had."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with Peak(process.pid) as peak:
        output, _ = process.communicate()
    if process.returncode:
        raise PaliGemmaError(f"{' '.join(map(str, command))} failed: {last_line(output, process.returncode)}")
    return {"seconds": round(time.perf_counter() - started, 1), **peak.figures()}


def plan(variant: str, config: PaliGemmaConfig, precision: str, prepack: bool) -> dict:
    """The bytes that a checkpoint in bfloat16, its bundle, and exporting it would take."""
    placed = weights.plan(config, precision, FUSED)
    return {
        "variant": variant, "checkpoint_bytes": 2 * sum(math.prod(each.shape) for each in parameters(config)),
        "bundle_bytes": weights.size(placed) * (2 if prepack else 1), "export_bytes": weights.memory(placed),
    }  # fmt: skip


def table(results: dict) -> str:
    """What `measure` found, as text."""
    row, prepacked = results["rows"][0], ", prepacked" if results["prepack"] else ""
    layers = f" with {plural(row['layers'], 'layer')} a tower" if row["layers"] else ""
    export, run = row["export"], row["run"]
    return "\n".join([
        f"{row['variant']}{layers}: {results['precision']} bundle{prepacked} of {row['bytes'] / 1e9:.1f} GB, "
        f"{plural(results['threads'], 'thread')}, medians of {plural(results['rounds'], 'answer')}",
        f"{'':<12}{'GiB at most':>12}{'private':>10}",
        f"{'export':<12}{export['peak_gib']:>12.2f}{export['private_gib']:>10.2f}   {export['seconds']:.1f} s",
        f"{'run':<12}{run['peak_gib']:>12.2f}{run['private_gib']:>10.2f}   load {run['load_s']:.1f} s, first token "
        f"{run['first_token_s']:.3f} s, a further one {run['ms_per_token']:.1f} ms",
        "private: what no file backs; the rest are mapped pages of files, which the system can drop and read again",
    ])  # fmt: skip


def plan_table(results: dict) -> str:
    """What `plan` found, as text."""
    lines = [f"{'GB':<20}{'checkpoint':>12}{results['precision'] + ' bundle':>16}{'memory to export':>20}"]
    for row in results["rows"]:
        sizes = [row[name] / 1e9 for name in ("checkpoint_bytes", "bundle_bytes", "export_bytes")]
        lines.append(f"{row['variant']:<20}{sizes[0]:>12.1f}{sizes[1]:>16.1f}{sizes[2]:>20.2f}")
    return "\n".join([*lines, "beside the mapped checkpoint; a run takes about the bundle, and a cache"])
