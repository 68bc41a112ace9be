"""python -m export.benchmark serve [BUNDLE]: requests a second of serve-onnx, by how many clients ask at a time.

Starts the service, and lets so many clients ask it about a picture of their own each time, streamed, one request
behind the other. The numbers of clients take turns, since the machine's speed drifts; one client is the same requests
one after another. Prints requests a second, and the times to the first token and between tokens, in milliseconds.
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

    def add(self, other: "Run") -> None:
        """Take in another run of as many clients."""
        self.seconds += other.seconds
        self.requests += other.requests
        self.tokens += other.tokens
        self.first += other.first
        self.gaps += other.gaps

    def figures(self) -> dict:
        """Requests and tokens a second, and percentiles in milliseconds."""
        times = {
            f"{name}_{label}": round(1000 * float(np.percentile(values or [np.nan], share)), 2)
            for name, values in (("first_ms", self.first), ("gap_ms", self.gaps))
            for label, share in (("median", 50), ("p95", 95), ("p99", 99))
        }
        rates = {"requests_per_s": self.requests / self.seconds, "tokens_per_s": self.tokens / self.seconds}
        return {**{name: round(value, 3) for name, value in rates.items()}, **times}


def measure(port: int, counts: Sequence[int], requests: int, rounds: int, prompt: str, tokens: int) -> dict[int, Run]:
    """Number of clients -> what they saw in all rounds. The first round of each warms up."""
    runs, bodies = {count: Run() for count in counts}, bodies_of(prompt, tokens)
    for i in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for count, run in runs.items():
            each = max(1, requests // count)
            found = asyncio.run(clients(port, count, each if i else 1, bodies))
            if i:
                run.add(found)
    return runs


def bodies_of(prompt: str, tokens: int) -> Iterator[bytes]:
    """Without end, requests about pictures that differ in a pixel: none is in the service's cache."""
    pixels = np.array(Image.open(SHIPPED / "example.png").convert("RGB"))
    for i in range(pixels.shape[0] * pixels.shape[1]):
        changed, file = pixels.copy(), io.BytesIO()
        changed[divmod(i, pixels.shape[1])] ^= 128
        Image.fromarray(changed).save(file, "PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": parts}]
        yield json.dumps({"messages": messages, "stream": True, "max_tokens": tokens}).encode()


async def clients(port: int, count: int, each: int, bodies: Iterator[bytes]) -> Run:
    """So many clients that ask `each` times."""
    run, mine = Run(requests=count * each), [[next(bodies) for _ in range(each)] for _ in range(count)]
    started = time.perf_counter()
    await asyncio.gather(*(client(port, asked, run) for asked in mine))
    run.seconds = time.perf_counter() - started
    return run


async def client(port: int, bodies: Sequence[bytes], run: Run) -> None:
    """Ask one thing after another over one connection, and note when tokens come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for body in bodies:
            began = time.perf_counter()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            times = [began]
            while (line := await reader.readline()) != b"data: [DONE]\n":
                if not line or b'"error"' in line:
                    raise PaliGemmaError(f"the service failed: {line.decode(errors='replace').strip() or 'it is gone'}")
                if line.startswith(b"data: ") and b'"content": ""' not in line and b'"delta": {}' not in line:
                    times.append(time.perf_counter())
            await reader.readuntil(b"\r\n0\r\n\r\n")
            run.tokens += len(times) - 1
            run.first.append(times[1] - began)
            run.gaps += np.diff(times[1:]).tolist()
    finally:
        writer.close()


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


def written(folder: Path, variant: str, layers: int | None, precision: str, prepack: bool) -> Path:
    """A bundle of a random checkpoint of a released shape, with the shipped model's tokenizer."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    synthetic(checkpoint, variant, layers, "--dtype", "bfloat16", with_tokenizer=True)
    options = ["--precision", precision, *(["--prepack"] if prepack else [])]
    watch(entry("export_main", checkpoint, "--output", bundle, *options))
    shutil.rmtree(checkpoint)
    return bundle


def table(figures: dict[int, dict]) -> str:
    """A line for each number of clients."""
    one = figures[min(figures)]["requests_per_s"]
    lines = [
        f"{'':>8}{'requests':>10}{'':>7}{'first token, ms':>26}{'between tokens, ms':>27}",
        f"{'clients':>8}{'a second':>10}{'ratio':>7}" + 2 * f"{'median':>10}{'p95':>8}{'p99':>8}",
    ]
    for count, found in figures.items():
        times = "".join(
            f"{found[f'{name}_median']:>10.1f}{found[f'{name}_p95']:>8.1f}{found[f'{name}_p99']:>8.1f}"
            for name in ("first_ms", "gap_ms")
        )
        lines.append(f"{count:>8}{found['requests_per_s']:>10.2f}{found['requests_per_s'] / one:>7.2f}{times}")
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
    options.add_argument("--folder", type=Path, help="with --variant: a new folder to work in (a temporary one)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    with ExitStack() as stack:
        bundle = arguments.bundle
        if arguments.variant:
            folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with_prepack = arguments.precision, arguments.prepack
            bundle = written(folder, arguments.variant, arguments.layers, *with_prepack)
        passed_on = ("slots", "gap", "threads", "provider")
        settings = [part for name in passed_on for part in (f"--{name}", getattr(arguments, name))]
        _, port = stack.enter_context(service(bundle, [*settings, "--timeout", 3600]))
        runs = measure(
            port, sorted(arguments.clients), arguments.requests, arguments.rounds, arguments.prompt, arguments.tokens
        )
    figures = {count: run.figures() for count, run in runs.items()}
    if arguments.json:
        print(json.dumps(figures))
    else:
        threads = arguments.threads or os.cpu_count() or 1
        print(f"{plural(threads, 'thread')}, {plural(arguments.slots, 'slot')}, {arguments.rounds} rounds")
        print(table(figures))
    return 0
