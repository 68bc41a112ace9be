"""The generation loop, over any engine.

An engine has two functions (`paligemma.prefill` and `paligemma.decode` with their weights bound, the torch
twin, or the two ONNX sessions):

    prefill(pixel_values [B, 3, S, S], input_ids [B, T], lengths [B], capacity) -> logits [B, V], cache
    decode(input_ids [B, 1], lengths [B], cache) -> logits [B, V], cache

and says what else a caller must know: `config`, `resize` (its preprocessing) and `masks` (mask codes [B, 16] ->
[B, 64, 64], or None where no mask codec came with the weights). It may bring a `preprocess` and a `sample` of its own,
which then take the place of `image.preprocess` and `sampling.sample`.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from . import paligemma, segmentation
from .errors import PaliGemmaError
from .sampling import Sampling, sample


class NumpyEngine:
    """The reference as an engine."""

    name = "numpy"

    def __init__(self, checkpoint):
        self.config, self.resize, self.masks = checkpoint.config, checkpoint.resize, segmentation.decoder_of(checkpoint)
        self.params = checkpoint.params

    def prefill(self, pixel_values, input_ids, lengths, capacity):
        check_room(input_ids.shape[1], capacity)
        return paligemma.prefill(self.params, self.config, pixel_values, input_ids, lengths, capacity)

    def decode(self, input_ids, lengths, cache):
        check_room(lengths.max() + 1, cache[0][0].shape[2])
        return paligemma.decode(self.params, self.config, input_ids, lengths, cache)


@dataclass
class Timings:
    """Seconds spent in prefill and decode, filled in while generating."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: int = field(default=0)

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


def generate(
    engine, pixel_values, prompts, known, max_new_tokens=64, sampling=None, capacity=None, timings=None, seeds=None
):
    """Yield one token a row [B] at a time until every row has ended or has max_new_tokens, one number or one a row.

    A row that has ended (its eos or its last token was yielded) yields pad from then on. With `seeds`, one a row in
    place of the sampling's own, a row draws the same in any company. Raises PaliGemmaError if `capacity`, or the
    engine, has too few positions.
    """
    config, sampling, timings = engine.config, sampling or Sampling(), timings or Timings()
    input_ids, lengths = pad_prompts(prompts, config.pad)
    needed = choose_capacity(config, lengths, max_new_tokens, getattr(engine, "max_length", None))
    if capacity is not None:
        check_room(needed, capacity)
    capacity = capacity or needed
    draws, draw = uniforms(len(prompts), sampling.seed, seeds), getattr(engine, "sample", sample)
    alive = np.ones(len(prompts), bool)

    started = time.perf_counter()
    logits, cache = engine.prefill(pixel_values, input_ids, lengths, capacity)
    timings.prefill_s = time.perf_counter() - started
    for step in range(np.max(max_new_tokens)):
        token = draw(logits, known, sampling.temperature, sampling.top_k, sampling.top_p, next(draws))
        token = np.where(alive, token, config.pad)
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
