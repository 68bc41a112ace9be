"""The weights file that the graphs share: raw tensors, one after another, each on a page boundary.

It is planned first (so that graphs and checks need no bytes) and then written tensor by tensor, a block of
rows at a time: a model never has to fit in memory. What each precision makes of a weight is decided here.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType

from numpy_ref.checkpoint import parameters
from numpy_ref.checkpoint.blocks import BLOCK, Rows, all_finite, check_finite, first_not_finite
from numpy_ref.checkpoint.layouts import Parameter
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError

from ..model import quantized
from ..model.graphs import Initializer
from ..model.layers import FUSED, PORTABLE
from .forms import Blocks, Channels, Form, Joined, Whole

FILE = "weights.bin"
ALIGNMENT = 4096  # what the ONNX specification recommends, so that a tensor can be mapped
#: The precisions whose weights are kept as numbers of one type, and that type.
FLOATS = {"float32": DataType.FLOAT, "float16": DataType.FLOAT16, "bfloat16": DataType.BFLOAT16}
#: Weights in few bits; activations in float32, for the CPU, or in the half precision that the name ends in, for CUDA.
QUANTIZED = ("int8", "int4", "int2", "int4-float16", "int4-bfloat16")
CALIBRATED = ("int2",)  # those in which a model is of no use unless its weights were chosen by rows
PRECISIONS = (*FLOATS, *QUANTIZED)
ATTENTION, MLP = ("query", "key", "value"), ("gate", "up")  # weights that read the same input


@dataclass(frozen=True)
class Stored:
    """One tensor of the file: `part` is which of its form's, `offset` where it begins.

    `path` is the weight's, or the one that the weights `members` have together where they are joined.
    """

    path: str
    members: tuple[str, ...]
    form: Form
    part: int
    offset: int

    @property
    def name(self) -> str:
        """The tensor's in a graph."""
        return self.path + self.form.parts[self.part].suffix

    @property
    def dtype(self) -> DataType:
        return self.form.parts[self.part].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.parts[self.part].shape

    @property
    def length(self) -> int:
        """In bytes."""
        return self.form.parts[self.part].length


def stream_dtype(precision: str) -> DataType:
    """What the cache, and the weights that are not quantized, are kept in."""
    return FLOATS.get(precision.rpartition("-")[2], DataType.FLOAT)


def forms(parameter: Parameter, precision: str) -> list[Form]:
    """How a weight is stored: kernels of the blocks and the embedding table in few bits, everything else as it is.

    int8: kernels by channel, for both graphs; the table in blocks of 8 bits.
    int4: kernels by channel for prefill; the decoder's in blocks of 4 bits too, for decode; the table likewise.
    int2: as int4, but for decode gate and up, which are most of the decoder, in blocks of 2 bits.
    int4-float16, int4-bfloat16: the decoder's kernels and the table in blocks of 4 bits, for both graphs.
    """
    path, shape, dtype = parameter.path, parameter.shape, stream_dtype(precision)
    if precision in FLOATS:
        return [Whole(shape, dtype)]
    bits = 8 if precision == "int8" else 4
    if path == "text.embedding" and quantized.block_size(shape[1]):
        return [Blocks(shape, bits, dtype, is_table=True)]
    if path == "text.head.kernel" and quantized.block_size(shape[0]):
        return [Blocks(shape, bits, dtype)]
    if ".blocks." not in path or not path.endswith(".kernel"):
        return [Whole(shape, dtype)]
    fits = path.startswith("text.") and quantized.block_size(shape[0])
    if dtype != DataType.FLOAT:
        return [Blocks(shape, bits, dtype) if fits else Whole(shape, dtype)]
    if precision == "int8" or not fits:
        return [Channels(shape)]
    is_fewer = precision == "int2" and path.split(".")[-2] in MLP
    return [Channels(shape), Blocks(shape, 2 if is_fewer else bits, dtype)]


