"""python -m tests.faults [--kills N] [--json]: kill what writes at random moments, and look at what is left.

Export, conversion (both ways) and training run as the commands that a user types, each in a process that SIGKILL ends
before, while or after it writes. Whatever the moment: the output is whole or absent, and the next run succeeds and
removes what the dead one left. Training is not begun again but gone on with: its state never goes back.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from numpy_ref import checkpoint
from numpy_ref.cli.options import Parser, whole

from .models import CONFIGS, random_params

BEFORE, DURING, AFTER = PHASES = ("before", "during", "after")
#: In which phase each kill is tried, over and over. Where it fell is then seen from what is left.
TURNS = (BEFORE, DURING, DURING, AFTER)
PATIENCE = 300.0  # seconds that any run may take
ROOT = Path(__file__).parent.parent


class FaultError(AssertionError):
    """Something that was promised does not hold."""


@dataclass(frozen=True)
class Job:
    """A command that makes `output`.

    `arguments` are Python's, the output's path is put behind them. `compared` are the files that have the same bytes
    each time, all of them if none is named. `resumes`: what is begun is gone on with.
    """

    name: str
    arguments: tuple
    output: str
    compared: tuple[str, ...] = ()
    resumes: bool = False

    def command(self, folder: Path) -> list[str]:
        """Python's arguments for an output in `folder`."""
        return [*map(str, self.arguments), str(folder / self.output)]

    def start(self, folder: Path) -> subprocess.Popen:
        """The command in a process of its own, with its output in `folder`."""
        command = [sys.executable, *self.command(folder)]
        # Errors go to a file: a pipe would be kept open by the loaders of a trainer that was killed.
        with errors_of(folder).open("wb") as errors:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT, env=environment())

    def state(self, folder: Path) -> Path:
        """Where training keeps what it has done."""
        return folder / f"{self.output}.training" / "state.safetensors"

    def phase(self, folder: Path, since: float) -> str:
        """How far a run that was begun at `since` (seconds of file times) has come, from what lies in `folder`."""
        if (folder / self.output).exists():
            return AFTER
        if left_overs(folder):
            return DURING
        return AFTER if modified(self.state(folder)) > since else BEFORE

    def digest(self, output: Path) -> dict[str, str]:
        """The SHA-256 of each compared file."""
        files = [output] if output.is_file() else sorted(file for file in output.rglob("*") if file.is_file())
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if not self.compared or file.name in self.compared
        }


def jobs(source: Path, data: Path, steps=60) -> dict[str, Job]:
    """What is killed. `source` is a checkpoint directory with a .npz of it beside, `data` lines to train on."""
    convert = ("-m", "numpy_ref.checkpoint", "convert")
    export = ("-c", "from export.cli import export_main; export_main()")
    train = ("-m", "torch_impl.train", "--data", data, "--steps", steps, "--batch-size", 2, "--learning-rate", 1e-3,
             "--float32", "--save-every", 0, "--output")  # fmt: skip
    return {
        job.name: job
        for job in (
            Job("export", (*export, source, "--output"), "bundle"),
            Job("convert to npz", (*convert, source), "converted.npz"),
            Job("convert from npz", (*convert, source.with_suffix(".npz")), "converted"),
            Job("train", train, "trained", ("model.safetensors", "config.json"), resumes=True),
        )
    }


def sources(folder: Path, vocab=40_000, width=420) -> tuple[Path, Path]:
    """A random checkpoint, large enough that writing it takes a while, as a directory and as a .npz; and own data."""
    config = CONFIGS["paligemma1"]
    text = replace(config.text, vocab=vocab, width=width, query_scalar=float(config.text.head_dim), rope_base=10000.0)
    config = replace(
        config, vision=replace(config.vision, image_size=21), text=text, image_token=vocab, max_length=8192
    )
    params = random_params(config, dtype=np.float32)
    checkpoint.save(folder / "source", config, params)
    checkpoint.save_npz(folder / "source.npz", config, params)
    return folder / "source", own_data(folder / "data")


