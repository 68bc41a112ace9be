"""Weights in eight, four and two bits, in the forms that ONNX Runtime's kernels take.

Both are symmetric: w is about scale * q, with q a whole number around zero.

Channels  q int8 [in, out], one scale an output. The activations get eight bits too, with one scale a row of x, so
          that a row with an outlier spoils no other. The quickest product for many rows (prefill).
Blocks    q of 2, 4 or 8 bits [out, in / S, S * bits / 8], one scale for S weights in a row (MatMulNBits). The quickest
          for a single row, which is bound by the bytes read (decode). The rows of an embedding table are read from
          the same bytes (GatherBlockQuantized).

A quantized weight stands in the parameter tree where the plain one would, and `layers.linear` and `layers.embedding`
let it do their work.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType, Value
from onnxscript import GraphBuilder

from .layers import Op, Pair, replaceable

CONTRIB = "com.microsoft"
BLOCK_SIZES = (128, 64, 32, 16)  # the largest that divides a row is taken
#: Of the widest step, by bits, tried too; more of them hardly lower the error, and in eight bits none does.
CUTS = {8: (), 4: (0.93, 0.86), 2: (0.85, 0.7, 0.6, 0.5)}
LEAST = 1e-20  # what a row of zeros is taken to hold
MIDDLE = 128  # the zero of rounded activations, which are uint8: in it the kernels are quickest
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: products in int8, scaled by block


# --- in a graph --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Channels:
    """A kernel [in, out] in int8. `values` and `scales` are tensors, or the graph's values once declared."""

    values: Any
    scales: Any
    dtype = DataType.FLOAT

    def declare(self, builder: GraphBuilder) -> "Channels":
        """The same with its tensors as initializers of a graph."""
        return _declare(self, builder)

    def multiply(self, op: Op, x: Value) -> Value:
        """x [..., in] float32 -> [..., out]."""
        return op.Mul(*self.multiply_apart(op, x))

    def multiply_apart(self, op: Op, x: Value) -> Pair:
        """The product but for a factor a row, and the factors: [..., out] and [..., 1]."""
        rounded, factors = _round_rows(op, x)
        middle = _byte(op, MIDDLE)
        y = op.MatMulIntegerToFloat(rounded, self.values, 1.0, self.scales, middle, _domain=CONTRIB, _version=1)
        y.dtype, y.shape = DataType.FLOAT, _with_last(x.shape, self.values.shape[1])
        return y, factors


@dataclass(frozen=True)
class Blocks:
    """A kernel or a table by its rows [out, in], in `bits` bits. `flat` are the same bytes as [out, in * bits / 8]."""

    values: Any
    flat: Any
    scales: Any
    bits: int

    @property
    def dtype(self) -> DataType:
        """What it multiplies, and what comes out."""
        return self.scales.dtype

    def declare(self, builder: GraphBuilder) -> "Blocks":
        """The same with its tensors as initializers of a graph."""
        return _declare(self, builder)

    @property
    def block(self) -> int:
        return self.values.shape[-1] * 8 // self.bits

    def multiply(self, op: Op, x: Value) -> Value:
        """x [..., in] -> [..., out]."""
        out, blocks = self.values.shape[0], self.values.shape[1]
        rounded = {"accuracy_level": INT8_ACTIVATIONS} if self.dtype == DataType.FLOAT else {}
        y = op.MatMulNBits(
            x, self.values, self.scales, K=blocks * self.block, N=out, bits=self.bits, block_size=self.block,
            **rounded, _domain=CONTRIB, _version=1,
        )  # fmt: skip
        y.dtype, y.shape = self.dtype, _with_last(x.shape, out)
        return y

    def rows(self, op: Op, ids: Value) -> Value:
        """Rows of a table: ids [...] -> [..., in]."""
        x = table_rows(op, self, ids)
        x.dtype, x.shape = self.dtype, ir.Shape([*ids.shape, self.values.shape[1] * self.block])
        return x


@replaceable
def table_rows(op: Op, table: Blocks, ids: Value) -> Value:
    """Rows of a table in blocks: ids [...] -> [..., in]."""
    return op.GatherBlockQuantized(
        table.flat, ids, table.scales, bits=table.bits, block_size=table.block, gather_axis=0, quantize_axis=1,
        _domain=CONTRIB, _version=1,
    )  # fmt: skip


def table_rows_in_standard_operators(op: Op, table: Blocks, ids: Value) -> Value:
    """The same, for runtimes that do not have the operator on every provider, as ONNX Runtime's build for WebGPU."""
    packed = op.Gather(table.values, ids)  # [..., blocks, bytes]
    if table.bits == 4:
        low, high = op.BitwiseAnd(packed, _byte(op, 15)), op.BitShift(packed, _byte(op, 4), direction="RIGHT")
        pairs = op.Concat(op.Unsqueeze(low, [-1]), op.Unsqueeze(high, [-1]), axis=-1)
        packed = op.Reshape(pairs, op.Concat(op.Shape(packed, end=-1), [table.block], axis=0))
    scales = op.Unsqueeze(op.Gather(table.scales, ids), [-1])
    steps = op.Sub(op.Cast(packed, to=table.dtype), float(2 ** (table.bits - 1)))
    return op.Reshape(op.Mul(steps, scales), op.Concat(op.Shape(ids), [-1], axis=0))


