"""Leaf functions that add nodes to a graph, each the twin of its namesake in `numpy_ref/model/layers.py`.

Only standard operators whose kernels exist in float64 too (convolutions aside, which the model does not use), so that
ONNX Runtime itself can be refereed in it. The functions marked `replaceable` give way to others where a graph is built
with `operators="fused"`: `fused.py` and `fused_half.py` say which.
"""

import math
from collections.abc import Iterator
from functools import wraps
from itertools import takewhile

import onnx_ir as ir
from onnx_ir import DataType

from numpy_ref.model.layers import identity

PORTABLE, FUSED = OPERATORS = ("portable", "fused")
HALF = (DataType.FLOAT16, DataType.BFLOAT16)


def named(function):
    """Mark a function of a module: nodes that it adds are named by the module's path, which is that of its weights.

    `op.paths` {weight: path} belongs to the graph; `op.module` is the path of the module that is being built.
    """

    @wraps(function)
    def inside(op, *arguments, **keywords):
        outer, path = op.module, module_path(op.paths, (arguments, keywords)) or op.module
        op.builder.push_module(path.removeprefix(outer).lstrip("."))  # the builder wants the way from the outer one
        op.module = path
        added = function(op, *arguments, **keywords)
        op.builder.pop_module()
        op.module = outer
        return added

    return inside


def module_path(paths, arguments) -> str:
    """The path of the smallest module that has all of the weights among nested arguments; "" if there are none."""
    modules = [paths[weight].split(".")[:-1] for weight in _leaves(arguments) if weight in paths]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*modules, strict=False))
    return ".".join(names[0] for names in shared)


def _leaves(tree) -> Iterator:
    if isinstance(tree, dict | tuple | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree


def replaceable(portable):
    """Mark a function for which a graph may have another: the one place where a graph's operators are chosen.

    `op.instead` {marked function: what takes its place} belongs to the graph; `portable` is the function itself.
    It is `named` too.
    """

    @named
    @wraps(portable)
    def chosen(op, *arguments, **keywords):
        return op.instead.get(chosen, portable)(op, *arguments, **keywords)

    chosen.portable = portable
    return chosen


def upcast(op, x):
    """x [...] -> [...]: float16 and bfloat16 become float32, float32 and float64 stay."""
    return op.Cast(x, to=DataType.FLOAT) if x.dtype in HALF else x


def cast_to(op, x, dtype):
    """x in a dtype; no node if it already is."""
    return x if x.dtype == dtype else op.Cast(x, to=dtype)


def cast_like(op, weight, x):
    """The weight in the dtype of x, no node if it already is: weight [...] -> [...]."""
    return cast_to(op, weight, x.dtype)


@named
def linear(op, x, kernel, bias=None):
    """x [..., in], kernel [in, out], bias [out] -> [..., out], in the dtype of the kernel.

    Here the activation is cast, where the reference casts the weight: a half-precision bundle multiplies in half
    precision, and `residual` takes the product back into the dtype of the stream. A quantized kernel knows how to
    multiply.
    """
    x = cast_like(op, x, kernel)
    y = kernel.multiply(op, x) if is_quantized(kernel) else op.MatMul(x, kernel)
    return y if bias is None else op.Add(y, bias)


def is_quantized(weight):
    """Whether a weight is of `quantized`, and not a tensor of the graph."""
    return not isinstance(weight, ir.Value)


def residual(op, x, update):
    """x + update in the dtype of x, which is float32 in float16 bundles: Gemma's stream may outgrow float16."""
    return op.Add(x, cast_like(op, update, x))


@named
def embedding(op, ids, table, dtype):
    """Rows of a table: ids [...], table [V, D] -> [..., D]."""
    return cast_to(op, table.rows(op, ids) if is_quantized(table) else op.Gather(table, ids), dtype)


@replaceable
def gelu(op, x):
    """GELU in its tanh form: x [...] -> [...].

    Spelled out because the Gelu operator's own expansion has float32 constants, 1e-8 off in float64. The runtime
    recognises this spelling and fuses it.
    """
    x32 = upcast(op, x)
    inner = op.Mul(op.Add(x32, op.Mul(op.Pow(x32, 3.0), 0.044715)), math.sqrt(2 / math.pi))
    return cast_like(op, op.Mul(op.Mul(x32, 0.5), op.Add(op.Tanh(inner), 1.0)), x)


def softmax(op, x):
    """exp(x) / sum(exp(x)) over the last axis: x [..., S] -> [..., S]."""
    return op.Softmax(x, axis=-1)


def softcap(op, x, cap):
    """tanh(x / cap) * cap; x itself when cap is None. x [...] -> [...]."""
    return x if cap is None else op.Mul(op.Tanh(op.Div(x, cap)), cap)


@replaceable
def layer_norm(op, x, scale, bias, eps):
    """LayerNorm: x [..., D], scale [D], bias [D] -> [..., D]. Variance divides by D."""
    x32 = upcast(op, x)
    centred = op.Sub(x32, op.ReduceMean(x32, [-1]))
    variance = op.ReduceMean(op.Pow(centred, 2.0), [-1])
    normed = op.Div(centred, op.Sqrt(op.Add(variance, eps)))
    scaled = op.Add(op.Mul(normed, cast_like(op, scale, x32)), cast_like(op, bias, x32))
    return cast_like(op, scaled, x)


@replaceable
def rms_norm(op, x, scale, eps):
    """RMSNorm with the scale as an offset from one: x [..., D], scale [D] -> [..., D]."""
    x32 = upcast(op, x)
    variance = op.ReduceMean(op.Pow(x32, 2.0), [-1])
    normed = op.Div(x32, op.Sqrt(op.Add(variance, eps)))
    return cast_like(op, op.Mul(normed, op.Add(cast_like(op, scale, x32), 1.0)), x)


@replaceable
def add_layer_norm(op, x, update, scale, bias, eps):
    """`residual`, and `layer_norm` of it: x, update [..., D] -> two [..., D]."""
    x = residual(op, x, update)
    return x, layer_norm(op, x, scale, bias, eps)


@replaceable
def add_rms_norm(op, x, update, scale, eps):
    """`residual`, and `rms_norm` of it: x, update [..., D] -> two [..., D]."""
    x = residual(op, x, update)
    return x, rms_norm(op, x, scale, eps)


def rope_angles(op, positions, head_dim, base, dtype):
    """Cosine and sine of the rotary embedding: positions [B, T] -> two [B, 1, T, H/2]."""
    steps = op.Cast(op.Constant(value_floats=[float(i) for i in range(0, head_dim, 2)]), to=dtype)
    frequencies = op.Pow(op.Cast(op.Constant(value_float=base), to=dtype), op.Mul(steps, -1 / head_dim))
    angles = op.Mul(op.Cast(op.Unsqueeze(positions, [1, 3]), to=dtype), frequencies)
    return op.Cos(angles), op.Sin(angles)


@replaceable
def rope(op, x, cos, sin):
    """Rotate x [B, N, T, H] by the angles of cos and sin [B, 1, T, H/2] -> [B, N, T, H], pairing the two halves."""
    first, second = op.Split(upcast(op, x), axis=-1, num_outputs=2, _outputs=2)
    rotated = op.Concat(
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)), op.Add(op.Mul(second, cos), op.Mul(first, sin)), axis=-1
    )
    return cast_like(op, rotated, x)


