"""PaliGemma's graphs, prefill, decode and extend: twin of `numpy_ref/model/paligemma.py`.

`op.residual` is the dtype of the residual stream.
"""

import onnx_ir as ir
from onnx_ir import DataType, Value

from numpy_ref.config import PaliGemmaConfig
from numpy_ref.model.layers import Params, identity, scoped

from . import gemma, siglip
from .layers import Op, Pair, Tap, cast_like, cast_to, linear, replaceable

FEATURES = "image_features"  # in the prefill graph, where the picture ends and the decoder begins


def encode_image(op: Op, p: Params, config: PaliGemmaConfig, pixel_values: Value, tap: Tap = identity) -> Value:
    """pixel_values [B, 3, S, S] -> [B, P, D] in the decoder's width."""
    features = siglip.encoder(op, p["vision"], config.vision, pixel_values, scoped(tap, "vision"))
    return tap("projector", cast_like(op, linear(op, features, **p["projector"]), pixel_values))


def embed_prefix(
    op: Op, p: Params, config: PaliGemmaConfig, pixel_values: Value, input_ids: Value, tap: Tap = identity
) -> Value:
    """The features of a row's pictures, then the ids after its image tokens: input_ids [B, T] -> [B, T, D].

    What `encode_image` gave for the pictures may stand in their place. Concatenated, not scattered by a comparison with
    the image token: the shapes depend on no data.
    """
    images = pixel_values
    if len(pixel_values.shape) > 3:
        images = encode_image(op, p, config, pixel_values, tap)
        images.name = FEATURES
    images = join_pictures(op, images, input_ids)
    text_ids = op.Slice(input_ids, op.Shape(images, start=1, end=2), [2**31 - 1], [1])
    text = gemma.embed(op, p["text"], config.text, text_ids, images.dtype)
    return tap("embed_prefix", op.Concat(images, tap("embed", text), axis=1))


def join_pictures(op: Op, images: Value, input_ids: Value) -> Value:
    """The features of each row's pictures, one behind the other: images [B*N, P, D] -> [B, N*P, D]."""
    rows, (_, patches, width) = op.Shape(input_ids, end=1), images.shape
    by_row = op.Reshape(images, op.Concat(rows, [-1, patches, width], axis=0))  # fails unless all have equally many
    joined = op.Reshape(by_row, [0, -1, width])
    joined.dtype, joined.shape = images.dtype, ir.Shape(["B", None, width])
    return joined


@replaceable
def prefix_mask(op: Op, prefix_lengths: Value, lengths: Value, size: Value, window: int | None = None) -> Value:
    """Who may attend to whom: prefix_lengths [B], lengths [B] -> [B, size, size], True = may."""
    steps = op.Range(0, size, 1)
    query, key = op.Unsqueeze(steps, [0, 2]), op.Unsqueeze(steps, [0, 1])
    prefix, length = op.Unsqueeze(prefix_lengths, [1, 2]), op.Unsqueeze(lengths, [1, 2])
    causal = op.LessOrEqual(key, query)
    if window is not None:
        oldest = op.Sub(op.Min(query, op.Sub(length, 1)), window)
        causal = op.And(causal, op.Greater(key, oldest))
    both_in_prefix = op.And(op.Less(key, prefix), op.Less(query, prefix))
    return op.And(op.Or(both_in_prefix, causal), op.Less(key, length))


@replaceable
def decode_mask(op: Op, lengths: Value, capacity: Value, window: int | None = None, size: Value | int = 1) -> Value:
    """The rows of the mask for `size` tokens from position `lengths` [B] on -> [B, size, C]."""
    key, position = op.Unsqueeze(op.Range(0, capacity, 1), [0, 1]), op.Unsqueeze(lengths, [1, 2])
    if size != 1:
        position = op.Add(position, op.Unsqueeze(op.Range(0, size, 1), [0, 2]))
    mask = op.LessOrEqual(key, position)
    return mask if window is None else op.And(mask, op.Greater(key, op.Sub(position, window)))


def hidden_states(
    op: Op, p: Params, config: PaliGemmaConfig, pixel_values: Value, input_ids: Value, lengths: Value,
    prefix_lengths: Value, tap: Tap = identity,
) -> tuple[Value, list[Pair]]:  # fmt: skip
    """The decoder's output everywhere: input_ids [B, T] -> [B, T, D] and (key, value)s, each [B, K, T, H]."""
    x = embed_prefix(op, p, config, pixel_values, input_ids, tap)
    size = length_of(op, input_ids, 1)
    positions = op.Unsqueeze(op.Range(0, size, 1), [0])
    windows = dict.fromkeys([*config.text.windows] or [None])
    masks = {window: prefix_mask(op, prefix_lengths, lengths, size, window) for window in windows}
    return gemma.decoder(op, p["text"], config.text, x, positions, masks, tap=scoped(tap, "text"))


