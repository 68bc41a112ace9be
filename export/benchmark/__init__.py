"""python -m export.benchmark: this project's bundle against Hugging Face transformers, on this machine in one run.

Writes a random checkpoint of the shape asked for, exports it, and lets two processes answer about a picture in turns,
one with the bundle, one with transformers on the same weights (SDPA, except in the decoder of PaliGemma 2, for which
transformers has eager attention alone). Where llama-cpp-python and gguf, or onnxruntime-genai, are installed, they run
the decoder alone in four bits, and so does a process with the bundle, which is given the picture's features. Prints
medians and ratios: the time from the picture to the first token, the time of a further token, load time, and the peak
of memory (proportional set size: a page that is mapped twice counts once; Linux only). What decoding reads, over the
time it takes, is put beside the read bandwidth that plain dot products over large arrays reach, in turns with it; and a
second question about a picture, which is the decoder's alone, beside a first one (`--questions`: nothing but that).
`--objects` times nothing but answers with boxes, with guesses and without
(objects.py).
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref import cli
from numpy_ref.checkpoint import SHIPPED, load_config
from numpy_ref.cli.options import on_cores
from numpy_ref.config import VARIANTS
from numpy_ref.engine import Engine, Features
from numpy_ref.errors import PaliGemmaError, plural

from ..bundle.weights import PRECISIONS
from ..measure import entry, module, synthetic, watch
from . import objects, peers

PROG = "python -m export.benchmark"
OURS, PEER, ALONE = "ours", "transformers", "ours alone"
ANSWER = 32  # tokens of the answer whose work outside of the graphs is timed
FAR, PAIRS = 1000, 25  # cached positions of a late step; how often one thing is timed in turns with another
STEP, BESIDE, SECOND, OBJECTS = "step", "beside", "second", "objects"  # what a worker may be asked besides an answer


def measure(folder: Path, arguments: Namespace, threads: int) -> dict:
    """Everything, into one dict."""
    checkpoint, bundle, export_s = written(folder, arguments)
    folders = {OURS: bundle, PEER: checkpoint}
    for side, decoder in peers.DECODERS.items():
        if decoder.takes(load_config(checkpoint).text):
            folders[side] = folder / side
            decoder.make(folders[side], checkpoint)
            folders[ALONE] = bundle
    with Worker(OURS, bundle, arguments.tokens, threads) as worker:  # as export left it
        first_load_s = worker.figures["load_s"]
    compared = compare(folders, arguments.rounds, arguments.tokens, threads, arguments.against)
    compared[OURS] |= {"export_s": round(export_s, 1), "first_load_s": first_load_s}
    return {**settings(arguments, threads), "against": arguments.against, **compared}


def questions(folder: Path, arguments: Namespace, threads: int) -> dict:
    """A second question about a picture against a first one, by our bundle alone."""
    _, bundle, _ = written(folder, arguments)
    with Worker(OURS, bundle, arguments.tokens, threads) as worker:
        worker.ask(SECOND)  # opens the graphs
        return {**settings(arguments, threads), "rounds": arguments.rounds, **second(worker, arguments.rounds)}


def answers_with_boxes(folder: Path, arguments: Namespace, threads: int) -> dict:
    """Answers with boxes, token by token and with guesses, by our bundle alone."""
    _, bundle, _ = written(folder, arguments)
    with Worker(OURS, bundle, arguments.rounds, threads) as worker:
        return {**settings(arguments, threads), "rounds": arguments.rounds, OBJECTS: worker.ask(OBJECTS)}


def objects_table(results: dict) -> str:
    """What `answers_with_boxes` found, as text."""
    layers = f" with {plural(results['layers'], 'layer')} a tower" if results["layers"] else ""
    what = f"{results['variant']}{layers}, {results['precision']}{', prepacked' if results['prepack'] else ''}"
    turns = f"{plural(results['threads'], 'thread')}, medians of {plural(results['rounds'], 'round')}"
    return f"{what}, {turns}\n{objects.table(results[OBJECTS])}"


def second(worker: "Worker", rounds: int) -> dict:
    """Medians of the seconds from the picture to the first token, and from the second prompt; and of their ratios."""
    runs = [worker.ask(SECOND) for _ in tqdm(range(rounds), desc="questions", leave=False, disable=None)]
    ratio = float(np.median([run["second_s"] / run["first_s"] for run in runs]))
    return {**medians(runs), "second_over_first": round(ratio, 3)}


def settings(arguments: Namespace, threads: int) -> dict:
    """What was asked for."""
    return {key: getattr(arguments, key) for key in ("variant", "layers", "precision", "prepack")} | {
        "threads": threads
    }


def written(folder: Path, arguments: Namespace) -> tuple[Path, Path, float]:
    """A random checkpoint and its bundle in a folder, and the seconds of the export."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    with tqdm(total=2, desc="checkpoint and bundle", leave=False, disable=None) as bar:
        synthetic(checkpoint, arguments.variant, arguments.layers, "--dtype", "bfloat16")
        bar.update()
        options = ["--precision", arguments.precision, *(["--prepack"] if arguments.prepack else [])]
        export_s, _, _ = watch(entry("export_main", checkpoint, "--output", bundle, *options))
        bar.update()
    return checkpoint, bundle, export_s


