"""Beam search, and the best of several drawn answers, over any engine.

Answers are compared by their log-probability, the sum over their tokens, the one that ends them included:

    log p(answer) = sum over t of log p(token t | pictures, prompt, tokens before t)

As in `sampling.log_probability`, each is the log-softmax of the raw logits over all ids. There is no length penalty.

Both are big_vision's (`_beam_decode` and `best_of_n` in big_vision/trainers/proj/paligemma/predict_fns.py). Its beam
search keeps two lists for each prompt, and at each step

1. ends every live candidate, and adds the result to the finished ones;
2. extends every live candidate by the tokens that do not end it, and keeps the likeliest N of all;
3. stops once no live candidate is as likely as the best finished one: a longer one is never likelier.

So a finished candidate takes no place from the live ones, and an answer always ends: where T tokens are allowed, the
last of them is its end. Among equals the first wins.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .engine import Engine, Pictures, pixels_of
from .errors import PaliGemmaError, plural
from .generate import Timings, choose_capacity, generate, not_finite, pad_prompts, pictures_in, spreads_of
from .model.sampling import Sampling


@dataclass(frozen=True)
class Candidate:
    """An answer, or the beginning of one, without the token that ends it; `logprob` counts that one too."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of each
    spreads: tuple[float, ...] = ()  # `sampling.location_spread` of each; without meaning where it is no location
    logprob: float = 0.0  # the sum

    def then(self, token: int, logprob: float, spread: float) -> "Candidate":
        """The candidate with one more token."""
        tokens, logprobs, spreads = (*self.tokens, token), (*self.logprobs, logprob), (*self.spreads, spread)
        return Candidate(tokens, logprobs, spreads, self.logprob + logprob)

    def ended(self, logprob: float) -> "Candidate":
        """The candidate with a token of this log-probability that ends it."""
        return replace(self, logprob=self.logprob + logprob)


#: A search with its settings bound, as `partial(beam_search, beams=4)`: engine, pictures, prompts, known,
#: max_new_tokens, timings, locations -> each prompt's candidates, the best first.
Search = Callable[
    [Engine, Pictures, Sequence[Sequence[int]], np.ndarray, int | np.ndarray, Timings | None, np.ndarray | None],
    list[list[Candidate]],
]


def likeliest_first(candidates: Iterable[Candidate]) -> list[Candidate]:
    """By falling log-probability; equal ones stay in their order."""
    return sorted(candidates, key=lambda candidate: -candidate.logprob)


# --- beam search -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beam:
    """The live and the finished candidates of one prompt, each the likeliest first."""

    live: Sequence[Candidate] = (Candidate(),)
    finished: Sequence[Candidate] = ()

    @property
    def is_done(self) -> bool:
        """Whether no live candidate is as likely as the best finished one."""
        return bool(self.finished) and self.live[0].logprob < self.finished[0].logprob

    @property
    def answers(self) -> list[Candidate]:
        """What was found; of a model without an end token the live candidates."""
        return list(self.finished or self.live)


def advance(
    beam: Beam, ids: np.ndarray, logprobs: np.ndarray, ended: np.ndarray, spreads: np.ndarray, count: int
) -> tuple[Beam, list[int]]:
    """One step of a prompt: the beam with `count` live candidates a token longer, and whose continuations these are.

    Of each of its R live candidates: ids [R, N] of the likeliest tokens that do not end it, falling; logprobs [R, N] of
    these; ended [R, E], the log-probabilities of the tokens that do; spreads [R]. At least `count` tokens of each, or
    one that is left out might have been among the likeliest.
    """
    ends = [
        candidate.ended(logprob) for candidate, row in zip(beam.live, ended.tolist(), strict=True) for logprob in row
    ]
    longer = [
        (parent, candidate.then(token, logprob, float(spreads[parent])))
        for parent, candidate in enumerate(beam.live)
        for token, logprob in zip(ids[parent].tolist(), logprobs[parent].tolist(), strict=True)
    ]
    kept = sorted(longer, key=lambda pair: -pair[1].logprob)[:count]
    finished = likeliest_first([*beam.finished, *ends])[:count]
    return Beam([candidate for _, candidate in kept], finished), [parent for parent, _ in kept]


