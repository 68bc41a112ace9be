"""python -m tests.soak [BUNDLE] [--generations N] [--json]: memory over many generations with one loaded bundle.

`python -m tests.soak serve` is for the service (soak_serve.py).

The slope is that of the line of least squares through the second half of the samples, when all that is made once is made.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from export.session import load
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli.options import Parser, on_cores, whole
from numpy_ref.generate import generate
from numpy_ref.image import open_image
from numpy_ref.model.sampling import Sampling

PROMPTS = ("caption en", "detect star", "segment star", "answer en how many shapes are there ?")


def resident() -> int:
    """Bytes of this process that are in memory, from Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(counts, sizes) -> float:
    """Bytes a generation, by least squares over the second half of the samples."""
    half = len(counts) // 2
    return float(np.polyfit(counts[half:], sizes[half:], 1)[0])


def generations(engine, tokenizer, image, count):
    """Answer `count` times, the questions in turn, at rising and falling capacities; yields how many are done."""
    known = tokenizer.known()
    for i in range(count):
        pixel_values, prompt = engine.preprocess(image), tokenizer.prompt(PROMPTS[i % len(PROMPTS)])
        sampling = Sampling(temperature=i % 2, seed=i)
        for _ in generate(engine, pixel_values, [prompt], known, 4 + i % 13, sampling):
            pass
        if engine.masks:
            engine.masks(np.full((1, 16), i % 128))
        yield i + 1


def main(argv=None):
    options = Parser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    options.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="left out: the model that ships")
    options.add_argument("--generations", type=whole(1), default=2000, metavar="N", help="(2000)")
    options.add_argument("--threads", type=on_cores(0), default=0, help="of the runtime, 0 for all (0)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    engine, tokenizer = load(arguments.bundle, "cpu", arguments.threads, host_graphs=True)
    image, every, samples = open_image(SHIPPED / "example.png"), max(1, arguments.generations // 20), []
    started = time.perf_counter()
    walk = generations(engine, tokenizer, image, arguments.generations)
    for done in tqdm(walk, total=arguments.generations, leave=False, disable=None):
        if done % every == 0:
            samples.append((done, resident(), time.perf_counter() - started))
            if not arguments.json:
                print(f"{done:>8} generations  {samples[-1][1] / 2**20:9.2f} MiB  {samples[-1][2]:7.1f} s", flush=True)
    found = slope([done for done, *_ in samples], [size for _, size, _ in samples])
    if arguments.json:
        rows = [{"generations": done, "bytes": size} for done, size, _ in samples]
        print(json.dumps({"samples": rows, "bytes_per_generation": found}))
    else:
        print(f"slope over the second half: {found:.1f} bytes a generation")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        from . import soak_serve  # which imports this module

        sys.exit(soak_serve.main(sys.argv[1:]))
    sys.exit(main())