def compare(folders: dict[str, Path], rounds: int, tokens: int, threads: int, against: str = "bfloat16") -> dict:
    """All sides in turns, since the machine's speed drifts: figures of each, and ratios."""
    runs, read = {side: [] for side in folders}, weight_bytes(folders[OURS], "decode")
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(side, folder, tokens, threads, against))
            for side, folder in folders.items()
        }
        for i in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
            for side in rotated(list(workers), i):
                runs[side].append(workers[side].ask())
        bandwidth, share = against_bandwidth(workers[OURS], read, threads)
        workers[OURS].figures |= workers[OURS].ask(BESIDE)
        workers[OURS].ask(SECOND)  # opens the graphs, in place of those that the rounds were run with
        workers[OURS].figures |= second(workers[OURS], rounds)
    results = {side: {**workers[side].figures, **medians(runs[side])} for side in folders}
    results[OURS]["beyond_weights_gib"] = round(
        results[OURS]["peak_gib"] - weight_bytes(folders[OURS], "prefill", "decode") / 2**30, 3
    )
    memory = round(results[OURS]["peak_gib"] / results[PEER]["peak_gib"], 3)
    return {
        "rounds": rounds, **results, "ratios": {**faster(runs[PEER], runs[OURS]), "memory": memory},
        **{f"{side} ratios": faster(runs[side], runs[ALONE]) for side in peers.DECODERS if side in runs},
        "bandwidth_gb_per_s": bandwidth, "decode_bytes": read, "bandwidth_share": share,
    }  # fmt: skip


def rotated(sides: list, i: int) -> list:
    """The order of a round: another begins each time, since what ran before may leave the machine faster or slower."""
    i %= len(sides)
    return sides[i:] + sides[:i]


def medians(runs: list[dict]) -> dict:
    """The median of each figure."""
    return {name: round(float(np.median([run[name] for run in runs])), 4) for name in runs[0]}


def faster(theirs: list[dict], ours: list[dict]) -> dict:
    """How many times faster ours are, as medians over rounds."""

    def ratio(name):
        return round(float(np.median([a[name] / b[name] for a, b in zip(theirs, ours, strict=True)])), 3)

    return {"decode": ratio("ms_per_token"), "prefill": ratio("first_token_s")}


def against_bandwidth(worker: "Worker", read: int, threads: int) -> tuple[float, float]:
    """The read bandwidth in GB/s, and which share of it a decode step that reads so many bytes reaches: in turns."""
    arrays, widths, shares = [np.ones(2**26, np.float32) for _ in range(threads)], [], []
    for _ in range(PAIRS):
        step = worker.ask(STEP)
        time.sleep(0.1)  # its threads spin on for a while
        widths.append(read_bandwidth(arrays))
        shares.append(read / 1e6 / step["ms"] / widths[-1])
    return round(float(np.median(widths)), 1), round(float(np.median(shares)), 3)


def read_bandwidth(arrays: Sequence[np.ndarray]) -> float:
    """GB/s of dot products side by side over arrays that no cache holds; the best of several."""
    best = 0.0
    with ThreadPoolExecutor(len(arrays)) as pool:
        for _ in range(4):
            started = time.perf_counter()
            list(pool.map(lambda array: np.dot(array, array), arrays))
            best = max(best, sum(array.nbytes for array in arrays) / 1e9 / (time.perf_counter() - started))
    return best