def beam_search(
    engine: Engine,
    pictures: Pictures,
    prompts: Sequence[Sequence[int]],
    known: np.ndarray,
    max_new_tokens: int | np.ndarray = 64,
    timings: Timings | None = None,
    locations: np.ndarray | None = None,
    *,
    beams: int,
) -> list[list[Candidate]]:
    """Up to `beams` finished candidates of each prompt, the best first; behind it stands what else had been found.

    The arguments up to `timings` are those of `generate`; with the ids of the location tokens, locations [L],
    candidates have spreads. Prompts are read once, and each is searched for as if it were alone. Raises PaliGemmaError
    as `generate` does, or if there are fewer tokens than beams.
    """
    config, timings = engine.config, timings or Timings()
    ends = np.array([token for token in config.ends if known[token]], np.int64)
    among = known & ~np.isin(np.arange(len(known)), ends)
    if beams > among.sum():
        raise PaliGemmaError(f"{beams} beams, but only {plural(among.sum(), 'token')} to choose from; take fewer beams")
    input_ids, lengths = pad_prompts(prompts, config.pad)
    capacity = choose_capacity(engine, lengths, max_new_tokens, pictures_in(config, prompts[0]))
    found, most = [Beam() for _ in prompts], np.broadcast_to(max_new_tokens, len(prompts))
    running, width = np.ones(len(prompts), bool), 1  # live candidates of each prompt

    started = time.perf_counter()
    logits, cache = engine.prefill(pictures, input_ids, lengths, capacity)
    timings.prefill_s = time.perf_counter() - started
    for step in range(most.max()):
        started = time.perf_counter()
        ids, logprobs, ended = engine.likeliest(logits, among, beams, ends)
        spreads = spreads_of(engine, logits, ids, locations)
        timings.add_wait(step, time.perf_counter() - started)
        for row in np.flatnonzero(running.repeat(width) & ~np.isfinite(logprobs).all(-1))[:1]:
            prompt, place = divmod(int(row), width)
            pixel_values = np.split(pixels_of(pictures), len(prompts))[prompt]
            raise not_finite(engine, pixel_values, prompts[prompt], found[prompt].live[place].tokens)
        parents: list[int] = []
        for prompt, beam in enumerate(found):
            rows, chosen = slice(prompt * width, (prompt + 1) * width), list(range(beams))
            if running[prompt]:
                found[prompt], chosen = advance(beam, ids[rows], logprobs[rows], ended[rows], spreads[rows], beams)
            parents += [prompt * width + parent for parent in chosen]
        running &= ~np.array([beam.is_done for beam in found]) & (step + 1 < most)
        if not running.any():
            break
        width = beams
        tokens = np.array([[candidate.tokens[-1]] for beam in found for candidate in beam.live])
        # A prompt that is done stays where it is, or on the last slot, as in `generate`.
        places = np.minimum(lengths + step, capacity - 1).repeat(width).astype(np.int32)
        started = time.perf_counter()
        logits, cache = engine.decode(tokens, places, engine.reorder(cache, np.array(parents)))
        timings.decode_s += time.perf_counter() - started
        timings.decode_tokens += width * int(running.sum())
        timings.passes += 1
    return [beam.answers for beam in found]


# --- the best of n -----------------------------------------------------------------------------------------


