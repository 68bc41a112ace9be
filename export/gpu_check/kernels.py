"""Stage 7: the kernels that a decode step and prefill spend their time in, and which attention was chosen."""

import ctypes
import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from numpy_ref.generate import pad_prompts

from ..benchmark.peers.prompt import prompt
from ..session import Session, cuda
from . import models
from .stage import LABEL, Found, NotHere, Settings

LIMIT, PART_LIMIT = 120, 60
FRESH = True
DEAREST, STEPS, PREFILLS = 10, 20, 3
DEBUG = "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"  # has the runtime say which attention each node takes
COLOR = re.compile(r"\x1b\[[0-9;]*m")
CHOSEN = re.compile(r"Operator=(\S+).*?SdpaKernel=(\S+)")


def parts(settings: Settings) -> list[str]:
    names = [name for name in models.full_names(settings) if name not in ("float16", "int4-float16")]
    return [f"{what} {name}" for name in names for what in ("profile", "attention")]


def run(part: str, settings: Settings, found: Found) -> None:
    what, name = part.split()
    if not settings.on_device:
        raise NotHere("runs on the CPU provider")
    if what == "attention":
        attention(settings, name, found)
        return
    torch = profiler()
    calls = calls_of(models.opened(models.full(settings, name), settings))
    for graph, repeats in (("decode", STEPS), ("prefill", PREFILLS)):
        for _ in range(3):
            calls[graph]()
        found.add(**{graph: profiled(torch, calls[graph], repeats)})


def profiler() -> ModuleType:
    """torch, with CUDA. NotHere without."""
    if importlib.util.find_spec("torch") is None:
        raise NotHere("torch, whose profiler is used, is not installed")
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise NotHere("this torch, whose profiler is used, has no CUDA device")
    torch.zeros(1, device="cuda")
    return torch


def calls_of(engine: Session) -> dict:
    """`prefill` and `decode` of one picture and prompt, as functions of nothing."""
    config = engine.config
    ids, lengths = pad_prompts([prompt(config)], config.pad)
    pixels = models.picture(engine)

    def prefill():
        return engine.prefill(pixels, ids, lengths, ids.shape[1] + 2)

    _, cache = prefill()
    return {"prefill": prefill, "decode": lambda: engine.decode(ids[:, -1:], lengths, cache)}


def profiled(torch: ModuleType, call: Callable[[], object], repeats: int) -> dict:
    """Kernels by name, of the whole process: the profiler's library sees the runtime's too."""
    kinds = torch.profiler.ProfilerActivity
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with warnings.catch_warnings(), torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
            warnings.simplefilter("ignore")  # of events that a second cycle would lose
            for _ in range(repeats):
                call()
            cuda.synchronize()
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = dearest(events, repeats)
    if not found["launches"]:
        raise NotHere("the profiler saw no kernel of this process")
    return found


def dearest(events: list[dict], repeats: int) -> dict:
    """The kernels that take longest, a call: [{name, us, launches}], and all of them in sum."""
    times, counts, first, last = Counter(), Counter(), [], []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            times[event["name"]] += event["dur"]
            counts[event["name"]] += 1
            first.append(event["ts"])
            last.append(event["ts"] + event["dur"])
    top = [
        {"name": name, "us": us / repeats, "launches": counts[name] / repeats}
        for name, us in times.most_common(DEAREST)
    ]
    span = (max(last) - min(first)) / repeats if first else 0.0
    return {
        "kernels": top, "busy_us": sum(times.values()) / repeats, "span_us": span,
        "launches": counts.total() / repeats, "all": {name: us / repeats for name, us in times.most_common(60)},
    }  # fmt: skip


def attention(settings: Settings, name: str, found: Found) -> None:
    """Which attention each node takes, as the runtime itself prints it: {graph: {operator and kernel: nodes}}."""
    os.environ[DEBUG] = "1"
    bundle = models.full(settings, name)
    with printed() as read:
        engine = models.opened(bundle, settings)
        calls = calls_of(engine)
        cuda.synchronize()
        found.add(prefill=chosen(read()))
        calls["decode"]()
        cuda.synchronize()
        found.add(decode=chosen(read()))


def chosen(text: str) -> dict[str, int]:
    """What the runtime printed, as {operator and kernel: how many nodes}."""
    return dict(Counter(map(" ".join, CHOSEN.findall(COLOR.sub("", text)))))


@contextmanager
def printed() -> Iterator[Callable[[], str]]:
    """Within it standard output goes to a file; `read()` gives what was added to it since the last time."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        seen = 0

        def read():
            nonlocal seen
            ctypes.CDLL(None).fflush(None)  # the runtime writes through C's buffers
            text = os.pread(file.fileno(), 2**24, seen)
            seen += len(text)
            return text.decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def lines(part: str, found: dict) -> list[str]:
    if part.startswith("attention"):
        lines = []
        for graph, kernels in ((name, found[name]) for name in ("prefill", "decode") if name in found):
            names = ", ".join(f"{count} {name}" for name, count in kernels.items())
            lines.append(f"{part:<{LABEL}}{graph:<8} {names or 'the runtime printed nothing'}")
        return lines
    return [line for graph in ("decode", "prefill") if graph in found for line in shown(part, graph, found[graph])]


def shown(part: str, graph: str, found: dict) -> list[str]:
    """The kernels of one graph as text."""
    busy, span = found["busy_us"], found["span_us"]
    head = (
        f"{part:<{LABEL}}{graph}: {found['launches']:.0f} launches, {busy:.0f} of {span:.0f} us on the device, profiled"
    )
    return [head, *(f"{k['us']:>12.1f} us {k['launches']:>6.0f}x  {k['name'][:84]}" for k in found["kernels"])]
