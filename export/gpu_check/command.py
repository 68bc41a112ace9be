"""The command: runs the stages, each in a process of its own, and prints what they found, at the end as JSON."""

import argparse
import faulthandler
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from numpy_ref import cli, files
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError

from ..session import CUDA, choose_provider
from . import models
from .stage import AGAIN, DIFFERS, FAILED, LABEL, NOT_HERE, Report, Settings, status_of, work

PROG = "python -m export.gpu_check"
#: The most valuable first, in case time runs out.
STAGES = {
    "environment": "export.gpu_check.environment",
    "placement": "export.gpu_check.placement",
    "numbers": "export.gpu_check.correctness",
    "capture": "export.gpu_check.capture",
    "speed": "export.gpu_check.speed",
    "peer": "export.gpu_check.peer",
    "kernels": "export.gpu_check.kernels",
    "compiled": "export.gpu_check.compiled",
}
LARGE = ("speed", "kernels")  # which need the large bundles
TIME = 480  # seconds for everything


def check(settings: Settings, stages: Sequence[str] | None = None, seconds: float = TIME) -> dict:
    """Every stage's answer, {stage: {status, seconds, parts}}; their lines are printed as they come."""
    stages, deadline = list(stages or STAGES), time.monotonic() + seconds
    settings.folder.mkdir(parents=True, exist_ok=True)
    makes = any(stage in LARGE for stage in stages)
    maker = start("--make", settings) if makes else None  # while the first stages run
    try:
        return {name: run_stage(name, settings, deadline) for name in stages}
    finally:
        if maker:
            stop(maker)


def run_stage(name: str, settings: Settings, deadline: float) -> dict:
    """One stage, in as many processes as it takes."""
    started, printed, restarts = time.monotonic(), set(), 0
    try:
        module = importlib.import_module(STAGES[name])
        parts = module.parts(settings)
    except Exception as error:
        print(f"\n{name}: {FAILED}: {error}", flush=True)
        return {"status": FAILED, "error": str(error), "seconds": 0.0, "parts": {}}
    print(f"\n{name}", flush=True)
    end = min(started + module.LIMIT, deadline)
    with tempfile.TemporaryDirectory() as scratch, bar(name, len(parts)) as progress:
        report = Report(Path(scratch) / "report.json")

        def print_news():
            for part, found in report.parts.items():
                if "status" in found and part not in printed:
                    printed.add(part)
                    for line in text(module, part, found):
                        progress.write(line, file=sys.stdout)
                    sys.stdout.flush()
                    progress.update()

        while len(printed) < len(parts):
            restarts += 1
            if time.monotonic() >= end or restarts > 2 * len(parts) + 2:
                for part in parts:
                    if part not in printed:
                        report.end(part, FAILED, "no time was left")
                print_news()
                break
            report = run_process(name, settings, report.file, end, module.PART_LIMIT, updater(report, print_news))
            print_news()
    answered = {part: report.parts[part] for part in parts if part in report.parts}
    status = status_of(answered.values())
    seconds = round(time.monotonic() - started, 1)
    print(f"{name}: {status}, {seconds} s", flush=True)
    return {"status": status, "seconds": seconds, "parts": answered}


def updater(report: Report, print_news: Callable[[], None]) -> Callable[[], Report]:
    """A function that brings a report up to date from its file, and tells what is new."""

    def update():
        found = Report(report.file)
        report.parts, report.running, report.since = found.parts, found.running, found.since
        print_news()
        return report

    return update


def run_process(
    name: str, settings: Settings, file: Path, end: float, part_limit: float, update: Callable[[], Report]
) -> Report:
    """One process of a stage; what it was at when it died, or was stopped, has failed."""
    process, reason = start("--work", settings, STAGES[name], file), None
    last = Tail(process)
    while process.poll() is None:
        time.sleep(0.1)
        report, now = update(), time.monotonic()
        over = report.running and time.time() - report.since > part_limit
        if over or now > end:
            reason = f"stopped after {time.time() - report.since:.0f} s" if report.running else "stopped"
            stop(process)
    code, output = process.wait(), last.text()
    report = update()
    if code in (0, AGAIN) and not report.running:
        return report
    reason = reason or f"the process ended with {signal_name(code)}"
    part = report.running or next((p for p in importlib.import_module(STAGES[name]).parts(settings)
                                   if "status" not in report.parts.get(p, {})), None)  # fmt: skip
    if part:
        report.end(part, FAILED, f"{reason}: {output}" if output else reason)
    return report


class Tail:
    """Passes on what a process writes, to standard error, and keeps the end of it."""

    def __init__(self, process: subprocess.Popen):
        assert process.stdout is not None
        self.pipe, self.kept = process.stdout, b""
        self.thread = threading.Thread(target=self._pass, daemon=True)
        self.thread.start()

    def _pass(self):
        for line in self.pipe:
            sys.stderr.write(line.decode(errors="replace"))
            self.kept = (self.kept + line)[-20000:]

    def text(self) -> str:
        """The last lines; to be asked for once, when the process has ended."""
        self.thread.join(5)
        if not self.thread.is_alive():  # nobody else holds the other end
            self.pipe.close()
        return " | ".join(last_lines(self.kept.decode(errors="replace").splitlines()))[:800]