def own_data(folder: Path) -> Path:
    """Twelve pictures, red or blue, and the question which."""
    folder.mkdir()
    lines = []
    for i in range(12):
        color = ("red", "blue")[i % 2]
        Image.new("RGB", (50, 40), color).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prefix": "answer en what color?", "suffix": color}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def environment() -> dict[str, str]:
    """One thread a process: threads that wait for each other make a busy machine slow."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


# --- looking -----------------------------------------------------------------------------------------------


def left_overs(folder: Path) -> list[Path]:
    """What is unfinished in a folder: hidden siblings of the output, and states of training half written."""
    states = "*.training"  # the second pattern is of the library that writes them
    return [*folder.glob(".*.part"), *folder.glob(f"{states}/*.part"), *folder.glob(f"{states}/.tmp*")]


def modified(file: Path) -> float:
    """When a file was last written, in seconds; 0 if it is not there."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def steps_of(state: Path) -> int:
    """The step that a state of training has come to, once all its tensors were read; 0 without one."""
    if not state.exists():
        return 0
    with safe_open(state, framework="np") as stored:
        for name in stored.keys():  # noqa: SIM118
            stored.get_tensor(name)
        return json.loads(stored.metadata()["progress"])["step"]


def expect(holds, message: str) -> None:
    """Raise FaultError with what is told, unless it holds."""
    if not holds:
        raise FaultError(message)


def errors_of(folder: Path) -> Path:
    """Where the last process whose output lies in `folder` says its errors."""
    return folder.with_name(f"{folder.name}.errors")


def finish(process, folder: Path) -> str:
    """Wait for a process to end; what it said of errors."""
    process.wait(PATIENCE)
    return errors_of(folder).read_text()


# --- killing -----------------------------------------------------------------------------------------------


@dataclass
class Undisturbed:
    """A run that was left alone: what it made, and after how many seconds it first wrote, had written, and ended.

    `interval` is the longest that its state was not written anew.
    """

    digest: dict[str, str]
    during: float
    after: float
    end: float
    interval: float

    def span(self, turn: str) -> float:
        """How long a phase lasts, in seconds."""
        return {BEFORE: self.during, DURING: self.after - self.during, AFTER: self.end - self.after}[turn]


def undisturbed(job: Job, folder: Path) -> Undisturbed:
    """Run a job to its end, look when it does what, and remove what it made."""
    started, seen, saved = time.time(), {}, set()
    process = job.start(folder)
    while process.poll() is None:
        seen.setdefault(job.phase(folder, started), time.time() - started)
        saved.add(modified(job.state(folder)) or started)
        time.sleep(0.001)
    end, errors = time.time() - started, finish(process, folder)
    expect(process.returncode == 0, f"{job.name} alone: {errors}")
    digest = job.digest(folder / job.output)
    remove(folder / job.output)
    during = seen.get(DURING, end)
    interval = max((b - a for a, b in itertools.pairwise(sorted(saved)[1:])), default=0.0)
    return Undisturbed(digest, during, max(during, seen.get(AFTER, end)), end, interval)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def kill(job: Job, folder: Path, turn: str, alone: Undisturbed, moments: random.Random) -> tuple[str | None, float]:
    """Start a job, wait until it has come to a phase and a random while more, and kill it.

    The phase that it was in, None if it had ended; and the age of its state in seconds, where it had kept one.
    """
    started = time.time()
    process = job.start(folder)
    while process.poll() is None and PHASES.index(job.phase(folder, started)) < PHASES.index(turn):
        time.sleep(0.0005)
    time.sleep(moments.uniform(0, 0.8 * alone.span(turn)))
    process.send_signal(signal.SIGKILL)
    killed = time.time()
    errors = finish(process, folder)
    expect(process.returncode in (0, -signal.SIGKILL), f"{job.name}: {errors}")
    kept = modified(job.state(folder))
    return (job.phase(folder, started) if process.returncode else None), (killed - kept if kept > started else 0.0)


