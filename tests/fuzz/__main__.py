"""python -m tests.fuzz [TARGET …] [--seconds N]: damaged input for every reader, each in a process that is watched.

Every input has to end in success or in PaliGemmaError with one line. What does not (another exception, a crash of a
native library, silence for longer than HANG, more memory than MEMORY) is a finding: its input is kept under .fuzz/, and
the exit code is 1.  `python -m tests.fuzz TARGET --input FILE` reads one such input again, with the traceback.
"""

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from numpy_ref.cli.options import Parser, on_cores, real, whole

from .worker import BAD

HANG = 60  # seconds for one input, on a machine that has other work too
START = 10  # times as long until the first input, for loading libraries
MEMORY = 2 * 2**30  # bytes of a process that reads, libraries and all
KEPT = Path(".fuzz")
WORKER = (sys.executable, "-m", "tests.fuzz.worker")
LIST = (
    "config", "preprocessor", "safetensors", "index", "npz", "vae", "tokenizer.model", "tokenizer.json", "bundle.json", "graph",
    "picture", "prompt", "grammar", "prompt_file", "json_lines", "request", "training", "prepacked", "options", "drawing", "sizes",
    "coco", "voc", "parquet", "shard", "service",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What became of a target."""

    target: str
    inputs: int
    seconds: float
    peak_mib: int
    finding: str | None = None  # what went wrong
    input: str | None = None  # and the file that holds with what


def watch(target: str, seconds: float, seed: int, hang=HANG, memory=MEMORY, program=WORKER) -> Result:
    """Fuzz one target in a process of its own, and stop it where it leaves its bounds."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder, started = Path(place), time.monotonic()
        command = [*program, target, place, str(seconds), str(seed)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            finding = _watch(process, folder, hang, memory)
            usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(usage[1])  # Popen does not see that it was waited for
        if not finding and code:
            finding = _reason(folder, code)
        kept = _keep(folder, target, finding) if finding else None
        return Result(
            target, _count(folder), round(time.monotonic() - started, 1), usage[2].ru_maxrss // 1024, finding, kept
        )


def _watch(process, folder, hang, memory) -> str | None:
    """Look until the process ends; kill it, and say why, if it hangs or takes too much."""
    seen, since = 0, time.monotonic()
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.05)
        if (count := _count(folder)) != seen:
            seen, since = count, time.monotonic()
        problem = None
        if (taken := _resident(process.pid)) > memory:
            problem = f"memory: {taken / 2**20:.0f} MiB"
        elif time.monotonic() - since > (hang if seen else START * hang):
            problem = f"hang: no end after {hang} s"
        if problem:
            process.kill()
            return problem
    return None


def _count(folder) -> int:
    """How many inputs a worker has begun."""
    try:
        return struct.unpack("<Q", (folder / "count").read_bytes())[0]
    except (OSError, struct.error):
        return 0


def _resident(pid) -> int:
    """Bytes of memory that a process holds; 0 where the system does not say, or it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _reason(folder, code) -> str:
    """The last line of the log; for a crash, the signal."""
    lines = (folder / "log").read_text(errors="replace").strip().splitlines() or [""]
    return lines[-1][:300] if code == BAD else f"crash: exit code {code} ({lines[-1][:200]})"


def _keep(folder, target, finding) -> str:
    """Copy the input of a finding, and what was said about it, to where it stays."""
    data = (folder / "current").read_bytes() if (folder / "current").exists() else b""
    file = KEPT / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"
    KEPT.mkdir(exist_ok=True)
    file.write_bytes(data)
    shutil.copy(folder / "log", file.with_name(f"{file.name}.log"))
    return str(file)


def table(results) -> str:
    """The results as lines."""
    rows = [f"{'target':<16}{'inputs':>10}{'seconds':>9}{'a second':>10}{'peak MiB':>10}"]
    for r in results:
        rate = r.inputs / max(r.seconds, 0.1)
        rows.append(f"{r.target:<16}{r.inputs:>10,}{r.seconds:>9}{rate:>10.0f}{r.peak_mib:>10}  {r.finding or 'ok'}")
        rows += [f"{'':<16}python -m tests.fuzz {r.target} --input {r.input}"] if r.finding else []
    found = sum(bool(r.finding) for r in results)
    return "\n".join([*rows, f"{'in all':<16}{sum(r.inputs for r in results):>10,}  findings: {found}"])


def read_again(target, file):
    """Read one input in this process."""
    from .targets import TARGETS

    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        TARGETS[target].prepare(Path(place))(Path(file).read_bytes())
    print("read")


def main(argv=None) -> int:
    options = Parser(prog="python -m tests.fuzz", description=__doc__)
    options.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(LIST)} (all)")
    options.add_argument("--seconds", type=real(0), default=120, metavar="N", help="in all (120)")
    options.add_argument("--seed", type=whole(0), default=0, metavar="S", help="of the changes (0)")
    options.add_argument(
        "--jobs", type=on_cores(1), default=os.cpu_count(), metavar="J", help="processes at once (one a core)"
    )
    options.add_argument("--json", action="store_true", help="print a JSON list")
    options.add_argument("--input", metavar="FILE", help="read this one input again")
    arguments = options.parse_args(argv)
    targets = arguments.targets or LIST
    if unknown := set(targets) - set(LIST):
        options.error(f"no such target: {', '.join(sorted(unknown))}")
    if arguments.input:
        return read_again(*targets, arguments.input)
    share = arguments.seconds * min(arguments.jobs, len(targets)) / len(targets)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: inputs are changed without looking at coverage", file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda target: watch(target, share, arguments.seed), targets))
    print(json.dumps([asdict(result) for result in results], indent=1) if arguments.json else table(results))
    return int(any(result.finding for result in results))


if __name__ == "__main__":
    sys.exit(main())
