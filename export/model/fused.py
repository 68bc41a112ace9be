"""Operators of ONNX Runtime's own, and large standard ones, for several small ones: same numbers, fewer nodes.

For graphs whose stream is float32, where they are quick on the CPU: `INSTEAD`, at the end, says what takes whose place.
(`fused_half.py` is for half precision on CUDA.)

attention in prefill   MultiHeadAttention without a mask goes through the keys in tiles: scores are never held whole.
                       Padding is told by one more column: 1 in every query, 0 or -1e9 in the keys.
attention in decode    GroupQueryAttention writes into the cache where it lies, and reads only what is filled.
attention in extend    the portable one, since that operator takes several tokens behind a cache from one row alone.
rotary embedding       ONNX Runtime's own, which runtimes from before opset 23 have too.
kernels in few bits    those that read the same input, side by side in the weights file, are taken as one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType, Value

from numpy_ref.config import GemmaConfig, SiglipConfig
from numpy_ref.model.layers import Params, identity, scoped

from . import gemma, layers, paligemma, siglip
from .layers import Mask, Op, Pair, Rotary, Tap, Weight
from .quantized import CONTRIB, Blocks, Channels

HEADS = 8  # what divides the head sizes that GroupQueryAttention takes
_MASKED = -1e9  # a score that leaves a weight of zero


def rms_norm(op: Op, x: Value, scale: Value, eps: float) -> Value:
    """RMSNorm with the scale as an offset from one: x [..., D], scale [D] -> [..., D]."""
    gain = op.Add(scale, 1.0)  # made once, when the graph is loaded
    return like(op.SimplifiedLayerNormalization(x, gain, axis=-1, epsilon=eps, _version=1), x)


def layer_norm(op: Op, x: Value, scale: Value, bias: Value, eps: float) -> Value:
    """LayerNorm: x [..., D], scale [D], bias [D] -> [..., D]."""
    return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=eps)


def gelu(op: Op, x: Value) -> Value:
    """GELU in its tanh form."""
    return op.Gelu(x, approximate="tanh")


def rope_angles(op: Op, positions: Value, head_dim: int, base: float, dtype: DataType) -> Rotary:
    """What RotaryEmbedding takes: positions [B, T] -> themselves, and two tables [positions there are, H/2]."""
    return op.Clip(positions, 0, op.max_length - 1), *rotary_tables(op, head_dim, base, dtype)


def rotary_tables(op: Op, head_dim: int, base: float, dtype: DataType) -> Pair:
    """Cosine and sine at every position that the model has: two [positions, H/2], made when the graph is loaded."""
    positions = op.Unsqueeze(op.Range(0, op.max_length, 1), [0])
    angles = layers.rope_angles.portable(op, positions, head_dim, base, DataType.FLOAT)
    cos, sin = (layers.cast_to(op, op.Squeeze(table, [0, 1]), dtype) for table in angles)
    return cos, sin


def rope(op: Op, x: Value, positions: Value, cos: Value, sin: Value) -> Value:
    """Rotate x [B, N, T, H] by the angles of `rope_angles`, pairing the two halves."""
    return like(op.RotaryEmbedding(x, positions, cos, sin, _domain=CONTRIB, _version=1), x)


def flatten_rows(op: Op, x: Value, rows: str) -> Value:
    """x [B, T, D] -> [1, B * T, D]: all rows along one axis, as kernels that scale each row want them.

    `rows` is what to call that axis.
    """
    return _with_rows(op.Reshape(x, [1, -1, x.shape[-1]]), x, rows)


def by_head(op: Op, tap: Tap, heads: int, batch: Value | tuple[int] = (0,), factor: float = 1.0) -> Tap:
    """A tap for values [..., N * H], which it passes on as the reference has them, [B, N, T, H]; `batch` [1] is B.

    Queries are passed on times the factor that the operator puts into the scores. Without a tap there are no nodes.
    """

    def split(name, value):
        shape = op.Concat(batch, [-1, heads, value.shape[-1] // heads], axis=0)
        parted = op.Transpose(op.Reshape(value, shape), perm=[0, 2, 1, 3])
        tap(name, parted if factor == 1.0 else op.Mul(parted, factor))
        return value

    return tap if tap is identity else split


def patch_block(op: Op, p: Params, config: SiglipConfig, x: Value, tap: Tap = identity) -> Value:
    """A block of the vision tower: [B, P, D] -> [B, P, D]. Taps see all patches along one axis, [1, B * P, D]."""
    rows = siglip.block.portable(op, p, config, flatten_rows(op, x, "patches of all"), tap)
    return like(op.Reshape(rows, [-1, config.patches, config.width]), x)


def patch_attention(op: Op, p: Params, config: SiglipConfig, x: Value, tap: Tap = identity) -> Value:
    """Multi-head attention of every patch to every patch of its picture: [1, B * P, D] -> [1, B * P, D]."""
    query, key, value = (
        op.Reshape(layers.linear(op, x, **p[name]), [-1, config.patches, config.width])
        for name in ("query", "key", "value")
    )
    scale, split = 1 / math.sqrt(config.head_dim), by_head(op, tap, config.heads)
    by_head(op, tap, config.heads, factor=scale)("query", query)
    split("key", key)
    split("value", value)
    context = op.MultiHeadAttention(query, key, value, num_heads=config.heads, scale=scale, _domain=CONTRIB, _version=1)
    context = split("context", like(context, query))
    context = _with_rows(op.Reshape(context, [1, -1, config.width]), query, x.shape[1])
    return layers.linear(op, context, **p["output"])


@dataclass(frozen=True)
class Padding:
    """What stands for the mask of prefill, where every token sees all of the prefix: which keys are padding.

    A column more in every key, 0 or -1e9, which the 1 in that column of every query adds to the score. A soft cap makes
    -1 of that, in its own units, so they are 1e9 for such a key.
    """

    mask: Value  # [B, 1, T], True = a token
    batch: Value  # [1], how many sequences lie in the line of rows
    column: Value  # [B, T, K, 1]
    ones: Value  # [B, queries of a key head, K, 1]
    caps: Value | None  # [B, 1, 1, T], if there is a soft cap

    def part(self, op: Op, x: Value, heads: int, size: int) -> Value:
        """x [1, B * T, N * H] -> [B, T, N, H]."""
        parted = op.Reshape(x, op.Concat(self.batch, [-1, heads, size], axis=0))
        parted.dtype, parted.shape = x.dtype, ir.Shape(["B", None, heads, size])
        return parted


@dataclass(frozen=True)
class Window:
    """What stands for the mask of decode: how many positions back a token sees, None for all; and how to build it."""

    size: int | None
    built: Callable


def _padding(op, config, mask, dtype):
    """The padding that a mask [B, 1, T] tells, for queries at all positions."""
    one, none, score = (layers.cast_to(op, op.Constant(value_float=x), dtype) for x in (1.0, 0.0, _MASKED))
    group = config.heads // config.kv_heads
    column = op.Unsqueeze(op.Transpose(op.Where(mask, none, score), perm=[0, 2, 1]), [3])
    ones = op.Reshape(op.Expand(op.Where(mask, one, one), [1, group, 1]), [0, -1, 1, 1])
    column, ones = (op.Expand(each, [1, 1, config.kv_heads, 1]) for each in (column, ones))
    caps = None
    if config.attn_softcap is not None:
        caps = op.Where(op.Unsqueeze(mask, [1]), config.attn_softcap, -_MASKED)
    return Padding(mask, op.Shape(mask, end=1), column, ones, caps)


@layers.named
def prefix_attention(
    op: Op, p: Params, config: GemmaConfig, asking: Value, x: Value, there: Rotary, rotary: Rotary,
    padding: Padding, tap: Tap = identity,
) -> tuple[Value, Pair]:  # fmt: skip
    """What the tokens `asking` [1, B * A, D], at the angles `there`, take from all of x [1, B * T, D].

    -> [1, B * A, D], and keys and values [B, K, T, H].
    """
    query, key, value = (
        layers.linear(op, each, **p[name]) for each, name in ((asking, "query"), (x, "key"), (x, "value"))
    )
    query, key = (
        _rotate(op, each, angles, heads)
        for each, angles, heads in ((query, there, config.heads), (key, rotary, config.kv_heads))
    )
    by_head(op, tap, config.heads, padding.batch, config.query_scale)("query", query)
    key, value = (padding.part(op, each, config.kv_heads, config.head_dim) for each in (key, value))
    cache = tap("key", op.Transpose(key, perm=[0, 2, 1, 3])), tap("value", op.Transpose(value, perm=[0, 2, 1, 3]))
    if config.attn_softcap is None:
        context = _in_tiles(op, config, query, key, value, padding)
    else:  # the operator has none
        context = _with_softcap(op, config, query, cache, padding, tap)
    context = op.Reshape(context, [1, -1, config.heads * config.head_dim])
    context.dtype, context.shape = value.dtype, ir.Shape([1, asking.shape[1], config.heads * config.head_dim])
    context = by_head(op, tap, config.heads, padding.batch)("context", context)
    return layers.linear(op, context, **p["output"]), cache


def _in_tiles(op, config, query, key, value, padding):
    """query [1, B * A, N * H], key and value [B, T, K, H] -> what lies in memory as [1, B * A, N * H].

    Queries that share a key head are stacked.
    """
    heads, group, size = config.kv_heads, config.heads // config.kv_heads, config.head_dim
    if heads > 1:
        query = op.Transpose(op.Reshape(query, [0, 0, heads, group, size]), perm=[0, 1, 3, 2, 4])
    stacked = op.Concat(padding.part(op, query, heads, size), padding.ones, axis=3)
    keys = op.Concat(key, padding.column, axis=3)
    context = op.MultiHeadAttention(
        *(op.Reshape(each, [0, 0, -1]) for each in (stacked, keys, value)), num_heads=heads,
        scale=config.query_scale, _domain=CONTRIB, _version=1,
    )  # fmt: skip
    context.dtype = value.dtype
    if heads > 1:
        context = op.Transpose(op.Reshape(context, [-1, group, heads, size]), perm=[0, 2, 1, 3])
    return context


def _with_softcap(op, config, query, cache, padding, tap):
    """query [1, B * A, N * H], key and value [B, K, T, H] -> [B, A, N * H], with few passes over the scores.

    One key head after the other, so that the scores of one alone are held.
    """
    heads, size = config.kv_heads, config.head_dim
    query = padding.part(op, op.Mul(query, config.query_scale / config.attn_softcap), config.heads, size)
    query = op.Transpose(query, perm=[0, 2, 1, 3])
    ones, column = (op.Transpose(each, perm=[0, 2, 1, 3]) for each in (padding.ones, padding.column))
    stacked = op.Concat(op.Reshape(query, [0, heads, -1, size]), ones, axis=3)
    keys = op.Transpose(op.Concat(cache[0], column, axis=3), perm=[0, 1, 3, 2])
    parts = zip(*(_by_key_head(op, each, heads) for each in (stacked, keys, cache[1])), strict=True)
    scores, weights, contexts = [], [], []
    for asking, key, value in parts:
        scores.append(op.MatMul(asking, key))  # in caps
        weights.append(op.Softmax(op.Mul(op.Tanh(scores[-1]), padding.caps), axis=-1))
        contexts.append(op.MatMul(weights[-1], value))
    if tap is not identity:
        by_query = op.Concat(op.Shape(query, end=3), op.Shape(keys, start=3), axis=0)
        tap("scores", op.Mul(op.Concat(*scores, axis=1), config.attn_softcap))
        tap("weights", op.Reshape(op.Concat(*weights, axis=1), by_query))
    return layers.merge_heads(op, op.Reshape(op.Concat(*contexts, axis=1), op.Shape(query)))


def _by_key_head(op, x, heads):
    return op.Split(x, [1] * heads, axis=1, _outputs=heads) if heads > 1 else [x]


def attention(
    op: Op, p: Params, config: GemmaConfig, x: Value, rotary: Rotary, mask: Padding | Window | Value,
    cache: Pair | None = None, start: Value | None = None, tap: Tap = identity,
) -> tuple[Value, Pair]:  # fmt: skip
    """Grouped-query attention: [B, T, D] -> [B, T, D] and its (key, value).

    `mask` is a Padding in prefill, a Window in decode, and in extend [B, T, C].
    """
    if isinstance(mask, Padding):
        return prefix_attention(op, p, config, x, x, rotary, rotary, mask, tap)
    if isinstance(mask, Value):
        parts = project(op, x, p, ("query", "key", "value"))
        return attend_behind(op, p, config, parts, rotary, mask, cache, start, tap)
    if config.head_dim % HEADS:
        return gemma.attention.portable(op, p, config, x, rotary, mask.built(), cache, start, tap)
    query, key, value = project(op, x, p, ("query", "key", "value"))
    query, key = (_rotate(op, each, rotary, heads) for each, heads in ((query, config.heads), (key, config.kv_heads)))
    by_head(op, tap, config.heads, factor=config.query_scale)("query", query)
    for name, each in (("key", key), ("value", value)):
        by_head(op, tap, config.kv_heads)(name, each)
    filled = op.Cast(start, to=DataType.INT32)
    total = op.Add(op.ReduceMax(filled, keepdims=0), op.Constant(value=ir.tensor(np.array(1, np.int32))))
    context, key, value = op.GroupQueryAttention(
        query, key, value, *cache, filled, total, num_heads=config.heads, kv_num_heads=config.kv_heads,
        scale=config.query_scale, softcap=config.attn_softcap or 0.0, local_window_size=mask.size or -1,
        _domain=CONTRIB, _version=1, _outputs=3,
    )  # fmt: skip
    context.dtype, context.shape = cache[0].dtype, ir.Shape([*list(x.shape)[:2], config.heads * config.head_dim])
    context = by_head(op, tap, config.heads)("context", context)
    updated = like(key, cache[0]), like(value, cache[1])
    return layers.linear(op, context, **p["output"]), updated


def attend_behind(
    op: Op, p: Params, config: GemmaConfig, parts: Sequence[Value], rotary: Rotary, mask: Value, cache: Pair,
    start: Value, tap: Tap = identity,
) -> tuple[Value, Pair]:  # fmt: skip
    """Queries, keys and values of several tokens, each [B, T, heads * H], behind a cache: the portable attention."""
    query, key, value = (
        layers.split_heads(op, each, heads)
        for each, heads in zip(parts, (config.heads, config.kv_heads, config.kv_heads), strict=True)
    )
    query = tap("query", op.Mul(layers.rope(op, query, *rotary), config.query_scale))
    key, value = tap("key", layers.rope(op, key, *rotary)), tap("value", value)
    key, value = (layers.write_cache(op, *each, start) for each in zip(cache, (key, value), strict=True))
    context = tap("context", layers.attend(op, query, key, value, mask, config.attn_softcap, tap))
    return layers.linear(op, layers.merge_heads(op, context), **p["output"]), (key, value)


def _rotate(op, x, rotary, heads):
    """Rotate x [B, T, N*H] by the angles of `rope_angles`.

    Each token is a row of its own: the operator takes none that is longer than its tables, as that of a batch may be.
    """
    if x.shape[1] == 1:  # they are
        return like(op.RotaryEmbedding(x, *rotary, num_heads=heads, _domain=CONTRIB, _version=1), x)
    positions, *tables = rotary
    tokens, at = op.Reshape(x, [-1, 1, x.shape[-1]]), op.Reshape(positions, [-1, 1])
    rotated = op.RotaryEmbedding(tokens, at, *tables, num_heads=heads, _domain=CONTRIB, _version=1)
    return like(op.Reshape(rotated, op.Shape(x)), x)


def mlp(op: Op, p: Params, x: Value) -> Value:
    """GeGLU: gelu(x @ gate) * (x @ up) @ down, without biases. [B, T, D] -> [B, T, D]."""
    up = p["up"]["kernel"]
    if isinstance(up, Channels):  # the factors of its rows go through the last product: that is narrower
        hidden, factors = up.multiply_apart(op, x)
        hidden = op.Mul(gelu(op, layers.linear(op, x, **p["gate"])), hidden)
        return op.Mul(layers.linear(op, hidden, **p["down"]), factors)
    gate, up = project(op, x, p, ("gate", "up"))
    return layers.linear(op, op.Mul(gelu(op, gate), up), **p["down"])


def decoder(
    op: Op, p: Params, config: GemmaConfig, x: Value, positions: Value, masks: dict[int | None, Mask],
    cache: list[Pair] | None = None, start: Value | None = None, tap: Tap = identity,
) -> tuple[Value, list[Pair]]:  # fmt: skip
    """All layers and the final norm; of prefill only each row's last position, [1, B, D]: the rest is not asked for."""
    if cache is not None:
        return gemma.decoder.portable(op, p, config, x, positions, masks, cache, start, tap)
    dtype, caches = x.dtype, []
    each = op.Reshape(op.Expand(positions, op.Shape(x, end=2)), [1, -1])
    rotary = layers.rope_angles(op, each, config.head_dim, config.rope_base, dtype)
    mask = masks[config.window(0)]  # all the same
    padding = _padding(op, config, mask, p["blocks"][0]["attention"]["key"]["kernel"].dtype)
    x = flatten_rows(op, x, "tokens of all")
    *before, final = p["blocks"]
    for i, weights in enumerate(before):
        x, layer_cache = gemma.block(op, weights, config, x, rotary, padding, tap=scoped(tap, f"blocks.{i}"))
        x = tap(f"blocks.{i}", x)
        caches.append(layer_cache)
    last = op.Sub(op.ReduceSum(op.Cast(mask, to=DataType.INT64), [1, 2], keepdims=0), 1)  # [B]
    there = layers.rope_angles(op, op.Unsqueeze(last, [0]), config.head_dim, config.rope_base, dtype)
    name = f"blocks.{len(before)}"
    x, layer_cache = _last_block(op, final, config, x, rotary, there, padding, last, scoped(tap, name))
    return tap("norm", layers.rms_norm(op, tap(name, x), **p["norm"], eps=config.eps)), [*caches, layer_cache]


