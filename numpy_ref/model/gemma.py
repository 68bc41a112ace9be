"""The Gemma decoder, versions 1 and 2 (big_vision `models/ppp/gemma.py`; Gemma 2 report, table 1).

Version 2 adds, by configuration alone: a norm after attention and MLP, soft caps on scores and logits,
and a sliding window on every other layer (which arrives here as that layer's mask).
"""

import math

import numpy as np
from numpy.typing import DTypeLike

from ..config import GemmaConfig
from .layers import (
    Array,
    Pair,
    Params,
    Tap,
    attend,
    embedding,
    gelu,
    identity,
    linear,
    merge_heads,
    rms_norm,
    rope,
    rope_angles,
    scoped,
    softcap,
    split_heads,
    write_cache,
)


def embed(p: Params, config: GemmaConfig, ids: Array, dtype: DTypeLike) -> Array:
    """Token embeddings times sqrt(D): ids [B, T] -> [B, T, D]. Picture features are not scaled."""
    # The factor is rounded to the dtype that the table is used in: 59.75 for sqrt(3584) in bfloat16.
    return embedding(ids, p["embedding"], dtype) * np.asarray(math.sqrt(config.width), dtype)


def attention(
    p: Params, config: GemmaConfig, x: Array, rotary: Pair, mask: Array, cache: Pair | None = None,
    start: Array | None = None, tap: Tap = identity,
) -> tuple[Array, Pair]:  # fmt: skip
    """Grouped-query attention with rotary positions.

    x [B, T, D], rotary (cos, sin) each [B, 1, T, H/2], mask [B, T, S], cache (key, value) each [B, K, S, H], start [B]
    -> [B, T, D] and the (key, value) that it attended to, each [B, K, S, H]. Without a cache S = T; with one, the new
    keys and values are first written into it at `start`.
    """
    query = rope(split_heads(linear(x, **p["query"]), config.heads), *rotary) * config.query_scale
    key = rope(split_heads(linear(x, **p["key"]), config.kv_heads), *rotary)
    value = split_heads(linear(x, **p["value"]), config.kv_heads)
    query, key, value = tap("query", query), tap("key", key), tap("value", value)
    if cache is not None and start is not None:
        key, value = write_cache(cache[0], key, start), write_cache(cache[1], value, start)
    context = attend(query, key, value, mask, config.attn_softcap, tap)
    return linear(merge_heads(tap("context", context)), **p["output"]), (key, value)


def mlp(p: Params, x: Array) -> Array:
    """GeGLU (Shazeer 2020): gelu(x @ gate) * (x @ up) @ down, without biases: x [B, T, D] -> [B, T, D]."""
    return linear(gelu(linear(x, **p["gate"])) * linear(x, **p["up"]), **p["down"])


def block(
    p: Params, config: GemmaConfig, x: Array, rotary: Pair, mask: Array, cache: Pair | None = None,
    start: Array | None = None, tap: Tap = identity,
) -> tuple[Array, Pair]:  # fmt: skip
    """One decoder layer.

    x [B, T, D], rotary (cos, sin) each [B, 1, T, H/2], mask [B, T, S], cache (key, value) each [B, K, S, H], start [B]
    -> [B, T, D] and its (key, value), each [B, K, S, H]. With the norms of version 2 in brackets:

    x += [norm] attention(norm(x)); x += [norm] mlp(norm(x))
    """
    normed = tap("attention_norm", rms_norm(x, **p["attention_norm"], eps=config.eps))
    update, cache = attention(p["attention"], config, normed, rotary, mask, cache, start, scoped(tap, "attention"))
    update = tap("attention", update)
    if config.post_norms:
        update = tap("post_attention_norm", rms_norm(update, **p["post_attention_norm"], eps=config.eps))
    x = x + update
    normed = tap("mlp_norm", rms_norm(x, **p["mlp_norm"], eps=config.eps))
    update = tap("mlp", mlp(p["mlp"], normed))
    if config.post_norms:
        update = tap("post_mlp_norm", rms_norm(update, **p["post_mlp_norm"], eps=config.eps))
    return x + update, cache


def decoder(
    p: Params, config: GemmaConfig, x: Array, positions: Array, masks: dict[int | None, Array],
    cache: list[Pair] | None = None, start: Array | None = None, tap: Tap = identity,
) -> tuple[Array, list[Pair]]:  # fmt: skip
    """All layers and the final norm.

    x [B, T, D], positions [B, T], masks {window: [B, T, S]}, cache (a key and a value a layer) each [B, K, S, H],
    start [B] -> [B, T, D] and one (key, value) a layer, each [B, K, S, H].
    """
    rotary = rope_angles(positions, config.head_dim, config.rope_base, np.promote_types(x.dtype, np.float32))
    caches = []
    for i, weights in enumerate(p["blocks"]):
        layer_cache = None if cache is None else cache[i]
        mask = masks[config.window(i)]
        x, layer_cache = block(weights, config, x, rotary, mask, layer_cache, start, scoped(tap, f"blocks.{i}"))
        x = tap(f"blocks.{i}", x)
        caches.append(layer_cache)
    return tap("norm", rms_norm(x, **p["norm"], eps=config.eps)), caches


def logits(p: Params, config: GemmaConfig, x: Array) -> Array:
    """Scores of every row of the vocabulary: x [..., D] -> [..., V]. The tied head is the unscaled table."""
    kernel = p["embedding"].T if config.tied else p["head"]["kernel"]
    return softcap(linear(x, kernel), config.final_softcap)
