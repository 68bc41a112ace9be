"""The generation loop, over any engine.

An engine has two functions (`paligemma.prefill` and `paligemma.decode` with their weights bound, the torch
twin, or the two ONNX sessions):

    prefill(pixel_values [B, 3, S, S], input_ids [B, T], lengths [B], capacity) -> logits [B, V], cache
    decode(input_ids [B, 1], lengths [B], cache) -> logits [B, V], cache

and says what else a caller must know: `config`, `resize` (its preprocessing) and `masks` (mask codes [B, 16] ->
[B, 64, 64], or None where no mask codec came with the weights). It may bring a `preprocess` and a `sample` of its own,
which then take the place of `image.preprocess` and `sampling.sample`, and a `first_not_finite` (as `NumpyEngine` has),
which is asked where logits that are no numbers come from.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from .checkpoint import flatten
from .checkpoint.adapter import in_memory
from .checkpoint.blocks import all_finite, check_finite
from .errors import PaliGemmaError
from .model import paligemma, segmentation
from .model.sampling import Sampling, sample

#: What overflows in the reference is found in its logits, not told by NumPy in warnings of its own.
_quietly = np.errstate(over="ignore", invalid="ignore")


class FirstNotFinite:
    """A tap that keeps the first name that comes with a NaN or an infinity."""

    def __init__(self, finite=all_finite):
        self.finite, self.name = finite, None

    def __call__(self, name, value):
        if self.name is None and not self.finite(value):
            self.name = name
        return value


class NumpyEngine:
    """The reference as an engine. Raises PaliGemmaError that names a weight with a NaN or an infinity."""

    name = "numpy"

    def __init__(self, checkpoint):
        self.params = in_memory(checkpoint.params)
        for path, array in flatten(self.params).items():
            check_finite(path, array)
        self.config, self.resize, self.masks = checkpoint.config, checkpoint.resize, segmentation.decoder_of(checkpoint)

    @_quietly
    def prefill(self, pixel_values, input_ids, lengths, capacity):
        check_room(input_ids.shape[1], capacity)
        return paligemma.prefill(self.params, self.config, pixel_values, input_ids, lengths, capacity)

    @_quietly
    def decode(self, input_ids, lengths, cache):
        check_room(lengths.max() + 1, cache[0][0].shape[2])
        return paligemma.decode(self.params, self.config, input_ids, lengths, cache)

    @_quietly
    def first_not_finite(self, pixel_values, input_ids, lengths, prefix_lengths):
        """The first tap of one pass over prompts and answers that is not finite, None if all are."""
        tap = FirstNotFinite()
        paligemma.forward(self.params, self.config, pixel_values, input_ids, lengths, prefix_lengths, tap)
        return tap.name


@dataclass
class Timings:
    """Seconds spent in prefill and decode, filled in while generating."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = field(default=0)

    def add_wait(self, step: int, seconds: float) -> None:
        """Seconds waited for the logits of a step, which prefill gave, or decode."""
        if step:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