def weight_bytes(bundle: Path, *names: str) -> int:
    """Bytes that the graphs of these names refer to in the weights file, each place once."""
    import onnx

    places = {}
    for name in names:
        for tensor in onnx.load(bundle / f"{name}.onnx", load_external_data=False).graph.initializer:
            entry = {pair.key: pair.value for pair in tensor.external_data}
            if entry:
                places[entry["offset"]] = int(entry["length"])
    return sum(places.values())


# --- the processes -----------------------------------------------------------------------------------------


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
        peak = _Peak(self.process.pid)
        try:
            self.figures = self._receive()  # loading, and an answer to warm up
        except PaliGemmaError:
            self.close()
            raise
        finally:
            most = peak.stop()
        self.figures["peak_gib"] = round(most / 2**30, 3)

    def ask(self, what: str = "answer") -> dict:
        """Seconds to the first token, and milliseconds of each further one; or what else it is asked for."""
        self.questions.write(f"{what}\n")
        self.questions.flush()
        return self._receive()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        self.questions.close()
        self.process.wait()
        self.answers.close()
        self.errors.close()

    def _receive(self):
        line = self.answers.readline()
        if not line:
            self.errors.seek(0)
            reason = self.errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise PaliGemmaError(f"the process of {self.side} stopped: {reason[-1]}")
        return json.loads(line)


class _Peak:
    """The largest proportional set size of a process, looked at in a thread until stopped."""

    def __init__(self, pid: int):
        self.pid, self.most, self.stopped = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self):
        while not self.stopped.wait(0.1):
            self.most = max(self.most, proportional(self.pid))

    def stop(self) -> int:
        self.stopped.set()
        self.thread.join()
        return max(self.most, proportional(self.pid))


def proportional(pid: int) -> int:
    """Bytes of memory of a process, shared pages divided among those who share them; 0 where that is not told."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def work(side: str, folder: Path, tokens: int, threads: int, against: str) -> None:
    """What a worker does: load, warm up, then time an answer a line of standard input."""
    started = time.perf_counter()
    decoders = {name: decoder.open for name, decoder in peers.DECODERS.items()}
    openers: dict[str, Callable] = {
        OURS: _ours,
        ALONE: _ours_alone,
        PEER: partial(peers.transformers, against),
        **decoders,
    }
    answer, known = openers[side](folder, threads)
    if OBJECTS in known:
        known[OBJECTS] = partial(known[OBJECTS], tokens)  # as many rounds
    load_s = time.perf_counter() - started
    answer(2, lambda: None)
    print(json.dumps({"load_s": round(load_s, 2)}), flush=True)
    for line in sys.stdin:
        reply = known.get(line.strip(), partial(timed, answer, tokens))
        print(json.dumps(reply()), flush=True)


def timed(answer: peers.Answer, tokens: int) -> dict:
    """Seconds to the first token of an answer, and milliseconds of each of the further ones."""
    times = [time.perf_counter()]
    answer(1 + tokens, lambda: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    until_first, more = np.diff(times).tolist()
    return {"first_token_s": until_first, "ms_per_token": 1000 * more / tokens}


def _ours(folder, threads):
    """`answer`, by the bundle, from the picture file to the tokens; and what else it can be asked."""
    from numpy_ref.generate import Timings
    from numpy_ref.image import open_image
    from numpy_ref.tokenizer import Tokenizer

    engine, generate = _engine(folder, threads)
    tokenizer = Tokenizer.load(SHIPPED, load_config(SHIPPED))  # the synthetic checkpoint has none

    def answer(count, first, timings=None):
        picture = engine.preprocess(open_image(SHIPPED / "example.png"))
        tokenizer.prompt("answer en how many shapes are there?")
        generate(picture, count, first, timings)

    def beside():
        """The share of an answer's time that is not spent in prefill and decode; how much longer a late step takes."""
        started, timings = time.perf_counter(), Timings()
        answer(ANSWER, lambda: None, timings)
        whole = time.perf_counter() - started
        outside = round(1 - (timings.prefill_s + timings.decode_s) / whole, 4)
        return {"outside_share": outside, **late_steps(engine)}

    def second():
        """Seconds to the first token of an answer about a picture, and to that of a second one about the same."""
        times = [time.perf_counter()]
        features = engine.encode(engine.preprocess(open_image(SHIPPED / "example.png")))
        for _ in range(2):
            generate(features, 1, lambda: times.append(time.perf_counter()))
        return {"first_s": times[1] - times[0], "second_s": times[2] - times[1]}

    return answer, {STEP: steps(engine), BESIDE: beside, SECOND: second, OBJECTS: partial(objects.measure, engine)}


