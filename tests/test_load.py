"""One loaded bundle under load: many threads give the answers of one, and memory does not grow."""

import gc
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import onnxruntime
import pytest

from export import bundle, session
from export.session import HostSession, Session, engine
from numpy_ref import checkpoint
from numpy_ref.generate import generate
from numpy_ref.image import open_image
from numpy_ref.model.sampling import Sampling
from numpy_ref.tokenizer import Tokenizer

from . import soak
from .models import CONFIGS, random_batch, random_params

THREADS = 8


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped model's bundle."""
    bundle.write(checkpoint.load(), tmp_path_factory.mktemp("load") / "out")
    return bundle.load(tmp_path_factory.getbasetemp() / "load0" / "out")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random model as a session."""
    folder, config = tmp_path_factory.mktemp("tiny"), CONFIGS["paligemma2"]
    loaded = checkpoint.Checkpoint(folder, config, random_params(config, dtype=np.float32), np.dtype("f4"))
    bundle.write(loaded, folder / "out")
    return Session(bundle.load(folder / "out"), "cpu", threads=1)


def together(function, arguments):
    """Call a function in as many threads as there are arguments, all let go at once; the results."""
    barrier = Barrier(len(arguments))

    def begin(argument):
        barrier.wait()
        return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(begin, arguments))


def tokens(engine, seed, steps=7):
    """What one generation draws: rows, sizes and draws by the seed."""
    rows = 1 + seed % 3
    pixels, ids, lengths = random_batch(engine.config, (3, 7, 5)[:rows], seed)
    prompts = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    sampling, known = Sampling(temperature=seed % 2, seed=seed), np.ones(engine.config.text.vocab, bool)
    return np.stack(list(generate(engine, pixels, prompts, known, steps, sampling))).tolist()


def test_eight_threads_answer_as_one(tiny):
    serial = [[tokens(tiny, 5 * thread + i) for i in range(5)] for thread in range(THREADS)]
    assert len({str(answer) for answers in serial for answer in answers}) > THREADS
    threaded = together(lambda thread: [tokens(tiny, 5 * thread + i) for i in range(5)], range(THREADS))
    assert threaded == serial


def test_interleaved_generations_do_not_mix(tiny):
    """Step by step in turns, in one thread: each has its own cache, and its own buffers for what is fed and drawn."""
    pixels, ids, lengths = random_batch(tiny.config)
    alone = []
    for row in range(len(ids)):
        logits, cache = tiny.prefill(pixels[[row]], ids[[row]], lengths[[row]], 40)
        alone.append((logits, tiny.decode(ids[[row], -1:], lengths[[row]], cache)[0]))
    prefilled = [tiny.prefill(pixels[[row]], ids[[row]], lengths[[row]], 40) for row in range(len(ids))]
    ended = [tiny.decode(ids[[row], -1:], lengths[[row]], prefilled[row][1])[0] for row in reversed(range(len(ids)))]
    for (first, second), (logits, _), after in zip(alone, prefilled, reversed(ended), strict=True):
        assert np.array_equal(first, logits)
        assert np.array_equal(second, after)


def test_graphs_that_are_opened_when_needed_are_opened_in_any_thread(shipped):
    """Picture, draws and masks by the bundle's own graphs, with a session whose threads all come first."""
    tokenizer, image = Tokenizer.load(shipped.path, shipped.config), open_image(checkpoint.SHIPPED / "example.png")

    def answer(engine, thread):
        prompt, sampling = tokenizer.prompt(soak.PROMPTS[thread % 4]), Sampling(temperature=0.5, seed=thread)
        pixels = engine.preprocess(image)
        drawn = [int(t[0]) for t in generate(engine, pixels, [prompt], tokenizer.known(), 6, sampling)]
        return drawn, engine.masks(np.arange(thread, thread + 16)[None]).tobytes(), tokenizer.decode(drawn)

    alone = HostSession(shipped, "cpu", 1)
    shared, before = HostSession(shipped, "cpu", 1), sys.stdout
    threaded = together(lambda thread: answer(shared, thread), range(THREADS))
    assert threaded == [answer(alone, thread) for thread in range(THREADS)]
    assert sys.stdout is before


def test_stdout_comes_back_from_every_thread(tiny, monkeypatch):
    """Sessions that are opened at once redirect it for the whole process."""
    seen, original = [], onnxruntime.InferenceSession

    def slow(*arguments, **options):
        seen.append(sys.stdout)
        time.sleep(0.01)
        return original(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", slow)
    before = sys.stdout
    together(lambda thread: (time.sleep(0.003 * thread), session.Session(tiny.bundle, "cpu", 1)), range(THREADS))
    assert sys.stdout is before
    assert len(seen) == 2 * THREADS
    assert all(stdout is sys.stderr for stdout in seen)


def test_a_generation_leaves_nothing_behind(tiny, monkeypatch):
    """Its buffers go when it ends, by counting of references alone: on a GPU a collector would come too late."""
    caches = weakref.WeakSet()
    made = engine.Cache.__init__

    def counted(self, *arguments):
        made(self, *arguments)
        caches.add(self)

    monkeypatch.setattr(engine.Cache, "__init__", counted)
    gc.collect()
    before = live_values()
    gc.disable()
    try:
        for seed in range(6):
            tokens(tiny, seed)
        assert live_values() == before
        assert len(caches) == 0
        walk = generate(tiny, *a_question(tiny))
        next(walk)
        assert len(caches) == 1
        assert live_values() > before
        walk.close()  # whoever has seen enough
        assert len(caches) == 0
        assert live_values() == before
    finally:
        gc.enable()


def a_question(engine):
    pixels, ids, lengths = random_batch(engine.config, (3,))
    return pixels, [ids[0, : lengths[0]].tolist()], np.ones(engine.config.text.vocab, bool)


def live_values() -> int:
    """How many values of the runtime there are in Python's hands."""
    return sum(type(value) is onnxruntime.OrtValue for value in gc.get_objects())


def test_memory_is_flat(tiny):
    """200 generations after 50; `python -m tests.soak` has 2,000 of the shipped model. One cache kept in ten shows."""
    cache = 2 * tiny.config.text.depth * tiny.config.text.kv_heads * tiny.config.text.head_dim * 4 * CAPACITY
    for _ in range(50):
        fill(tiny)
    before = soak.resident()
    for _ in range(200):
        fill(tiny)
    assert soak.resident() - before < 200 / 15 * cache


CAPACITY = 10_000  # a cache of 4.8 MB


def fill(engine):
    """Prefill into a large cache, and one step."""
    pixels, ids, lengths = random_batch(engine.config, (3,))
    _, cache = engine.prefill(pixels, ids, lengths, CAPACITY)
    engine.decode(ids[:, -1:], lengths, cache)