def kills(job: Job, folder: Path, count: int, seed=0, progress=lambda: None) -> list[dict]:
    """Kill a job `count` times and look each time; one row a phase, of how often what was the case.

    Raises FaultError if the output is neither whole nor absent, the next run fails or leaves something lying, or
    training goes back.
    """
    folder.mkdir()
    alone, moments, rows = undisturbed(job, folder), random.Random(seed), {phase: Counter() for phase in PHASES}
    done = furthest = 0
    for turn in itertools.cycle(TURNS):
        if done == count:
            break
        phase, lost = kill(job, folder, turn, alone, moments)
        output = folder / job.output
        if phase:
            done += 1
            progress()
            row = rows[phase]
            row["kills"] += 1
            row["left-overs"] += bool(left_overs(folder))
            row["whole" if output.exists() else "absent"] += 1
        if phase and job.resumes and not output.exists():
            row["lost_s"] = max(row["lost_s"], round(lost, 2))
            step = steps_of(job.state(folder))
            expect(step >= furthest, f"{job.name}: went back from step {furthest} to {step}")
            row["next run succeeded"] += 1  # counted now; the next kill, or the end, raises if it does not
            furthest = step
            continue
        check(job, folder, alone)
        shutil.rmtree(job.state(folder).parent, ignore_errors=True)  # killed between naming the output and this
        if phase:
            finish_again(job, folder, alone)
            row["next run succeeded"] += 1
        furthest = 0
    if furthest:
        finish_again(job, folder, alone)
    return [
        {"job": job.name, "phase": phase, **row, "interval_s": round(alone.interval, 2)} for phase, row in rows.items()
    ]


def check(job, folder, alone) -> None:
    """An output that is there is whole. It is taken away."""
    output = folder / job.output
    if output.exists():
        expect(job.digest(output) == alone.digest, f"{job.name}: the output is there, but not whole")
        remove(output)


def finish_again(job, folder, alone) -> None:
    """The next run succeeds, with the same result, and leaves nothing but it in the folder."""
    process = job.start(folder)
    errors = finish(process, folder)
    expect(process.returncode == 0, f"{job.name}: the run after a kill failed: {errors}")
    names = {path.name for path in folder.iterdir()}
    expect(names == {job.output}, f"{job.name}: beside the output there is {sorted(names - {job.output})}")
    check(job, folder, alone)


COLUMNS = ("job", "phase", "kills", "absent", "whole", "left-overs", "next run succeeded")


def table(rows) -> str:
    """The rows as text."""
    lines = [f"{'job':<18}{'killed':<8}" + "".join(f"{name:>{len(name) + 2}}" for name in COLUMNS[2:])]
    for row in rows:
        numbers = "".join(f"{row.get(name, 0):>{len(name) + 2}}" for name in COLUMNS[2:])
        lines.append(f"{row['job']:<18}{row['phase']:<8}{numbers}")
    for name in dict.fromkeys(row["job"] for row in rows if row["interval_s"]):
        mine = [row for row in rows if row["job"] == name]
        lost, interval = max(row.get("lost_s", 0.0) for row in mine), mine[0]["interval_s"]
        lines.append(
            f"{name}: a kill cost at most {lost} s of training; left alone, it kept its state each {interval} s"
        )
    return "\n".join(lines)


def main(argv=None):
    options = Parser(prog="python -m tests.faults", description="Kill what writes, and look.")
    options.add_argument("--kills", type=whole(1), default=50, metavar="N", help="of each job (50)")
    options.add_argument("--jobs", nargs="+", metavar="JOB", help="only these (all)")
    options.add_argument("--seed", type=whole(0), default=0, help="of the moments (0)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        found = jobs(*sources(Path(place)))
        wanted = arguments.jobs or list(found)
        for name in wanted:
            with tqdm(total=arguments.kills, desc=name, leave=False, disable=None) as bar:
                rows += kills(
                    found[name], Path(place) / found[name].output, arguments.kills, arguments.seed, bar.update
                )
    print(json.dumps({"kills": arguments.kills, "rows": rows}) if arguments.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