def plan(
    config: PaliGemmaConfig, precision: str = "float32", operators: str = PORTABLE, used: tuple[str, ...] = ("",),
    one_form: bool = False,
) -> dict[str, Stored]:  # fmt: skip
    """Place the tensors of a model: name -> Stored, in the order in which they are written.

    All of them, or those whose paths begin with one of `used`; with `one_form` a weight of several forms has the last.

    Kernels in blocks that read the same input lie side by side, values and scales apart, so that a graph can take them
    as one. For fused operators in half precision whole kernels of queries, keys and values are joined by their columns,
    and their biases, into one tensor.
    """
    placed, offset = {}, 0
    joins = operators == FUSED and stream_dtype(precision) != DataType.FLOAT
    for group in _groups(config, precision, joins, used, one_form):
        for part in range(len(group[0][2].parts)):
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            for path, members, form in group:
                stored = Stored(path, members, form, part, offset)
                placed[stored.name] = stored
                offset += stored.length
    return placed


_Weight = tuple[str, tuple[str, ...], Form]  # as in Stored: path, members, form


def _groups(config, precision, joins, used, one_form) -> list[list[_Weight]]:
    """What is placed together: a weight alone, or several that read the same input."""
    groups: list[list[_Weight]] = []
    waiting: dict[tuple, list[_Weight]] = {}
    for parameter in (parameter for parameter in parameters(config) if parameter.path.startswith(used)):
        path = parameter.path
        layer, names, leaf = _partners(path)
        for form in forms(parameter, precision)[-1 if one_form else 0 :]:
            is_joined = joins and names == ATTENTION and isinstance(form, Whole)
            if not is_joined and not (names and isinstance(form, Blocks)):
                groups.append([(path, (path,), form)])
                continue
            group = waiting.setdefault((layer, names, leaf), [])
            group.append((path, (path,), form))
            if len(group) == len(names):
                groups.append([_join(group, f"{layer}.{'_'.join(names)}.{leaf}")] if is_joined else group)
    return groups


def _partners(path) -> tuple[str, tuple[str, ...], str]:
    """A weight's layer, the names there of those that read its input, itself among them, and what it is of them.

    text.blocks.0.mlp.up.kernel -> text.blocks.0.mlp, (gate, up), kernel. No names for a weight that has no partners.
    """
    *layer, name, leaf = path.split(".")
    return ".".join(layer), next((names for names in (ATTENTION, MLP) if name in names), ()), leaf


def _join(group, path) -> _Weight:
    """Whole weights of the same rows as one."""
    members, shapes = tuple(path for path, _, _ in group), [form.shape for _, _, form in group]
    return path, members, Joined(shapes[0][:-1], tuple(shape[-1] for shape in shapes), group[0][2].dtype)


def size(placed: dict[str, Stored]) -> int:
    """Bytes of the whole file."""
    last = list(placed.values())[-1]
    return last.offset + last.length


