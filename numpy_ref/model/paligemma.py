"""PaliGemma: picture features and text in one sequence, prefix-LM attention, prefill, decode and extend.

A row of input ids is  <image> * N*P, <bos>, prefix, "\\n"[, suffix]  and is padded on the right. Each of the B rows
has N pictures, one as a rule; a row's pictures follow each other in the B*N of `pixel_values`.
(Beyer et al. 2024, section 3; big_vision `models/proj/paligemma/paligemma.py`.)
"""

import numpy as np

from ..config import PaliGemmaConfig
from . import gemma, siglip
from .layers import Array, Pair, Params, Tap, identity, linear, scoped


def encode_image(p: Params, config: PaliGemmaConfig, pixel_values: Array, tap: Tap = identity) -> Array:
    """Vision tower and projector: pixel_values [B, 3, S, S] -> [B, P, D] in the decoder's width."""
    features = siglip.encoder(p["vision"], config.vision, pixel_values, scoped(tap, "vision"))
    return tap("projector", linear(features, **p["projector"]))


def embed_prefix(
    p: Params, config: PaliGemmaConfig, pixel_values: Array, input_ids: Array, tap: Tap = identity
) -> Array:
    """The decoder's input: the features of a row's pictures, then the embeddings of the ids after its image tokens.

    pixel_values [B*N, 3, S, S], input_ids [B, T] -> [B, T, D]. What `encode_image` gave for the pictures may stand in
    their place. Image tokens only hold places: their ids are never looked up, so a table needs no row for them.
    """
    images = pixel_values if pixel_values.ndim == 3 else encode_image(p, config, pixel_values, tap)
    images = join_pictures(images, input_ids)
    text = gemma.embed(p["text"], config.text, input_ids[:, images.shape[1] :], images.dtype)
    return tap("embed_prefix", np.concatenate([images, tap("embed", text)], axis=1))


def join_pictures(images: Array, input_ids: Array) -> Array:
    """Features of a row's pictures, one behind the other: images [B*N, P, D], input_ids [B, T] -> [B, N*P, D]."""
    rows, (_, patches, width) = len(input_ids), images.shape
    return images.reshape(rows, -1, patches, width).reshape(rows, -1, width)  # fails unless all rows have equally many


def prefix_mask(prefix_lengths: Array, lengths: Array, size: int, window: int | None = None) -> Array:
    """Who may attend to whom: prefix_lengths [B], lengths [B] -> [B, size, size], True = may.

    The prefix sees the whole prefix, the suffix sees everything before it; with a window, the suffix sees
    only the last `window` positions while the prefix ignores it. For a prefix of 3, a length of 5, size 6:

        1 1 1 . . .
        1 1 1 . . .
        1 1 1 . . .
        1 1 1 1 . .
        1 1 1 1 1 .
        1 1 1 1 1 .   <- padding: what it computes is not used, but it must not be empty (softmax)
    """
    query, key = np.arange(size)[None, :, None], np.arange(size)[None, None, :]
    prefix, length = prefix_lengths[:, None, None], lengths[:, None, None]
    causal = key <= query
    if window is not None:
        causal = causal & (key > np.minimum(query, length - 1) - window)
    return ((key < prefix) & (query < prefix) | causal) & (key < length)


def decode_mask(lengths: Array, capacity: int, window: int | None = None, size: int = 1) -> Array:
    """The rows of the mask for `size` tokens from position `lengths` [B] on -> [B, size, C].

    Each sees all that is cached, those before it, and itself.
    """
    key, position = np.arange(capacity)[None, None, :], lengths[:, None, None] + np.arange(size)[None, :, None]
    mask = key <= position
    return mask if window is None else mask & (key > position - window)


def forward(
    p: Params, config: PaliGemmaConfig, pixel_values: Array, input_ids: Array, lengths: Array, prefix_lengths: Array,
    tap: Tap = identity,
) -> Array:  # fmt: skip
    """Logits of every position in one pass, as training uses it.

    pixel_values [B*N, 3, S, S], input_ids [B, T], lengths and prefix_lengths [B] -> [B, T, V].
    """
    x, _ = hidden_states(p, config, pixel_values, input_ids, lengths, prefix_lengths, tap)
    return tap("logits", gemma.logits(p["text"], config.text, x))


