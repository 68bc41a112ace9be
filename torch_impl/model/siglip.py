"""The SigLIP vision tower: twin of `numpy_ref/model/siglip.py`."""

import math

import torch
from torch import Tensor, nn

from numpy_ref.config import SiglipConfig
from numpy_ref.model.layers import identity, scoped

from .layers import LayerNorm, Linear, Tap, attend, cast_like, gelu, merge_heads, split_heads


class PatchEmbed(Linear):
    """Cut the picture into patches and project each: pixel_values [B, 3, S, S] -> [B, P, D]."""

    def __init__(self, config: SiglipConfig):
        super().__init__(3 * config.patch_size**2, config.width)
        self.config = config

    def forward(self, pixel_values: Tensor) -> Tensor:
        size, side = self.config.patch_size, self.config.image_size // self.config.patch_size
        batch, channels = pixel_values.shape[:2]
        tiles = pixel_values[:, :, : side * size, : side * size].reshape(batch, channels, side, size, side, size)
        patches = tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, channels * size * size)
        return super().forward(patches)


class Attention(nn.Module):
    """Multi-head attention of every patch to every patch: x [B, P, D] -> [B, P, D]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.query, self.key = Linear(config.width, config.width), Linear(config.width, config.width)
        self.value, self.output = Linear(config.width, config.width), Linear(config.width, config.width)

    def forward(self, x: Tensor, tap: Tap = identity) -> Tensor:
        query = split_heads(self.query(x), self.config.heads) * (1 / math.sqrt(self.config.head_dim))
        key = split_heads(self.key(x), self.config.heads)
        value = split_heads(self.value(x), self.config.heads)
        context = attend(tap("query", query), tap("key", key), tap("value", value), tap=tap)
        return self.output(merge_heads(tap("context", context)))


class Mlp(nn.Module):
    """x [B, P, D] -> [B, P, D] through a hidden layer of width F."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.up, self.down = Linear(config.width, config.mlp), Linear(config.mlp, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block. x [B, P, D] -> [B, P, D]: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.attention_norm, self.attention = LayerNorm(config.width, config.eps), Attention(config)
        self.mlp_norm, self.mlp = LayerNorm(config.width, config.eps), Mlp(config)

    def forward(self, x: Tensor, tap: Tap = identity) -> Tensor:
        normed = tap("attention_norm", self.attention_norm(x))
        x = x + tap("attention", self.attention(normed, scoped(tap, "attention")))
        normed = tap("mlp_norm", self.mlp_norm(x))
        return x + tap("mlp", self.mlp(normed))


class Encoder(nn.Module):
    """Picture to patch features: pixel_values [B, 3, S, S] in [-1, 1] -> [B, P, D]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.position_embedding = nn.Parameter(torch.randn(config.patches, config.width) / math.sqrt(config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, config.eps)

    def forward(self, pixel_values: Tensor, tap: Tap = identity) -> Tensor:
        x = tap("patch_embed", self.patch_embed(pixel_values))
        x = tap("position_embedding", x + cast_like(self.position_embedding, x))
        for i, block in enumerate(self.blocks):
            x = tap(f"blocks.{i}", block(x, scoped(tap, f"blocks.{i}")))
        return tap("norm", self.norm(x))
