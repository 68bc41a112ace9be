"""Operators of ONNX Runtime's own, and large standard ones, for several small ones: same numbers, fewer nodes.

`layers.fusible` takes these where a graph is built with `operators="fused"`. What is not here stays as it is.

attention in prefill   MultiHeadAttention without a mask goes through the keys in tiles: scores are never held whole.
                       Padding is told by one more column: 1 in every query, 0 or -1e9 in the keys.
attention in decode    GroupQueryAttention writes into the cache where it lies, and reads only what is filled.
kernels in few bits    those that read the same input, side by side in the weights file, are taken as one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from numpy_ref.layers import identity

from . import gemma, layers, paligemma
from .quantize import CONTRIB, Blocks, Channels

_MASKED = -1e9  # a score that leaves a weight of zero


def rms_norm(op, x, scale, eps):
    """RMSNorm with the scale as an offset from one: x [..., D], scale [D] -> [..., D]."""
    x32 = layers.upcast(op, x)
    gain = op.Add(layers.cast_like(op, scale, x32), 1.0)  # made once, when the graph is loaded
    normed = op.SimplifiedLayerNormalization(x32, gain, axis=-1, epsilon=eps, _version=1)
    return layers.cast_like(op, _like(normed, x32), x)


def layer_norm(op, x, scale, bias, eps):
    """LayerNorm: x [..., D], scale [D], bias [D] -> [..., D]."""
    x32 = layers.upcast(op, x)
    scale, bias = layers.cast_like(op, scale, x32), layers.cast_like(op, bias, x32)
    return layers.cast_like(op, op.LayerNormalization(x32, scale, bias, axis=-1, epsilon=eps), x)


def gelu(op, x):
    """GELU in its tanh form."""
    return op.Gelu(x, approximate="tanh")


def rope(op, x, cos, sin):
    """Rotate x [B, N, T, H] by the angles [B, 1, T, H/2], pairing the two halves."""
    x32 = layers.upcast(op, x)
    rows = op.Concat(op.Shape(x, start=0, end=1), op.Shape(cos, start=2, end=4), axis=0)
    cos, sin = (op.Expand(op.Squeeze(angles, [1]), rows) for angles in (cos, sin))
    return layers.cast_like(op, _like(op.RotaryEmbedding(x32, cos, sin), x32), x)


def attend(op, query, key, value, mask=None, cap=None, tap=identity):
    """query [B, N, T, H] (scaled), key and value [B, K, S, H], mask [B, 1, S] -> [B, N, T, H]."""
    if cap is not None:  # the operator has none
        return layers.attend.portable(op, query, key, value, mask, cap, tap)
    size = query.shape[3]
    # Queries that share a key head are stacked; each key head is a row of a batch for itself.
    stacked = op.Reshape(query, op.Concat(_rows(op, key), [-1, size], axis=0))
    keys, values = (op.Reshape(x, op.Concat(_rows(op, x), op.Shape(x, start=2), axis=0)) for x in (key, value))
    if mask is not None:
        stacked, keys = _with_padding(op, stacked, keys, key, mask)
    context = op.MultiHeadAttention(stacked, keys, values, num_heads=1, scale=1.0, _domain=CONTRIB, _version=1)
    context.dtype = query.dtype
    return _like(op.Reshape(context, op.Shape(query)), query)


def _rows(op, x):
    """[B, K, ...] -> the number B * K, in one dimension."""
    return op.Mul(op.Shape(x, start=0, end=1), op.Shape(x, start=1, end=2))


def _with_padding(op, query, keys, key, mask):
    """One more column, by which every query scores a key that is masked down: both [B * K, ..., H + 1]."""
    one = op.Expand(_constant(op, 1.0, query), op.Concat(op.Shape(query, start=0, end=2), [1], axis=0))
    score = op.Where(mask, _constant(op, 0.0, query), _constant(op, _MASKED, query))
    heads = op.Expand(score, op.Shape(key, start=0, end=3))  # [B, K, S]
    column = op.Reshape(heads, op.Concat(op.Shape(keys, start=0, end=2), [1], axis=0))
    return op.Concat(query, one, axis=-1), op.Concat(keys, column, axis=-1)


def attention(op, p, config, x, rotary, mask, cache=None, start=None, tap=identity):
    """Grouped-query attention: [B, T, D] -> [B, T, D] and its (key, value). In decode `mask` is a Window."""
    if cache is None or config.head_dim % 8:  # GroupQueryAttention takes no others
        mask = mask.built() if isinstance(mask, Window) else mask
        return gemma.attention.portable(op, p, config, x, rotary, mask, cache, start, tap)
    query, key, value = (layers.cast_like(op, each, cache[0]) for each in _project(op, x, p, ("query", "key", "value")))
    cos, sin = (op.Squeeze(angles, [1]) for angles in rotary)
    query, key = (
        layers.cast_like(op, _rotate(op, each, cos, sin, heads), cache[0])
        for each, heads in ((query, config.heads), (key, config.kv_heads))
    )
    filled = op.Cast(start, to=DataType.INT32)
    total = op.Add(op.ReduceMax(filled, keepdims=0), op.Constant(value=ir.tensor(np.array(1, np.int32))))
    context, key, value = op.GroupQueryAttention(
        query, key, value, *cache, filled, total, num_heads=config.heads, kv_num_heads=config.kv_heads,
        scale=config.query_scale, softcap=config.attn_softcap or 0.0, local_window_size=mask.size or -1,
        _domain=CONTRIB, _version=1, _outputs=3,
    )  # fmt: skip
    context.dtype, context.shape = cache[0].dtype, ir.Shape([*list(x.shape)[:2], config.heads * config.head_dim])
    updated = tuple(_like(each, past) for each, past in zip((key, value), cache, strict=True))
    return layers.linear(op, context, **p["output"]), updated


def _rotate(op, x, cos, sin, heads):
    """Rotate x [B, T, N*H] in float32 by the angles [B, T, H/2]."""
    x32 = layers.upcast(op, x)
    return _like(op.RotaryEmbedding(x32, cos, sin, num_heads=heads), x32)


def mlp(op, p, x):
    """GeGLU: gelu(x @ gate) * (x @ up) @ down, without biases. [B, T, D] -> [B, T, D]."""
    up = p["up"]["kernel"]
    if isinstance(up, Channels):  # the factors of its rows go through the last product: that is narrower
        hidden, factors = up.multiply_apart(op, x)
        hidden = op.Mul(gelu(op, layers.linear(op, x, **p["gate"])), hidden)
        return op.Mul(layers.linear(op, hidden, **p["down"]), factors)
    gate, up = _project(op, x, p, ("gate", "up"))
    return layers.linear(op, op.Mul(gelu(op, gate), up), **p["down"])


def decoder(op, p, config, x, positions, masks, cache=None, start=None, tap=identity):
    """All layers and the final norm; of prefill only each row's last position, [B, 1, D]: the rest is not asked for."""
    if cache is not None:
        return gemma.decoder.portable(op, p, config, x, positions, masks, cache, start, tap)
    dtype, caches = layers.upcast(op, x).dtype, []
    rotary = layers.rope_angles(op, positions, config.head_dim, config.rope_base, dtype)
    for i, weights in enumerate(p["blocks"][:-1]):
        x, layer_cache = gemma.block(op, weights, config, x, rotary, masks[config.window(i)])
        caches.append(layer_cache)
    mask = masks[config.window(config.depth - 1)]
    last = op.Sub(op.ReduceSum(op.Cast(mask, to=DataType.INT64), [2], keepdims=0), 1)  # [B, 1]
    there = layers.rope_angles(op, last, config.head_dim, config.rope_base, dtype)
    x, layer_cache = _last_block(op, p["blocks"][-1], config, x, rotary, there, mask, last)
    return layers.rms_norm(op, x, **p["norm"], eps=config.eps), [*caches, layer_cache]