@layers.named
def _last_block(op, p, config, x, rotary, there, padding, last, tap=identity):
    """A layer whose output is wanted at one position a row, last [B]: x [1, B * T, D] -> [1, B, D], keys and values."""
    normed = tap("attention_norm", layers.rms_norm(op, x, **p["attention_norm"], eps=config.eps))
    batch, length = (op.Squeeze(op.Shape(padding.mask, start=axis, end=axis + 1), [0]) for axis in (0, 2))
    places = op.Add(last, op.Mul(op.Range(0, batch, 1), length))
    x, asking = (_with_rows(op.Gather(each, places, axis=1), each, "B") for each in (x, normed))
    padding = replace(padding, ones=op.Slice(padding.ones, [0], [config.heads // config.kv_heads], [1]))
    within = scoped(tap, "attention")
    update, cache = prefix_attention(op, p["attention"], config, asking, normed, there, rotary, padding, within)
    update = tap("attention", update)
    if config.post_norms:
        update = tap("post_attention_norm", layers.rms_norm(op, update, **p["post_attention_norm"], eps=config.eps))
    x, normed = layers.add_rms_norm(op, x, update, **p["mlp_norm"], eps=config.eps)
    update = tap("mlp", gemma.mlp(op, p["mlp"], tap("mlp_norm", normed)))
    if config.post_norms:
        update = tap("post_mlp_norm", layers.rms_norm(op, update, **p["post_mlp_norm"], eps=config.eps))
    return layers.residual(op, x, update), cache


def last_position(op: Op, x: Value, lengths: Value) -> Value:
    """What stands at each row's last token: x [1, B, D], which has nothing else, -> [B, D]."""
    return op.Squeeze(x, [0])


def project(op: Op, x: Value, p: Params, names: Sequence[str], split: bool = True) -> list[Value]:
    """x through several kernels; through one where they lie side by side in the file, and then split again or not."""
    kernels = [p[name]["kernel"] for name in names]
    packed = pack(op, kernels)
    if packed is None:
        return [layers.linear(op, x, kernel) for kernel in kernels]
    product = layers.linear(op, x, packed)
    if not split:
        return [product]
    sizes = [kernel.values.shape[0] for kernel in kernels]
    parts = op.Split(product, sizes, axis=-1, _outputs=len(sizes))
    for part, size in zip(parts, sizes, strict=True):
        part.dtype, part.shape = product.dtype, ir.Shape([*list(x.shape)[:-1], size])
    return parts


def pack(op: Op, kernels: Sequence[Weight]) -> Blocks | None:
    """Kernels in blocks as one, if they follow one another in the weights file; None if they do not."""
    blocks = [kernel for kernel in kernels if isinstance(kernel, Blocks)]
    if len(blocks) < len(kernels):
        return None
    joined = [_joined([getattr(each, name) for each in blocks]) for name in ("values", "scales")]
    if None in joined:
        return None
    values, scales = (op.builder.initializer(tensor, tensor.name, qualify=False) for tensor in joined)
    return Blocks(values, None, scales, blocks[0].bits)


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


def prefix_mask(op: Op, prefix_lengths: Value, lengths: Value, size: Value, window: int | None = None) -> Value:
    """Who may be attended to: [B, 1, size], True = may. In prefill all is prefix, and every token sees all of it."""
    return op.Less(op.Unsqueeze(op.Range(0, size, 1), [0, 1]), op.Unsqueeze(lengths, [1, 2]))


def decode_mask(
    op: Op, lengths: Value, capacity: Value, window: int | None = None, size: Value | int = 1
) -> Window | Value:
    """No mask yet for one token: GroupQueryAttention knows what is filled. For several the portable one."""
    if size != 1:
        return paligemma.decode_mask.portable(op, lengths, capacity, window, size)
    return Window(window, partial(paligemma.decode_mask.portable, op, lengths, capacity, window))


def like(value: Value, other: Value, dtype: DataType | None = None) -> Value:
    """A value whose type and shape the graph library does not know, said to be another's."""
    value.dtype, value.shape = dtype or other.dtype, other.shape
    return value


def _with_rows(value, other, rows):
    """The same for a line of other rows."""
    value.dtype, value.shape = other.dtype, ir.Shape([1, rows, other.shape[-1]])
    return value


#: What takes the place of which function.
INSTEAD = {
    layers.gelu: gelu,
    layers.layer_norm: layer_norm,
    layers.rms_norm: rms_norm,
    layers.rope: rope,
    layers.rope_angles: rope_angles,
    siglip.attention: patch_attention,
    siglip.block: patch_block,
    gemma.attention: attention,
    gemma.mlp: mlp,
    gemma.decoder: decoder,
    paligemma.prefix_mask: prefix_mask,
    paligemma.decode_mask: decode_mask,
    paligemma.last_position: last_position,
}
