"""Leaf functions: every piece of arithmetic that the towers are made of, on plain arrays.

Each returns the dtype it was given. Half-precision values are lifted to float32 where the references
do so (norms, softmax, rotary angles) and lowered at the end; float64 stays float64, so that the whole
model can be refereed in it. Weights are cast to the dtype of the activation at the moment of use, which
lets a memory-mapped bfloat16 checkpoint run in float32 without a second copy of it.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

Array = np.ndarray  # of any shape and dtype; docstrings have the shapes
Pair = tuple[Array, Array]  # (cosine, sine) of the rotary embedding, or (key, value) of a layer
Params = dict[str, Any]  # weights by name: arrays, dicts of them, and for `blocks` a list of such dicts
Tap = Callable[[str, Array], Array]  # called with the name of an intermediate value and the value, which it returns
Value = TypeVar("Value")  # an array, a tensor or a value of a graph


def identity(name: str, value: Value) -> Value:
    """The tap that does nothing. A tap is called with each named intermediate value and returns it."""
    return value


def scoped(tap: Callable[[str, Value], Value], prefix: str) -> Callable[[str, Value], Value]:
    """A tap that puts `prefix.` before every name it is called with."""
    return tap if tap is identity else lambda name, value: tap(f"{prefix}.{name}", value)


def upcast(x: Array) -> Array:
    """x [...] -> [...]: float16 and bfloat16 become float32, float32 and float64 stay."""
    return x.astype(np.float32) if x.dtype.itemsize < 4 else x


def cast_like(weight: Array, x: Array) -> Array:
    """The weight in the dtype of x, without a copy if it already is: weight [...] -> [...]."""
    return weight.astype(x.dtype, copy=False)


def matmul(x: Array, y: Array) -> Array:
    """x [..., T, D] @ y [..., D, S] -> [..., T, S], in the dtype of x: NumPy's own product of bfloat16 is float32."""
    return (x @ y).astype(x.dtype, copy=False)


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """x [..., in], kernel [in, out], bias [out] -> [..., out]."""
    y = matmul(x, cast_like(kernel, x))
    return y if bias is None else y + cast_like(bias, x)


def embedding(ids: Array, table: Array, dtype: DTypeLike) -> Array:
    """Rows of a table: ids [...], table [V, D] -> [..., D]."""
    return table[ids].astype(dtype)


def gelu(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, eq. 2), as SigLIP and Gemma have it: x [...] -> [...]."""
    x32 = upcast(x)
    inner = math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32 * x32 * x32)
    return (x32 * 0.5 * (1 + np.tanh(inner))).astype(x.dtype)


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis, shifted so that exp cannot overflow: x [..., S] -> [..., S]."""
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def softcap(x: Array, cap: float | None) -> Array:
    """tanh(x / cap) * cap (Gemma 2 report, section 2); x itself when cap is None. x [...] -> [...]."""
    return x if cap is None else np.tanh(x / cap) * cap


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """LayerNorm (Ba et al. 2016): x [..., D], scale [D], bias [D] -> [..., D]. Variance divides by D."""
    x32 = upcast(x)
    centred = x32 - x32.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return (normed * cast_like(scale, x32) + cast_like(bias, x32)).astype(x.dtype)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """RMSNorm (Zhang & Sennrich 2019) as Gemma has it: x [..., D], scale [D] -> [..., D].

    The stored scale is an offset from one, and is multiplied in before the downcast: in half precision
    the other order rounds twice (transformers #29402).
    """
    x32 = upcast(x)
    normed = x32 / np.sqrt((x32 * x32).mean(-1, keepdims=True) + eps)
    return (normed * (1 + cast_like(scale, x32))).astype(x.dtype)


