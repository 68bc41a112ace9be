"""Operators for graphs in half precision, which are for CUDA, where each is a launch: same model, few launches.

norms                  one operator each; a sum and the norm behind it are one too.
query, key and value   one product: the weights file has their kernels side by side.
attention of patches   the standard Attention, which takes flash kernels in float16 and in bfloat16.
attention of tokens    GroupQueryAttention takes that one product, rotates queries and keys, writes the cache where it
                       lies and attends, in prefill as in decode; in extend the portable attention does.

The residual stream is in `op.residual`, float32 or the dtype of the weights. Source: ONNX Runtime, ContribOperators.md.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import DataType, Value

from numpy_ref.config import GemmaConfig, SiglipConfig
from numpy_ref.model.layers import Params, identity, scoped

from . import gemma, layers, paligemma, siglip
from .fused import attend_behind, by_head, gelu, like, project, rotary_tables
from .layers import Op, Pair, Tap
from .quantized import CONTRIB


def layer_norm(op: Op, x: Value, scale: Value, bias: Value, eps: float) -> Value:
    """LayerNorm: x [..., D], scale [D], bias [D] -> [..., D] in the dtype of the weights."""
    weights = (layers.cast_like(op, weight, x) for weight in (scale, bias))
    return layers.cast_like(op, op.LayerNormalization(x, *weights, axis=-1, epsilon=eps), scale)


def rms_norm(op: Op, x: Value, scale: Value, eps: float) -> Value:
    """RMSNorm with the scale as an offset from one: x [..., D], scale [D] -> [..., D] in the dtype of the weights."""
    normed = op.SimplifiedLayerNormalization(x, _gain(op, scale, x), axis=-1, epsilon=eps, _version=1)
    return layers.cast_like(op, like(normed, x), scale)


def add_layer_norm(op: Op, x: Value, update: Value, scale: Value, bias: Value, eps: float) -> Pair:
    """x + update in the dtype of x, and LayerNorm of it in that of the weights."""
    weights = [layers.cast_like(op, weight, x) for weight in (scale, bias)]
    return _sum_and_norm(op, op.SkipLayerNormalization, x, update, weights, scale, eps)


def add_rms_norm(op: Op, x: Value, update: Value, scale: Value, eps: float) -> Pair:
    """x + update in the dtype of x, and RMSNorm of it in that of the weights."""
    return _sum_and_norm(op, op.SkipSimplifiedLayerNormalization, x, update, [_gain(op, scale, x)], scale, eps)


def _gain(op, scale, x):
    """1 + scale in the dtype of x, made once, when the graph is loaded; rounded after the sum, not before."""
    return layers.cast_like(op, op.Add(layers.upcast(op, scale), 1.0), x)


def _sum_and_norm(op, operator, x, update, weights, scale, eps):
    update = layers.cast_like(op, update, x)
    normed, mean, deviation, total = operator(x, update, *weights, epsilon=eps, _domain=CONTRIB, _version=1, _outputs=4)
    mean.name = deviation.name = ""  # are for training, and not every provider gives them
    return like(total, x), layers.cast_like(op, like(normed, x), scale)


def patch_attention(op: Op, p: Params, config: SiglipConfig, x: Value, tap: Tap = identity) -> Value:
    """Multi-head attention of every patch to every patch: [B, P, D] -> [B, P, D]."""
    packed = layers.linear(op, x, **p["query_key_value"])
    query, key, value = op.Split(packed, axis=-1, num_outputs=3, _outputs=3)
    scale, split = 1 / math.sqrt(config.head_dim), by_head(op, tap, config.heads)
    by_head(op, tap, config.heads, factor=scale)("query", query)
    split("key", key)
    split("value", value)
    context = op.Attention(query, key, value, q_num_heads=config.heads, kv_num_heads=config.heads, scale=scale)
    return layers.linear(op, split("context", like(context, x, packed.dtype)), **p["output"])


@dataclass(frozen=True)
class Lengths:
    """What stands for a mask: how far each row is filled, which is all that GroupQueryAttention has to be told."""

    last: Value  # int32 [B], the position of each row's last token
    total: Value  # int32 [], keys in the longest row; from shapes alone, since the operator reads it on the host
    window: int | None


def prefix_mask(op: Op, prefix_lengths: Value, lengths: Value, size: Value, window: int | None = None) -> Lengths:
    """No mask: in prefill all is prefix, and every token sees all of it."""
    return Lengths(op.Cast(op.Sub(lengths, 1), to=DataType.INT32), op.Cast(size, to=DataType.INT32), None)


def decode_mask(
    op: Op, lengths: Value, capacity: Value, window: int | None = None, size: Value | int = 1
) -> Lengths | Value:
    """No mask for one token: at position `lengths` [B] it sees what came before it, in a window. For several, one."""
    if size != 1:
        return paligemma.decode_mask.portable(op, lengths, capacity, window, size)
    return Lengths(op.Cast(lengths, to=DataType.INT32), op.Cast(capacity, to=DataType.INT32), window)


def attention(
    op: Op, p: Params, config: GemmaConfig, x: Value, rotary: Pair, mask: Lengths | Value, cache: Pair | None = None,
    start: Value | None = None, tap: Tap = identity,
) -> tuple[Value, Pair]:  # fmt: skip
    """Grouped-query attention: [B, T, D] -> [B, T, D] and its (key, value).

    `rotary` are tables [positions, H/2]; in extend, where `mask` is [B, T, C], the angles at the tokens.
    """
    packed = _packed(op, p, x)
    if isinstance(mask, Value):
        sizes = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        parts = op.Split(packed, sizes, axis=-1, _outputs=3)
        for part, size in zip(parts, sizes, strict=True):
            part.dtype, part.shape = packed.dtype, ir.Shape([*list(x.shape)[:2], size])
        return attend_behind(op, p, config, parts, rotary, mask, cache, start, tap)
    context, key, value = op.GroupQueryAttention(
        packed, None, None, *(cache or (None, None)), mask.last, mask.total, *rotary,
        num_heads=config.heads, kv_num_heads=config.kv_heads, scale=config.query_scale, do_rotary=1,
        softcap=config.attn_softcap or 0.0, local_window_size=mask.window or -1, causal=int(cache is not None),
        _domain=CONTRIB, _version=1, _outputs=3,
    )  # fmt: skip
    context.dtype, context.shape = packed.dtype, ir.Shape([*list(x.shape)[:2], config.heads * config.head_dim])
    for each in (key, value):
        each.dtype, each.shape = packed.dtype, ir.Shape([x.shape[0], config.kv_heads, None, config.head_dim])
    if cache is None:  # with one, these are all keys and values so far
        key, value = tap("key", key), tap("value", value)
    context = by_head(op, tap, config.heads)("context", context)
    return layers.linear(op, context, **p["output"]), (key, value)


def _packed(op, p, x):
    """Queries, keys and values in one: [B, T, D] -> [B, T, (N + 2 K) H]."""
    if "query_key_value" in p:
        return layers.linear(op, x, **p["query_key_value"])
    parts = project(op, x, p, ("query", "key", "value"), split=False)
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=-1)


def mlp(op: Op, p: Params, x: Value) -> Value:
    """GeGLU: gelu(x @ gate) * (x @ up) @ down, without biases. [B, T, D] -> [B, T, D]."""
    gate, up = project(op, x, p, ("gate", "up"))
    return layers.linear(op, op.Mul(gelu(op, gate), up), **p["down"])


def decoder(
    op: Op, p: Params, config: GemmaConfig, x: Value, positions: Value, masks: dict[int | None, Lengths | Value],
    cache: list[Pair] | None = None, start: Value | None = None, tap: Tap = identity,
) -> tuple[Value, list[Pair]]:  # fmt: skip
    """All layers and the final norm; each sum is taken together with the norm behind it, be it of the next layer."""
    if all(isinstance(mask, Lengths) for mask in masks.values()):
        rotary = rotary_tables(op, config.head_dim, config.rope_base, p["norm"]["scale"].dtype)
    else:
        rotary = layers.rope_angles(op, positions, config.head_dim, config.rope_base, DataType.FLOAT)
    caches = []
    following = [*(weights["attention_norm"] for weights in p["blocks"][1:]), p["norm"]]
    normed = layers.rms_norm(op, x, **p["blocks"][0]["attention_norm"], eps=config.eps)
    for i, (weights, norm) in enumerate(zip(p["blocks"], following, strict=True)):
        layer, mask, within = None if cache is None else cache[i], masks[config.window(i)], scoped(tap, f"blocks.{i}")
        update, layer = gemma.attention(
            op, weights["attention"], config, within("attention_norm", normed), rotary, mask, layer, start,
            scoped(within, "attention"),
        )  # fmt: skip
        update = within("attention", update)
        if config.post_norms:
            update = layers.rms_norm(op, update, **weights["post_attention_norm"], eps=config.eps)
            update = within("post_attention_norm", update)
        x, normed = layers.add_rms_norm(op, x, update, **weights["mlp_norm"], eps=config.eps)
        update = within("mlp", gemma.mlp(op, weights["mlp"], within("mlp_norm", normed)))
        if config.post_norms:
            update = layers.rms_norm(op, update, **weights["post_mlp_norm"], eps=config.eps)
            update = within("post_mlp_norm", update)
        x, normed = layers.add_rms_norm(op, x, update, **norm, eps=config.eps)
        x = tap(f"blocks.{i}", x)
        caches.append(layer)
    return tap("norm", normed), caches


#: What takes the place of which function.
INSTEAD = {
    layers.gelu: gelu,
    layers.layer_norm: layer_norm,
    layers.rms_norm: rms_norm,
    layers.add_layer_norm: add_layer_norm,
    layers.add_rms_norm: add_rms_norm,
    siglip.attention: patch_attention,
    gemma.attention: attention,
    gemma.mlp: mlp,
    gemma.decoder: decoder,
    paligemma.prefix_mask: prefix_mask,
    paligemma.decode_mask: decode_mask,
}
