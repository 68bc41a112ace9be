"""Leaf functions that add nodes to a graph, each the twin of its namesake in `numpy_ref/model/layers.py`.

Only standard operators whose kernels exist in float64 too (convolutions aside, which the model does not use), so that
ONNX Runtime itself can be refereed in it. The functions marked `replaceable` give way to others where a graph is built
with `operators="fused"`: `fused.py` and `fused_half.py` say which.
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import takewhile
from typing import Any, Concatenate, ParamSpec, Protocol, TypeGuard, TypeVar, cast

from onnx_ir import DataType, Value
from onnxscript import GraphBuilder

from numpy_ref.model.layers import identity

PORTABLE, FUSED = OPERATORS = ("portable", "fused")
HALF = (DataType.FLOAT16, DataType.BFLOAT16)

# --- types -------------------------------------------------------------------------------------------------


class Op(Protocol):
    """What adds nodes to a graph: `op.MatMul(x, y)` adds one, for each operator. The rest is the graph's own."""

    builder: GraphBuilder
    instead: dict[Callable, Callable]  # {function: what takes its place} (`replaceable`)
    residual: DataType  # of the residual stream
    max_length: int | None  # how many positions there are
    rounded: dict  # {value: the same in eight bits} (`quantized`)
    paths: dict[Value, str]  # {weight: its path} (`named`)
    module: str  # the path of the module that is being built, by which its nodes are named (`named`)

    def __getattr__(self, operator: str) -> Callable: ...


class Quantized(Protocol):
    """A weight in few bits, which knows how to multiply (`quantized`); if it is a table, it has rows too."""

    @property
    def dtype(self) -> DataType: ...

    def multiply(self, op: Op, x: Value) -> Value: ...

    def rows(self, op: Op, ids: Value) -> Value: ...


Weight = Value | Quantized
Mask = Any  # a Value, bool [B, T, S]; or what stands for it where other operators are chosen, as `fused.Padding`
Rotary = tuple[Value, ...]  # what `rope_angles` makes for `rope`
Pair = tuple[Value, Value]  # (key, value) of a layer, (sum, norm of it)
Tap = Callable[[str, Value], Value]  # called with the name of an intermediate value and the value, which it returns
Arguments = ParamSpec("Arguments")
Added = TypeVar("Added")
Adds = Callable[Concatenate[Op, Arguments], Added]  # a function that adds nodes, and returns values of the graph


