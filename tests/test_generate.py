"""The generation loop, on an engine whose every logit is known."""

from dataclasses import replace

import numpy as np
import pytest

from export import bundle
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.engine import Engine, NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import Timings, answers, choose_capacity, generate, pad_prompts
from numpy_ref.model.sampling import Sampling
from torch_impl.load import TorchEngine

from .models import CONFIGS, random_batch, random_params

CONFIG = replace(CONFIGS["paligemma1"], eos=1)
KNOWN = np.ones(53, bool)


class Script(Engine):
    """An engine that answers the given tokens, and checks what it is fed."""

    def __init__(self, *rows):
        super().__init__(CONFIG)
        self.rows, self.lengths = rows, []

    def logits(self, step):
        logits = np.zeros((len(self.rows), 53), np.float32)
        for row, tokens in zip(logits, self.rows, strict=True):
            row[tokens[min(step, len(tokens) - 1)]] = 5
        return logits

    def prefill(self, pixel_values, input_ids, lengths, capacity):
        self.capacity, self.lengths = capacity, [lengths.tolist()]
        return self.logits(0), 1

    def decode(self, input_ids, lengths, step):
        assert input_ids.shape == (len(self.rows), 1)
        self.lengths.append(lengths.tolist())
        return self.logits(step), step + 1

    def reorder(self, step, rows):
        self.rows = [self.rows[row] for row in rows]
        return step


def run(engine, *prompt_sizes, **options):
    prompts, pictures = [[5] * n for n in prompt_sizes], np.zeros((len(prompt_sizes), 3, 1, 1))
    return np.stack(list(generate(engine, pictures, prompts, KNOWN, **options)), 1).tolist()


def test_rows_end_apart():
    engine = Script([9, 8, 1, 7], [6, 5, 4, 3, 1])
    timings = Timings()
    tokens = run(engine, 4, 2, max_new_tokens=9, timings=timings)
    assert tokens == [[9, 8, 1, 0, 0], [6, 5, 4, 3, 1]]
    assert answers(np.array(tokens).T, CONFIG.eos) == [[9, 8], [6, 5, 4, 3]]
    # The row that has ended stays where it is.
    assert engine.lengths == [[4, 2], [4, 2], [5, 3], [6, 4], [6, 5]][: len(engine.lengths)]
    assert timings.decode_tokens == 2 + 2 + 1 + 1


def test_the_last_token_is_not_fed_back():
    engine = Script([9, 8, 7])
    assert run(engine, 4, max_new_tokens=3) == [[9, 8, 7]]
    assert engine.capacity == 4 + 3 - 1
    assert len(engine.lengths) == 3


def test_seeds_repeat_and_differ():
    def draw(seed):
        return run(Script([9, 8, 7]), 4, max_new_tokens=9, sampling=Sampling(temperature=9.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_each_row_has_its_own_budget():
    """A row that has had its tokens is silent, and its last slot is the farthest that it writes to."""
    engine = Script([9, 8, 7, 6], [9, 8, 7, 6])
    tokens = run(engine, 6, 4, max_new_tokens=np.array([2, 4]))
    assert tokens == [[9, 8, 0, 0], [9, 8, 7, 6]]
    assert engine.capacity == 7
    assert max(max(lengths) for lengths in engine.lengths[1:]) < engine.capacity
    assert engine.lengths[1:] == [[6, 4], [6, 5], [6, 6]]


def test_a_row_with_a_seed_draws_the_same_in_any_company():
    def draw(*seeds):
        engine, sampling = Script(*[[9, 8, 7]] * len(seeds)), Sampling(temperature=9.0, seed=5)
        return run(engine, *[4] * len(seeds), max_new_tokens=9, sampling=sampling, seeds=seeds)

    apart = [draw([3, row])[0] for row in range(3)]
    assert draw([3, 0], [3, 1], [3, 2])[:3] == apart
    assert draw([3, 2], [3, 0]) == [apart[2], apart[0]]
    assert apart[0] != apart[1] != apart[2]


def test_capacity():
    assert choose_capacity(Script(), np.array([12, 20]), 5) == 24
    assert choose_capacity(Script(), np.array([12, 20]), np.array([15, 5])) == 26
    with pytest.raises(PaliGemmaError, match=r"the prompt has 90 tokens .9 of them the picture.*capacity of 97"):
        choose_capacity(Script(), np.array([90]), 9)


def test_padding():
    input_ids, lengths = pad_prompts([[3, 4, 5], [6]], pad=2)
    assert input_ids.tolist() == [[3, 4, 5], [6, 2, 2]]
    assert lengths.tolist() == [3, 1]
    assert (input_ids.dtype, lengths.dtype) == (np.int64, np.int32)


def test_a_cache_that_is_too_small(tmp_path):
    """Every engine says so, before it writes past the end or silently writes nothing."""
    loaded = checkpoint.Checkpoint(tmp_path, CONFIG, random_params(CONFIG, dtype=np.float32), np.dtype("f4"))
    bundle.write(loaded, tmp_path / "out")
    pixels, ids, lengths = random_batch(CONFIG)
    size = ids.shape[1]
    for engine in (NumpyEngine(loaded), TorchEngine(loaded), Session(bundle.load(tmp_path / "out"), "cpu")):
        with pytest.raises(PaliGemmaError, match=f"{size - 1} slots is too small for {size}"):
            engine.prefill(pixels, ids, lengths, size - 1)
        _, cache = engine.prefill(pixels, ids, lengths, size)
        with pytest.raises(PaliGemmaError, match=f"{size} slots is too small for {size + 1}"):
            engine.decode(ids[:, -1:], np.full_like(lengths, size), cache)
        with pytest.raises(PaliGemmaError, match=f"{size} slots is too small for {size + 2}"):
            engine.extend(ids[:, -3:], np.full_like(lengths, size - 1), cache)
        with pytest.raises(PaliGemmaError, match="exceeds the capacity of 97"):
            list(generate(engine, pixels[:1], [ids[0].tolist()], KNOWN, 97))


# --- what ends an answer -----------------------------------------------------------------------------------


class Scripted(Engine):
    """An engine whose tokens are given: one row of steps."""

    name = "scripted"

    def __init__(self, config, tokens):
        super().__init__(config)
        self.tokens = iter(tokens)

    def prefill(self, pixel_values, input_ids, lengths, capacity):
        return self.logits(), None

    def decode(self, input_ids, lengths, cache):
        return self.logits(), None

    def reorder(self, cache, rows):
        raise NotImplementedError

    def logits(self):
        return np.eye(self.config.text.vocab)[[next(self.tokens)]]


@pytest.mark.parametrize(
    ("stops", "expected"), [(None, [8, 9]), ((1,), [8, 9]), ((9, 1), [8]), ((7, 8), []), ((), [8, 9, 1, 6])]
)
def test_any_of_several_tokens_ends_an_answer(stops, expected):
    config = replace(CONFIG, eos=1, stops=stops)
    engine, known = Scripted(config, [8, 9, 1, 6]), np.ones(config.text.vocab, bool)
    tokens = list(generate(engine, np.zeros((1, 3, 1, 1)), [[5]], known, 4))
    assert answers(tokens, config.ends) == [expected]