def hidden_states(
    p: Params, config: PaliGemmaConfig, pixel_values: Array, input_ids: Array, lengths: Array, prefix_lengths: Array,
    tap: Tap = identity,
) -> tuple[Array, list[Pair]]:  # fmt: skip
    """The decoder's output at every position, and each layer's keys and values.

    pixel_values [B*N, 3, S, S], input_ids [B, T], lengths and prefix_lengths [B]
    -> [B, T, D] and one (key, value) a layer, each [B, K, T, H].
    """
    x = embed_prefix(p, config, pixel_values, input_ids, tap)
    size = input_ids.shape[1]
    positions = np.broadcast_to(np.arange(size)[None], input_ids.shape)
    masks = {window: prefix_mask(prefix_lengths, lengths, size, window) for window in {*config.text.windows, None}}
    return gemma.decoder(p["text"], config.text, x, positions, masks, tap=scoped(tap, "text"))


def prefill(
    p: Params, config: PaliGemmaConfig, pixel_values: Array, input_ids: Array, lengths: Array, capacity: int,
    tap: Tap = identity,
) -> tuple[Array, list[Pair]]:  # fmt: skip
    """Read picture and prompt: the logits after each row's last token, and the filled cache.

    pixel_values [B*N, 3, S, S], input_ids [B, T], lengths [B], capacity >= T
    -> [B, V] and one (key, value) a layer, each [B, K, C, H]. Slots from lengths on hold no meaning.
    """
    x, cache = hidden_states(p, config, pixel_values, input_ids, lengths, lengths, tap)
    cache = [(pad_cache(key, capacity), pad_cache(value, capacity)) for key, value in cache]
    return tap("logits", gemma.logits(p["text"], config.text, last_position(x, lengths))), cache


def last_position(x: Array, lengths: Array) -> Array:
    """What stands at each row's last token: x [B, T, D], lengths [B] -> [B, D]."""
    return x[np.arange(len(lengths)), lengths - 1]


def pad_cache(array: Array, capacity: int) -> Array:
    """array [B, K, T, H] -> [B, K, C, H] with zeros behind."""
    return np.pad(array, ((0, 0), (0, 0), (0, capacity - array.shape[2]), (0, 0)))


def decode(
    p: Params, config: PaliGemmaConfig, input_ids: Array, lengths: Array, cache: list[Pair], tap: Tap = identity
) -> tuple[Array, list[Pair]]:
    """One more token a row: its logits, and the new cache.

    input_ids [B, 1] at position lengths [B], cache (a key and a value a layer) each [B, K, C, H]
    -> [B, V] and one (key, value) a layer, each [B, K, C, H].
    """
    x, cache = further_states(p, config, input_ids, lengths, cache, tap)
    return tap("logits", gemma.logits(p["text"], config.text, x[:, 0])), cache


def extend(
    p: Params, config: PaliGemmaConfig, input_ids: Array, lengths: Array, cache: list[Pair], tap: Tap = identity
) -> tuple[Array, list[Pair]]:
    """Several more tokens a row, which are known already: the logits after each, and the new cache.

    input_ids [B, T] from position lengths [B]; cache (a key and a value a layer) each [B, K, C, H]
    -> [B, T, V] and one (key, value) a layer, each [B, K, C, H]. `decode` is the case of one token.
    """
    x, cache = further_states(p, config, input_ids, lengths, cache, tap)
    return tap("logits", gemma.logits(p["text"], config.text, x)), cache


def further_states(
    p: Params, config: PaliGemmaConfig, input_ids: Array, lengths: Array, cache: list[Pair], tap: Tap = identity
) -> tuple[Array, list[Pair]]:
    """The decoder's output at tokens behind what is cached, and the new cache.

    input_ids [B, T] from position lengths [B]; cache (a key and a value a layer) each [B, K, C, H]
    -> [B, T, D] and one (key, value) a layer, each [B, K, C, H].
    """
    (capacity, dtype), size = (cache[0][0].shape[2], cache[0][0].dtype), input_ids.shape[1]
    x = tap("embed", gemma.embed(p["text"], config.text, input_ids, dtype))
    masks = {window: decode_mask(lengths, capacity, window, size) for window in {*config.text.windows, None}}
    positions = lengths[:, None] + np.arange(size)
    return gemma.decoder(p["text"], config.text, x, positions, masks, cache, lengths, scoped(tap, "text"))
