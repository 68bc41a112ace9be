"""Prefill and decode in one graph, as the loops of other libraries call a model: embeddings in, a cache that grows.

`attention_mask` tells what is a token, 1, and what is padding, 0, on whichever side. Without a cache all is prefix, and
every token sees all of it; behind one, each sees what came before it, in its window.
"""

from onnx_ir import DataType, Value

from numpy_ref.config import PaliGemmaConfig
from numpy_ref.model.layers import Params, identity, scoped

from . import gemma, image, layers, paligemma, quantized
from .layers import Op, Pair, Tap, cast_to


def encode_picture(
    op: Op, p: Params, config: PaliGemmaConfig, pictures: Value, resize: str, tap: Tap = identity
) -> Value:
    """Pictures of any size, float32 [B, 3, height, width] in 0 … 255, resized here -> features [B, P, D]."""
    resized = image.RESIZES[resize](op, op.Cast(pictures, to=DataType.UINT8), config.vision.image_size)
    pixel_values = cast_to(op, image.scale(op, resized), op.residual)
    return paligemma.encode_image(op, p, config, pixel_values, tap)


def embed(op: Op, p: Params, config: PaliGemmaConfig, input_ids: Value, tap: Tap = identity) -> Value:
    """Embeddings of all ids, image tokens included, whose place features take: input_ids [B, T] -> [B, T, D]."""
    if config.image_token >= config.text.vocab:  # the table has no row for them
        input_ids = op.Min(input_ids, config.text.vocab - 1)
    return tap("embed", gemma.embed(op, p["text"], config.text, input_ids, DataType.FLOAT))


def embed_with_features(
    op: Op, p: Params, config: PaliGemmaConfig, input_ids: Value, features: Value, tap: Tap = identity
) -> Value:
    """The same with the features [N, P, D] in the places of the image tokens, of which there are N * P.

    Without features, behind the prompt, an image token is one that was drawn, and has its own embedding.
    """
    is_picture = op.And(op.Equal(input_ids, config.image_token), op.Greater(op.Size(features), 0))
    places = op.Transpose(op.NonZero(is_picture), perm=[1, 0])
    rows = op.Reshape(features, [-1, config.text.width])
    return tap("embed_prefix", op.ScatterND(embed(op, p, config, input_ids), places, rows))


def decoder(
    op: Op, p: Params, config: PaliGemmaConfig, embeddings: Value, attention_mask: Value, cache: list[Pair],
    tap: Tap = identity,
) -> tuple[Value, list[Pair]]:  # fmt: skip
    """embeddings [B, T, D], attention_mask [B, S] of them and what is cached -> last logits [B, 1, V], the cache.

    Keys and values are [B, K, S - T, H] before and [B, K, S, H] after.
    """
    size, past = (paligemma.length_of(op, *each) for each in ((embeddings, 1), (cache[0][0], 2)))
    positions = op.Sub(op.CumSum(attention_mask, 1), 1)  # [B, S]
    asking = op.Slice(positions, op.Neg(op.Unsqueeze(size, [0])), [2**31 - 1], [1])  # [B, T]
    windows = dict.fromkeys([*config.text.windows] or [None])
    masks = {window: mask(op, attention_mask, positions, asking, past, window) for window in windows}
    x = cast_to(op, embeddings, op.residual)
    there = op.Max(asking, 0)  # padding before the first token has none
    x, cache = gemma.decoder(op, p["text"], config.text, x, there, masks, cache, past, scoped(tap, "text"))
    tokens = op.Slice(attention_mask, op.Neg(op.Unsqueeze(size, [0])), [2**31 - 1], [1])
    lengths = op.ReduceMax(op.Mul(tokens, op.Range(1, op.Add(size, 1), 1)), [1], keepdims=0)  # up to the last token
    logits = gemma.logits(op, p["text"], config.text, paligemma.last_position.portable(op, x, lengths))
    return op.Unsqueeze(tap("logits", logits), [1]), cache


def mask(
    op: Op, attention_mask: Value, positions: Value, asking: Value, past: Value, window: int | None = None
) -> Value:
    """Who may attend to whom: keys at positions [B, S], queries at [B, T] -> [B, T, S], True = may."""
    key, query = op.Unsqueeze(positions, [1]), op.Unsqueeze(asking, [2])
    behind = op.LessOrEqual(key, query)
    if window is not None:
        behind = op.And(behind, op.Greater(key, op.Sub(query, window)))
    seen = op.Or(behind, op.Equal(past, 0))
    return op.And(seen, op.Cast(op.Unsqueeze(attention_mask, [1]), to=DataType.BOOL))


def append_cache(op: Op, cache: Value, update: Value, start: Value) -> Value:
    """cache [B, K, C, H], update [B, K, T, H] -> [B, K, C + T, H]."""
    return op.Concat(cache, update, axis=2)


#: What takes the place of which function, whatever the operators.
INSTEAD = {
    layers.write_cache: append_cache,
    quantized.table_rows: quantized.table_rows_in_standard_operators,
}