def memory(placed: dict[str, Stored]) -> int:
    """Bytes that writing holds at once: a block as it is read, converted and laid out; a kernel by channel whole."""
    widest = max(stored.length // stored.shape[0] for stored in placed.values())
    return 3 * max(BLOCK, widest) + max(stored.form.memory for stored in placed.values())


def write(
    file: str | Path,
    placed: dict[str, Stored],
    arrays: Mapping[str, Rows],
    progress: Callable[[int], object] = lambda size: None,
    rounded: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> str:
    """Write arrays {path: array} as placed; call `progress` with each block's bytes. The file's SHA-256.

    `rounded` {path: (values, scales)} stand for the blocks of the weights that it has.
    """
    digest = hashlib.sha256()
    with open(file, "wb") as stream, ThreadPoolExecutor(1) as hasher:
        hashed: Future = hasher.submit(bool)
        for block in _contents(placed, arrays, rounded or {}):
            hashed.result()  # one block is hashed while the next is converted and written
            hashed = hasher.submit(digest.update, block)
            stream.write(block)
            progress(len(block))
        hashed.result()
    return digest.hexdigest()


def _contents(placed, arrays, rounded) -> Iterator[memoryview]:
    """The file's bytes, block by block, zeros between the tensors."""
    position = 0
    for stored, piece in _encoded(placed, arrays, rounded):
        if stored.offset > position:
            yield memoryview(bytes(stored.offset - position))
            position = stored.offset
        contents = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        # Looked at as it passes, without reading the model again; what is wrong with a quantized weight shows in
        # its scales.
        if stored.dtype.is_floating_point() and not all_finite(contents.view(stored.dtype.numpy())):
            _refuse(stored, arrays)
        yield contents.data
        position += len(contents)


def _refuse(stored, arrays):
    """Raise PaliGemmaError that names what is not finite in a weight, or grew infinite in the bundle's dtype."""
    dtype = stored.dtype.numpy()
    for path in stored.members:
        array = np.asarray(arrays[path])
        check_finite(path, array)
        if place := first_not_finite(array, dtype):
            raise PaliGemmaError(
                f"tensor {path} holds {array[place]} at {list(place)}, beyond the range of {dtype}; "
                "choose another --precision"
            )
    raise PaliGemmaError(f"tensor {stored.path} has a scale beyond the range of {dtype}; choose another --precision")


def _encoded(placed, arrays, rounded) -> Iterator[tuple[Stored, np.ndarray]]:
    """(Stored, a piece of its array) in the order of the file.

    A form makes its parts together. The first, which is the large one, is passed on piece by piece; the others wait
    until their place in the file comes.
    """
    waiting = defaultdict(list)
    for stored in placed.values():
        if stored.part:
            yield from ((stored, piece) for piece in waiting.pop((stored.path, stored.form, stored.part)))
            continue
        if isinstance(stored.form, Blocks) and stored.path in rounded:
            values, scales = rounded[stored.path]
            pieces = enumerate((values, scales.astype(stored.form.dtype.numpy())))
        else:
            pieces = stored.form.encode(*(arrays[path] for path in stored.members))
        for part, piece in pieces:
            if part == 0:
                yield stored, piece
            else:
                waiting[stored.path, stored.form, part].append(piece)


def initializer(
    placed: dict[str, Stored], directory: str | Path = "", graph: str = "prefill", file: str = FILE
) -> Initializer:
    """path -> the weight as a graph takes it: tensors that refer into the weights file.

    Of a weight that is stored in two forms decode and extend take the second. One that is joined to others is that
    tensor, under the name that they have together.
    """
    by_path: dict[str, list[Stored]] = {}
    for stored in placed.values():
        for path in stored.members:
            by_path.setdefault(path, []).append(stored)

    def reference(path):
        found = by_path[path]
        form = found[0 if graph == "prefill" else -1].form
        return form.take([_external(stored, directory, file) for stored in found if stored.form == form])

    return reference


def apart(config: PaliGemmaConfig, placed: dict[str, Stored], directory: str | Path) -> Initializer:
    """path -> the weight alone, as a tensor; of what is joined in the file, its own columns in memory."""
    reference = initializer(placed, directory)
    stored_joined = [(each, each.form) for each in placed.values() if isinstance(each.form, Joined)]
    joined = {path: (each, form) for each, form in stored_joined for path in each.members}

    def tensor(path):
        if path not in joined:
            return reference(path)
        stored, form = joined[path]
        columns = form.columns(stored.members.index(path))
        array = np.memmap(Path(directory) / FILE, stored.dtype.numpy(), "r", stored.offset, stored.shape)
        return ir.tensor(np.ascontiguousarray(array[..., columns]), name=path)

    return tensor


def _external(stored, directory, file):
    return ir.ExternalTensor(
        file, stored.offset, stored.length, stored.dtype, shape=ir.Shape(stored.shape), name=stored.name,
        base_dir=directory,
    )  # fmt: skip
