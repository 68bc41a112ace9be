"""Sides that answer in turns, since the machine's speed drifts, and what is found of each."""

import math
import os
import signal
import subprocess
import tempfile
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref.errors import PaliGemmaError

from .. import bundle as bundles
from ..measure import entry, module, synthetic, watch
from . import bounds
from .peers import PEERS
from .peers.prompt import prompt
from .workers import ALONE, LATE, OURS, OUTSIDE, RATE, SECOND, Worker, last_line

MAKING_S = 1800  # what a peer may take to be made from a checkpoint


@dataclass(frozen=True)
class Job:
    """What people ask of a picture: its size, and how many tokens the answer has."""

    name: str
    pixels: int
    tokens: int


JOBS = (Job("caption", 448, 16), Job("detect four objects", 448, 31), Job("read a document", 896, 128))


def measure(folder: Path, variant: str, layers: int | None, arguments: Namespace, threads: int, more: bool) -> dict:
    """Everything about one shape, into one dict; with `more` what our bundle alone is asked, too."""
    checkpoint, bundle, export_s = written(folder, variant, layers, arguments)
    folders, reasons = {OURS: bundle}, {}
    for name in tqdm(arguments.peers, desc="peers", leave=False, disable=None):
        try:
            folders[name] = made(name, folder / name, checkpoint)
        except PaliGemmaError as error:
            reasons[name] = str(error)
    if any(PEERS[name].decoder_alone for name in folders if name in PEERS):
        folders[ALONE] = bundle
    first = {"export_s": round(export_s, 1)}
    if more:
        with Worker(OURS, bundle, arguments.tokens, threads) as worker:  # as export left it
            first["first_load_s"] = worker.figures["load_s"]
    found = compare(folders, arguments.rounds, arguments.tokens, threads, arguments.against, more)
    found["sides"][OURS] |= first
    return {"variant": variant, "layers": layers, **found, "reasons": {**reasons, **found["reasons"]}}


def written(folder: Path, variant: str, layers: int | None, arguments: Namespace) -> tuple[Path, Path, float]:
    """A random checkpoint and its bundle in a folder, and the seconds of the export."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    with tqdm(total=2, desc="checkpoint and bundle", leave=False, disable=None) as bar:
        synthetic(checkpoint, variant, layers, "--dtype", "bfloat16")
        bar.update()
        export_s, _, _ = watch(entry("export_main", checkpoint, "--output", bundle, *export_options(arguments)))
        bar.update()
    return checkpoint, bundle, export_s


def export_options(arguments: Namespace) -> list[str]:
    """What export-onnx is given."""
    return ["--precision", arguments.precision, *(["--prepack"] if arguments.prepack else [])]


def made(name: str, folder: Path, checkpoint: Path) -> Path:
    """What a peer opens: a new folder, made in a process of its own, or the checkpoint. Raises PaliGemmaError."""
    peer = PEERS[name]
    if peer.absent():
        raise PaliGemmaError(peer.absent())
    if peer.make is None:
        return checkpoint
    needed, there = peer.memory * sum(file.stat().st_size for file in checkpoint.iterdir()), available()
    if needed > there:
        raise PaliGemmaError(
            f"making it takes about {needed / 2**30:.0f} GiB of memory, and {there / 2**30:.0f} are available; "
            "give --layers"
        )
    with tempfile.TemporaryFile() as errors:
        command = module("export.benchmark", "--make", name, folder, checkpoint)
        process = subprocess.Popen(command, stdout=errors, stderr=errors, start_new_session=True)
        try:
            failed = process.wait(MAKING_S)
        except subprocess.TimeoutExpired:
            raise PaliGemmaError(f"it was not made within {MAKING_S // 60} minutes") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it may have started others
                process.wait()
        if failed:
            errors.seek(0)
            raise PaliGemmaError(f"it cannot be made: {last_line(errors.read(), failed)}")
    return folder


def available() -> float:
    """Bytes of memory that programs can have; without end where that is not told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)