def decoding(engine: Engine, capacity: int) -> Callable[[int], float]:
    """A function that decodes a token at a position and gives the milliseconds that it took."""
    config, ids = engine.config, np.array([peers.prompt(engine.config)])
    picture = np.zeros((1, 3, config.vision.image_size, config.vision.image_size), np.float32)
    _, filled = engine.prefill(picture, ids, np.array([ids.shape[1]], np.int32), capacity)

    def step(position):
        started = time.perf_counter()
        engine.decode(ids[:, -1:], np.array([position], np.int32), filled)
        return 1000 * (time.perf_counter() - started)

    return step


def steps(engine: Engine) -> Callable[[], dict]:
    """A function that decodes a few tokens right behind the prompt and gives the median of their milliseconds."""
    prompted = len(peers.prompt(engine.config))
    step = cache(lambda: decoding(engine, prompted + 1))  # made when it is first asked for: loading is timed
    return lambda: {"ms": float(np.median([step()(prompted) for _ in range(5)]))}


def late_steps(engine: Engine) -> dict:
    """How many times longer a decode step takes where FAR positions are cached, than right behind the prompt."""
    early = len(peers.prompt(engine.config))
    late = min(max(FAR, early + 1), engine.max_length - 1)
    step = decoding(engine, late + 1)
    times = np.array([[step(early), step(late)] for _ in range(PAIRS)])
    return {"late_position": late, "late_step": round(float(np.median(times[:, 1] / times[:, 0])), 3)}


def _ours_alone(folder, threads):
    """`answer` by the bundle's decoder, which is given the features of a picture."""
    engine, generate = _engine(folder, threads, in_halves=True)
    config = engine.config
    features = np.random.default_rng(0).standard_normal((config.vision.patches, config.text.width), np.float32)
    return partial(generate, [Features(features, features)]), {}


def _engine(folder, threads, in_halves=False):
    """A bundle's session, and a function that lets it give so many tokens about a picture, and calls at the first."""
    from numpy_ref.generate import generate
    from numpy_ref.tokenizer import known_ids

    from .. import bundle
    from ..session import open_session

    engine = open_session(bundle.load_but_weights(folder), "cpu", threads, in_halves=in_halves)
    known = known_ids(engine.config)
    known[[engine.config.eos, *engine.config.ends]] = False  # every answer has its full length

    def run(picture, count, first, timings=None):
        steps = generate(engine, picture, [peers.prompt(engine.config)], known, count, timings=timings)
        next(steps)
        first()
        for _ in steps:
            pass

    return engine, run


# --- the command -------------------------------------------------------------------------------------------


