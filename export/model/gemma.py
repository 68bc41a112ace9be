"""The Gemma decoder, versions 1 and 2: twin of `numpy_ref/model/gemma.py`."""

import math

from onnx_ir import DataType, Value

from numpy_ref.config import GemmaConfig
from numpy_ref.model.layers import Params, identity, scoped

from .layers import (
    Mask,
    Op,
    Pair,
    Rotary,
    Tap,
    add_rms_norm,
    attend,
    cast_like,
    cast_to,
    embedding,
    gelu,
    is_quantized,
    linear,
    merge_heads,
    named,
    replaceable,
    residual,
    rms_norm,
    rope,
    rope_angles,
    softcap,
    split_heads,
    upcast,
    write_cache,
)


@named
def embed(op: Op, p: Params, config: GemmaConfig, ids: Value, dtype: DataType) -> Value:
    """Token embeddings times sqrt(D): ids [B, T] -> [B, T, D]. Picture features are not scaled."""
    # The factor is rounded to the dtype that the table is used in: 59.75 for sqrt(3584) in bfloat16.
    rows = embedding(op, ids, p["embedding"], p["embedding"].dtype)
    return cast_to(op, op.Mul(rows, math.sqrt(config.width)), dtype)


@replaceable
def attention(
    op: Op, p: Params, config: GemmaConfig, x: Value, rotary: Rotary, mask: Mask, cache: Pair | None = None,
    start: Value | None = None, tap: Tap = identity,
) -> tuple[Value, Pair]:  # fmt: skip
    """Grouped-query attention, rotary positions: x [B, T, D] -> [B, T, D] and its (key, value), each [B, K, S, H]."""
    query = rope(op, split_heads(op, linear(op, x, **p["query"]), config.heads), *rotary)
    query = op.Mul(query, config.query_scale)
    key = rope(op, split_heads(op, linear(op, x, **p["key"]), config.kv_heads), *rotary)
    value = split_heads(op, linear(op, x, **p["value"]), config.kv_heads)
    query, key, value = tap("query", query), tap("key", key), tap("value", value)
    if cache is not None and start is not None:
        key, value = write_cache(op, cache[0], key, start), write_cache(op, cache[1], value, start)
    context = attend(op, query, key, value, mask, config.attn_softcap, tap)
    return linear(op, merge_heads(op, tap("context", context)), **p["output"]), (key, value)


@replaceable
def mlp(op: Op, p: Params, x: Value) -> Value:
    """GeGLU: gelu(x @ gate) * (x @ up) @ down, without biases: x [B, T, D] -> [B, T, D]."""
    return linear(op, op.Mul(gelu(op, linear(op, x, **p["gate"])), linear(op, x, **p["up"])), **p["down"])


@named
def block(
    op: Op, p: Params, config: GemmaConfig, x: Value, rotary: Rotary, mask: Mask, cache: Pair | None = None,
    start: Value | None = None, tap: Tap = identity,
) -> tuple[Value, Pair]:  # fmt: skip
    """One decoder layer: x [B, T, D] -> [B, T, D] and its (key, value), each [B, K, S, H]."""
    normed = tap("attention_norm", rms_norm(op, x, **p["attention_norm"], eps=config.eps))
    update, cache = attention(op, p["attention"], config, normed, rotary, mask, cache, start, scoped(tap, "attention"))
    update = tap("attention", update)
    if config.post_norms:
        update = tap("post_attention_norm", rms_norm(op, update, **p["post_attention_norm"], eps=config.eps))
    x, normed = add_rms_norm(op, x, update, **p["mlp_norm"], eps=config.eps)
    update = tap("mlp", mlp(op, p["mlp"], tap("mlp_norm", normed)))
    if config.post_norms:
        update = tap("post_mlp_norm", rms_norm(op, update, **p["post_mlp_norm"], eps=config.eps))
    return residual(op, x, update), cache


@replaceable
def decoder(
    op: Op, p: Params, config: GemmaConfig, x: Value, positions: Value, masks: dict[int | None, Mask],
    cache: list[Pair] | None = None, start: Value | None = None, tap: Tap = identity,
) -> tuple[Value, list[Pair]]:  # fmt: skip
    """All layers and the final norm: x [B, T, D] -> [B, T, D] and one (key, value) a layer, each [B, K, S, H]."""
    rotary = rope_angles(op, positions, config.head_dim, config.rope_base, upcast(op, x).dtype)
    caches = []
    for i, weights in enumerate(p["blocks"]):
        layer_cache = None if cache is None else cache[i]
        mask = masks[config.window(i)]
        x, layer_cache = block(op, weights, config, x, rotary, mask, layer_cache, start, scoped(tap, f"blocks.{i}"))
        x = tap(f"blocks.{i}", x)
        caches.append(layer_cache)
    return tap("norm", rms_norm(op, x, **p["norm"], eps=config.eps)), caches


@named
def logits(op: Op, p: Params, config: GemmaConfig, x: Value) -> Value:
    """Scores of every row of the vocabulary: x [..., D] -> [..., V]. The tied head is the unscaled table."""
    if config.tied and is_quantized(p["embedding"]):
        scores = p["embedding"].multiply(op, cast_like(op, x, p["embedding"]))
    elif config.tied:
        # The table as it lies, [V, D], times each x: the runtime need not keep a transposed copy of it.
        scores = op.Gemm(cast_like(op, x, p["embedding"]), p["embedding"], transB=1)
    else:
        scores = linear(op, x, p["head"]["kernel"])
    return softcap(op, upcast(op, scores), config.final_softcap)
