"""The weights file that the graphs share: raw tensors, one after another, each on a page boundary.

It is planned first (so that graphs and checks need no bytes) and then written tensor by tensor, a block of
rows at a time: a model never has to fit in memory.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import onnx_ir as ir

from numpy_ref.checkpoint import parameters
from numpy_ref.storage import BLOCK, blocks

FILE = "weights.bin"
ALIGNMENT = 4096  # what the ONNX specification recommends, so that a tensor can be mapped


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    path: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    offset: int
    length: int


def plan(config, dtype=ir.DataType.FLOAT) -> dict[str, Stored]:
    """Place every tensor of a model: path -> Stored, in the order in which they are written."""
    placed, offset = {}, 0
    for parameter in parameters(config):
        length = math.prod(parameter.shape) * dtype.numpy().itemsize  # onnx_ir's own itemsize is a float
        placed[parameter.path] = Stored(parameter.path, dtype, parameter.shape, offset, length)
        offset = -(-(offset + length) // ALIGNMENT) * ALIGNMENT
    return placed


def size(placed) -> int:
    """Bytes of the whole file."""
    last = list(placed.values())[-1]
    return last.offset + last.length


def memory(placed) -> int:
    """Bytes that writing holds at once: a block as it is read, converted and laid out."""
    widest = max(stored.length // stored.shape[0] for stored in placed.values())
    return 3 * max(BLOCK, widest)


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


def _contents(placed, arrays):
    """The file's bytes, block by block, zeros between the tensors."""
    end = 0
    for stored in placed.values():
        if stored.offset > end:
            yield bytes(stored.offset - end)
        yield from blocks(arrays[stored.path], stored.dtype.numpy())
        end = stored.offset + stored.length


def initializer(placed, directory=""):
    """path -> a tensor that refers into the weights file, as the graphs take it."""

    def reference(path):
        stored = placed[path]
        return ir.ExternalTensor(
            FILE, stored.offset, stored.length, stored.dtype, shape=ir.Shape(stored.shape), name=path,
            base_dir=directory,
        )  # fmt: skip

    return reference