def prefill(
    op: Op, p: Params, config: PaliGemmaConfig, pixel_values: Value, input_ids: Value, lengths: Value, capacity: Value,
    tap: Tap = identity,
) -> tuple[Value, list[Pair]]:  # fmt: skip
    """Read picture and prompt: input_ids [B, T] -> last logits [B, V] and the filled cache, each [B, K, C, H]."""
    lengths, pixel_values = op.Cast(lengths, to=DataType.INT64), cast_to(op, pixel_values, op.residual)
    x, cache = hidden_states(op, p, config, pixel_values, input_ids, lengths, lengths, tap)
    last = last_position(op, x, lengths)
    cache = [(pad_cache(op, key, capacity), pad_cache(op, value, capacity)) for key, value in cache]
    return tap("logits", gemma.logits(op, p["text"], config.text, last)), cache


@replaceable
def last_position(op: Op, x: Value, lengths: Value) -> Value:
    """What stands at each row's last token: x [B, T, D], lengths [B] -> [B, D]."""
    return op.GatherND(x, op.Unsqueeze(op.Sub(lengths, 1), [1]), batch_dims=1)


def pad_cache(op: Op, array: Value, capacity: Value) -> Value:
    """array [B, K, T, H] -> [B, K, C, H] with zeros behind."""
    behind = op.Unsqueeze(op.Sub(capacity, length_of(op, array, 2)), [0])
    shape = op.Concat(op.Shape(array, end=2), behind, op.Shape(array, start=3), axis=0)
    # Concatenated, since Pad has no bfloat16 kernel.
    return op.Concat(array, op.Expand(cast_like(op, op.Constant(value_float=0.0), array), shape), axis=2)


def decode(
    op: Op, p: Params, config: PaliGemmaConfig, input_ids: Value, lengths: Value, cache: list[Pair], tap: Tap = identity
) -> tuple[Value, list[Pair]]:
    """One more token a row: input_ids [B, 1] at lengths [B] -> logits [B, V] and the cache, each [B, K, C, H]."""
    x, cache = further_states(op, p, config, input_ids, lengths, cache, tap)
    return tap("logits", gemma.logits(op, p["text"], config.text, op.Squeeze(x, [1]))), cache


def extend(
    op: Op, p: Params, config: PaliGemmaConfig, input_ids: Value, lengths: Value, cache: list[Pair], tap: Tap = identity
) -> tuple[Value, list[Pair]]:
    """Several more tokens a row: input_ids [B, T] from lengths [B] -> logits [B, T, V] and cache, each [B, K, C, H]."""
    x, cache = further_states(op, p, config, input_ids, lengths, cache, tap)
    rows = op.Reshape(x, [-1, config.text.width])  # the head is made for a row a token
    rows.dtype, rows.shape = x.dtype, ir.Shape(["tokens of all", config.text.width])
    logits = gemma.logits(op, p["text"], config.text, rows)
    shape = op.Concat(op.Shape(input_ids), [config.text.vocab], axis=0)
    return tap("logits", op.Reshape(logits, shape)), cache


def further_states(
    op: Op, p: Params, config: PaliGemmaConfig, input_ids: Value, lengths: Value, cache: list[Pair], tap: Tap = identity
) -> tuple[Value, list[Pair]]:
    """The decoder's output behind what is cached: input_ids [B, T] -> [B, T, D] and the cache, each [B, K, C, H]."""
    lengths = op.Cast(lengths, to=DataType.INT64)
    capacity = length_of(op, cache[0][0], 2)
    size = 1 if input_ids.shape[1] == 1 else length_of(op, input_ids, 1)
    x = tap("embed", gemma.embed(op, p["text"], config.text, input_ids, op.residual))
    windows = dict.fromkeys([*config.text.windows] or [None])
    masks = {window: decode_mask(op, lengths, capacity, window, size) for window in windows}
    positions = op.Unsqueeze(lengths, [1])
    if size != 1:
        positions = op.Add(positions, op.Unsqueeze(op.Range(0, size, 1), [0]))
    return gemma.decoder(op, p["text"], config.text, x, positions, masks, cache, lengths, scoped(tap, "text"))


def length_of(op: Op, array: Value, axis: int) -> Value:
    """The size of one axis as a scalar int64 value."""
    return op.Squeeze(op.Shape(array, start=axis, end=axis + 1), [0])
