"""python -m export.benchmark serve [BUNDLE]: requests a second of serve-onnx, by how many clients ask at a time.

Starts the service, and lets so many clients ask it about a picture of their own each time, streamed, one request
behind the other. The numbers of clients take turns, since the machine's speed drifts; one client is the same requests
one after another. With --beside-transformers, so does `transformers serve` on the same weights. Prints requests a
second, and the times to the first token and between tokens, in milliseconds.
"""

import asyncio
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from numpy_ref import cli
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli.options import on_cores
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError, plural

from ..bundle.weights import PRECISIONS
from ..measure import entry, synthetic, watch
from . import peer_service

PROG = "python -m export.benchmark serve"
SERVE = "from export.service.command import serve_main; serve_main()"


@dataclass
class Run:
    """What clients saw: seconds that they took together, and those of single requests."""

    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def add(self, other: "Run") -> None:
        """Take in another run of as many clients."""
        self.seconds += other.seconds
        self.requests += other.requests
        self.tokens += other.tokens
        self.first += other.first
        self.gaps += other.gaps
        self.texts += other.texts

    def figures(self) -> dict:
        """Requests and tokens a second, and percentiles in milliseconds."""
        times = {
            f"{name}_{label}": round(1000 * float(np.percentile(values or [np.nan], share)), 2)
            for name, values in (("first_ms", self.first), ("gap_ms", self.gaps))
            for label, share in (("median", 50), ("p95", 95), ("p99", 99))
        }
        rates = {"requests_per_s": self.requests / self.seconds, "tokens_per_s": self.tokens / self.seconds}
        return {**{name: round(value, 3) for name, value in rates.items()}, **times}


