"""Stage 4: captured decode steps against plain ones, memory over many generations, and two threads."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from numpy_ref.generate import generate
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer

from ..bundle import Bundle
from ..session import Session, cuda
from . import models
from .correctness import PROMPTS
from .stage import LABEL, Found, NotHere, Settings

LIMIT, PART_LIMIT = 120, 60
LONG, SHORT = 32, 5
GROWTH = 16 * 2**20  # bytes that memory may grow by over all generations
WARM = 20  # generations until everything that is made once is made
HALVES = ("float16", "bfloat16")


def parts(settings: Settings) -> list[str]:
    captured = [
        f"captured {name}" for name in models.shipped_names() if models.form(name.split()[0])[0] not in ("int8", "int4")
    ]
    return [*captured, "memory plain", "memory captured", "threads"]


def run(part: str, settings: Settings, found: Found) -> None:
    what, _, name = part.partition(" ")
    if what == "captured":
        same_tokens(settings, name, found)
    elif what == "memory":
        flat_memory(settings, name == "captured", found)
    else:
        two_threads(settings, found)


def same_tokens(settings: Settings, name: str, found: Found) -> None:
    """Captured and plain sessions, batches 1, 3, 1 again, a short generation behind a long one, greedy and drawn."""
    bundle = models.shipped(settings, name)
    if not settings.on_device:
        raise NotHere("decode is captured on CUDA alone")
    plain = models.opened(bundle, settings)  # one that cannot run there is told from one that cannot be captured
    captured = models.opened(bundle, settings, captured=True)
    cases = [(1, LONG, 0.0), (3, LONG, 0.0), (1, LONG, 0.0), (1, SHORT, 0.0), (3, SHORT, 1.5), (1, LONG, 1.5)]
    differ = []
    for batch, count, temperature in cases:
        expected, actual = (answers_of(engine, batch, count, temperature) for engine in (plain, captured))
        if expected != actual:
            case = {"batch": batch, "tokens": count, "temperature": temperature}
            differ.append({**case, "plain": expected, "captured": actual})
        found.add(cases=len(cases), cases_differ=differ, differs=bool(differ))


def answers_of(
    engine: Session, batch: int, count: int, temperature: float = 0.0, seed: int = 3, first: int = 0
) -> list[list[int]]:
    """The tokens of answers about the example picture, one list a step."""
    tokenizer = Tokenizer.load(engine.bundle.path, engine.config)
    prompts = [tokenizer.prompt(PROMPTS[(first + i) % len(PROMPTS)]) for i in range(batch)]
    sampling = Sampling(temperature=temperature, top_k=50, seed=seed)
    pixels = models.picture(engine, batch)
    return [token.tolist() for token in generate(engine, pixels, prompts, tokenizer.known(), count, sampling)]


def any_half(settings: Settings) -> Bundle:
    """A bundle for what does not depend on the precision: the first that runs wholly here."""
    reasons = []
    for precision in (*HALVES, "float32"):
        for operators in ("fused", "portable"):
            try:
                bundle = models.shipped(settings, f"{precision} {operators}")
                models.opened(bundle, settings)
                return bundle
            except NotHere as reason:
                reasons.append(str(reason))
    raise NotHere(f"no bundle runs wholly on the device: {reasons[0]}")


def flat_memory(settings: Settings, captured: bool, found: Found) -> None:
    """Memory in use, of the device or else of this process, before and after many generations."""
    bundle = any_half(settings)
    engine = models.opened(bundle, settings, captured)

    def many(count):
        for i in range(count):
            answers_of(engine, 1 + i % 3, 2 + i % 7, float(i % 2), seed=i, first=i)
        gc.collect()
        return in_use(settings)

    before = many(WARM)
    found.add(generations=settings.generations, bytes_before=before)
    after = many(settings.generations)
    found.add(bytes_after=after, growth=after - before, differs=after - before > GROWTH)


def in_use(settings: Settings) -> int:
    if settings.on_device:
        cuda.synchronize()
        return cuda.memory()[0]
    statm = Path("/proc/self/statm")
    if not statm.exists():
        raise NotHere("this system does not say how much memory a process has")
    import resource

    return int(statm.read_text().split()[1]) * resource.getpagesize()


def two_threads(settings: Settings, found: Found) -> None:
    """Two threads that share a session: each says what it says alone."""
    engine = models.opened(any_half(settings), settings)
    arguments = [(1, LONG, 0.0, 3, 0), (2, LONG, 1.5, 4, 1)]
    alone = [answers_of(engine, *each) for each in arguments]
    with ThreadPoolExecutor(2) as pool:
        rounds = [list(pool.map(lambda each: answers_of(engine, *each), arguments)) for _ in range(5)]
    differ = sum(together != alone for together in rounds)
    found.add(rounds=len(rounds), rounds_differ=differ, differs=bool(differ))


def lines(part: str, found: dict) -> list[str]:
    if part.startswith("captured"):
        differ = len(found["cases_differ"])
        return [f"{part:<{LABEL}}{found['cases'] - differ} of {found['cases']} generations say what plain ones say"]
    if part.startswith("memory"):
        grown = found["growth"] / 2**20
        return [f"{part:<{LABEL}}{grown:+.1f} MiB over {found['generations']} generations"]
    return [f"{part:<{LABEL}}{found['rounds'] - found['rounds_differ']} of {found['rounds']} rounds as alone"]
