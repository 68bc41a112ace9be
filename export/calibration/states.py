"""A batch of rows on its way through the decoder, and what stands around it in a layer.

Its *tokens* are those that the rounded weights read. In an int4 bundle, whose prefill has weights in eight bits, they
are the answers, behind prompts that are as good as exact; where one set of weights does both, they are prompts and
answers together. There are two states of them: `exact`, in the model as it was, and `rounded`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from numpy_ref.config import GemmaConfig, PaliGemmaConfig
from numpy_ref.generate import pad_prompts
from numpy_ref.model import gemma, paligemma
from numpy_ref.model.layers import Array, Pair, Params, gelu, linear, merge_heads, rms_norm, rope_angles

EXACT, ROUNDED = "exact", "rounded"


@dataclass(frozen=True)
class Batch:
    """Rows with answers, whose states lie in files of a folder that begin with a number."""

    config: PaliGemmaConfig
    folder: Path
    number: int
    prompts: list[list[int]]
    answers: list[list[int]]
    apart: bool  # whether prompts are read by exact weights

    def put(self, name: str, array: np.ndarray) -> None:
        save_file({name: np.ascontiguousarray(array)}, self._file(name))

    def get(self, name: str) -> np.ndarray:
        return load_file(self._file(name))[name]

    def _file(self, name):
        return self.folder / f"{self.number}.{name}.safetensors"

    @property
    def prompt_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, T] and lengths [B] of the prompts."""
        return pad_prompts(self.prompts, self.config.pad)

    @property
    def token_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, A] and lengths [B] of the tokens."""
        if self.apart:
            ids, _ = pad_prompts([answer or [self.config.pad] for answer in self.answers], self.config.pad)
            return ids, np.array([len(answer) for answer in self.answers], np.int32)
        pairs = zip(self.prompts, self.answers, strict=True)
        return pad_prompts([[*prompt, *answer] for prompt, answer in pairs], self.config.pad)

    @property
    def is_token(self) -> np.ndarray:
        """Where there is a token, and not padding: bool [B, A]."""
        ids, lengths = self.token_ids
        return np.arange(ids.shape[1]) < lengths[:, None]

    def begin(self, state: str, look_up: Callable[[np.ndarray], np.ndarray]) -> None:
        """Embed the tokens, and the prompts where they are apart; `look_up` gives rows of a table [n, D] by ids [n].

        The features of the pictures are there already.
        """
        if not self.apart:
            self.put(state, self._with_pictures(self.token_ids[0], look_up))
            return
        places, p = self._table(self.token_ids[0], look_up)
        self.put(state, gemma.embed(p, self.config.text, places, np.float32))
        if state == EXACT:
            self.put("prompts", self._with_pictures(self.prompt_ids[0], look_up))

    def _with_pictures(self, ids, look_up) -> np.ndarray:
        places, p = self._table(ids, look_up)
        return paligemma.embed_prefix({"text": p}, self.config, self.get("features"), places)

    def _table(self, ids, look_up):
        """A table of the rows that ids [B, T] ask for, and where they are in it: they need not all be looked up."""
        distinct, places = np.unique(np.minimum(ids, self.config.text.vocab - 1), return_inverse=True)
        return places.reshape(ids.shape), {"embedding": look_up(distinct)}

    def advance_prompts(self, p: Params, layer: int) -> None:
        """Take the prompts through a layer, and keep its keys and values."""
        ids, lengths = self.prompt_ids
        size, config = ids.shape[1], self.config.text
        rotary = _angles(config, np.broadcast_to(np.arange(size), ids.shape))
        mask = paligemma.prefix_mask(lengths, lengths, size, config.window(layer))
        x, cache = gemma.block(p, config, self.get("prompts"), rotary, mask)
        self.put("prompts", x)
        for name, array in zip(("key", "value"), cache, strict=True):
            self.put(name, array)

    def around(self, layer: int) -> dict[str, Any]:
        """What a layer needs beside its tokens, as `gemma.attention` takes it."""
        config, prompts, (ids, lengths) = self.config.text, self.prompt_ids[1], self.token_ids
        size, window = ids.shape[1], config.window(layer)
        if not self.apart:
            rotary = _angles(config, np.broadcast_to(np.arange(size), ids.shape))
            return {"rotary": rotary, "mask": paligemma.prefix_mask(prompts, lengths, size, window)}
        capacity = self.prompt_ids[0].shape[1] + size
        return {
            "rotary": _angles(config, prompts[:, None] + np.arange(size)),
            "mask": paligemma.decode_mask(prompts, capacity, window, size),
            "cache": tuple(paligemma.pad_cache(self.get(name), capacity) for name in ("key", "value")),
            "start": prompts,
        }

    def asked(self) -> np.ndarray:
        """The exact states behind which a token is drawn, [n, D]: each prompt's last, and those of its answer."""
        tokens, lengths = self.get(EXACT), self.prompt_ids[1]
        if self.apart:
            return np.concatenate([paligemma.last_position(self.get("prompts"), lengths), tokens[self.is_token]])
        behind = np.arange(tokens.shape[1]) >= lengths[:, None] - 1
        return tokens[behind & self.is_token]


def _angles(config, positions) -> Pair:
    return rope_angles(positions, config.head_dim, config.rope_base, np.float32)


# --- the two halves of `gemma.block`, and what their kernels read ------------------------------------------
# `around` is what `Batch.around` gives; those that look at no other position leave it alone.


def after_attention(p: Params, config: GemmaConfig, x: Array, around: dict[str, Any]) -> Array:
    """x += [norm] attention(norm(x)): x [B, T, D] -> [B, T, D]."""
    update, _ = gemma.attention(p["attention"], config, attention_input(p, config, x), **around)
    return x + (rms_norm(update, **p["post_attention_norm"], eps=config.eps) if config.post_norms else update)


def after_mlp(p: Params, config: GemmaConfig, x: Array, around: dict[str, Any] | None = None) -> Array:
    """x += [norm] mlp(norm(x)): x [B, T, D] -> [B, T, D]."""
    update = gemma.mlp(p["mlp"], mlp_input(p, config, x))
    return x + (rms_norm(update, **p["post_mlp_norm"], eps=config.eps) if config.post_norms else update)


def attention_input(p: Params, config: GemmaConfig, x: Array, around: dict[str, Any] | None = None) -> Array:
    """What queries, keys and values are made of: x [B, T, D] -> [B, T, D]."""
    return rms_norm(x, **p["attention_norm"], eps=config.eps)


def context(p: Params, config: GemmaConfig, x: Array, around: dict[str, Any]) -> Array:
    """What the output kernel of attention reads: x [B, T, D] -> [B, T, N*H]."""
    found = {}

    def tap(name, value):
        found[name] = value
        return value

    gemma.attention(p["attention"], config, attention_input(p, config, x), **around, tap=tap)
    return merge_heads(found["context"])


def mlp_input(p: Params, config: GemmaConfig, x: Array, around: dict[str, Any] | None = None) -> Array:
    """What gate and up read: x [B, T, D] -> [B, T, D]."""
    return rms_norm(x, **p["mlp_norm"], eps=config.eps)


def hidden(p: Params, config: GemmaConfig, x: Array, around: dict[str, Any] | None = None) -> Array:
    """What the last kernel of the MLP reads: x [B, T, D] -> [B, T, F]."""
    x, p = mlp_input(p, config, x), p["mlp"]
    return gelu(linear(x, **p["gate"])) * linear(x, **p["up"])