class Replaceable(Protocol[Arguments, Added]):
    """A function for which a graph may have another (`replaceable`); `portable` is the function itself."""

    portable: Adds[Arguments, Added]

    def __call__(self, op: Op, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Added: ...


# --- the choice of operators, and the names of nodes -------------------------------------------------------


def named(function: Adds[Arguments, Added]) -> Adds[Arguments, Added]:
    """Mark a function of a module: nodes that it adds are named by the module's path, which is that of its weights.

    `op.paths` {weight: path} belongs to the graph; `op.module` is the path of the module that is being built.
    """

    @wraps(function)
    def inside(op: Op, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Added:
        outer, path = op.module, module_path(op.paths, (arguments, keywords)) or op.module
        op.builder.push_module(path.removeprefix(outer).lstrip("."))  # the builder wants the way from the outer one
        op.module = path
        added = function(op, *arguments, **keywords)
        op.builder.pop_module()
        op.module = outer
        return added

    return inside


def module_path(paths: dict[Value, str], arguments: object) -> str:
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


def replaceable(portable: Adds[Arguments, Added]) -> Replaceable[Arguments, Added]:
    """Mark a function for which a graph may have another: the one place where a graph's operators are chosen.

    `op.instead` {marked function: what takes its place} belongs to the graph; `portable` is the function itself.
    It is `named` too.
    """

    @named
    @wraps(portable)
    def chosen(op: Op, *arguments: Arguments.args, **keywords: Arguments.kwargs) -> Added:
        return op.instead.get(chosen, portable)(op, *arguments, **keywords)

    marked = cast(Replaceable[Arguments, Added], chosen)  # by what is set here
    marked.portable = portable
    return marked


# --- arithmetic ---------------------------------------------------------------------------------------------


def upcast(op: Op, x: Value) -> Value:
    """x [...] -> [...]: float16 and bfloat16 become float32, float32 and float64 stay."""
    return op.Cast(x, to=DataType.FLOAT) if x.dtype in HALF else x


def cast_to(op: Op, x: Value, dtype: DataType) -> Value:
    """x in a dtype; no node if it already is."""
    return x if x.dtype == dtype else op.Cast(x, to=dtype)


def cast_like(op: Op, weight: Value, x: Weight) -> Value:
    """The weight in the dtype of x, no node if it already is: weight [...] -> [...]."""
    return cast_to(op, weight, x.dtype)


@named
def linear(op: Op, x: Value, kernel: Weight, bias: Value | None = None) -> Value:
    """x [..., in], kernel [in, out], bias [out] -> [..., out], in the dtype of the kernel.

    Here the activation is cast, where the reference casts the weight: a half-precision bundle multiplies in half
    precision, and `residual` takes the product back into the dtype of the stream. A quantized kernel knows how to
    multiply.
    """
    x = cast_like(op, x, kernel)
    y = kernel.multiply(op, x) if is_quantized(kernel) else op.MatMul(x, kernel)
    return y if bias is None else op.Add(y, bias)


def is_quantized(weight: Weight) -> TypeGuard[Quantized]:
    """Whether a weight is of `quantized`, and not a tensor of the graph."""
    return not isinstance(weight, Value)


def residual(op: Op, x: Value, update: Value) -> Value:
    """x + update in the dtype of x, which is float32 in float16 bundles: Gemma's stream may outgrow float16."""
    return op.Add(x, cast_like(op, update, x))


@named
def embedding(op: Op, ids: Value, table: Weight, dtype: DataType) -> Value:
    """Rows of a table: ids [...], table [V, D] -> [..., D]."""
    return cast_to(op, table.rows(op, ids) if is_quantized(table) else op.Gather(table, ids), dtype)


@replaceable
def gelu(op: Op, x: Value) -> Value:
    """GELU in its tanh form: x [...] -> [...].

    Spelled out because the Gelu operator's own expansion has float32 constants, 1e-8 off in float64. The runtime
    recognises this spelling and fuses it.
    """
    x32 = upcast(op, x)
    inner = op.Mul(op.Add(x32, op.Mul(op.Pow(x32, 3.0), 0.044715)), math.sqrt(2 / math.pi))
    return cast_like(op, op.Mul(op.Mul(x32, 0.5), op.Add(op.Tanh(inner), 1.0)), x)


def softmax(op: Op, x: Value) -> Value:
    """exp(x) / sum(exp(x)) over the last axis: x [..., S] -> [..., S]."""
    return op.Softmax(x, axis=-1)


def softcap(op: Op, x: Value, cap: float | None) -> Value:
    """tanh(x / cap) * cap; x itself when cap is None. x [...] -> [...]."""
    return x if cap is None else op.Mul(op.Tanh(op.Div(x, cap)), cap)


@replaceable
def layer_norm(op: Op, x: Value, scale: Value, bias: Value, eps: float) -> Value:
    """LayerNorm: x [..., D], scale [D], bias [D] -> [..., D]. Variance divides by D."""
    x32 = upcast(op, x)
    centred = op.Sub(x32, op.ReduceMean(x32, [-1]))
    variance = op.ReduceMean(op.Pow(centred, 2.0), [-1])
    normed = op.Div(centred, op.Sqrt(op.Add(variance, eps)))
    scaled = op.Add(op.Mul(normed, cast_like(op, scale, x32)), cast_like(op, bias, x32))
    return cast_like(op, scaled, x)


@replaceable
def rms_norm(op: Op, x: Value, scale: Value, eps: float) -> Value:
    """RMSNorm with the scale as an offset from one: x [..., D], scale [D] -> [..., D]."""
    x32 = upcast(op, x)
    variance = op.ReduceMean(op.Pow(x32, 2.0), [-1])
    normed = op.Div(x32, op.Sqrt(op.Add(variance, eps)))
    return cast_like(op, op.Mul(normed, op.Add(cast_like(op, scale, x32), 1.0)), x)


@replaceable
def add_layer_norm(op: Op, x: Value, update: Value, scale: Value, bias: Value, eps: float) -> Pair:
    """`residual`, and `layer_norm` of it: x, update [..., D] -> two [..., D]."""
    x = residual(op, x, update)
    return x, layer_norm(op, x, scale, bias, eps)


@replaceable
def add_rms_norm(op: Op, x: Value, update: Value, scale: Value, eps: float) -> Pair:
    """`residual`, and `rms_norm` of it: x, update [..., D] -> two [..., D]."""
    x = residual(op, x, update)
    return x, rms_norm(op, x, scale, eps)


@replaceable
def rope_angles(op: Op, positions: Value, head_dim: int, base: float, dtype: DataType) -> Pair:
    """Cosine and sine of the rotary embedding: positions [B, T] -> two [B, 1, T, H/2]."""
    steps = op.Cast(op.Constant(value_floats=[float(i) for i in range(0, head_dim, 2)]), to=dtype)
    frequencies = op.Pow(op.Cast(op.Constant(value_float=base), to=dtype), op.Mul(steps, -1 / head_dim))
    angles = op.Mul(op.Cast(op.Unsqueeze(positions, [1, 3]), to=dtype), frequencies)
    return op.Cos(angles), op.Sin(angles)


@replaceable
def rope(op: Op, x: Value, cos: Value, sin: Value) -> Value:
    """Rotate x [B, N, T, H] by the angles of cos and sin [B, 1, T, H/2] -> [B, N, T, H], pairing the two halves."""
    first, second = op.Split(upcast(op, x), axis=-1, num_outputs=2, _outputs=2)
    rotated = op.Concat(
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)), op.Add(op.Mul(second, cos), op.Mul(first, sin)), axis=-1
    )
    return cast_like(op, rotated, x)


