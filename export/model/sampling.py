"""From logits to the next token as a graph: twin of `numpy_ref/model/sampling.py`.

Given the same uniform number it draws the same token, in any language.
"""

import math

from onnx_ir import DataType, Value

from .layers import Op, softmax


def sample(
    op: Op, logits: Value, known: Value, temperature: Value, top_k: Value, top_p: Value, uniform: Value
) -> Value:
    """Draw a token a row: logits [B, V], uniform [B] in [0, 1), known [V] bool, numbers as scalars -> int64 [B]."""
    vocab = op.Shape(logits, start=1, end=2)
    greedy = op.Equal(temperature, 0.0)
    # Greedy is the likeliest alone; top_k 0, and any beyond the vocabulary, keeps all.
    count = op.Where(op.Equal(top_k, 0), vocab, op.Min(op.Unsqueeze(top_k, [0]), vocab))
    count = op.Where(greedy, [1], count)
    return sample_among(op, logits, known, op.Where(greedy, 1.0, temperature), count, top_p, uniform)


def sample_among(
    op: Op, logits: Value, known: Value, temperature: Value, count: Value, top_p: Value, uniform: Value
) -> Value:
    """Draw among the likeliest `count` int64 [1], with a temperature above 0; greedy is a count of 1.

    What CUDA can do without a wait: its TopK reads the count on the host, so it must not be computed on the device.
    """
    logits = op.Where(known, logits, -math.inf)
    ranked, order = op.TopK(logits, count, axis=-1, _outputs=2)  # among equals the smaller id comes first
    weights = keep_top_p(op, softmax(op, op.Div(ranked, temperature)), top_p)
    rank = op.Unsqueeze(invert_cdf(op, weights, uniform), [1])
    return op.Squeeze(op.GatherElements(order, rank, axis=1), [1])


def log_probability(op: Op, logits: Value, token: Value) -> Value:
    """The log-softmax of the raw logits [B, V] over all ids, at token [B] -> [B]."""
    chosen = op.GatherElements(op.LogSoftmax(logits, axis=-1), op.Unsqueeze(token, [1]), axis=1)
    return op.Squeeze(chosen, [1])


def likeliest(op: Op, logits: Value, among: Value, count: Value, ends: Value) -> tuple[Value, Value, Value]:
    """The ids of the highest log-probabilities among some, falling; `count` is how many, an array of one.

    logits [B, V], ends [E], among [V] bool -> int64 [B, M], float32 [B, M], float32 [B, E].
    """
    logprobs = op.LogSoftmax(logits, axis=-1)
    # Ranked by logits, as the draw ranks them: nothing is rounded there that makes two of them equal.
    _, ranked = op.TopK(op.Where(among, logits, -math.inf), count, axis=-1, _outputs=2)
    return ranked, op.GatherElements(logprobs, ranked, axis=1), op.Gather(logprobs, ends, axis=1)


def location_spread(op: Op, logits: Value, locations: Value) -> Value:
    """The standard deviation of a location: logits [B, V], locations [L] -> float32 [B]."""
    size = op.Squeeze(op.Shape(locations), [0])
    places = op.Cast(op.Range(0, size, 1), to=DataType.FLOAT)
    weights = softmax(op, op.Gather(logits, locations, axis=1))
    away = op.Sub(places, op.ReduceSum(op.Mul(weights, places), [-1]))
    return op.Sqrt(op.ReduceSum(op.Mul(weights, op.Mul(away, away)), [-1], keepdims=0))


def keep_top_p(op: Op, weights: Value, top_p: Value) -> Value:
    """Zero what top-p cuts off: weights [B, K], falling, of sum one -> [B, K]."""
    before = op.CumSum(weights, 1, exclusive=1)
    first = op.Equal(before, 0.0)  # nothing before it; the likeliest weighs more than nothing
    return op.Where(op.Or(op.Less(before, top_p), first), weights, 0.0)


def invert_cdf(op: Op, weights: Value, uniform: Value) -> Value:
    """The first rank whose cumulated weight exceeds uniform * total: weights [B, K], uniform [B] -> [B]."""
    cumulated = op.CumSum(weights, 1)
    total = op.Slice(cumulated, [-1], [2**31 - 1], [1])
    # Those before it are counted: CUDA has no ArgMax of whole numbers. Of weights that are NaN none is, which leaves
    # the first, an index that exists.
    before = op.LessOrEqual(cumulated, op.Mul(op.Unsqueeze(uniform, [1]), total))
    return op.Cast(op.ReduceSum(op.Cast(before, to=DataType.FLOAT), [1], keepdims=0), to=DataType.INT64)