def rope_angles(positions: Array, head_dim: int, base: float, dtype: DTypeLike) -> Pair:
    """Cosine and sine of the rotary embedding (Su et al. 2021): positions [B, T] -> two [B, 1, T, H/2].

    Pair i turns by position * base ** (-2i / H). The axis of length one broadcasts over the heads.
    """
    frequencies = base ** (np.arange(0, head_dim, 2, dtype=dtype) * (-1 / head_dim))
    angles = positions[:, None, :, None].astype(dtype) * frequencies
    return np.cos(angles), np.sin(angles)


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate x [B, N, T, H] by the angles of cos and sin [B, 1, T, H/2] -> [B, N, T, H].

    Pairs are (x[i], x[i + H/2]), the two halves, as in Gemma; not neighbours as in the paper.
    """
    x32 = upcast(x)
    first, second = np.split(x32, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def split_heads(x: Array, heads: int) -> Array:
    """x [B, T, N*H] -> [B, N, T, H]."""
    batch, length, _ = x.shape
    return x.reshape(batch, length, heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x: Array) -> Array:
    """x [B, N, T, H] -> [B, T, N*H]."""
    batch, _, length, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def attend(
    query: Array, key: Array, value: Array, mask: Array | None = None, cap: float | None = None, tap: Tap = identity
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017) with grouped queries (Ainslie et al. 2023).

    query [B, N, T, H] (already scaled), key and value [B, K, S, H], mask [B, T, S] (True = may attend)
    -> [B, N, T, H]. Head n reads key head n // G. Multi-head attention is K = N, multi-query is K = 1.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    # The queries that share a key head are stacked, so that each key is read once.
    query = query.reshape(batch, kv_heads, -1, head_dim)
    scores = upcast(tap("scores", matmul(query, key.swapaxes(-1, -2))))
    scores = softcap(scores, cap)  # before the mask: a capped -inf would be an ordinary number
    scores = scores.reshape(batch, heads, length, keys)
    if mask is not None:
        scores = np.where(mask[:, None], scores, np.asarray(-np.inf, scores.dtype))
    weights = tap("weights", softmax(scores).astype(value.dtype))
    context = matmul(weights.reshape(batch, kv_heads, -1, keys), value)
    return context.reshape(batch, heads, length, head_dim)


def write_cache(cache: Array, update: Array, start: Array) -> Array:
    """A new cache with each row's update from position start on.

    cache [B, K, C, H], update [B, K, T, H], start [B] -> [B, K, C, H].
    """
    cache = cache.copy()
    for row, position in enumerate(start):
        cache[row, :, position : position + update.shape[2]] = update[row]
    return cache


# --- beside the two towers: what masks and older networks are made of --------------------------------------


def relu(x: Array) -> Array:
    """max(x, 0): x [...] -> [...]."""
    return np.maximum(x, 0)


def conv(x: Array, kernel: Array, bias: Array, stride: int = 1, padding: int = 0) -> Array:
    """Convolution as deep learning has it (cross-correlation): the kernel slides, and is not mirrored.

    x [B, C, h, w], kernel [out, C, k, k], bias [out] -> [B, out, h', w'], h' = (h + 2 padding - k) // stride + 1.
    """
    size = kernel.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
    y = np.einsum("bchwij,ocij->bohw", windows, cast_like(kernel, x), optimize=True)
    return y + cast_like(bias, x)[:, None, None]


def conv_transpose(x: Array, kernel: Array, bias: Array, stride: int, padding: int) -> Array:
    """The transposed convolution, which scatters each input over the window that `conv` would read.

    x [B, C, h, w], kernel [C, out, k, k], bias [out] -> [B, out, h', w'], h' = (h - 1) stride - 2 padding + k.
    """
    batch, _, height, width = x.shape
    size = kernel.shape[-1]
    spread = np.zeros((batch, kernel.shape[1], (height - 1) * stride + size, (width - 1) * stride + size), x.dtype)
    patches = np.einsum("bchw,coij->boijhw", x, cast_like(kernel, x), optimize=True)
    for i in range(size):
        for j in range(size):
            spread[:, :, i : i + height * stride : stride, j : j + width * stride : stride] += patches[:, :, i, j]
    inside = slice(padding, -padding or None)
    return spread[:, :, inside, inside] + cast_like(bias, x)[:, None, None]


def batch_norm(x: Array, scale: Array, bias: Array, mean: Array, variance: Array, eps: float) -> Array:
    """Batch normalisation at inference (Ioffe & Szegedy 2015): x [B, D], scale, bias, mean and variance [D] -> [B, D].

    Mean and variance are fixed, gathered in training. PaliGemma has none: a row's result would hang on the rows that
    trained beside it, and rows of unequal length have no common statistics. Layer and RMS norm, which look along the
    features of one position, took its place in transformers.
    """
    x32 = upcast(x)
    normed = (x32 - cast_like(mean, x32)) / np.sqrt(cast_like(variance, x32) + eps)
    return (normed * cast_like(scale, x32) + cast_like(bias, x32)).astype(x.dtype)


def batch_norm_training(
    x: Array, scale: Array, bias: Array, mean: Array, variance: Array, eps: float, momentum: float
) -> tuple[Array, Array, Array]:
    """Batch normalisation in training: by the batch's own statistics, which also move the running ones.

    x [B, D], scale, bias, mean and variance [D] -> y [B, D], new mean [D], new variance [D]. The batch is normed by
    the variance that divides by B; the running one takes in the unbiased one, which divides by B - 1. `momentum` is
    the weight of the new value, as in PyTorch.
    """
    x32 = upcast(x)
    batch_mean = x32.mean(0)
    centred = x32 - batch_mean
    batch_variance = (centred * centred).mean(0)
    y = batch_norm(x, scale, bias, batch_mean, batch_variance, eps)
    unbiased = batch_variance * (len(x) / (len(x) - 1))
    return y, mean + momentum * (batch_mean - mean), variance + momentum * (unbiased - variance)
