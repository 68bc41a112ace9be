"""Leaf functions, each the twin of its namesake in `numpy_ref/model/layers.py`, and the modules that hold weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from numpy_ref.model.layers import identity

Pair = tuple[Tensor, Tensor]  # (cosine, sine) of the rotary embedding, or (key, value) of a layer
Tap = Callable[[str, Tensor], Tensor]  # called with the name of an intermediate value and the value, which it returns


def upcast(x: Tensor) -> Tensor:
    """x [...] -> [...]: float16 and bfloat16 become float32, float32 and float64 stay."""
    return x.float() if x.dtype.itemsize < 4 else x


def cast_like(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype of x, without a copy if it already is: weight [...] -> [...]."""
    return weight.to(x.dtype)


def linear(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], kernel [in, out], bias [out] -> [..., out]."""
    y = x @ cast_like(kernel, x)
    return y if bias is None else y + cast_like(bias, x)


def embedding(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table: ids [...], table [V, D] -> [..., D]."""
    return nn.functional.embedding(ids, table).to(dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form: x [...] -> [...]."""
    return nn.functional.gelu(upcast(x), approximate="tanh").to(x.dtype)


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last axis: x [..., S] -> [..., S]."""
    return torch.softmax(x, -1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """tanh(x / cap) * cap; x itself when cap is None. x [...] -> [...]."""
    return x if cap is None else torch.tanh(x / cap) * cap


def layer_norm(x: Tensor, scale: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm: x [..., D], scale [D], bias [D] -> [..., D]. Variance divides by D."""
    x32 = upcast(x)
    centred = x32 - x32.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    return (normed * cast_like(scale, x32) + cast_like(bias, x32)).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMSNorm with the scale as an offset from one: x [..., D], scale [D] -> [..., D]."""
    x32 = upcast(x)
    normed = x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + eps)
    return (normed * (1 + cast_like(scale, x32))).to(x.dtype)


def rope_angles(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Pair:
    """Cosine and sine of the rotary embedding: positions [B, T] -> two [B, 1, T, H/2]."""
    steps = torch.arange(0, head_dim, 2, dtype=dtype, device=positions.device)
    frequencies = base ** (steps * (-1 / head_dim))
    angles = positions[:, None, :, None].to(dtype) * frequencies
    return torch.cos(angles), torch.sin(angles)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, T, H] by the angles of cos and sin [B, 1, T, H/2] -> [B, N, T, H], pairing the two halves."""
    x32 = upcast(x)
    first, second = x32.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, T, N*H] -> [B, N, T, H]."""
    batch, length, _ = x.shape
    return x.reshape(batch, length, heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """x [B, N, T, H] -> [B, T, N*H]."""
    batch, _, length, _ = x.shape
    return x.transpose(1, 2).reshape(batch, length, -1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, cap: float | None = None, tap: Tap = identity
) -> Tensor:
    """query [B, N, T, H] (scaled), key and value [B, K, S, H], mask [B, T, S] -> [B, N, T, H]."""
    batch, heads, length, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    # The queries that share a key head are stacked, so that each key is read once.
    query = query.reshape(batch, kv_heads, -1, head_dim)
    scores = upcast(tap("scores", query @ key.transpose(-1, -2)))
    scores = softcap(scores, cap)  # before the mask: a capped -inf would be an ordinary number
    scores = scores.reshape(batch, heads, length, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    weights = tap("weights", softmax(scores).to(value.dtype))
    context = weights.reshape(batch, kv_heads, -1, keys) @ value
    return context.reshape(batch, heads, length, head_dim)


def write_cache(cache: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """cache [B, K, C, H], update [B, K, T, H] written at start [B] of each row -> [B, K, C, H], a new tensor."""
    length = update.shape[2]
    slots = start[:, None] + torch.arange(length, device=start.device)
    index = slots[:, None, :, None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return cache.scatter(2, index.long(), update)


def relu(x: Tensor) -> Tensor:
    """max(x, 0): x [...] -> [...]."""
    return torch.relu(x)


def conv(x: Tensor, kernel: Tensor, bias: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """x [B, C, h, w], kernel [out, C, k, k], bias [out] -> [B, out, h', w']."""
    return nn.functional.conv2d(x, cast_like(kernel, x), cast_like(bias, x), stride, padding)


def conv_transpose(x: Tensor, kernel: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """x [B, C, h, w], kernel [C, out, k, k], bias [out] -> [B, out, h', w']."""
    return nn.functional.conv_transpose2d(x, cast_like(kernel, x), cast_like(bias, x), stride, padding)


def batch_norm(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """Batch normalisation at inference: x [B, D], scale, bias, mean and variance [D] -> [B, D]."""
    return nn.functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=eps)


def batch_norm_training(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in training: x [B, D], mean and variance [D] -> y [B, D], new mean [D], new variance [D]."""
    mean, variance = mean.clone(), variance.clone()  # PyTorch moves them in place
    y = nn.functional.batch_norm(x, mean, variance, scale, bias, training=True, momentum=momentum, eps=eps)
    return y, mean, variance


class Linear(nn.Module):
    """`linear` with its weights."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        nn.init.normal_(self.kernel, std=1 / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.kernel, self.bias)


class LayerNorm(nn.Module):
    """`layer_norm` with its weights."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.scale, self.bias, self.eps)


class RmsNorm(nn.Module):
    """`rms_norm` with its weight, which starts at zero: an offset from one."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)
