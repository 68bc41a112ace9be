"""One target in a process of its own: `python -m tests.fuzz.worker TARGET FOLDER SECONDS SEED`.

FOLDER is where it works and tells how far it is: `count` holds how many inputs were begun (eight bytes), `current` the
last of them, so that whoever watches knows what was read when the process died, or had to be killed. An input that ends
in anything but success or PaliGemmaError of one line ends the process, with code 77 and the traceback on stderr.
"""

import contextlib
import os
import random
import struct
import sys
import time
import traceback
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

#: Where new ways through the code are looked for, if atheris is there to see them.
INSTRUMENTED = [
    "numpy_ref",
    "export.bundle",
    "export.session",
    "export.serve",
    "export.service",
    "torch_impl.train.data",
]
BAD = 77
STARTED = time.monotonic()


class Reader:
    """A target's read with the bookkeeping around it."""

    def __init__(self, read, folder: Path):
        from numpy_ref.errors import PaliGemmaError

        self.read, self.refusal, self.tried = read, PaliGemmaError, 0
        self.current = os.open(folder / "current", os.O_RDWR | os.O_CREAT)
        self.count = os.open(folder / "count", os.O_RDWR | os.O_CREAT)

    def __call__(self, data: bytes) -> None:
        os.ftruncate(self.current, os.pwrite(self.current, data, 0))
        self.tried += 1
        os.pwrite(self.count, struct.pack("<Q", self.tried), 0)
        try:
            self.read(data)
        except self.refusal as error:
            if not str(error).isprintable():
                self._stop(f"a message that is not one printable line: {str(error)!r}")
        except BaseException:
            self._stop(traceback.format_exc())

    def _stop(self, reason):
        print(reason, file=sys.stderr, flush=True)
        os._exit(BAD)


def fuzz(target, reader, seeds, seconds: float, seed: int) -> None:
    """Every seed, then changed ones until the process is so many seconds old; by coverage where atheris is installed."""
    for data in seeds:
        reader(data)
    seconds -= time.monotonic() - STARTED
    if atheris is None:
        mutate_blindly(target, reader, seeds, seconds, seed)
    else:
        mutate_by_coverage(target, reader, seeds, seconds, seed)


def mutate_blindly(target, reader, seeds, seconds, seed):
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        change = rng.choice([target.mutate, target.mutate, _raw()])
        reader(change(rng.choice(seeds), rng))


def mutate_by_coverage(target, reader, seeds, seconds, seed):
    folder = Path("corpus")
    folder.mkdir()
    for i, data in enumerate(seeds):
        (folder / str(i)).write_bytes(data)

    def change(data, size, seed):
        rng = random.Random(seed)
        kind = rng.randrange(3)
        return (atheris.Mutate(data, size) if kind == 0 else (_raw() if kind == 1 else target.mutate)(data, rng))[:size]

    longest = 2 * max(map(len, seeds)) + 100
    # Hangs, memory and crashes are the watcher's affair: it has the same limits without libFuzzer.
    options = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed + 1}", f"-max_len={longest}"]
    options += ["-rss_limit_mb=0", "-timeout=100000", "-verbosity=0", "-handle_segv=0", "-handle_abrt=0"]
    atheris.Setup([sys.argv[0], *options, str(folder)], reader, custom_mutator=change)
    atheris.Fuzz()


def _raw():
    from . import mutate

    return mutate.raw


def main(name, folder, seconds, seed):
    # The targets' modules are loaded here and not above, so that they can be instrumented on the way.
    with atheris.instrument_imports(include=INSTRUMENTED) if atheris else contextlib.nullcontext():
        from .targets import TARGETS
    target, folder = TARGETS[name], Path(folder)
    os.chdir(folder)
    (folder / "work").mkdir()
    reader = Reader(target.prepare(folder / "work"), folder)
    fuzz(target, reader, target.seeds(), float(seconds), int(seed))


if __name__ == "__main__":
    main(*sys.argv[1:])
