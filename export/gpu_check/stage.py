"""What a stage is: parts that are run one after another in a process of their own, and what they found.

A stage is a module with

    LIMIT           seconds for the whole stage
    PART_LIMIT      seconds for one of its parts
    parts(settings) the names of its parts, in the order in which they are run
    run(part, settings, found)   what a part found goes into `found`; NotHere where the machine lacks something
    lines(part, found)           the same as text

and, where every part needs a fresh process, FRESH = True.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy_ref.checkpoint.hugging_face import from_hf, to_hf
from numpy_ref.config import PaliGemmaConfig

from ..session.cuda import MissingError

OK, DIFFERS, FAILED, NOT_HERE = "ok", "differs", "failed", "not here"
LABEL = 32  # how wide the names of parts are printed
AGAIN = 75  # the exit code of a process that has parts left, which want a new one


class NotHere(Exception):  # noqa: N818 - an answer, not an error
    """This machine cannot answer, for the reason given."""


@dataclass(frozen=True)
class Settings:
    """What every stage is told. `threads` share the work of making the large bundles."""

    folder: Path
    provider: str  # "cuda" or "cpu"
    variant: str
    config: PaliGemmaConfig  # of the random model
    steps: int = 100  # decode steps of a timed answer
    generations: int = 200  # over which memory has to stay flat

    @property
    def on_device(self) -> bool:
        return self.provider == "cuda"

    def as_json(self) -> str:
        """For the processes of the stages."""
        return json.dumps({**vars(self), "folder": str(self.folder), "config": to_hf(self.config)})

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        fields = json.loads(text)
        return cls(**{**fields, "folder": Path(fields["folder"]), "config": from_hf(fields["config"])})


class Found(dict):
    """What a part has found so far; each `add` is kept in a file, so that a process that dies leaves it."""

    def __init__(self, keep: Callable[[], None]):
        super().__init__()
        self.keep = keep

    def add(self, **figures: Any) -> None:
        self.update(figures)
        self.keep()


class Report:
    """The parts of a stage by name, each with its status and what it found, and which one is running."""

    def __init__(self, file: Path):
        self.file, self.parts, self.running, self.since = file, {}, None, 0.0
        if file.exists():
            fields = json.loads(file.read_text())
            self.parts, self.running, self.since = fields["parts"], fields["running"], fields["since"]

    def begin(self, part: str) -> Found:
        found = Found(self.keep)
        self.parts[part], self.running, self.since = found, part, time.time()
        self.keep()
        return found

    def end(self, part: str, status: str, error: str | None = None) -> None:
        found = self.parts.setdefault(part, {})
        found["status"] = status
        if error:
            found["error"] = error
        self.running = None
        self.keep()

    def keep(self) -> None:
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps({"parts": self.parts, "running": self.running, "since": self.since}))
        os.replace(beside, self.file)


def status_of(parts: Iterable[dict]) -> str:
    """The status of a stage, from those of its parts: the worst of those that were answered."""
    statuses = {part["status"] for part in parts}
    return next((status for status in (FAILED, DIFFERS, OK) if status in statuses), NOT_HERE)


def work(module: ModuleType, settings: Settings, report: Report) -> int:
    """Run the parts that have no answer yet; the exit code of the process.

    After a part that raised, those that are left get a new process: the device may be of no more use to this one.
    """
    waiting = [part for part in module.parts(settings) if part not in report.parts]
    for i, part in enumerate(waiting):
        found = report.begin(part)
        try:
            module.run(part, settings, found)
            report.end(part, DIFFERS if found.get("differs") else OK)
            over = getattr(module, "FRESH", False)
        except (NotHere, MissingError) as reason:
            report.end(part, NOT_HERE, str(reason))
            over = False
        except Exception as error:
            found["traceback"] = traceback.format_exc()[-4000:]
            report.end(part, FAILED, one_line(error))
            over = True
        if over and i + 1 < len(waiting):
            return AGAIN
    return 0


def one_line(error: BaseException) -> str:
    """An exception, and where in this project or its libraries it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{place}"