def split_heads(op, x, heads):
    """x [B, T, N*H] -> [B, N, T, H]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, -1]), perm=[0, 2, 1, 3])


def merge_heads(op, x):
    """x [B, N, T, H] -> [B, T, N*H]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, -1])


def attend(op, query, key, value, mask=None, cap=None, tap=identity):
    """query [B, N, T, H] (scaled), key and value [B, K, S, H], mask [B, T, S] -> [B, N, T, H]."""
    kv_heads, head_dim = key.shape[1], query.shape[3]
    shape = op.Concat(op.Shape(query, start=0, end=3), op.Shape(key, start=2, end=3), axis=0)
    # The queries that share a key head are stacked, so that each key is read once.
    grouped = op.Reshape(query, [0, kv_heads, -1, head_dim])
    scores = upcast(op, tap("scores", op.MatMul(grouped, op.Transpose(key, perm=[0, 1, 3, 2]))))
    stacked = op.Shape(scores)
    scores = softcap(op, scores, cap)  # before the mask: a capped -inf would be an ordinary number
    scores = op.Reshape(scores, shape)
    if mask is not None:
        scores = op.Where(op.Unsqueeze(mask, [1]), scores, -math.inf)
    weights = tap("weights", cast_like(op, softmax(op, scores), value))
    context = op.MatMul(op.Reshape(weights, stacked), value)
    return op.Reshape(context, op.Shape(query))


def write_cache(op, cache, update, start):
    """cache [B, K, C, H], update [B, K, T, H] written at start [B] of each row -> [B, K, C, H].

    A host that binds the input and the output to one buffer gets this in place.
    """
    return op.TensorScatter(cache, update, op.Cast(start, to=DataType.INT64), axis=2)


# --- beside the two towers ---------------------------------------------------------------------------------


def relu(op, x):
    """max(x, 0): x [...] -> [...]."""
    return op.Relu(x)


def conv(op, x, kernel, bias, stride=1, padding=0):
    """x [B, C, h, w], kernel [out, C, k, k], bias [out] -> [B, out, h', w']."""
    return op.Conv(x, kernel, bias, strides=[stride] * 2, pads=[padding] * 4)


def conv_transpose(op, x, kernel, bias, stride, padding):
    """x [B, C, h, w], kernel [C, out, k, k], bias [out] -> [B, out, h', w']."""
    return op.ConvTranspose(x, kernel, bias, strides=[stride] * 2, pads=[padding] * 4)


def batch_norm(op, x, scale, bias, mean, variance, eps):
    """Batch normalisation at inference: x [B, D], scale, bias, mean and variance [D] -> [B, D]."""
    x32 = upcast(op, x)
    centred = op.Sub(x32, cast_like(op, mean, x32))
    normed = op.Div(centred, op.Sqrt(op.Add(cast_like(op, variance, x32), eps)))
    return cast_like(op, op.Add(op.Mul(normed, cast_like(op, scale, x32)), cast_like(op, bias, x32)), x)