def _byte(op, value):
    return op.Constant(value=_scalar(value, np.uint8))


def _round_rows(op, x):
    """x [..., in] -> itself in steps of a 127th of its row's largest, around MIDDLE; those steps [..., 1].

    Kernels that read the same x share the nodes: opening a graph takes time that grows with their number squared.
    """
    if x not in op.rounded:
        largest = op.Max(op.ReduceMax(x, [-1]), op.Neg(op.ReduceMin(x, [-1])), LEAST)
        steps = op.Mul(largest, 1 / 127)
        rows = [axis for axis, size in enumerate(x.shape[:-1]) if size != 1]
        if len(rows) == 1:  # the operator takes a scale a row along one axis, which saves a pass over x
            along = op.Reshape(steps, [-1])
            rounded = op.QuantizeLinear(x, along, _middles(op, along, x.shape[rows[0]]), axis=rows[0])
        else:
            rounded = op.QuantizeLinear(op.Div(x, steps), 1.0, _byte(op, MIDDLE))
        op.rounded[x] = rounded, steps
    return op.rounded[x]


def _middles(op, steps, size):
    """MIDDLE for each of the steps [R]; one node for all that have a size of this name."""
    key = getattr(size, "value", size) or steps  # a size without a name may be any
    if key not in op.rounded:
        op.rounded[key] = op.Expand(_byte(op, MIDDLE), op.Shape(steps))
    return op.rounded[key]


def _declare(weight, builder):
    tensors = {name: value for name, value in vars(weight).items() if isinstance(value, ir.TensorProtocol)}
    return replace(weight, **{name: builder.initializer(tensor, tensor.name) for name, tensor in tensors.items()})


def _scalar(value, dtype):
    return ir.tensor(np.array(value, dtype))


def _with_last(shape, size):
    return ir.Shape([*list(shape)[:-1], size])


# --- in NumPy ---------------------------------------------------------------------------------------------


def block_size(size: int) -> int:
    """How many weights of a row of `size` share a scale; 0 if the row does not divide."""
    return next((block for block in BLOCK_SIZES if size % block == 0), 0)


def quantize_channels(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [in, out] -> int8 [in, out] and float32 scales [out]."""
    scales = np.maximum(np.abs(kernel).max(0), np.finfo(np.float32).tiny) / np.float32(127)
    with np.errstate(invalid="ignore"):  # whoever writes the scales looks at whether they are finite
        return np.rint(kernel / scales).astype(np.int8), scales


def quantize_blocks(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> uint8 [out, in / S, S * bits / 8] and float32 scales [out, in / S].

    By least squares: of several steps a block takes the one that leaves the smallest error. With the widest its largest
    weight becomes the lowest number, which is one farther from zero than the highest; the others cut the largest short.
    """
    block, zero = block_size(rows.shape[1]), 2 ** (bits - 1)
    blocks = rows.reshape(len(rows), -1, block)
    places = np.abs(blocks).argmax(-1)[..., None]
    widest = np.take_along_axis(blocks, places, -1) / np.float32(-zero)
    q, scales, explained = _round_blocks(blocks, widest, zero)
    for cut in CUTS[bits]:
        other = _round_blocks(blocks, widest * np.float32(cut), zero)
        better = other[2] > explained
        for kept, found in zip((q, scales, explained), other, strict=True):
            np.copyto(kept, found, where=better)
    return pack(q, bits), scales[..., 0]


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers around zero [out, in / S, S] -> uint8 [out, in / S, S * bits / 8], the first in the lower bits."""
    with np.errstate(invalid="ignore"):
        q = (q + np.float32(2 ** (bits - 1))).astype(np.uint8)
    fields = 8 // bits
    return functools.reduce(np.bitwise_or, (q[..., i::fields] << bits * i for i in range(fields)))


def _round_blocks(blocks, steps, zero):
    """Blocks [..., S] by steps [..., 1]: whole numbers q, the scale a that fits them best, and what that explains.

    |b - a q|^2 is least with a = (q b) / (q q), and then less than |b|^2 by a (q b).
    """
    with np.errstate(invalid="ignore", over="ignore"):  # whoever writes the scales looks at whether they are finite
        q = blocks / np.where(steps == 0, np.float32(1), steps)
        np.clip(np.rint(q, out=q), -zero, zero - 1, out=q)
        along, length = (np.einsum("...i,...i", q, other)[..., None] for other in (blocks, q))
        fitted = np.where(length > 0, along / np.maximum(length, 1), steps)
        return q, fitted, along * fitted


def dequantize_blocks(values: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The inverse, as the kernels have it: -> float32 [out, in]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    q = (values[..., None] >> shifts & np.uint8(2**bits - 1)).reshape(*values.shape[:2], -1)
    weights = (q.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    return weights.reshape(len(values), math.prod(weights.shape[1:]))