def _last_block(op, p, config, x, rotary, there, mask, last):
    """A layer whose output is wanted at one position a row: x [B, T, D] -> [B, 1, D], and all keys and values."""
    normed = layers.rms_norm(op, x, **p["attention_norm"], eps=config.eps)
    x, asking = (op.GatherND(each, op.Unsqueeze(last, [2]), batch_dims=1) for each in (x, normed))
    query, key, value = (
        layers.split_heads(op, layers.linear(op, each, **p["attention"][name]), heads)
        for each, name, heads in ((asking, "query", config.heads), (normed, "key", config.kv_heads),
                                  (normed, "value", config.kv_heads))
    )  # fmt: skip
    query, key = op.Mul(rope(op, query, *there), config.query_scale), rope(op, key, *rotary)
    context = attend(op, query, key, value, mask, config.attn_softcap)
    update = layers.linear(op, layers.merge_heads(op, context), **p["attention"]["output"])
    if config.post_norms:
        update = layers.rms_norm(op, update, **p["post_attention_norm"], eps=config.eps)
    x = layers.residual(op, x, update)
    update = gemma.mlp(op, p["mlp"], layers.rms_norm(op, x, **p["mlp_norm"], eps=config.eps))
    if config.post_norms:
        update = layers.rms_norm(op, update, **p["post_mlp_norm"], eps=config.eps)
    return layers.residual(op, x, update), (key, value)


