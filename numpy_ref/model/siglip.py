"""The SigLIP vision tower: a ViT without class token or pooling (big_vision `models/vit.py`)."""

import math

from ..config import SiglipConfig
from .layers import (
    Array,
    Params,
    Tap,
    attend,
    cast_like,
    gelu,
    identity,
    layer_norm,
    linear,
    merge_heads,
    scoped,
    split_heads,
)


def patch_embed(p: Params, config: SiglipConfig, pixel_values: Array) -> Array:
    """Cut the picture into patches and project each: pixel_values [B, 3, S, S] -> [B, P, D].

    A convolution whose stride is its kernel size is one matrix product over the flattened patches.
    Rows and columns that do not fill a patch are dropped (padding VALID).
    """
    size, side = config.patch_size, config.image_size // config.patch_size
    batch, channels = pixel_values.shape[:2]
    tiles = pixel_values[:, :, : side * size, : side * size].reshape(batch, channels, side, size, side, size)
    patches = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(batch, side * side, channels * size * size)
    return linear(patches, **p)


def attention(p: Params, config: SiglipConfig, x: Array, tap: Tap = identity) -> Array:
    """Multi-head attention of every patch to every patch: x [B, P, D] -> [B, P, D]."""
    query = split_heads(linear(x, **p["query"]), config.heads) * (1 / math.sqrt(config.head_dim))
    key = split_heads(linear(x, **p["key"]), config.heads)
    value = split_heads(linear(x, **p["value"]), config.heads)
    context = attend(tap("query", query), tap("key", key), tap("value", value), tap=tap)
    return linear(merge_heads(tap("context", context)), **p["output"])


def mlp(p: Params, x: Array) -> Array:
    """x [B, P, D] -> [B, P, D] through a hidden layer of width F."""
    return linear(gelu(linear(x, **p["up"])), **p["down"])


def block(p: Params, config: SiglipConfig, x: Array, tap: Tap = identity) -> Array:
    """Pre-norm transformer block. x [B, P, D] -> [B, P, D]: x += attention(norm(x)); x += mlp(norm(x))."""
    normed = tap("attention_norm", layer_norm(x, **p["attention_norm"], eps=config.eps))
    x = x + tap("attention", attention(p["attention"], config, normed, scoped(tap, "attention")))
    normed = tap("mlp_norm", layer_norm(x, **p["mlp_norm"], eps=config.eps))
    return x + tap("mlp", mlp(p["mlp"], normed))


def encoder(p: Params, config: SiglipConfig, pixel_values: Array, tap: Tap = identity) -> Array:
    """Picture to patch features: pixel_values [B, 3, S, S] in [-1, 1] -> [B, P, D]."""
    x = tap("patch_embed", patch_embed(p["patch_embed"], config, pixel_values))
    x = tap("position_embedding", x + cast_like(p["position_embedding"], x))
    for i, weights in enumerate(p["blocks"]):
        x = tap(f"blocks.{i}", block(weights, config, x, scoped(tap, f"blocks.{i}")))
    return tap("norm", layer_norm(x, **p["norm"], eps=config.eps))
