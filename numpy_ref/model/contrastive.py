"""Contrastive learning: how the vision tower is taught before it meets the decoder, by pictures and their captions.

Both towers end in one unit vector. A matching pair should point the same way, every other pair of the batch should
not. CLIP asks which caption of the batch belongs to a picture (softmax over the row, and over the column); SigLIP asks
of each pair alone whether it belongs together (sigmoid), which needs no sums over the batch. PaliGemma's tower is
SigLIP's; the text tower, the pooling head, temperature and bias are used in pretraining only and are then dropped.

Sources: Radford et al. 2021 (CLIP); Zhai et al. 2023 (SigLIP) and big_vision `trainers/proj/image_text/siglip.py`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import SiglipConfig
from . import siglip
from .layers import (
    Array,
    Params,
    Tap,
    attend,
    cast_like,
    embedding,
    identity,
    layer_norm,
    linear,
    matmul,
    merge_heads,
    scoped,
    split_heads,
)


@dataclass(frozen=True)
class TextConfig:
    """The text tower: a transformer as the vision tower's, over `length` tokens."""

    vocab: int
    length: int
    width: int
    depth: int
    mlp: int
    heads: int
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class ContrastiveConfig:
    """Both towers; they share their width, so that their vectors can be multiplied."""

    vision: SiglipConfig
    text: TextConfig


def normalize(x: Array) -> Array:
    """Scale to length one: x [B, D] -> [B, D]."""
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def pool(p: Params, config: SiglipConfig, x: Array, tap: Tap = identity) -> Array:
    """SigLIP's pooling head: a learned query attends to all patches, then an MLP. x [B, P, D] -> [B, D].

    Multi-head attention pooling (Lee et al. 2019; big_vision `models/vit.py MAPHead`).
    """
    probe = np.broadcast_to(cast_like(p["probe"], x), (len(x), 1, config.width))
    query = split_heads(linear(probe, **p["attention"]["query"]), config.heads) * config.head_dim**-0.5
    key = split_heads(linear(x, **p["attention"]["key"]), config.heads)
    value = split_heads(linear(x, **p["attention"]["value"]), config.heads)
    pooled = linear(merge_heads(attend(query, key, value, tap=scoped(tap, "attention"))), **p["attention"]["output"])
    normed = layer_norm(pooled, **p["norm"], eps=config.eps)
    return (pooled + siglip.mlp(p["mlp"], normed))[:, 0]


def embed_image(p: Params, config: ContrastiveConfig, pixel_values: Array, tap: Tap = identity) -> Array:
    """Pictures to unit vectors: pixel_values [B, 3, S, S] -> [B, D]."""
    features = siglip.encoder(p["vision"], config.vision, pixel_values, scoped(tap, "vision"))
    return tap("image", normalize(pool(p["pool"], config.vision, features, scoped(tap, "pool"))))


def embed_text(p: Params, config: ContrastiveConfig, ids: Array, tap: Tap = identity) -> Array:
    """Captions to unit vectors: ids [B, L], filled up with pad, -> [B, D].

    As in SigLIP nothing is masked, and the last position, which is nearly always padding, speaks for the whole.
    """
    text: Any = config.text  # has what a block reads of a SiglipConfig
    x = embedding(ids, p["text"]["embedding"], p["text"]["embedding"].dtype)
    x = tap("text.position_embedding", x + cast_like(p["text"]["position_embedding"], x))
    for i, weights in enumerate(p["text"]["blocks"]):
        x = tap(f"text.blocks.{i}", siglip.block(weights, text, x, scoped(tap, f"text.blocks.{i}")))
    x = layer_norm(x, **p["text"]["norm"], eps=text.eps)
    return tap("text", normalize(linear(x[:, -1], **p["text"]["head"])))


def similarity(image: Array, text: Array, log_temperature: Array) -> Array:
    """Cosines over the temperature: image and text [B, D] -> [B, B], pictures down, captions across."""
    return matmul(image, text.T) * np.exp(log_temperature).astype(image.dtype)


def siglip_loss(image: Array, text: Array, log_temperature: Array, bias: Array) -> Array:
    """The sigmoid loss: image and text [B, D] -> one number.

    -sum_j log sigmoid(z_ij * s_ij), mean over i, with s_ij = cosine * temperature + bias and z_ij = +1 for the pair
    itself, -1 for every other. The bias starts at -10, since nearly all pairs are others; temperature at 10.
    """
    scores = similarity(image, text, log_temperature) + bias
    signs = 2 * np.eye(len(image), dtype=scores.dtype) - 1
    return np.logaddexp(0, -signs * scores).sum(-1).mean()  # -log sigmoid(x) = log(1 + exp(-x))


def clip_loss(image: Array, text: Array, log_temperature: Array) -> Array:
    """The softmax loss: image and text [B, D] -> one number.

    Cross-entropy of the right caption for each picture and of the right picture for each caption, averaged.
    The temperature starts at 1 / 0.07.
    """
    scores = similarity(image, text, log_temperature)
    return (_cross_entropy(scores) + _cross_entropy(scores.T)) / 2


def _cross_entropy(scores):
    """Of the diagonal, under a softmax over each row."""
    shifted = scores - scores.max(-1, keepdims=True)
    return (np.log(np.exp(shifted).sum(-1)) - np.diagonal(shifted)).mean()


def recall_at_1(image: Array, text: Array) -> float:
    """Of all pictures, the share whose own caption is the nearest: image and text [B, D] -> one number in [0, 1]."""
    return float((np.argmax(image @ text.T, -1) == np.arange(len(image))).mean())
