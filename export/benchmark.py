"""python -m export.benchmark: this project's bundle against Hugging Face transformers, on this machine in one run.

Writes a random checkpoint of the shape asked for, exports it, and lets two processes answer about a picture in turns,
one with the bundle, one with transformers (bfloat16, SDPA) on the same weights. Prints medians and ratios: the time
from the picture to the first token, the time of a further token, load time, and the peak of memory (proportional set
size: a page that is mapped twice counts once; Linux only). What decoding reads, over the time it takes, is put beside
the read bandwidth that plain dot products over large arrays reach.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from numpy_ref import cli
from numpy_ref.checkpoint import SHIPPED, load_config
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError

from .measure import entry, module, watch
from .weights import PRECISIONS

PROG = "python -m export.benchmark"
PROMPT_TOKENS = 7  # bos, a prefix of five, the newline
SIDES = ("ours", "transformers")


def measure(folder: Path, variant: str, layers, precision: str, rounds: int, tokens: int, threads: int) -> dict:
    """Everything, into one dict."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    with tqdm(total=2, desc="checkpoint and bundle", leave=False, disable=None) as bar:
        options = ["--layers", layers] if layers else []
        watch(module("numpy_ref.synthetic", variant, checkpoint, "--dtype", "bfloat16", *options))
        bar.update()
        export_s, _, _ = watch(entry("export_main", checkpoint, "--output", bundle, "--precision", precision))
        bar.update()
    compared = compare({"ours": bundle, "transformers": checkpoint}, rounds, tokens, threads)
    compared["ours"]["export_s"] = round(export_s, 1)
    return {"variant": variant, "layers": layers, "precision": precision, "threads": threads, **compared}


def compare(folders: dict[str, Path], rounds: int, tokens: int, threads: int) -> dict:
    """Both sides in turns, since the machine's speed drifts: figures of each, and ratios."""
    bandwidth, runs = read_bandwidth(threads), {side: [] for side in SIDES}
    with ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(side, folders[side], tokens, threads)) for side in SIDES}
        for _ in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
            for side, worker in workers.items():
                runs[side].append(worker.ask())
    results = {side: {**workers[side].told, **medians(runs[side])} for side in SIDES}
    read = decode_bytes(folders["ours"])
    share = read / 1e6 / results["ours"]["ms_per_token"] / bandwidth
    return {
        "rounds": rounds, **results, "ratios": ratios(results, runs), "bandwidth_gb_per_s": round(bandwidth, 1),
        "decode_bytes": read, "bandwidth_share": round(share, 3),
    }  # fmt: skip


def medians(runs) -> dict:
    """The median of each figure."""
    return {name: round(float(np.median([run[name] for run in runs])), 4) for name in runs[0]}


def ratios(results, runs) -> dict:
    """How many times faster than transformers, as medians over rounds; memory as our peak over theirs."""

    def faster(name):
        pairs = zip(runs["ours"], runs["transformers"], strict=True)
        return round(float(np.median([theirs[name] / ours[name] for ours, theirs in pairs])), 3)

    memory = results["ours"]["peak_gib"] / results["transformers"]["peak_gib"]
    return {"decode": faster("ms_per_token"), "prefill": faster("first_token_s"), "memory": round(memory, 3)}