def compare(
    folders: dict[str, Path], rounds: int, tokens: int, threads: int, against: str = "bfloat16", more: bool = True
) -> dict:
    """All sides in turns: "sides" has the figures of each, and "reasons" why a peer has none.

    After each round the machine's rates are measured, so that a bound belongs to the figures beside it.
    """
    config, read = bundles.load_but_weights(folders[OURS]).config, bounds.reader(threads)
    todo, size = bounds.operations(config, len(prompt(config))), bounds.weight_bytes(folders[OURS], "decode")
    runs: dict[str, list[dict]] = {}
    with ExitStack() as stack:
        workers, reasons = {}, {}

        def without(side, error):
            if side in (OURS, ALONE):
                raise error
            reasons[side] = str(error)
            runs.pop(side, None)

        for side, folder in folders.items():
            try:
                workers[side] = stack.enter_context(Worker(side, folder, tokens, threads, against))
                runs[side] = []
            except PaliGemmaError as error:
                without(side, error)
        for i in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
            for side in rotated(list(runs), i):
                try:
                    runs[side].append(with_jobs(workers[side].ask(), config.vision.image_size))
                except PaliGemmaError as error:
                    without(side, error)
            rate = workers[OURS].ask(RATE)["operations_per_s"]
            runs[OURS][-1] |= beside_bounds(runs[OURS][-1], todo, rate, size, read())
        ours = workers[OURS]
        ours.figures |= ours.ask(LATE)
        if more:
            ours.figures |= ours.ask(OUTSIDE)
            ours.ask(SECOND)  # opens the graphs, in place of those that the rounds were run with
            ours.figures |= second(ours, rounds)
    sides = {side: {**workers[side].figures, **medians(found)} for side, found in runs.items()}
    for side in runs.keys() - {OURS, ALONE}:
        beside = ALONE if PEERS[side].decoder_alone else OURS
        sides[side]["ratios"] = ratios(runs[side], runs[beside])
        if beside == OURS:
            sides[side]["ratios"]["peak_gib"] = round(sides[OURS]["peak_gib"] / sides[side]["peak_gib"], 3)
    weights = bounds.weight_bytes(folders[OURS], "prefill", "decode") / 2**30
    sides[OURS]["beyond_weights_gib"] = round(sides[OURS]["peak_gib"] - weights, 3)
    return {"sides": sides, "reasons": reasons, "operations": todo, "decode_bytes": size}


def with_jobs(run: dict, pixels: int) -> dict:
    """A run, and how many answers a minute it amounts to for each of JOBS with pictures of that size."""
    jobs = [job for job in JOBS if job.pixels == pixels]
    each = {job.name: run["first_token_s"] + (job.tokens - 1) * run["ms_per_token"] / 1000 for job in jobs}
    return run | {name: 60 / seconds for name, seconds in each.items()}


def beside_bounds(run: dict, todo: int, rate: float, size: int, bandwidth: float) -> dict:
    """What a first and a further token take at least at these rates (operations/s, GB/s), and ours in multiples."""
    first_s, ms = todo / rate, size / 1e6 / bandwidth
    return {
        "tera_operations_per_s": rate / 1e12, "bandwidth_gb_per_s": bandwidth, "least_first_token_s": first_s,
        "least_ms_per_token": ms, "first_token_over_least": run["first_token_s"] / first_s,
        "token_over_least": run["ms_per_token"] / ms,
    }  # fmt: skip


def second(worker: Worker, rounds: int) -> dict:
    """Medians of the seconds from the picture to the first token, and from the second prompt; and of their ratios."""
    runs = [worker.ask(SECOND) for _ in tqdm(range(rounds), desc="questions", leave=False, disable=None)]
    ratio = float(np.median([run["second_s"] / run["first_s"] for run in runs]))
    return {**medians(runs), "second_over_first": round(ratio, 3)}


def rotated(sides: list, i: int) -> list:
    """The order of a round: another begins each time, since what ran before may leave the machine faster or slower."""
    i %= len(sides)
    return sides[i:] + sides[:i]


def medians(runs: list[dict]) -> dict:
    """The median of each figure, in five digits."""
    return {name: float(f"{np.median([run[name] for run in runs]):.5g}") for name in runs[0]}


def ratios(theirs: list[dict], ours: list[dict]) -> dict:
    """How many times faster ours are, and how many times as many answers a minute: medians over rounds."""

    def ratio(name, a, b):
        return b[name] / a[name] if name in {job.name for job in JOBS} else a[name] / b[name]

    pairs = list(zip(theirs, ours, strict=True))
    return {name: round(float(np.median([ratio(name, *pair) for pair in pairs])), 3) for name in theirs[0]}