def best_of(
    engine: Engine,
    pictures: Pictures,
    prompts: Sequence[Sequence[int]],
    known: np.ndarray,
    max_new_tokens: int | np.ndarray = 64,
    timings: Timings | None = None,
    locations: np.ndarray | None = None,
    *,
    count: int,
    sampling: Sampling,
    seeds: Sequence | None = None,
) -> list[list[Candidate]]:
    """`count` drawn candidates of each prompt, the likeliest first; an answer that was drawn twice is there twice.

    The arguments are those of `beam_search`. Draw i of a prompt has a generator of its own, seeded with the prompt's
    seed (one of `seeds`, or the sampling's) and i: so it is the same in any company. Raises PaliGemmaError as
    `generate` does, or if the engine gives no log-probabilities.
    """
    seeds = [sampling.seed] * len(prompts) if seeds is None else seeds
    own = [[*np.atleast_1d(seed), i] for seed in seeds for i in range(count)]
    most = np.broadcast_to(max_new_tokens, len(prompts)).repeat(count)
    repeated = [prompt for prompt in prompts for _ in range(count)]
    steps, logprobs, spreads = [], [], []
    for tokens in generate(
        engine, pictures, repeated, known, most, sampling, timings, own, logprobs, spreads=spreads,
        locations=locations, copies=count,
    ):  # fmt: skip
        steps.append(tokens)
        if logprobs[0] is None:
            raise PaliGemmaError("the best of several answers needs log-probabilities; export the bundle again")
    drawn = [
        cut(*row, ends=engine.config.ends)
        for row in zip(np.stack(steps, 1), np.stack(logprobs, 1), np.stack(spreads, 1), most, strict=True)
    ]
    return [likeliest_first(drawn[i : i + count]) for i in range(0, len(drawn), count)]


def cut(tokens: np.ndarray, logprobs: np.ndarray, spreads: np.ndarray, most: int, ends: Sequence[int]) -> Candidate:
    """What `generate` yielded for a row, tokens, logprobs and spreads [T], up to its end or `most` of it."""
    found = Candidate()
    for token, logprob, spread in zip(tokens[:most].tolist(), logprobs.tolist(), spreads.tolist(), strict=False):
        if token in ends:
            return found.ended(logprob)
        found = found.then(token, logprob, spread)
    return found


# --- options -----------------------------------------------------------------------------------------------

MOST = 256  # answers at once: each is a row, with a cache of its own
_DRAWING = {"temperature": 0, "top_k": 0, "top_p": 1}
_OF_ONE_ANSWER = {"constrain": None, "start": "", "lookup": False}


def search_of(options: Mapping[str, Any], spell: Callable[[str], str] = str) -> Search | None:
    """The search that `beams` or `best_of` asks for, if one does, among options by name.

    Raises PaliGemmaError for options that contradict each other, which names them as `spell` does.
    """
    asked = {name: int(options[name]) for name in ("beams", "best_of") if options.get(name) is not None}
    if not asked:
        return None
    if len(asked) > 1:
        raise PaliGemmaError(f"{spell('beams')} searches and {spell('best_of')} draws; leave one of them out")
    ((name, count),) = asked.items()
    if not 2 <= count <= MOST:
        raise PaliGemmaError(f"{spell(name)} is {count}, and has to be from 2 to {MOST}, or None")
    if given := _given(options, _OF_ONE_ANSWER):
        raise PaliGemmaError(f"{spell(given)} is about one answer, and {spell(name)} compares several; leave one out")
    if name == "beams":
        if given := _given(options, _DRAWING):
            raise PaliGemmaError(f"{spell(name)} takes the likeliest and draws nothing; leave {spell(given)} out")
        return partial(beam_search, beams=count)
    if not options.get("temperature"):
        reason = f"at temperature 0 all {count} answers are the same"
        raise PaliGemmaError(f"{spell(name)}: {reason}; use {spell('temperature')} 1")
    drawing = {key: options[key] for key in (*_DRAWING, "seed") if key in options}
    return partial(best_of, count=count, sampling=Sampling(**drawing))


def _given(options, defaults) -> str:
    """The name of the first of some options that is not at its default; "" if all are."""
    return next((name for name, default in defaults.items() if options.get(name, default) != default), "")