def last_position(op, x, lengths):
    """What stands at each row's last token: x [B, 1, D], which has nothing else, -> [B, D]."""
    return op.Squeeze(x, [1])


def _project(op, x, p, names):
    """x through several kernels; through one where they lie side by side in the file."""
    kernels = [p[name]["kernel"] for name in names]
    packed = pack(op, kernels)
    if packed is None:
        return [layers.linear(op, x, kernel) for kernel in kernels]
    sizes = [kernel.values.shape[0] for kernel in kernels]
    parts = op.Split(layers.linear(op, x, packed), sizes, axis=-1, _outputs=len(sizes))
    for part, size in zip(parts, sizes, strict=True):
        part.dtype, part.shape = DataType.FLOAT, ir.Shape([*list(x.shape)[:-1], size])
    return parts


def pack(op, kernels) -> Blocks | None:
    """Kernels in blocks as one, if they follow one another in the weights file; None if they do not."""
    if not all(isinstance(kernel, Blocks) for kernel in kernels):
        return None
    joined = [_joined([getattr(kernel, name) for kernel in kernels]) for name in ("values", "scales")]
    if None in joined:
        return None
    values, scales = (op.initializer(tensor, tensor.name) for tensor in joined)
    return Blocks(values, None, scales, kernels[0].bits)


def _joined(values):
    """Initializers whose bytes follow one another, as one tensor."""
    tensors = [value.const_value for value in values]
    first = tensors[0]
    if not all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
        return None
    if any(before.offset + before.length != after.offset for before, after in pairwise(tensors)):
        return None
    rows, length = sum(tensor.shape[0] for tensor in tensors), sum(tensor.length for tensor in tensors)
    return ir.ExternalTensor(
        first.location, first.offset, length, first.dtype, shape=ir.Shape([rows, *list(first.shape)[1:]]),
        name=f"{first.name}.packed", base_dir=first.base_dir,
    )  # fmt: skip


@dataclass(frozen=True)
class Window:
    """What stands for the mask of decode: how many positions back a token sees, None for all; and how to build it."""

    size: int | None
    built: Callable


def prefix_mask(op, prefix_lengths, lengths, size, window=None):
    """Who may be attended to: [B, 1, size], True = may. In prefill all is prefix, and every token sees all of it."""
    return op.Less(op.Unsqueeze(op.Range(0, size, 1), [0, 1]), op.Unsqueeze(lengths, [1, 2]))


def decode_mask(op, lengths, capacity, window=None):
    """No mask yet: GroupQueryAttention knows what is filled."""
    return Window(window, partial(paligemma.decode_mask.portable, op, lengths, capacity, window))


def _like(value, other):
    """A value whose type and shape the graph library does not know, said to be another's."""
    value.dtype, value.shape = other.dtype, other.shape
    return value


def _constant(op, number, like):
    return layers.cast_like(op, op.Constant(value_float=number), like)
