"""PaliGemma as one module: twin of `numpy_ref/model/paligemma.py`."""

import torch
from torch import Tensor, nn

from numpy_ref.config import PaliGemmaConfig
from numpy_ref.model.layers import identity, scoped

from .gemma import Decoder
from .layers import Linear, Pair, Tap
from .siglip import Encoder


def join_pictures(images: Tensor, input_ids: Tensor) -> Tensor:
    """The features of each row's pictures, one behind the other: images [B*N, P, D] -> [B, N*P, D]."""
    return images.unflatten(0, (len(input_ids), -1)).flatten(1, 2)


def prefix_mask(prefix_lengths: Tensor, lengths: Tensor, size: int, window: int | None = None) -> Tensor:
    """Who may attend to whom: prefix_lengths [B], lengths [B] -> [B, size, size], True = may."""
    steps = torch.arange(size, device=lengths.device)
    query, key = steps[None, :, None], steps[None, None, :]
    prefix, length = prefix_lengths[:, None, None], lengths[:, None, None]
    causal = key <= query
    if window is not None:
        causal = causal & (key > torch.minimum(query, length - 1) - window)
    return ((key < prefix) & (query < prefix) | causal) & (key < length)


def decode_mask(lengths: Tensor, capacity: int, window: int | None = None, size: int = 1) -> Tensor:
    """The rows of the mask for `size` tokens from position `lengths` [B] on -> [B, size, C]."""
    steps = torch.arange(max(size, capacity), device=lengths.device)
    key, position = steps[None, None, :capacity], lengths[:, None, None] + steps[None, :size, None]
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


def last_position(x: Tensor, lengths: Tensor) -> Tensor:
    """What stands at each row's last token: x [B, T, D], lengths [B] -> [B, D]."""
    return x[torch.arange(len(lengths)), lengths.long() - 1]


def pad_cache(array: Tensor, capacity: int) -> Tensor:
    """array [B, K, T, H] -> [B, K, C, H] with zeros behind."""
    return nn.functional.pad(array, (0, 0, 0, capacity - array.shape[2]))


class PaliGemma(nn.Module):
    """Vision tower, projector and decoder. The attribute tree is the parameter tree of `numpy_ref`."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision = Encoder(config.vision)
        self.projector = Linear(config.vision.width, config.text.width)
        self.text = Decoder(config.text)

    def encode_image(self, pixel_values: Tensor, tap: Tap = identity) -> Tensor:
        """pixel_values [B, 3, S, S] -> [B, P, D] in the decoder's width."""
        features = self.vision(pixel_values, scoped(tap, "vision"))
        return tap("projector", self.projector(features))

    def embed_prefix(self, pixel_values: Tensor, input_ids: Tensor, tap: Tap = identity) -> Tensor:
        """The features of a row's pictures, then the ids after its image tokens: input_ids [B, T] -> [B, T, D].

        What `encode_image` gave for the pictures may stand in their place.
        """
        images = pixel_values if pixel_values.ndim == 3 else self.encode_image(pixel_values, tap)
        images = join_pictures(images, input_ids)
        text = self.text.embed(input_ids[:, images.shape[1] :], images.dtype)
        return tap("embed_prefix", torch.cat([images, tap("embed", text)], dim=1))

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, lengths: Tensor, prefix_lengths: Tensor, tap: Tap = identity
    ) -> Tensor:
        """Logits of every position: input_ids [B, T], lengths and prefix_lengths [B] -> [B, T, V]."""
        x, _ = self.hidden_states(pixel_values, input_ids, lengths, prefix_lengths, tap)
        return tap("logits", self.text.logits(x))

    def hidden_states(
        self, pixel_values: Tensor, input_ids: Tensor, lengths: Tensor, prefix_lengths: Tensor, tap: Tap = identity
    ) -> tuple[Tensor, list[Pair]]:
        """The decoder's output everywhere: input_ids [B, T] -> [B, T, D] and (key, value)s, each [B, K, T, H]."""
        x = self.embed_prefix(pixel_values, input_ids, tap)
        size = input_ids.shape[1]
        positions = torch.arange(size, device=x.device)[None].expand_as(input_ids)
        windows = {*self.config.text.windows, None}
        masks = {window: prefix_mask(prefix_lengths, lengths, size, window) for window in windows}
        return self.text(x, positions, masks, tap=scoped(tap, "text"))

    def prefill(
        self, pixel_values: Tensor, input_ids: Tensor, lengths: Tensor, capacity: int, tap: Tap = identity
    ) -> tuple[Tensor, list[Pair]]:
        """Read picture and prompt: input_ids [B, T] -> last logits [B, V] and the filled cache, each [B, K, C, H]."""
        x, cache = self.hidden_states(pixel_values, input_ids, lengths, lengths, tap)
        last = last_position(x, lengths)
        cache = [(pad_cache(key, capacity), pad_cache(value, capacity)) for key, value in cache]
        return tap("logits", self.text.logits(last)), cache

    def decode(
        self, input_ids: Tensor, lengths: Tensor, cache: list[Pair], tap: Tap = identity
    ) -> tuple[Tensor, list[Pair]]:
        """One more token a row: input_ids [B, 1] at lengths [B] -> logits [B, V] and the cache, each [B, K, C, H]."""
        x, cache = self.further_states(input_ids, lengths, cache, tap)
        return tap("logits", self.text.logits(x[:, 0])), cache

    def extend(
        self, input_ids: Tensor, lengths: Tensor, cache: list[Pair], tap: Tap = identity
    ) -> tuple[Tensor, list[Pair]]:
        """Several tokens a row: input_ids [B, T] from lengths [B] -> logits [B, T, V] and cache, each [B, K, C, H]."""
        x, cache = self.further_states(input_ids, lengths, cache, tap)
        return tap("logits", self.text.logits(x)), cache

    def further_states(
        self, input_ids: Tensor, lengths: Tensor, cache: list[Pair], tap: Tap = identity
    ) -> tuple[Tensor, list[Pair]]:
        """The decoder's output behind what is cached: input_ids [B, T] -> [B, T, D] and cache, each [B, K, C, H]."""
        (capacity, dtype), size = (cache[0][0].shape[2], cache[0][0].dtype), input_ids.shape[1]
        x = tap("embed", self.text.embed(input_ids, dtype))
        windows = {*self.config.text.windows, None}
        masks = {window: decode_mask(lengths, capacity, window, size) for window in windows}
        positions = lengths[:, None] + torch.arange(size, device=lengths.device)
        return self.text(x, positions, masks, cache, lengths, scoped(tap, "text"))
