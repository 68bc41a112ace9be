"""The weights file that the graphs share: raw tensors, one after another, each on a page boundary.

It is planned first (so that graphs and checks need no bytes) and then written tensor by tensor, a block of
rows at a time: a model never has to fit in memory. What each precision makes of a weight is decided here.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from numpy_ref.checkpoint import parameters
from numpy_ref.checkpoint.blocks import BLOCK, all_finite, blocks, check_finite, first_not_finite
from numpy_ref.errors import PaliGemmaError

from ..model import quantized
from ..model.layers import FUSED, PORTABLE
from ..model.quantized import Part

FILE = "weights.bin"
ALIGNMENT = 4096  # what the ONNX specification recommends, so that a tensor can be mapped
#: The precisions whose weights are kept as numbers of one type, and that type.
FLOATS = {"float32": DataType.FLOAT, "float16": DataType.FLOAT16, "bfloat16": DataType.BFLOAT16}
#: Weights in few bits; activations in float32, for the CPU, or in the half precision that the name ends in, for CUDA.
QUANTIZED = ("int8", "int4", "int4-float16", "int4-bfloat16")
PRECISIONS = (*FLOATS, *QUANTIZED)
SIDE_BY_SIDE = (("query", "key", "value"), ("gate", "up"))
_JOINED = re.compile(r"(.*\.blocks\.\d+\.attention)\.(?:query|key|value)\.(kernel|bias)")


@dataclass(frozen=True)
class Form:
    """One way in which a weight is stored: its parts, and how they are made from the weight's array."""

    kind: str
    parts: tuple[Part, ...]
    encode: object  # array -> an iterator over the parts, each an iterator over arrays


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies. `path` is the weight's; `name` the tensor's, which differs where a weight has several.

    Weights that are joined (`plan`) have one path together.
    """

    path: str
    name: str
    form: Form
    dtype: DataType
    shape: tuple[int, ...]
    offset: int
    length: int


def stream_dtype(precision: str) -> DataType:
    """What the cache, and the weights that are not quantized, are kept in."""
    return FLOATS.get(precision.rpartition("-")[2], DataType.FLOAT)


def forms(parameter, precision: str) -> list[Form]:
    """How a weight is stored: kernels of the blocks and the embedding table in few bits, everything else as it is.

    int8: kernels by channel, for both graphs; the table in blocks of 8 bits.
    int4: kernels by channel for prefill; the decoder's in blocks of 4 bits too, for decode; the table likewise.
    int4-float16, int4-bfloat16: the decoder's kernels and the table in blocks of 4 bits, for both graphs.
    """
    path, shape, dtype = parameter.path, parameter.shape, stream_dtype(precision)
    if precision in FLOATS:
        return [_whole(shape, dtype)]
    bits = 8 if precision == "int8" else 4
    if path == "text.embedding" and quantized.block_size(shape[1]):
        return [_blocks(shape, bits, False, dtype)]
    if path == "text.head.kernel" and quantized.block_size(shape[0]):
        return [_blocks(shape, bits, True, dtype)]
    if ".blocks." not in path or not path.endswith(".kernel"):
        return [_whole(shape, dtype)]
    fits = path.startswith("text.") and quantized.block_size(shape[0])
    if dtype != DataType.FLOAT:
        return [_blocks(shape, bits, True, dtype) if fits else _whole(shape, dtype)]
    found = [Form("channels", tuple(quantized.channel_parts(shape)), quantized.encode_channels)]
    return [*found, _blocks(shape, bits, True, dtype)] if precision == "int4" and fits else found


def _whole(shape, dtype):
    return Form("whole", (Part("", dtype, shape),), partial(_in_dtype, dtype=dtype.numpy()))


def _in_dtype(array, dtype):
    yield (np.frombuffer(block, np.uint8) for block in blocks(array, dtype))


def _blocks(shape, bits, by_columns, dtype):
    parts = tuple(quantized.block_parts(shape, bits, by_columns, dtype))
    return Form("blocks", parts, partial(quantized.encode_blocks, bits=bits, by_columns=by_columns, dtype=dtype))


def plan(config, precision="float32", operators=PORTABLE) -> dict[str, Stored]:
    """Place every tensor of a model: name -> Stored, in the order in which they are written.

    Kernels in blocks that read the same input lie side by side, values and scales apart, so that a graph can take them
    as one. For fused operators in half precision whole kernels of queries, keys and values are joined by their columns,
    and their biases, into one tensor.
    """
    placed, offset = {}, 0
    joins = operators == FUSED and stream_dtype(precision) != DataType.FLOAT
    for group in _groups(config, precision, joins):
        for part in range(len(group[0][1].parts)):
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            for path, form in group:
                suffix, dtype, shape = astuple(form.parts[part])
                length = math.prod(shape) * dtype.numpy().itemsize  # onnx_ir's own itemsize is a float
                placed[path + suffix] = Stored(path, path + suffix, form, dtype, shape, offset, length)
                offset += length
    return placed


def joined_path(path: str) -> str | None:
    """The path that the kernels, or biases, of a query, a key and a value have together; None for other weights."""
    found = _JOINED.fullmatch(path)
    return f"{found[1]}.query_key_value.{found[2]}" if found else None


def _groups(config, precision, joins) -> list[list[tuple[str, Form]]]:
    """What is placed together: (path, form) alone, or several in blocks that read the same input."""
    groups, waiting = [], {}
    for parameter in parameters(config):
        layer, _, name = parameter.path.removesuffix(".kernel").rpartition(".")
        for form in forms(parameter, precision):
            partners = next((names for names in SIDE_BY_SIDE if name in names), None)
            if joins and form.kind == "whole" and (path := joined_path(parameter.path)):
                waiting.setdefault(path, []).append(parameter.shape)
                if len(waiting[path]) == 3:
                    shape = (*parameter.shape[:-1], sum(shape[-1] for shape in waiting[path]))
                    groups.append([(path, _whole(shape, form.parts[0].dtype))])
                continue
            if form.kind != "blocks" or not partners:
                groups.append([(parameter.path, form)])
                continue
            group = waiting.setdefault((layer, partners), [])
            group.append((parameter.path, form))
            if len(group) == len(partners):
                groups.append(group)
    return groups


class Columns:
    """Arrays of the same number of rows, [in, out] each, seen as one, a slice of rows at a time; or vectors as one."""

    def __init__(self, arrays):
        self.arrays, first = arrays, arrays[0]
        self.dtype, self.ndim = first.dtype, first.ndim
        self.shape = (*first.shape[:-1], sum(array.shape[-1] for array in arrays))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        if self.ndim == 1:
            return np.concatenate([array[:] for array in self.arrays])[rows]
        return np.concatenate([array[rows] for array in self.arrays], axis=1)


def _array(arrays, path):
    """What is written under a path: the weight, or those that are joined there."""
    if path in arrays:
        return arrays[path]
    return Columns([array for name, array in arrays.items() if joined_path(name) == path])


def size(placed) -> int:
    """Bytes of the whole file."""
    last = list(placed.values())[-1]
    return last.offset + last.length


def memory(placed) -> int:
    """Bytes that writing holds at once: a block as it is read, converted and laid out; a kernel by channel whole."""
    widest = max(stored.length // stored.shape[0] for stored in placed.values())
    whole = max((stored.length for stored in placed.values() if stored.form.kind == "channels"), default=0)
    in_few_bits = any(stored.form.kind != "whole" for stored in placed.values())
    return 3 * max(BLOCK, widest) + whole + (6 * 4 * quantized.STEP if in_few_bits else 0)


def write(file, placed, arrays, progress=lambda size: None) -> str:
    """Write arrays {path: array} as placed; call `progress` with each block's bytes. The file's SHA-256."""
    digest = hashlib.sha256()
    with open(file, "wb") as stream, ThreadPoolExecutor(1) as hasher:
        hashed = hasher.submit(bool)
        for block in _contents(placed, arrays):
            hashed.result()  # one block is hashed while the next is converted and written
            hashed = hasher.submit(digest.update, block)
            stream.write(block)
            progress(len(block))
        hashed.result()
    return digest.hexdigest()


def _contents(placed, arrays) -> Iterator[memoryview]:
    """The file's bytes, block by block, zeros between the tensors."""
    end = 0
    for stored, pieces in _encoded(placed, arrays):
        if stored.offset > end:
            yield memoryview(bytes(stored.offset - end))
        for piece in pieces:
            written = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            # Looked at as it passes, without reading the model again; what is wrong with a quantized weight shows in
            # its scales.
            if stored.dtype.is_floating_point() and not all_finite(written.view(stored.dtype.numpy())):
                _refuse(stored, arrays)
            yield written.data
        end = stored.offset + stored.length