def split_heads(op: Op, x: Value, heads: int) -> Value:
    """x [B, T, N*H] -> [B, N, T, H]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, -1]), perm=[0, 2, 1, 3])


def merge_heads(op: Op, x: Value) -> Value:
    """x [B, N, T, H] -> [B, T, N*H]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, -1])


def attend(
    op: Op, query: Value, key: Value, value: Value, mask: Value | None = None, cap: float | None = None,
    tap: Tap = identity,
) -> Value:  # fmt: skip
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


@replaceable
def write_cache(op: Op, cache: Value, update: Value, start: Value) -> Value:
    """cache [B, K, C, H], update [B, K, T, H] written at start [B] of each row -> [B, K, C, H].

    A host that binds the input and the output to one buffer gets this in place.
    """
    return op.TensorScatter(cache, update, op.Cast(start, to=DataType.INT64), axis=2)


# --- beside the two towers ---------------------------------------------------------------------------------


def relu(op: Op, x: Value) -> Value:
    """max(x, 0): x [...] -> [...]."""
    return op.Relu(x)


def conv(op: Op, x: Value, kernel: Value, bias: Value, stride: int = 1, padding: int = 0) -> Value:
    """x [B, C, h, w], kernel [out, C, k, k], bias [out] -> [B, out, h', w']."""
    return op.Conv(x, kernel, bias, strides=[stride] * 2, pads=[padding] * 4)


def conv_transpose(op: Op, x: Value, kernel: Value, bias: Value, stride: int, padding: int) -> Value:
    """x [B, C, h, w], kernel [C, out, k, k], bias [out] -> [B, out, h', w']."""
    return op.ConvTranspose(x, kernel, bias, strides=[stride] * 2, pads=[padding] * 4)


def batch_norm(op: Op, x: Value, scale: Value, bias: Value, mean: Value, variance: Value, eps: float) -> Value:
    """Batch normalisation at inference: x [B, D], scale, bias, mean and variance [D] -> [B, D]."""
    x32 = upcast(op, x)
    centred = op.Sub(x32, cast_like(op, mean, x32))
    normed = op.Div(centred, op.Sqrt(op.Add(cast_like(op, variance, x32), eps)))
    return cast_like(op, op.Add(op.Mul(normed, cast_like(op, scale, x32)), cast_like(op, bias, x32)), x)
