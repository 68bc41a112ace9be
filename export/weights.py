"""The weights file that the graphs share: raw tensors, one after another, each on a page boundary.

It is planned first (so that graphs and checks need no bytes) and then written tensor by tensor, a block of
rows at a time: a model never has to fit in memory. What each precision makes of a weight is decided here.
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from numpy_ref.checkpoint import parameters
from numpy_ref.errors import PaliGemmaError
from numpy_ref.storage import BLOCK, all_finite, blocks, check_finite, first_not_finite

from . import quantize
from .quantize import Part

FILE = "weights.bin"
ALIGNMENT = 4096  # what the ONNX specification recommends, so that a tensor can be mapped
#: The precisions whose weights are kept as numbers of one type, and that type.
FLOATS = {"float32": DataType.FLOAT, "float16": DataType.FLOAT16, "bfloat16": DataType.BFLOAT16}
QUANTIZED = ("int8", "int4")
PRECISIONS = (*FLOATS, *QUANTIZED)
SIDE_BY_SIDE = (("query", "key", "value"), ("gate", "up"))


@dataclass(frozen=True)
class Form:
    """One way in which a weight is stored: its parts, and how they are made from the weight's array."""

    kind: str
    parts: tuple[Part, ...]
    encode: object  # array -> an iterator over the parts, each an iterator over arrays


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies. `path` is the weight's; `name` the tensor's, which differs where a weight has several."""

    path: str
    name: str
    form: Form
    dtype: DataType
    shape: tuple[int, ...]
    offset: int
    length: int


def stream_dtype(precision: str) -> DataType:
    """What the cache, and the weights that are not quantized, are kept in."""
    return FLOATS.get(precision, DataType.FLOAT)


def forms(parameter, precision: str) -> list[Form]:
    """How a weight is stored: kernels of the blocks and the embedding table in few bits, everything else as it is.

    int8: kernels by channel, for both graphs; the table in blocks of 8 bits.
    int4: kernels by channel for prefill; the decoder's in blocks of 4 bits too, for decode; the table likewise.
    """
    path, shape = parameter.path, parameter.shape
    if precision in FLOATS:
        return [_whole(shape, FLOATS[precision])]
    bits = 8 if precision == "int8" else 4
    if path == "text.embedding" and quantize.block_size(shape[1]):
        return [_blocks(shape, bits, by_columns=False)]
    if path == "text.head.kernel" and quantize.block_size(shape[0]):
        return [_blocks(shape, bits, by_columns=True)]
    if ".blocks." in path and path.endswith(".kernel"):
        found = [Form("channels", tuple(quantize.channel_parts(shape)), quantize.encode_channels)]
        if precision == "int4" and path.startswith("text.") and quantize.block_size(shape[0]):
            found.append(_blocks(shape, bits, by_columns=True))
        return found
    return [_whole(shape, DataType.FLOAT)]


def _whole(shape, dtype):
    return Form("whole", (Part("", dtype, shape),), partial(_in_dtype, dtype=dtype.numpy()))


def _in_dtype(array, dtype):
    yield (np.frombuffer(block, np.uint8) for block in blocks(array, dtype))


def _blocks(shape, bits, by_columns):
    parts = tuple(quantize.block_parts(shape, bits, by_columns))
    return Form("blocks", parts, partial(quantize.encode_blocks, bits=bits, by_columns=by_columns))


def plan(config, precision="float32") -> dict[str, Stored]:
    """Place every tensor of a model: name -> Stored, in the order in which they are written.

    Kernels in blocks that read the same input lie side by side, values and scales apart, so that a graph can take them
    as one.
    """
    placed, offset = {}, 0
    for group in _groups(config, precision):
        for part in range(len(group[0][1].parts)):
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            for path, form in group:
                suffix, dtype, shape = astuple(form.parts[part])
                length = math.prod(shape) * dtype.numpy().itemsize  # onnx_ir's own itemsize is a float
                placed[path + suffix] = Stored(path, path + suffix, form, dtype, shape, offset, length)
                offset += length
    return placed


def _groups(config, precision) -> list[list[tuple[str, Form]]]:
    """What is placed together: (path, form) alone, or several in blocks that read the same input."""
    groups, waiting = [], {}
    for parameter in parameters(config):
        layer, _, name = parameter.path.removesuffix(".kernel").rpartition(".")
        for form in forms(parameter, precision):
            partners = next((names for names in SIDE_BY_SIDE if name in names), None)
            if form.kind != "blocks" or not partners:
                groups.append([(parameter.path, form)])
                continue
            group = waiting.setdefault((layer, partners), [])
            group.append((parameter.path, form))
            if len(group) == len(partners):
                groups.append(group)
    return groups


def size(placed) -> int:
    """Bytes of the whole file."""
    last = list(placed.values())[-1]
    return last.offset + last.length


def memory(placed) -> int:
    """Bytes that writing holds at once: a block as it is read, converted and laid out; a kernel by channel whole."""
    widest = max(stored.length // stored.shape[0] for stored in placed.values())
    whole = max((stored.length for stored in placed.values() if stored.form.kind == "channels"), default=0)
    quantized = any(stored.form.kind != "whole" for stored in placed.values())
    return 3 * max(BLOCK, widest) + whole + (6 * 4 * quantize.STEP if quantized else 0)


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
                _refuse(stored, arrays[stored.path])
            yield written.data
        end = stored.offset + stored.length


def _refuse(stored, array):
    """Raise PaliGemmaError that names what is not finite in a weight, or grew infinite in the bundle's dtype."""
    check_finite(stored.path, array)
    dtype = stored.dtype.numpy()
    place = first_not_finite(array, dtype)
    raise PaliGemmaError(
        f"tensor {stored.path} holds {array[place]} at {list(place)}, beyond the range of {dtype}; "
        "choose another --precision"
    )


def _encoded(placed, arrays):
    """(Stored, its arrays) in order; a form's values are made before its scales are known."""
    begun = {}
    for stored in placed.values():
        key = stored.path, stored.form.kind
        if key not in begun:
            begun[key] = stored.form.encode(arrays[stored.path])
        yield stored, next(begun[key])
        if stored.name.endswith(stored.form.parts[-1].suffix):
            del begun[key]


def initializer(placed, directory="", graph="prefill"):
    """path -> the weight as a graph takes it: tensors that refer into the weights file.

    Of a weight that is stored in two forms decode takes the second.
    """
    by_path: dict[str, list[Stored]] = {}
    for stored in placed.values():
        by_path.setdefault(stored.path, []).append(stored)

    def reference(path):
        found = by_path[path]
        form = found[0].form if graph == "prefill" else found[-1].form
        parts = [stored for stored in found if stored.form is form]
        if form.kind == "whole":
            return _external(parts[0], directory)
        values, scales = (_external(part, directory) for part in parts)
        if form.kind == "channels":
            return quantize.Channels(values, scales)
        rows, bits = parts[0].shape[0], int(parts[0].name.rsplit("int", 1)[1])
        flat = _external(parts[0], directory, (rows, parts[0].length // rows), ".rows")
        return quantize.Blocks(values, flat if path == "text.embedding" else None, scales, bits)

    return reference


def _external(stored, directory, shape=None, suffix=""):
    return ir.ExternalTensor(
        FILE, stored.offset, stored.length, stored.dtype, shape=ir.Shape(shape or stored.shape),
        name=stored.name + suffix, base_dir=directory,
    )  # fmt: skip