def read_bandwidth(threads: int) -> float:
    """GB/s of `threads` dot products side by side over arrays that no cache holds; the best of several."""
    arrays = [np.ones(2**27, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(lambda array: np.dot(array, array), arrays))
            best = max(best, sum(array.nbytes for array in arrays) / 1e9 / (time.perf_counter() - started))
    return best


def decode_bytes(bundle: Path) -> int:
    """Bytes of weights that one decode step reads: what decode.onnx refers to in the weights file, each place once."""
    import onnx

    model = onnx.load(bundle / "decode.onnx", load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        entry = {pair.key: pair.value for pair in tensor.external_data}
        if entry:
            places[entry["offset"]] = int(entry["length"])
    return sum(places.values())


# --- the two processes -------------------------------------------------------------------------------------


class Worker:
    """A process that holds one of the two models: `told` is what loading cost, `ask` one timed answer."""

    def __init__(self, side: str, folder: Path, tokens: int, threads: int):
        command = module("export.benchmark", "--worker", side, folder, "--tokens", tokens, "--threads", threads)
        self.side, self.errors = side, tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        peak = _Peak(self.process.pid)
        try:
            self.told = self._hear()  # loading, and an answer to warm up
        except PaliGemmaError:
            self.close()
            raise
        finally:
            most = peak.stop()
        self.told["peak_gib"] = round(most / 2**30, 3)

    def ask(self) -> dict:
        """Seconds to the first token, and milliseconds of each further one."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._hear()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _hear(self):
        line = self.process.stdout.readline()
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


def work(side: str, folder: Path, tokens: int, threads: int) -> None:
    """What a worker does: load, warm up, then time an answer a line of standard input."""
    started = time.perf_counter()
    answer = {"ours": _ours, "transformers": _transformers}[side](folder, threads)
    load_s = time.perf_counter() - started
    answer(2)
    print(json.dumps({"load_s": round(load_s, 2)}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        answer(1)
        first = time.perf_counter() - started
        started = time.perf_counter()
        answer(1 + tokens)
        more = max(time.perf_counter() - started - first, 1e-6)  # noise exceeds what a tiny model takes
        print(json.dumps({"first_token_s": first, "ms_per_token": 1000 * more / tokens}), flush=True)


def _ours(folder, threads):
    """`answer(count)`, by the bundle: from the picture file to `count` tokens."""
    from numpy_ref.generate import generate
    from numpy_ref.image import open_image, preprocess
    from numpy_ref.tokenizer import known_ids

    from . import bundle
    from .session import open_session

    engine = open_session(bundle.load_but_weights(folder), "cpu", threads)
    config, known = engine.config, known_ids(engine.config)
    known[config.eos] = False  # every answer has its full length

    def answer(count):
        picture = preprocess(open_image(SHIPPED / "example.png"), config.vision.image_size)
        for _ in generate(engine, picture, [_prompt(config)], known, count):
            pass

    return answer


def _transformers(folder, threads):
    """`answer(count)`, by transformers: bfloat16, SDPA, its own cache."""
    # Named, not imported: nothing else of this package needs them.
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    from numpy_ref.image import open_image, preprocess

    torch.set_num_threads(threads)
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    config = load_config(folder)
    ids = torch.tensor([_prompt(config)])

    @torch.inference_mode()
    def answer(count):
        picture = preprocess(open_image(SHIPPED / "example.png"), config.vision.image_size)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids),
            pixel_values=torch.from_numpy(picture).to(torch.bfloat16), do_sample=False,
            min_new_tokens=count, max_new_tokens=count,
        )  # fmt: skip

    return answer


def _prompt(config):
    return [config.image_token] * config.vision.patches + [config.bos, *range(10, 10 + PROMPT_TOKENS - 1)]


# --- the command -------------------------------------------------------------------------------------------


def table(results) -> str:
    """The figures as text."""
    rows = {
        "picture to first token, s": "first_token_s", "a further token, ms": "ms_per_token", "load, s": "load_s",
        "peak memory, GiB": "peak_gib",
    }  # fmt: skip
    faster = {"first_token_s": "prefill", "ms_per_token": "decode", "peak_gib": "memory"}
    layers = f" with {results['layers']} layers a tower" if results["layers"] else ""
    shape = f"{results['variant']}{layers}, {results['threads']} threads"
    lines = [f"{shape}: {results['precision']} bundle against transformers in bfloat16"]
    lines.append(f"{'':<28}{'ours':>10}{'transformers':>14}{'ratio':>8}")
    for label, name in rows.items():
        ratio = f"{results['ratios'][faster[name]]:>8.2f}" if name in faster else ""
        lines.append(f"{label:<28}{results['ours'][name]:>10.3f}{results['transformers'][name]:>14.3f}{ratio}")
    ours, theirs = (1000 / results[side]["ms_per_token"] for side in SIDES)
    lines.append(f"{'tokens/s':<28}{ours:>10.2f}{theirs:>14.2f}")
    lines.append(f"{'export, s':<28}{results['ours']['export_s']:>10.1f}")
    read, bandwidth = results["decode_bytes"] / 1e9, results["bandwidth_gb_per_s"]
    lines.append(f"a token reads {read:.2f} GB of weights: {results['bandwidth_share']:.0%} of {bandwidth} GB/s")
    return "\n".join(lines)


def main(argv=None):
    options = argparse.ArgumentParser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("--variant", choices=VARIANTS, default="paligemma-3b-224", help="the shape (paligemma-3b-224)")
    options.add_argument("--layers", type=cli.whole(1), help="keep only so many layers of each tower")
    options.add_argument("--precision", choices=PRECISIONS, default="float32", help="of our bundle (float32)")
    options.add_argument("--rounds", type=cli.whole(1), default=5, help="timed answers of each side (5)")
    options.add_argument("--tokens", type=cli.whole(1), default=16, help="further tokens a timed answer (16)")
    options.add_argument("--threads", type=cli.whole(1), default=None, help="of each side (all cores)")
    options.add_argument(
        "--folder", type=Path, help="where to work: a new folder, removed at the end (a temporary one)"
    )
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--worker", nargs=2, metavar=("SIDE", "DIR"), help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    threads = arguments.threads or os.cpu_count()
    if arguments.worker:
        side, folder = arguments.worker
        work(side, Path(folder), arguments.tokens, threads)
        return 0
    if arguments.precision == "bfloat16":
        raise PaliGemmaError("a bfloat16 bundle needs CUDA; this benchmark is about the CPU")
    if arguments.folder and arguments.folder.exists():
        raise PaliGemmaError(f"{arguments.folder}: exists already; name a new folder")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="paligemma-benchmark-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results = measure(
            folder,
            arguments.variant,
            arguments.layers,
            arguments.precision,
            arguments.rounds,
            arguments.tokens,
            threads,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(results) if arguments.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
