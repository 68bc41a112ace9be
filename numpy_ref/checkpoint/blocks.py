"""Arrays of weights block by block: the dtypes they may have, whether they are finite, their bytes as a file has them.

A block is some rows of about BLOCK bytes, so that an array that is mapped from a file never has to be in memory whole.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ..errors import PaliGemmaError

BLOCK = 32 * 2**20  # bytes converted at once
STRIP = 128  # columns of a transposed matrix turned at once


class Rows(Protocol):
    """An array, or what gives slices of its rows as one does: `adapter.Merged`, `synthetic.RandomArray`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


def bfloat16() -> np.dtype:
    """NumPy's bfloat16, which lives in a package of its own."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def dtypes() -> dict[str, np.dtype]:
    """The dtypes that a checkpoint may have, by their safetensors names."""
    return {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": bfloat16()}


def all_finite(array: np.ndarray) -> bool:
    """Whether no number of an array is a NaN or infinite.

    Read as whole numbers, with and without sign, those sort behind all others: two maxima over the bytes as they lie,
    without a temporary, ten times as fast as np.isfinite in bfloat16.
    """
    size = array.dtype.itemsize
    bounds = {f"i{size}": np.array(np.inf, array.dtype), f"u{size}": np.array(-np.inf, array.dtype)}
    return all(array.view(kind).max(initial=0) < bound.view(kind) for kind, bound in bounds.items())


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise PaliGemmaError that names the tensor and the place of its first NaN or infinity, if it has one."""
    if all_finite(array):
        return
    place = first_not_finite(array) or ()
    raise PaliGemmaError(
        f"tensor {name} holds {array[place]} at {list(place)}, and nothing can be computed with that; "
        "get the checkpoint again, or train it with a lower learning rate"
    )


def first_not_finite(array: np.ndarray, dtype: np.dtype | None = None) -> tuple[int, ...] | None:
    """The index of the first number that, in `dtype`, is a NaN or infinite; None if all are finite."""
    dtype, seen = dtype or array.dtype, 0
    for block in blocks(array, dtype):
        numbers = np.frombuffer(block, np.uint8).view(dtype)
        if not all_finite(numbers):
            return tuple(int(i) for i in np.unravel_index(seen + np.isfinite(numbers).argmin(), array.shape))
        seen += numbers.size
    return None


def checked_blocks(name: str, array: Rows) -> Iterator[memoryview]:
    """The `blocks` of an array in its own dtype, each looked at as it passes: `check_finite` without another pass."""
    for block in blocks(array):
        if not all_finite(np.frombuffer(block, np.uint8).view(array.dtype)):
            check_finite(name, np.asarray(array))
        yield block


def blocks(array: Rows, dtype: np.dtype | None = None) -> Iterator[memoryview]:
    """The array's bytes in row-major order, and in `dtype`, in pieces of about BLOCK bytes."""
    dtype = array.dtype if dtype is None else dtype
    if array.ndim == 0:
        array = array[None]
    row = max(1, math.prod(array.shape[1:]) * dtype.itemsize)
    step = max(1, BLOCK // row)
    for start in range(0, len(array), step):
        yield _row_major(array[start : start + step], dtype).reshape(-1).view(np.uint8).data


def _row_major(array, dtype):
    """The array in row-major order and in `dtype`; a view if it is both already.

    A transposed matrix is turned in strips of columns that fit the cache, twice as fast as in one go.
    """
    with np.errstate(over="ignore"):  # whoever asks for a narrower dtype looks at what came out
        if array.flags.c_contiguous or array.ndim != 2:
            return np.ascontiguousarray(array.astype(dtype, copy=False))
        turned = np.empty(array.shape, dtype)
        for strip in range(0, array.shape[1], STRIP):
            turned[:, strip : strip + STRIP] = array[:, strip : strip + STRIP]
        return turned
