"""The processes that answer: each holds one model, and is asked for one timed answer at a time."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from numpy_ref.checkpoint import SHIPPED, load_config
from numpy_ref.engine import Engine, Features
from numpy_ref.errors import PaliGemmaError, one_line

from ..measure import module
from . import bounds, objects
from .peers import PEERS, TRANSFORMERS
from .peers.prompt import Answer, prompt

OURS, ALONE = "ours", "ours, decoder alone"
ANSWER = 32  # tokens of the answer whose work outside of the graphs is timed
NEAR, FAR, PAIRS = 270, 1000, 25  # cached positions of an early and a late step; how often they take turns
# What ours may be asked besides an answer:
LATE, RATE, OUTSIDE, SECOND, OBJECTS = "late", "rate", "outside", "second", "objects"


class Worker:
    """A process that holds a model: `figures` is what loading cost, `ask` a timed answer or something else."""

    def __init__(self, side: str, folder: Path, tokens: int, threads: int, against: str = "bfloat16"):
        command = module(
            "export.benchmark", "--worker", side, folder, "--tokens", tokens, "--threads", threads, "--against", against
        )
        self.side, self.errors = side, tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.questions, self.answers = self.process.stdin, self.process.stdout
        try:
            with Peak(self.process.pid) as peak:
                self.figures = self._receive()  # loading, and an answer to warm up
        except PaliGemmaError:
            self.close()
            raise
        self.figures |= peak.figures()

    def ask(self, what: str = "answer") -> dict:
        """Seconds to the first token, and milliseconds of each further one; or what else it is asked for."""
        with suppress(BrokenPipeError):  # it has stopped, and has said why
            self.questions.write(f"{what}\n")
            self.questions.flush()
        return self._receive()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.questions.close()
        self.process.wait()
        self.answers.close()
        self.errors.close()

    def _receive(self):
        line = self.answers.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            raise PaliGemmaError(f"the process of {self.side} stopped: {last_line(self.errors.read(), code)}")
        return json.loads(line)


def last_line(output: bytes, code: int) -> str:
    """What a process said last, which is why it stopped; or else its exit code, below zero where a signal ended it."""
    lines = output.decode(errors="replace").strip().splitlines() or [f"exit code {code}"]
    return one_line(lines[-1].strip())


class Peak:
    """The most memory that a process has while this is open: proportional (`proportional`), and of it private."""

    def __init__(self, pid: int):
        self.pid, self.most, self.private, self.stopped = pid, 0, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stopped.set()
        self.thread.join()
        self._look()

    def figures(self) -> dict[str, float]:
        """The two in GiB."""
        return {"peak_gib": round(self.most / 2**30, 3), "private_gib": round(self.private / 2**30, 3)}

    def _watch(self):
        while not self.stopped.wait(0.1):
            self._look()

    def _look(self):
        found = memory(self.pid)
        self.most, self.private = max(self.most, found["Pss"]), max(self.private, found["Anonymous"])


def memory(pid: int) -> dict[str, int]:
    """Bytes of memory of a process: "Pss" with shared pages divided among those who share them, and "Anonymous".

    The latter no file backs, so that neither another process can share it nor the system drop it and read it again.
    Zeros where that is not told.
    """
    found = {"Pss": 0, "Anonymous": 0}
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return found
    for name, _, rest in (line.partition(":") for line in lines):
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    return found


# --- inside of one -----------------------------------------------------------------------------------------


def work(side: str, folder: Path, tokens: int, threads: int, against: str) -> None:
    """What a worker does: load, warm up, then time an answer a line of standard input."""
    started, known = time.perf_counter(), {}
    if side == OURS:
        answer, known = _ours(folder, threads, tokens)
    elif side == ALONE:
        answer = _ours_alone(folder, threads)
    else:
        more = {"dtype": against} if side == TRANSFORMERS else {}
        answer = PEERS[side].open(folder, threads, **more)
    load_s = time.perf_counter() - started
    answer(2, lambda: None)
    print(json.dumps({"load_s": round(load_s, 2)}), flush=True)
    for line in sys.stdin:
        reply = known.get(line.strip(), partial(timed, answer, tokens))
        print(json.dumps(reply()), flush=True)


def timed(answer: Answer, tokens: int) -> dict:
    """Seconds to the first token of an answer, and milliseconds of each of the further ones."""
    times = [time.perf_counter()]
    answer(1 + tokens, lambda: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    until_first, more = np.diff(times).tolist()
    return {"first_token_s": until_first, "ms_per_token": 1000 * more / tokens}


def _ours(folder: Path, threads: int, tokens: int) -> tuple[Answer, dict[str, Callable[[], dict]]]:
    """`answer`, by the bundle, from the picture file to the tokens; and what else it can be asked."""
    from numpy_ref.generate import Timings
    from numpy_ref.image import open_image
    from numpy_ref.tokenizer import Tokenizer

    engine, generate = _engine(folder, threads)
    tokenizer = Tokenizer.load(SHIPPED, load_config(SHIPPED))  # the synthetic checkpoint has none

    def answer(count, first, timings=None):
        picture = engine.preprocess(open_image(SHIPPED / "example.png"))
        tokenizer.prompt("answer en how many shapes are there?")
        return generate(picture, count, first, timings)

    def outside():
        """The share of an answer's time that is not spent in prefill and decode."""
        started, timings = time.perf_counter(), Timings()
        answer(ANSWER, lambda: None, timings)
        whole = time.perf_counter() - started
        return {"outside_share": round(1 - (timings.prefill_s + timings.decode_s) / whole, 4)}

    def second():
        """Seconds to the first token of an answer about a picture, and to that of a second one about the same."""
        times = [time.perf_counter()]
        features = engine.encode(engine.preprocess(open_image(SHIPPED / "example.png")))
        for _ in range(2):
            generate(features, 1, lambda: times.append(time.perf_counter()))
        return {"first_s": times[1] - times[0], "second_s": times[2] - times[1]}

    @cache  # made when it is first asked for: loading is timed
    def multiplier():
        prompted = len(prompt(engine.config))
        return bounds.multiplier(engine.config, engine.bundle.description.precision, prompted, threads)

    return answer, {
        LATE: partial(late_steps, engine), RATE: lambda: {"operations_per_s": multiplier()()}, OUTSIDE: outside,
        SECOND: second, OBJECTS: partial(objects.measure, engine, tokens),  # as many rounds
    }  # fmt: skip


