"""The Gemma decoder, versions 1 and 2: twin of `numpy_ref/model/gemma.py`."""

import math

import torch
from torch import Tensor, nn

from numpy_ref.config import GemmaConfig
from numpy_ref.model.layers import identity, scoped

from .layers import (
    Linear,
    Pair,
    RmsNorm,
    Tap,
    attend,
    embedding,
    gelu,
    linear,
    merge_heads,
    rope,
    rope_angles,
    softcap,
    split_heads,
    upcast,
    write_cache,
)


class Attention(nn.Module):
    """Grouped-query attention, rotary positions: x [B, T, D] -> [B, T, D] and its (key, value), each [B, K, S, H]."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query, self.key = Linear(config.width, queries, bias=False), Linear(config.width, keys, bias=False)
        self.value, self.output = Linear(config.width, keys, bias=False), Linear(queries, config.width, bias=False)

    def forward(
        self, x: Tensor, rotary: Pair, mask: Tensor, cache: Pair | None = None, start: Tensor | None = None,
        tap: Tap = identity,
    ) -> tuple[Tensor, Pair]:  # fmt: skip
        config = self.config
        query = rope(split_heads(self.query(x), config.heads), *rotary) * config.query_scale
        key = rope(split_heads(self.key(x), config.kv_heads), *rotary)
        value = split_heads(self.value(x), config.kv_heads)
        query, key, value = tap("query", query), tap("key", key), tap("value", value)
        if cache is not None and start is not None:
            key, value = write_cache(cache[0], key, start), write_cache(cache[1], value, start)
        context = attend(query, key, value, mask, config.attn_softcap, tap)
        return self.output(merge_heads(tap("context", context))), (key, value)


class Mlp(nn.Module):
    """GeGLU: gelu(x @ gate) * (x @ up) @ down, without biases: x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate = Linear(config.width, config.mlp, bias=False)
        self.up = Linear(config.width, config.mlp, bias=False)
        self.down = Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One decoder layer: x [B, T, D] -> [B, T, D] and its (key, value), each [B, K, S, H]."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.attention_norm, self.attention = RmsNorm(config.width, config.eps), Attention(config)
        self.mlp_norm, self.mlp = RmsNorm(config.width, config.eps), Mlp(config)
        if config.post_norms:
            self.post_attention_norm = RmsNorm(config.width, config.eps)
            self.post_mlp_norm = RmsNorm(config.width, config.eps)

    def forward(
        self, x: Tensor, rotary: Pair, mask: Tensor, cache: Pair | None = None, start: Tensor | None = None,
        tap: Tap = identity,
    ) -> tuple[Tensor, Pair]:  # fmt: skip
        normed = tap("attention_norm", self.attention_norm(x))
        update, cache = self.attention(normed, rotary, mask, cache, start, scoped(tap, "attention"))
        update = tap("attention", update)
        if self.config.post_norms:
            update = tap("post_attention_norm", self.post_attention_norm(update))
        x = x + update
        normed = tap("mlp_norm", self.mlp_norm(x))
        update = tap("mlp", self.mlp(normed))
        if self.config.post_norms:
            update = tap("post_mlp_norm", self.post_mlp_norm(update))
        return x + update, cache


class Decoder(nn.Module):
    """Embedding, all layers, the final norm, and the head.

    x [B, T, D] -> [B, T, D] and one (key, value) a layer, each [B, K, S, H].
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocab, config.width) / math.sqrt(config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RmsNorm(config.width, config.eps)
        if not config.tied:
            self.head = Linear(config.width, config.vocab, bias=False)

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Token embeddings times sqrt(D): ids [B, T] -> [B, T, D]. Picture features are not scaled."""
        # The factor is rounded to the dtype that the table is used in: 59.75 for sqrt(3584) in bfloat16.
        return embedding(ids, self.embedding, dtype) * torch.tensor(math.sqrt(self.config.width), dtype=dtype)

    def forward(
        self, x: Tensor, positions: Tensor, masks: dict[int | None, Tensor], cache: list[Pair] | None = None,
        start: Tensor | None = None, tap: Tap = identity,
    ) -> tuple[Tensor, list[Pair]]:  # fmt: skip
        config = self.config
        rotary = rope_angles(positions, config.head_dim, config.rope_base, upcast(x[:0]).dtype)
        caches = []
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[i]
            mask = masks[config.window(i)]
            x, layer_cache = block(x, rotary, mask, layer_cache, start, scoped(tap, f"blocks.{i}"))
            x = tap(f"blocks.{i}", x)
            caches.append(layer_cache)
        return tap("norm", self.norm(x)), caches

    def logits(self, x: Tensor) -> Tensor:
        """Scores of every row of the vocabulary: x [..., D] -> [..., V]. The tied head is the unscaled table."""
        kernel = self.embedding.T if self.config.tied else self.head.kernel
        return softcap(linear(x, kernel), self.config.final_softcap)
