"""From logits to the next token: greedy, temperature, top-k and top-p.

The randomness comes in as one uniform number a row, so that every host (Python, JavaScript, a graph)
draws the same token from the same number.
"""

from dataclasses import dataclass

import numpy as np

from .layers import Array, softmax

COLDEST = 1e-6  # temperature; below, logits may grow out of float32


@dataclass(frozen=True)
class Sampling:
    """How to draw. Temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def sample(
    logits: Array, known: Array, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    uniform: Array | None = None,
) -> Array:  # fmt: skip
    """Draw a token a row: logits [B, V], uniform [B] in [0, 1), known [V] bool -> int64 [B].

    Rows of the vocabulary that are not known are never drawn. Among equal logits the smaller id comes first. First
    top-k cuts, and what it leaves is a distribution of its own; then top-p cuts that.
    """
    logits = np.where(known, logits.astype(np.float32), np.float32(-np.inf))
    if temperature == 0:
        return logits.argmax(-1).astype(np.int64)
    assert uniform is not None, "only greedy sampling needs no uniform number"
    order = np.argsort(-logits, axis=-1, kind="stable")[:, : top_k or None]
    ranked = np.take_along_axis(logits, order, -1) / np.float32(temperature)
    weights = keep_top_p(softmax(ranked), top_p)
    return np.take_along_axis(order, invert_cdf(weights, uniform)[:, None], -1)[:, 0]


def log_probability(logits: Array, token: Array) -> Array:
    """The log-probability that the model gives a token: logits [B, V], token [B] -> float32 [B].

    The log-softmax, in float32, of the raw logits over all ids: before temperature, top-k and top-p, and with the ids
    that are never drawn. So it is the same for a token however it was drawn.
    """
    logits = logits.astype(np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, token[:, None], -1)[:, 0]
    return chosen - np.log(np.exp(shifted).sum(-1))


def likeliest(logits: Array, among: Array, count: int, ends: Array) -> tuple[Array, Array, Array]:
    """The ids of the `count` highest log-probabilities `among` some, falling; and what the `ends` have.

    logits [B, V], ends [E], among [V] bool -> int64 [B, M], float32 [B, M], float32 [B, E]. Log-probabilities are as
    in `log_probability`; among equal ones the smaller id comes first.
    """
    logits = logits.astype(np.float32)
    logprobs = logits - logits.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    # By logits, as `sample` ranks them: the log-softmax rounds, and may make two equal.
    ranked = np.stack([_highest(row, count) for row in np.where(among, logits, np.float32(-np.inf))])
    return ranked, np.take_along_axis(logprobs, ranked, -1), logprobs[:, ends]


def _highest(row, count):
    """Where the `count` highest numbers are: sorting these alone is quicker than sorting a vocabulary."""
    least = np.partition(row, -count)[-count]
    found = np.flatnonzero(~(row < least))  # a NaN among them
    return found[np.argsort(-row[found], kind="stable")[:count]]


def location_spread(logits: Array, locations: Array) -> Array:
    """The standard deviation of a location, in location tokens: logits [B, V], locations [L] -> float32 [B].

    sqrt(sum p_i (i - m)^2) with m = sum p_i i, where p is the softmax of the logits of the location tokens alone, whose
    ids are `locations` in rising order of place.
    """
    weights, places = softmax(logits[:, locations].astype(np.float32)), np.arange(len(locations), dtype=np.float32)
    away = places - (weights * places).sum(-1, keepdims=True)
    return np.sqrt((weights * away * away).sum(-1))


def keep_top_p(weights: Array, top_p: float) -> Array:
    """Zero what top-p cuts off (Holtzman et al. 2020): weights [B, K], falling, of sum one -> [B, K].

    The shortest head whose sum reaches p stays, and the first in any case.
    """
    # Shifted, not subtracted: 0.4 + 0.3 - 0.3 is less than 0.4.
    before = np.cumsum(np.pad(weights[:, :-1], ((0, 0), (1, 0))), -1)
    return np.where((before < top_p) | (np.arange(weights.shape[-1]) == 0), weights, 0)


def invert_cdf(weights: Array, uniform: Array) -> Array:
    """The first rank whose cumulated weight exceeds uniform * total: weights [B, K], uniform [B] -> [B]."""
    cumulated = np.cumsum(weights, -1)
    return (cumulated > uniform[:, None].astype(weights.dtype) * cumulated[:, -1:]).argmax(-1)