def _refuse(stored, arrays):
    """Raise PaliGemmaError that names what is not finite in a weight, or grew infinite in the bundle's dtype."""
    dtype = stored.dtype.numpy()
    for path, array in arrays.items():
        if stored.path not in (path, joined_path(path)):
            continue
        array = np.asarray(array)
        check_finite(path, array)
        if place := first_not_finite(array, dtype):
            raise PaliGemmaError(
                f"tensor {path} holds {array[place]} at {list(place)}, beyond the range of {dtype}; "
                "choose another --precision"
            )
    raise PaliGemmaError(f"tensor {stored.path} has a scale beyond the range of {dtype}; choose another --precision")


def _encoded(placed, arrays):
    """(Stored, its arrays) in order; a form's values are made before its scales are known."""
    begun = {}
    for stored in placed.values():
        key = stored.path, stored.form.kind
        if key not in begun:
            begun[key] = stored.form.encode(_array(arrays, stored.path))
        yield stored, next(begun[key])
        if stored.name.endswith(stored.form.parts[-1].suffix):
            del begun[key]


def initializer(placed, directory="", graph="prefill"):
    """path -> the weight as a graph takes it: tensors that refer into the weights file.

    Of a weight that is stored in two forms decode takes the second. One that is joined to others is that tensor, under
    the name that they have together.
    """
    by_path: dict[str, list[Stored]] = {}
    for stored in placed.values():
        by_path.setdefault(stored.path, []).append(stored)

    def reference(path):
        found = by_path[path if path in by_path else joined_path(path)]
        form = found[0].form if graph == "prefill" else found[-1].form
        parts = [stored for stored in found if stored.form is form]
        if form.kind == "whole":
            return _external(parts[0], directory)
        values, scales = (_external(part, directory) for part in parts)
        if form.kind == "channels":
            return quantized.Channels(values, scales)
        rows, bits = parts[0].shape[0], int(parts[0].name.rsplit("int", 1)[1])
        flat = _external(parts[0], directory, (rows, parts[0].length // rows), ".rows")
        return quantized.Blocks(values, flat if path == "text.embedding" else None, scales, bits)

    return reference


def apart(config, placed, directory):
    """path -> the weight alone, as a tensor; of what is joined in the file, its own columns in memory."""
    reference, stored = initializer(placed, directory), {each.path: each for each in placed.values()}

    def tensor(path):
        if path in stored:
            return reference(path)
        whole = stored[joined_path(path)]
        members = [p for p in parameters(config) if joined_path(p.path) == whole.path]
        edges = pairwise(accumulate((p.shape[-1] for p in members), initial=0))
        begin, end = next(edge for p, edge in zip(members, edges, strict=True) if p.path == path)
        array = np.memmap(Path(directory) / FILE, whole.dtype.numpy(), "r", whole.offset, whole.shape)
        return ir.tensor(np.ascontiguousarray(array[..., begin:end]), name=path)

    return tensor


def _external(stored, directory, shape=None, suffix=""):
    return ir.ExternalTensor(
        FILE, stored.offset, stored.length, stored.dtype, shape=ir.Shape(shape or stored.shape),
        name=stored.name + suffix, base_dir=directory,
    )  # fmt: skip
