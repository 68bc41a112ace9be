"""The forms in which the weights file keeps a weight: which tensors those are, how they are made, what a graph gets.

Every form has
    parts           its tensors in the file, the large one first
    encode(*arrays) (index of a part, a piece of its array) in turn; a part's pieces in their order, but what comes
                    between them is another's
    take(tensors)   what stands in a graph's parameter tree, of one tensor a part
    memory          bytes that encoding holds beside a block of the array
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from numpy_ref.checkpoint.adapter import Merged
from numpy_ref.checkpoint.blocks import Rows, blocks

from ..model import quantized

STEP = 4 * 2**20  # weights quantized at once
STEP_MEMORY = 6 * 4 * STEP  # bytes: float32 weights, and what quantizing makes of them on the way


@dataclass(frozen=True)
class Part:
    """One tensor of a stored weight. Its name is the weight's path and `suffix`."""

    suffix: str
    dtype: DataType
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.numpy().itemsize  # onnx_ir's own itemsize is a float


@dataclass(frozen=True)
class Whole:
    """A weight as it is, in numbers of one type."""

    shape: tuple[int, ...]
    dtype: DataType
    memory = 0

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part("", self.dtype, self.shape),)

    def encode(self, array: Rows) -> Iterator[tuple[int, np.ndarray]]:
        for block in blocks(array, self.dtype.numpy()):
            yield 0, np.frombuffer(block, np.uint8)

    def take(self, tensors: Sequence[ir.ExternalTensor]) -> ir.ExternalTensor:
        return tensors[0]


@dataclass(frozen=True)
class Joined:
    """Kernels [in, out] that read the same input, or their biases [out], side by side as one weight, by columns."""

    rows: tuple[int, ...]  # (in,), or () for biases
    widths: tuple[int, ...]  # the `out` of each
    dtype: DataType
    memory = 0

    @property
    def whole(self) -> Whole:
        """The one weight that they are together."""
        return Whole((*self.rows, sum(self.widths)), self.dtype)

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.whole.parts

    def encode(self, *arrays: Rows) -> Iterator[tuple[int, np.ndarray]]:
        return self.whole.encode(Columns(arrays))

    def take(self, tensors: Sequence[ir.ExternalTensor]) -> ir.ExternalTensor:
        return tensors[0]

    def columns(self, member: int) -> slice:
        """Those of one of them."""
        return slice(*list(pairwise(accumulate(self.widths, initial=0)))[member])


@dataclass(frozen=True)
class Channels:
    """A kernel [in, out] in int8 with a scale an output, as `quantized.Channels` multiplies by it."""

    shape: tuple[int, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        return Part(".int8", DataType.INT8, self.shape), Part(".int8.scale", DataType.FLOAT, self.shape[1:])

    @property
    def memory(self) -> int:
        return self.parts[0].length + STEP_MEMORY

    def encode(self, kernel: np.ndarray | Merged) -> Iterator[tuple[int, np.ndarray]]:
        size, out = kernel.shape
        values, scales = np.empty((size, out), np.int8), np.empty(out, np.float32)
        step = max(1, STEP // size)
        for start in range(0, out, step):
            columns = slice(start, start + step)
            values[:, columns], scales[columns] = quantized.quantize_channels(
                np.asarray(kernel[:, columns], np.float32)
            )
        yield 0, values
        yield 1, scales

    def take(self, tensors: Sequence[ir.ExternalTensor]) -> quantized.Channels:
        return quantized.Channels(*tensors)


@dataclass(frozen=True)
class Blocks:
    """A kernel [in, out], or a table [out, in] (`is_table`), in `bits` bits with a scale in `dtype` for every block.

    By rows [out, in] in the file, as `quantized.Blocks` multiplies by it. Of a table it looks rows up too.
    """

    shape: tuple[int, ...]
    bits: int
    dtype: DataType
    is_table: bool = False
    memory = STEP_MEMORY

    @property
    def parts(self) -> tuple[Part, ...]:
        out, size = self.shape if self.is_table else self.shape[::-1]
        block = quantized.block_size(size)
        values, suffix = (out, size // block, block * self.bits // 8), f".int{self.bits}"
        return Part(suffix, DataType.UINT8, values), Part(f"{suffix}.scale", self.dtype, values[:2])

    def encode(self, weight: np.ndarray | Merged) -> Iterator[tuple[int, np.ndarray]]:
        rows = weight if self.is_table else weight.T
        step = max(1, STEP // rows.shape[1])
        for start in range(0, len(rows), step):
            values, scales = quantized.quantize_blocks(np.asarray(rows[start : start + step], np.float32), self.bits)
            yield 0, values
            with np.errstate(over="ignore"):  # whoever writes the scales looks at whether they are finite
                yield 1, scales.astype(self.dtype.numpy())

    def take(self, tensors: Sequence[ir.ExternalTensor]) -> quantized.Blocks:
        values, scales = tensors
        return quantized.Blocks(values, _flat(values) if self.is_table else None, scales, self.bits)


Form = Whole | Joined | Channels | Blocks


class Columns:
    """Arrays of the same number of rows, [in, out] each, seen as one, a slice of rows at a time; or vectors as one."""

    def __init__(self, arrays: Sequence[Rows]):
        self.arrays, first = arrays, arrays[0]
        self.dtype, self.ndim = first.dtype, first.ndim
        self.shape = (*first.shape[:-1], sum(array.shape[-1] for array in arrays))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        if self.ndim == 1:
            return np.concatenate([array[:] for array in self.arrays])[rows]
        return np.concatenate([array[rows] for array in self.arrays], axis=1)


def _flat(values: ir.ExternalTensor) -> ir.ExternalTensor:
    """The same bytes of the file, uint8 [out, in / S, S * bits / 8], as [out, in * bits / 8]."""
    out, *rest = values.shape.numpy()
    return ir.ExternalTensor(
        values.location, values.offset, values.length, values.dtype, shape=ir.Shape((out, math.prod(rest))),
        name=f"{values.name}.rows", base_dir=values.base_dir,
    )  # fmt: skip
