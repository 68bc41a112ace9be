"""The SigLIP vision tower: twin of `numpy_ref/model/siglip.py`."""

import math

from onnx_ir import Value

from numpy_ref.config import SiglipConfig
from numpy_ref.model.layers import Params, identity, scoped

from .layers import (
    Op,
    Tap,
    add_layer_norm,
    attend,
    cast_like,
    gelu,
    layer_norm,
    linear,
    merge_heads,
    named,
    replaceable,
    residual,
    split_heads,
)


@named
def patch_embed(op: Op, p: Params, config: SiglipConfig, pixel_values: Value) -> Value:
    """Cut the picture into patches and project each: pixel_values [B, 3, S, S] -> [B, P, D]."""
    size, side = config.patch_size, config.image_size // config.patch_size
    cropped = op.Slice(pixel_values, [0, 0], [side * size, side * size], [2, 3])
    tiles = op.Reshape(cropped, [0, 3, side, size, side, size])
    patches = op.Reshape(op.Transpose(tiles, perm=[0, 2, 4, 1, 3, 5]), [0, side * side, 3 * size * size])
    return linear(op, patches, **p)


@replaceable
def attention(op: Op, p: Params, config: SiglipConfig, x: Value, tap: Tap = identity) -> Value:
    """Multi-head attention of every patch to every patch: x [B, P, D] -> [B, P, D]."""
    query = op.Mul(split_heads(op, linear(op, x, **p["query"]), config.heads), 1 / math.sqrt(config.head_dim))
    key = split_heads(op, linear(op, x, **p["key"]), config.heads)
    value = split_heads(op, linear(op, x, **p["value"]), config.heads)
    context = attend(op, tap("query", query), tap("key", key), tap("value", value), tap=tap)
    return linear(op, merge_heads(op, tap("context", context)), **p["output"])


@named
def mlp(op: Op, p: Params, x: Value) -> Value:
    """x [B, P, D] -> [B, P, D] through a hidden layer of width F."""
    return linear(op, gelu(op, linear(op, x, **p["up"])), **p["down"])


@replaceable
def block(op: Op, p: Params, config: SiglipConfig, x: Value, tap: Tap = identity) -> Value:
    """Pre-norm transformer block. x [B, P, D] -> [B, P, D]: x += attention(norm(x)); x += mlp(norm(x))."""
    normed = tap("attention_norm", layer_norm(op, x, **p["attention_norm"], eps=config.eps))
    update = tap("attention", attention(op, p["attention"], config, normed, scoped(tap, "attention")))
    x, normed = add_layer_norm(op, x, update, **p["mlp_norm"], eps=config.eps)
    return residual(op, x, tap("mlp", mlp(op, p["mlp"], tap("mlp_norm", normed))))


@named
def encoder(op: Op, p: Params, config: SiglipConfig, pixel_values: Value, tap: Tap = identity) -> Value:
    """Picture to patch features: pixel_values [B, 3, S, S] in [-1, 1] -> [B, P, D]."""
    x = tap("patch_embed", cast_like(op, patch_embed(op, p["patch_embed"], config, pixel_values), pixel_values))
    x = tap("position_embedding", op.Add(x, cast_like(op, p["position_embedding"], x)))
    for i, weights in enumerate(p["blocks"]):
        x = tap(f"blocks.{i}", block(op, weights, config, x, scoped(tap, f"blocks.{i}")))
    return tap("norm", layer_norm(op, x, **p["norm"], eps=config.eps))
