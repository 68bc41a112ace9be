"""A layout run as its client runs it, in Python: three graphs, and a cache that grows by a concatenation a step."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from numpy_ref.engine import Engine, Pictures, pixels_of

from ..bundle.weights import stream_dtype
from ..runtime import run_options, session_options
from ..session import CPU
from . import GENAI, Layout

RUN = run_options()


class LayoutSession(Engine):
    """The graphs of one precision in a folder, as an engine.

    Pictures reach its graphs in bytes, so pixel values are rounded to steps of 255.
    """

    name = "layout"

    def __init__(self, layout: Layout, folder: Path, threads: int = 0):
        super().__init__(layout.config, layout.resize)
        self.layout, self.dtype = layout, stream_dtype(layout.precision).numpy()
        self._vision, self._embedding, self._decoder = (
            onnxruntime.InferenceSession(folder / graph.file, session_options({}, threads), providers=[CPU])
            for graph in layout.graphs
        )

    def prefill(
        self, pictures: Pictures, input_ids: np.ndarray, lengths: np.ndarray, capacity: int
    ) -> tuple[np.ndarray, "Cache"]:
        """As every engine; the cache has no capacity."""
        (features,) = self._vision.run(None, {"pixel_values": in_bytes(pixels_of(pictures))}, RUN)
        text = self.config.text
        empty = np.zeros((len(input_ids), text.kv_heads, 0, text.head_dim), self.dtype)
        past = {f"{i}.{kind}": empty for i in range(text.depth) for kind in ("key", "value")}
        mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
        return self._step(self._embed(input_ids, features), Cache(mask, past))

    def decode(self, input_ids: np.ndarray, lengths: np.ndarray, cache: "Cache") -> tuple[np.ndarray, "Cache"]:
        """As every engine; `lengths` are in the cache's mask already."""
        none = np.zeros((1, 0, self.config.text.width), np.float32)
        mask = np.concatenate([cache.mask, np.ones_like(input_ids)], axis=1)
        return self._step(self._embed(input_ids, none), Cache(mask, cache.values))

    def reorder(self, cache: "Cache", rows: np.ndarray) -> "Cache":
        """As every engine."""
        return Cache(cache.mask[rows], {name: array[rows] for name, array in cache.values.items()})

    def _embed(self, input_ids, features):
        """What a client does with ids and features, in a graph or by itself."""
        feeds = {"input_ids": np.ascontiguousarray(input_ids, np.int64)}
        if self.layout.name == GENAI:
            return self._embedding.run(None, {**feeds, "image_features": features}, RUN)[0]
        (embeddings,) = self._embedding.run(None, feeds, RUN)
        embeddings[input_ids == self.config.image_token] = features.reshape(-1, features.shape[-1])
        return embeddings

    def _step(self, embeddings, cache):
        past = {f"past_key_values.{name}": array for name, array in cache.values.items()}
        feeds = {"inputs_embeds": embeddings, "attention_mask": cache.mask, **past}
        names = [value.name for value in self._decoder.get_outputs()]
        found: dict[str, Any] = dict(zip(names, self._decoder.run(names, feeds, RUN), strict=True))
        logits = found.pop("logits")[:, 0]
        return logits, Cache(cache.mask, {name.removeprefix("present."): array for name, array in found.items()})


class Cache:
    """Keys and values so far, {`{layer}.key`: [B, K, S, H]}, and `mask` [B, S]: 1 for tokens, 0 for padding."""

    def __init__(self, mask: np.ndarray, values: dict[str, np.ndarray]):
        self.mask, self.values = mask, values

    def numpy(self) -> dict[str, np.ndarray]:
        """The tokens' keys and values by name, each row's from its beginning on, zeros behind."""
        order = np.argsort(1 - self.mask, axis=1, kind="stable")[:, None, :, None]  # padding goes to the end
        kept = np.sort(self.mask, axis=1)[:, ::-1][:, None, :, None]
        return {name: np.take_along_axis(array, order, 2) * kept for name, array in self.values.items()}


def in_bytes(pixel_values: np.ndarray) -> np.ndarray:
    """Pixel values [B, 3, S, S] in [-1, 1] -> the same in 0 … 255, whole numbers in float32."""
    return np.rint((np.asarray(pixel_values, np.float64) + 1) * 127.5).astype(np.float32)