def last_lines(lines: list[str]) -> list[str]:
    """Of what a process wrote before its end: the place that it was at, if that is there, else the last lines."""
    lines = [line.strip() for line in lines if line.strip()]
    places = [i for i, line in enumerate(lines) if "most recent call first" in line]
    if not places:
        return lines[-4:]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return [*fatal, *lines[places[-1] + 1 : places[-1] + 5]]


def start(what: str, settings: Settings, *arguments: object) -> subprocess.Popen:
    """A process of this command that does one thing; what it prints goes where its errors go."""
    command = [sys.executable, "-X", "faulthandler", "-m", "export.gpu_check", what, settings.as_json()]
    out, err = (subprocess.DEVNULL, None) if what == "--make" else (subprocess.PIPE, subprocess.STDOUT)
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
    )


def stop(process: subprocess.Popen) -> None:
    """End a process and those that it started; where it was is written to its standard error first."""
    if process.poll() is None and hasattr(signal, "SIGUSR1"):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):
        process.kill()
    process.wait()


def signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def text(module: ModuleType, part: str, found: dict) -> list[str]:
    """The lines of a part that was answered, or why it was not."""
    if found["status"] == NOT_HERE:
        return [f"{part:<{LABEL}}{NOT_HERE}: {found['error']}"]
    if found["status"] == FAILED:
        return [f"{part:<{LABEL}}{FAILED}: {found['error']}", *_so_far(module, part, found)]
    try:
        lines = module.lines(part, found)
    except Exception as error:
        lines = [f"{part:<{LABEL}}{found['status']}, but cannot be shown ({error!r})"]
    return [*lines, *([f"{'':<{LABEL}}DIFFERS"] if found["status"] == DIFFERS else [])]


def _so_far(module, part, found) -> list[str]:
    """What a part that failed had found until then, as far as that can be shown."""
    try:
        return module.lines(part, found)
    except Exception:
        return []


def plain(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: those become text."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def bar(name: str, total: int) -> tqdm:
    return tqdm(total=total, desc=name, unit="part", leave=False, disable=None, delay=2)


def provider_of(wanted: str) -> str:
    return "cuda" if choose_provider(wanted) == CUDA else "cpu"


def settings_of(arguments: Namespace, folder: Path) -> Settings:
    config, provider = VARIANTS[arguments.variant], provider_of(arguments.provider)
    if arguments.layers:
        config = models.few_layers(config, arguments.layers)
    few = {} if provider == "cuda" else {"steps": 4, "generations": 20}
    return Settings(folder, provider, arguments.variant, config, **few)


def child(arguments: Namespace) -> int | None:
    """What a process that this command started is for; None in the command itself."""
    if arguments.make:
        models.make_full(Settings.from_json(arguments.make))
        return 0
    if arguments.work:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1)  # `stop` asks where it is
        settings, (module, file) = Settings.from_json(arguments.work[0]), arguments.work[1:]
        if settings.on_device:
            choose_provider("cuda")  # loads CUDA's libraries, for those who ask the device itself
        return work(importlib.import_module(module), settings, Report(Path(file)))
    return None


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Check this project on a GPU, and time it.")
    options.add_argument("--variant", choices=VARIANTS, default="paligemma-3b-224", help="timed (paligemma-3b-224)")
    options.add_argument("--layers", type=cli.whole(1), help="keep only so many layers of each of its towers")
    options.add_argument("--provider", choices=("auto", "cuda", "cpu"), default="auto", help="where to run (auto)")
    options.add_argument("--stages", metavar="A,B", help=f"some of {', '.join(STAGES)} (all)")
    options.add_argument("--output", type=Path, metavar="OUT.json", help="write the JSON object here too")
    options.add_argument("--folder", type=Path, metavar="DIR", help="keep bundles here, for the next run (none are)")
    options.add_argument("--time", type=cli.whole(1), default=TIME, help=f"seconds for all stages ({TIME})")
    options.add_argument("--make", help=argparse.SUPPRESS)
    options.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if (code := child(arguments)) is not None:
        return code
    stages = arguments.stages.split(",") if arguments.stages else list(STAGES)
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise PaliGemmaError(f"--stages {','.join(unknown)}: there are {', '.join(STAGES)}")
    if arguments.output:
        files.absent(arguments.output, "file")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="paligemma-gpu-check-"))
    started = time.monotonic()
    try:
        settings = settings_of(arguments, folder)
        answers = check(settings, stages, arguments.time)
    finally:
        if not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)
    about = {"variant": arguments.variant, "layers": arguments.layers, "provider": settings.provider}
    result = json.dumps({**about, "seconds": round(time.monotonic() - started, 1), "stages": plain(answers)})
    print(f"\n{result}", flush=True)
    if arguments.output:
        with files.new_file(arguments.output) as file:
            file.write_text(result + "\n")
    return int(any(answer["status"] in (FAILED, DIFFERS) for answer in answers.values()))