def measure(
    services: dict[str, tuple[int, str | None]],
    counts: Sequence[int],
    requests: int,
    rounds: int,
    bodies: Iterator[dict],
) -> dict[str, dict[int, Run]]:
    """Name of a service -> number of clients -> what they saw in all rounds. The first round of each warms up.

    A service is its port, and what it calls the model, if a request must name it.
    """
    runs = {name: {count: Run() for count in counts} for name in services}
    for i in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for count in counts:
            each = max(1, requests // count) if i else 1
            for name, (port, model) in services.items():
                asked = [
                    [json.dumps({**next(bodies), "model": model}).encode() for _ in range(each)] for _ in range(count)
                ]
                found = asyncio.run(clients(port, asked))
                if i:
                    runs[name][count].add(found)
    return runs


def bodies_of(prompt: str, tokens: int) -> Iterator[dict]:
    """Without end, requests about pictures that differ in a pixel: none is in the service's cache."""
    pixels = np.array(Image.open(SHIPPED / "example.png").convert("RGB"))
    for i in range(pixels.shape[0] * pixels.shape[1]):
        changed, file = pixels.copy(), io.BytesIO()
        changed[divmod(i, pixels.shape[1])] ^= 128
        Image.fromarray(changed).save(file, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": parts}]
        yield {"messages": messages, "stream": True, "max_tokens": tokens}


async def clients(port: int, asked: Sequence[Sequence[bytes]]) -> Run:
    """Clients at a time, each with the bodies of its requests."""
    run, started = Run(requests=sum(map(len, asked))), time.perf_counter()
    await asyncio.gather(*(client(port, each, run) for each in asked))
    run.seconds = time.perf_counter() - started
    return run


async def client(port: int, bodies: Sequence[bytes], run: Run) -> None:
    """Ask one thing after another over one connection, and note when tokens come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for body in bodies:
            began = time.perf_counter()
            fields = "Content-Type: application/json\r\nContent-Length"
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{fields}: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            times, text = [], ""
            if b" 200 " not in (status := await reader.readline()):
                await reader.readuntil(b"\r\n\r\n")
                reason = await reader.read(500)
                raise PaliGemmaError(f"a service failed: {status.decode().strip()} {reason.decode(errors='replace')}")
            while (line := await reader.readline()) != b"0\r\n":  # the length of the last chunk
                if not line or b'"error"' in line:
                    raise PaliGemmaError(f"a service failed: {line.decode(errors='replace').strip() or 'it is gone'}")
                if line.startswith(b"data: {") and (piece := text_of(line)):
                    times.append(time.perf_counter())
                    text += piece
            await reader.readline()
            run.tokens += len(times)
            run.texts.append(text)
            run.first += [times[0] - began] if times else []
            run.gaps += np.diff(times).tolist()
    finally:
        writer.close()


def text_of(line: bytes) -> str:
    """The piece of an answer that a server-sent event brings."""
    choices = json.loads(line[len(b"data: ") :])["choices"]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@contextmanager
def service(bundle: Path | None, options: Sequence[object]) -> Iterator[tuple[subprocess.Popen, int]]:
    """A service in a process of its own, and its port."""
    command = [sys.executable, "-c", SERVE, *([str(bundle)] if bundle else []), "--port", "0", "--no-log"]
    process = subprocess.Popen(
        [*command, *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise PaliGemmaError(f"the service does not start: {process.stderr.read().strip()}")
        yield process, int(line.split("/v1")[0].rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def written(folder: Path, variant: str, layers: int | None, precision: str, prepack: bool) -> tuple[Path, Path]:
    """A random checkpoint of a released shape, with the shipped model's tokenizer, and its bundle."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    synthetic(checkpoint, variant, layers, "--dtype", "bfloat16", with_tokenizer=True)
    options = ["--precision", precision, *(["--prepack"] if prepack else [])]
    watch(entry("export_main", checkpoint, "--output", bundle, *options))
    return checkpoint, bundle


def alike(runs: dict[str, dict[int, Run]]) -> float:
    """The share of answers that all services gave alike, for one client: it asks all of the same pictures, nearly."""
    one, *others = (Counter(by_count[min(by_count)].texts) for by_count in runs.values())
    same = one
    for other in others:
        same = same & other
    return same.total() / one.total()


def table(figures: dict[str, dict[int, dict]]) -> str:
    """A line for each service and number of clients; the ratio is to one client of the same service."""
    lines = [
        f"{'':>25}{'requests':>10}{'':>7}{'first token, ms':>26}{'between tokens, ms':>27}",
        f"{'':<16}{'clients':>9}{'a second':>10}{'ratio':>7}" + 2 * f"{'median':>10}{'p95':>8}{'p99':>8}",
    ]
    for service_name, by_count in figures.items():
        one = by_count[min(by_count)]["requests_per_s"]
        for count, found in by_count.items():
            times = "".join(
                f"{found[f'{name}_median']:>10.1f}{found[f'{name}_p95']:>8.1f}{found[f'{name}_p99']:>8.1f}"
                for name in ("first_ms", "gap_ms")
            )
            rate = found["requests_per_s"]
            lines.append(f"{service_name:<16}{count:>9}{rate:>10.3g}{rate / one:>7.2f}{times}")
    return "\n".join(lines)


def main(argv=None):
    options = cli.Parser(prog=PROG, description=__doc__.splitlines()[0])
    options.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="left out: the model that ships")
    options.add_argument("--variant", choices=VARIANTS, help="a random model of this shape, in place of BUNDLE")
    options.add_argument("--layers", type=cli.whole(1), help="with --variant: so many layers of each tower")
    options.add_argument("--precision", choices=PRECISIONS, default="int4", help="with --variant (int4)")
    options.add_argument("--prepack", action="store_true", help="with --variant: export with --prepack")
    options.add_argument("--clients", type=cli.whole(1), nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    options.add_argument("--requests", type=cli.whole(1), default=32, help="of all clients together, a round (32)")
    options.add_argument("--rounds", type=cli.whole(1), default=3, help="for each number of clients (3)")
    options.add_argument("--prompt", default="caption en", help="(caption en)")
    options.add_argument("--tokens", type=cli.whole(1), default=32, help="longest answer (32)")
    options.add_argument("--slots", type=cli.whole(1), default=16, help="of the service (16)")
    options.add_argument("--gap", type=cli.real(0), default=0.25, help="of the service (0.25)")
    options.add_argument("--threads", type=on_cores(0), default=0, help="of the service, 0 for all (0)")
    options.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (auto)")
    options.add_argument("--beside-transformers", action="store_true", help="measure `transformers serve` in turns")
    options.add_argument("--folder", type=Path, help="with --variant: a new folder to work in (a temporary one)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    if arguments.beside_transformers:
        if arguments.bundle:
            options.error("--beside-transformers: give --variant, or no BUNDLE: a bundle is no checkpoint")
        peer_service.check_installed()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint, bundle, dtype = SHIPPED, arguments.bundle, "float32"
        if arguments.variant:
            with_prepack = arguments.precision, arguments.prepack
            checkpoint, bundle = written(folder, arguments.variant, arguments.layers, *with_prepack)
            dtype = "bfloat16"
        passed_on = ("slots", "gap", "threads", "provider")
        settings = [part for name in passed_on for part in (f"--{name}", getattr(arguments, name))]
        _, port = stack.enter_context(service(bundle, [*settings, "--timeout", 3600]))
        services: dict[str, tuple[int, str | None]] = {"serve-onnx": (port, None)}
        if arguments.beside_transformers:
            peer_service.prepare(checkpoint, folder / "transformers")
            serving = peer_service.serving(folder / "transformers", dtype, arguments.threads)
            services["transformers"] = stack.enter_context(serving), str(folder / "transformers")
        elif arguments.variant:
            shutil.rmtree(checkpoint)
        bodies = bodies_of(arguments.prompt, arguments.tokens)
        runs = measure(services, sorted(arguments.clients), arguments.requests, arguments.rounds, bodies)
    same = None if arguments.variant or not arguments.beside_transformers else alike(runs)
    figures = {name: {count: run.figures() for count, run in found.items()} for name, found in runs.items()}
    if arguments.json:
        print(json.dumps(figures if same is None else {**figures, "same_answers": same}))
    else:
        threads = arguments.threads or os.cpu_count() or 1
        print(f"{plural(threads, 'thread')}, {plural(arguments.slots, 'slot')}, {plural(arguments.rounds, 'round')}")
        print(table(figures))
        if same is not None:
            print(f"{same:.1%} of the answers are the same")
    return 0