def late_steps(engine: Engine) -> dict:
    """How many times longer a decode step takes where FAR positions are cached than where NEAR are."""
    late = min(FAR, engine.max_length - 1)
    early = min(NEAR, late - 1)
    step = decoding(engine, late + 1)
    times = np.array([[step(early), step(late)] for _ in range(PAIRS)])
    ratio = float(np.median(times[:, 1] / times[:, 0]))
    return {"early_position": early, "late_position": late, "late_step": round(ratio, 3)}


def decoding(engine: Engine, capacity: int) -> Callable[[int], float]:
    """A function that decodes a token at a position below a capacity and gives the milliseconds that it took."""
    config, ids = engine.config, np.array([prompt(engine.config)])
    picture = np.zeros((1, 3, config.vision.image_size, config.vision.image_size), np.float32)
    prompted = ids.shape[1]
    _, filled = engine.prefill(picture, ids, np.array([prompted], np.int32), max(capacity, prompted))

    def step(position):
        started = time.perf_counter()
        engine.decode(ids[:, -1:], np.array([position], np.int32), filled)
        return 1000 * (time.perf_counter() - started)

    return step


def _ours_alone(folder: Path, threads: int) -> Answer:
    """`answer` by the bundle's decoder, which is given the features of a picture."""
    engine, generate = _engine(folder, threads, in_halves=True)
    config = engine.config
    features = np.random.default_rng(0).standard_normal((config.vision.patches, config.text.width), np.float32)
    return partial(generate, [Features(features, features)])


def _engine(folder: Path, threads: int, in_halves: bool = False) -> tuple[Any, Callable[..., list[int]]]:
    """A bundle's session, and a function that lets it give so many tokens about a picture, and calls at the first."""
    from numpy_ref.generate import generate
    from numpy_ref.tokenizer import known_ids

    from .. import bundle
    from ..session import open_session

    engine = open_session(bundle.load_but_weights(folder), "cpu", threads, in_halves=in_halves)
    known = known_ids(engine.config)
    known[[engine.config.eos, *engine.config.ends]] = False  # every answer has its full length

    def run(picture, count, first, timings=None):
        steps = generate(engine, picture, [prompt(engine.config)], known, count, timings=timings)
        tokens = [int(next(steps)[0])]
        first()
        return [*tokens, *(int(step[0]) for step in steps)]

    return engine, run