def pad_prompts(prompts, pad):
    """Lists of ids of unequal length -> input_ids [B, T] int64, padded on the right, and lengths [B] int32."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    input_ids = np.full((len(prompts), lengths.max()), pad, np.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return input_ids, lengths


def choose_capacity(config, lengths, max_new_tokens, limit=None):
    """Cache slots for the longest prompt and answer (the last token is never fed back); lengths [B].

    `max_new_tokens` is one number, or [B]. Raises PaliGemmaError if that is more than the model, or the bundle, has
    positions for.
    """
    limit, new_tokens = limit or config.max_length, np.broadcast_to(max_new_tokens, lengths.shape)
    longest = int((lengths + new_tokens).argmax())
    needed = int(lengths[longest] + new_tokens[longest]) - 1
    if needed > limit:
        raise PaliGemmaError(
            f"the prompt has {lengths[longest]} tokens ({config.vision.patches} of them the picture), which with "
            f"{new_tokens[longest]} new ones exceeds the capacity of {limit}; shorten the prompt or lower "
            "--max-new-tokens"
        )
    return needed


def check_room(needed, capacity) -> None:
    """Raise PaliGemmaError unless a cache of `capacity` slots holds `needed` positions."""
    if needed > capacity:
        raise PaliGemmaError(f"a cache of {capacity} slots is too small for {needed} positions")


def check_logits(engine, logits, alive, pixel_values, prompts, said) -> None:
    """Raise PaliGemmaError if a row that is alive has logits [B, V] that are no numbers, and say where they arose.

    `said` are the tokens [B] of the steps before. An engine that has taps runs that row again with one. Logits that
    stay on a device are not looked at: that would be one more wait a token.
    """
    if not isinstance(logits, np.ndarray):
        return
    rows = np.flatnonzero(alive & ~np.isfinite(logits).all(-1))
    if not rows.size:
        return
    row, tap = rows[0], None
    if hasattr(engine, "first_not_finite"):
        sequence = [*prompts[row], *(int(token[row]) for token in said)]
        input_ids, lengths = pad_prompts([sequence], engine.config.pad)
        prefix = np.array([len(prompts[row])], np.int32)
        tap = engine.first_not_finite(pixel_values[row : row + 1], input_ids, lengths, prefix)
    where = f"the first value that is not is {tap}" if tap else "export-onnx --verify says in which layer they arise"
    raise PaliGemmaError(f"the logits for token {len(said) + 1} of the answer are not finite numbers; {where}")


def generate(
    engine, pixel_values, prompts, known, max_new_tokens=64, sampling=None, capacity=None, timings=None, seeds=None
):
    """Yield one token a row [B] at a time until every row has ended or has max_new_tokens, one number or one a row.

    A row that has ended (its eos or its last token was yielded) yields pad from then on. With `seeds`, one a row in
    place of the sampling's own, a row draws the same in any company. Raises PaliGemmaError if `capacity`, or the
    engine, has too few positions, or if its logits are no numbers.
    """
    config, sampling, timings = engine.config, sampling or Sampling(), timings or Timings()
    input_ids, lengths = pad_prompts(prompts, config.pad)
    needed = choose_capacity(config, lengths, max_new_tokens, getattr(engine, "max_length", None))
    if capacity is not None:
        check_room(needed, capacity)
    capacity = capacity or needed
    draws, draw = uniforms(len(prompts), sampling.seed, seeds), getattr(engine, "sample", sample)
    alive, said = np.ones(len(prompts), bool), []

    started = time.perf_counter()
    logits, cache = engine.prefill(pixel_values, input_ids, lengths, capacity)
    timings.prefill_s = time.perf_counter() - started
    for step in range(np.max(max_new_tokens)):
        check_logits(engine, logits, alive, pixel_values, prompts, said)
        started = time.perf_counter()
        token = draw(logits, known, sampling.temperature, sampling.top_k, sampling.top_p, next(draws))
        if not isinstance(logits, np.ndarray):  # a device was still at work on them, and this the wait for it
            timings.add_wait(step, time.perf_counter() - started)
        token = np.where(alive, token, config.pad)
        said.append(token)
        yield token
        alive = alive & (token != config.eos) & (step + 1 < np.asarray(max_new_tokens))
        if not alive.any():
            return
        started = time.perf_counter()
        logits, cache = engine.decode(token[:, None], lengths, cache)
        timings.decode_s += time.perf_counter() - started
        timings.decode_tokens += int(alive.sum())
        # A finished row stays where it is, or on the last slot, and overwrites one that nobody reads.
        lengths = np.minimum(lengths + alive, capacity - 1).astype(np.int32)


def uniforms(rows, seed, seeds=None):
    """Without end, uniform [B] float32 in [0, 1): from one generator, or each row's from one of its own."""
    if seeds is None:
        generator = np.random.default_rng(seed)
        while True:
            yield generator.random(rows, np.float32)
    generators = [np.random.default_rng(own) for own in seeds]
    while True:
        yield np.array([generator.random(dtype=np.float32) for generator in generators])


def answers(tokens, eos):
    """Stacked yields [steps, B] -> one list of ids a row, cut before its eos."""
    rows = np.stack(tokens, axis=1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]
