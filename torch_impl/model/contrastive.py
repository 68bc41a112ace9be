"""Contrastive learning: twin of `numpy_ref/model/contrastive.py`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from numpy_ref.config import SiglipConfig
from numpy_ref.model.contrastive import ContrastiveConfig, TextConfig
from numpy_ref.model.layers import identity, scoped

from .layers import LayerNorm, Linear, Tap, attend, cast_like, embedding, merge_heads, split_heads
from .siglip import Attention, Block, Encoder, Mlp


def normalize(x: Tensor) -> Tensor:
    """Scale to length one: x [B, D] -> [B, D]."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True))


def similarity(image: Tensor, text: Tensor, log_temperature: Tensor) -> Tensor:
    """Cosines over the temperature: image and text [B, D] -> [B, B], pictures down, captions across."""
    return image @ text.T * torch.exp(log_temperature)


def siglip_loss(image: Tensor, text: Tensor, log_temperature: Tensor, bias: Tensor) -> Tensor:
    """The sigmoid loss: image and text [B, D] -> one number."""
    scores = similarity(image, text, log_temperature) + bias
    signs = 2 * torch.eye(len(image), dtype=scores.dtype, device=scores.device) - 1
    return nn.functional.softplus(-signs * scores).sum(-1).mean()


def clip_loss(image: Tensor, text: Tensor, log_temperature: Tensor) -> Tensor:
    """The softmax loss: image and text [B, D] -> one number."""
    scores, target = similarity(image, text, log_temperature), torch.arange(len(image), device=image.device)
    return (nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)) / 2


class Pool(nn.Module):
    """SigLIP's pooling head: a learned query attends to all patches, then an MLP. x [B, P, D] -> [B, D]."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.probe = nn.Parameter(torch.randn(1, config.width))
        self.attention, self.norm, self.mlp = Attention(config), LayerNorm(config.width, config.eps), Mlp(config)

    def forward(self, x: Tensor, tap: Tap = identity) -> Tensor:
        config, p = self.config, self.attention
        probe = cast_like(self.probe, x).expand(len(x), 1, config.width)
        query = split_heads(p.query(probe), config.heads) * config.head_dim**-0.5
        key, value = split_heads(p.key(x), config.heads), split_heads(p.value(x), config.heads)
        pooled = p.output(merge_heads(attend(query, key, value, tap=scoped(tap, "attention"))))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class TextTower(nn.Module):
    """The weights of `embed_text`."""

    def __init__(self, config: TextConfig):
        super().__init__()
        of_block: Any = config  # has what a block reads of a SiglipConfig
        self.embedding = nn.Parameter(torch.randn(config.vocab, config.width) / math.sqrt(config.width))
        self.position_embedding = nn.Parameter(torch.randn(config.length, config.width) / math.sqrt(config.width))
        self.blocks = nn.ModuleList(Block(of_block) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, config.eps)
        self.head = Linear(config.width, config.width)


class Contrastive(nn.Module):
    """Both towers with temperature and bias. The attribute tree is the parameter tree of `numpy_ref`."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        self.vision, self.pool, self.text = Encoder(config.vision), Pool(config.vision), TextTower(config.text)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def embed_image(self, pixel_values: Tensor, tap: Tap = identity) -> Tensor:
        """Pictures to unit vectors: pixel_values [B, 3, S, S] -> [B, D]."""
        features = self.vision(pixel_values, scoped(tap, "vision"))
        return tap("image", normalize(self.pool(features, scoped(tap, "pool"))))

    def embed_text(self, ids: Tensor, tap: Tap = identity) -> Tensor:
        """Captions to unit vectors: ids [B, L], filled up with pad, -> [B, D]."""
        text = self.text
        x = embedding(ids, text.embedding, text.embedding.dtype)
        x = tap("text.position_embedding", x + cast_like(text.position_embedding, x))
        for i, block in enumerate(text.blocks):
            x = tap(f"text.blocks.{i}", block(x, scoped(tap, f"text.blocks.{i}")))
        x = text.norm(x)
        return tap("text", normalize(text.head(x[:, -1])))
