"""The generation loop, over any engine."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .engine import Engine
from .errors import PaliGemmaError, plural
from .model.sampling import Sampling


@dataclass
class Timings:
    """Seconds spent in prefill and decode, filled in while generating."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = 0

    def add_wait(self, step: int, seconds: float) -> None:
        """Seconds waited for the logits of a step, which prefill gave, or decode."""
        if step:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


def pad_prompts(prompts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of ids of unequal length -> input_ids [B, T] int64, padded on the right, and lengths [B] int32."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    input_ids = np.full((len(prompts), lengths.max()), pad, np.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return input_ids, lengths


def choose_capacity(engine: Engine, lengths: np.ndarray, max_new_tokens: int | np.ndarray, pictures: int = 1) -> int:
    """Cache slots for the longest prompt and answer (the last token is never fed back); lengths [B].

    `max_new_tokens` is one number, or [B]; `pictures` is how many each prompt has. Raises PaliGemmaError if that is
    more than the engine has positions for.
    """
    patches, new_tokens = pictures * engine.config.vision.patches, np.broadcast_to(max_new_tokens, lengths.shape)
    longest = int((lengths + new_tokens).argmax())
    needed = int(lengths[longest] + new_tokens[longest]) - 1
    if needed > engine.max_length:
        raise PaliGemmaError(
            f"the prompt has {lengths[longest]} tokens ({patches} of them the picture{'s' * (pictures > 1)}), which "
            f"with {plural(new_tokens[longest], 'new one')} exceeds the capacity of {engine.max_length}; "
            f"{'give fewer pictures, ' * (pictures > 1)}shorten the prompt or lower --max-new-tokens"
        )
    return needed


def check_logits(
    engine: Engine,
    logits: Any,
    alive: np.ndarray,
    pixel_values: np.ndarray,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[np.ndarray],
) -> None:
    """Raise PaliGemmaError if a row that is alive has logits [B, V] that are not finite, and say where they arose.

    `generated` are the tokens [B] of the steps before. An engine that has taps runs that row again with one.
    """
    rows = np.flatnonzero(alive & ~np.isfinite(logits).all(-1))
    if not rows.size:
        return
    row = rows[0]
    sequence = [*prompts[row], *(int(token[row]) for token in generated)]
    input_ids, lengths = pad_prompts([sequence], engine.config.pad)
    prefix = np.array([len(prompts[row])], np.int32)
    pictures = pixel_values.reshape(len(prompts), -1, *pixel_values.shape[1:])[row]
    tap = engine.first_not_finite(pictures, input_ids, lengths, prefix)
    where = f"the first value that is not is {tap}" if tap else "export-onnx --verify says in which layer they arise"
    raise PaliGemmaError(f"the logits for token {len(generated) + 1} of the answer are not finite numbers; {where}")


def generate(
    engine: Engine,
    pixel_values: np.ndarray,
    prompts: Sequence[Sequence[int]],
    known: np.ndarray,
    max_new_tokens: int | np.ndarray = 64,
    sampling: Sampling | None = None,
    timings: Timings | None = None,
    seeds: Sequence[int] | None = None,
    logprobs: list[np.ndarray | None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield one token a row [B] at a time until every row has ended or has max_new_tokens, one number or one a row.

    pixel_values [B*N, 3, S, S] are the N pictures of each of B prompts; the ids of a prompt begin with their places.
    A row that has ended (its eos or its last token was yielded) yields pad from then on. With `seeds`, one a row in
    place of the sampling's own, a row draws the same in any company. `logprobs` gets what `Engine.draw` says of each
    step's tokens, [B] or None, before they are yielded. Raises PaliGemmaError if the engine has too few positions, or
    if its logits are not finite.
    """
    config, sampling, timings = engine.config, sampling or Sampling(), timings or Timings()
    input_ids, lengths = pad_prompts(prompts, config.pad)
    pictures = max(1, list(prompts[0]).count(config.image_token) // config.vision.patches)
    capacity = choose_capacity(engine, lengths, max_new_tokens, pictures)
    draws = uniforms(len(prompts), sampling.seed, seeds)
    alive, generated = np.ones(len(prompts), bool), []

    started = time.perf_counter()
    logits, cache = engine.prefill(pixel_values, input_ids, lengths, capacity)
    timings.prefill_s = time.perf_counter() - started
    for step in range(np.max(max_new_tokens)):
        on_host = isinstance(logits, np.ndarray)
        if on_host:
            check_logits(engine, logits, alive, pixel_values, prompts, generated)
        started = time.perf_counter()
        token, logprob = engine.draw(logits, known, sampling, next(draws))
        if not on_host:  # a device was still at work on them, and this the wait for it
            timings.add_wait(step, time.perf_counter() - started)
            if logprob is not None:  # all that comes to the host of them; to look at the others were one more wait
                check_logits(engine, logprob[:, None], alive, pixel_values, prompts, generated)
        if logprobs is not None:
            logprobs.append(logprob)
        token = np.where(alive, token, config.pad)
        generated.append(token)
        yield token
        alive = alive & ~np.isin(token, config.ends) & (step + 1 < np.asarray(max_new_tokens))
        if not alive.any():
            return
        started = time.perf_counter()
        logits, cache = engine.decode(token[:, None], lengths, cache)
        timings.decode_s += time.perf_counter() - started
        timings.decode_tokens += int(alive.sum())
        # A finished row stays where it is, or on the last slot, and overwrites one that nobody reads.
        lengths = np.minimum(lengths + alive, capacity - 1).astype(np.int32)


def uniforms(rows: int, seed: int, seeds: Sequence[int] | None = None) -> Iterator[np.ndarray]:
    """Without end, uniform [B] float32 in [0, 1): from one generator, or each row's from one of its own."""
    if seeds is None:
        generator = np.random.default_rng(seed)
        while True:
            yield generator.random(rows, np.float32)
    generators = [np.random.default_rng(own) for own in seeds]
    while True:
        yield np.array([generator.random(dtype=np.float32) for generator in generators])


def answers(tokens: Sequence[np.ndarray], ends: int | Sequence[int]) -> list[list[int]]:
    """Stacked yields [steps, B] -> one list of ids a row, cut before the first of `ends`, an id or several."""
    rows = np.stack(tokens, axis=1)
    return [row[: np.append(np.flatnonzero(np.isin(row, ends)), len(row))[0]].tolist() for row in rows]