def table(results: dict) -> str:
    """The figures as text."""
    rows = {
        "picture to first token, s": "first_token_s", "a further token, ms": "ms_per_token", "load, s": "load_s",
        "peak memory, GiB": "peak_gib",
    }  # fmt: skip
    ratio = {"first_token_s": "prefill", "ms_per_token": "decode", "peak_gib": "memory"}
    layers = f" with {plural(results['layers'], 'layer')} a tower" if results["layers"] else ""
    shape = f"{results['variant']}{layers}, {plural(results['threads'], 'thread')}"
    prepacked = ", prepacked" if results["prepack"] else ""
    lines = [f"{shape}: {results['precision']} bundle{prepacked} against transformers in {results['against']}"]
    decoders = [side for side in peers.DECODERS if side in results]
    others = "".join(f"{side:>12}{'ratio':>8}" for side in decoders)
    lines.append(f"{'':<28}{OURS:>10}{PEER:>14}{'ratio':>8}{others}")
    for label, name in rows.items():
        line = f"{label:<28}{results[OURS][name]:>10.3f}{results[PEER][name]:>14.3f}"
        line += f"{results['ratios'][ratio[name]]:>8.2f}" if name in ratio else f"{'':>8}"
        for side in decoders:
            found = results[f"{side} ratios"].get(ratio.get(name))
            line += f"{results[side][name]:>12.3f}" + (f"{found:>8.2f}" if found else f"{'':>8}")
        lines.append(line.rstrip())
    rates = [1000 / results[side]["ms_per_token"] for side in (OURS, PEER)]
    lines.append(f"{'tokens/s':<28}{rates[0]:>10.2f}{rates[1]:>14.2f}")
    lines.append(f"{'first load, s':<28}{results[OURS]['first_load_s']:>10.1f}")
    lines.append(f"{'export, s':<28}{results[OURS]['export_s']:>10.1f}")
    lines.append(f"{'peak beyond the weights, GiB':<28}{results[OURS]['beyond_weights_gib']:>10.3f}")
    read, bandwidth = results["decode_bytes"] / 1e9, results["bandwidth_gb_per_s"]
    lines.append(f"a token reads {read:.2f} GB of weights: {results['bandwidth_share']:.0%} of {bandwidth} GB/s")
    ours = results[OURS]
    lines.append(f"with {ours['late_position']} positions cached a token takes {ours['late_step']:.3f} times as long")
    lines.append(f"outside of the graphs: {ours['outside_share']:.1%} of an answer of {ANSWER} tokens")
    lines.append(second_line(ours))
    lines += [f"{side}: {peers.DECODERS[side].note}" for side in decoders]
    if decoders:
        alone = "{first_token_s:.3f} s to the first token, {ms_per_token:.1f} ms for a further one"
        lines.append(f"which run the decoder alone, as ours does in {alone}".format(**results[ALONE]))
    return "\n".join(lines)


def second_line(figures: dict) -> str:
    """How long a second question about a picture takes, as text."""
    return (
        "a second question about a picture takes {second_over_first:.2f} of the first: "
        "{second_s:.3f} s to its first token, {first_s:.3f} s from the picture to the first one's"
    ).format(**figures)


def main(argv=None):
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("--variant", choices=VARIANTS, default="paligemma-3b-224", help="the shape (paligemma-3b-224)")
    options.add_argument("--layers", type=cli.whole(1), help="keep only so many layers of each tower")
    options.add_argument("--precision", choices=PRECISIONS, default="float32", help="of our bundle (float32)")
    options.add_argument("--prepack", action="store_true", help="export with --prepack")
    options.add_argument(
        "--against",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="what transformers computes in (bfloat16)",
    )
    options.add_argument("--rounds", type=cli.whole(1), default=5, help="timed answers of each side (5)")
    options.add_argument("--tokens", type=cli.whole(1), default=16, help="further tokens a timed answer (16)")
    options.add_argument("--threads", type=on_cores(1), default=None, help="of each side (all cores)")
    options.add_argument(
        "--folder", type=Path, help="where to work: a new folder, removed at the end (a temporary one)"
    )
    options.add_argument(
        "--questions", action="store_true", help="only time a second question about a picture, by ours"
    )
    options.add_argument(
        "--objects", action="store_true", help="only time answers with boxes, token by token and with guesses, by ours"
    )
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--worker", nargs=2, metavar=("SIDE", "DIR"), help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    threads = arguments.threads or os.cpu_count() or 1
    if arguments.worker:
        side, folder = arguments.worker
        work(side, Path(folder), arguments.tokens, threads, arguments.against)
        return 0
    if arguments.precision.endswith("bfloat16"):
        raise PaliGemmaError("a bfloat16 bundle needs CUDA; this benchmark is about the CPU")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    chosen: Callable[[Path, argparse.Namespace, int], dict] = measure
    shown: Callable[[dict], str] = table
    if arguments.questions:
        chosen, shown = questions, second_line
    elif arguments.objects:
        chosen, shown = answers_with_boxes, objects_table
    if missing and chosen is measure:
        raise PaliGemmaError(
            f"it compares with transformers, and {' and '.join(missing)} cannot be imported; install it"
        )
    if arguments.folder and arguments.folder.exists():
        raise PaliGemmaError(f"{arguments.folder}: exists already; name a new folder")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="paligemma-benchmark-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results = chosen(folder, arguments, threads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results) if arguments.json else shown(results))
    return 0
