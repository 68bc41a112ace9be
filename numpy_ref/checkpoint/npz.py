"""Reading and writing NumPy's .npz files: a zip archive with one .npy file per array.

np.load copies every array that it is asked for, and np.savez takes whole arrays. Here an array is a view of the mapped
file, and is written a block of rows at a time, so that a model need not fit in memory.
"""

import math
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import PaliGemmaError
from ..files import opened
from .blocks import BLOCK, bfloat16, checked_blocks

MAX_INFLATION = 100  # how often its own size a compressed file may unfold to; weights hardly shrink at all


def map_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz as views of the mapped file; a compressed one is inflated into a file that vanishes.

    Two-byte void is how NumPy saves bfloat16, and is returned as that. Nothing is ever unpickled.
    """
    tensors = {}
    try:
        with opened(file) as stream, zipfile.ZipFile(stream) as archive:
            _check_compression(file, archive)
            whole = np.memmap(stream, np.uint8, "r")
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name == member.filename or name in tensors:
                    raise PaliGemmaError(f"{file}: member {member.filename} is not an array, or is there twice")
                tensors[name] = _npz_member(whole, archive, member)
    except (PaliGemmaError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy's parser of headers raise a dozen kinds for damaged bytes
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PaliGemmaError(f"{file}: not a whole .npz file ({reason}); download or copy it again") from None
    return tensors


def _check_compression(file, archive) -> None:
    """Before anything is inflated: NumPy's own way of compressing, not to absurd sizes, and room on the disk."""
    packed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    if odd := [member.filename for member in packed if member.compress_type != zipfile.ZIP_DEFLATED]:
        raise PaliGemmaError(f"{file}: {odd[0]} is compressed as NumPy never does (numpy.savez_compressed)")
    needed = sum(member.file_size for member in packed)
    if not needed:
        return  # there need not even be a folder for temporary files
    if needed > MAX_INFLATION * file.stat().st_size:
        raise PaliGemmaError(
            f"{file}: its compressed arrays unfold to {needed / 1e9:.1f} GB, {MAX_INFLATION} times the file or more, "
            "which weights never do; store it uncompressed (numpy.savez) if it is sound"
        )
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise PaliGemmaError(
            f"{file}: its compressed arrays take {needed / 1e9:.1f} GB, but {tempfile.gettempdir()} has "
            f"{free / 1e9:.1f} GB free; make room, set TMPDIR, or store the file uncompressed (numpy.savez)"
        )


def _npz_member(whole, archive, member):
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):  # later ones are for headers of more than 64 KiB, which no plain array has
            raise ValueError(f"{member.filename} has npy version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds objects, not numbers")
        begin, size = stream.tell(), math.prod(shape) * dtype.itemsize
        if begin + size != member.file_size:
            raise ValueError(f"{member.filename} holds {member.file_size - begin} bytes, its header says {size}")
        if member.compress_type == zipfile.ZIP_STORED:
            begin += _data_offset(whole, member)
            array = whole[begin : begin + size]
        else:
            array = _inflate(stream)
    dtype = bfloat16() if dtype == np.dtype("V2") else dtype
    array = array.view(dtype)
    array = array.reshape(shape[::-1]).T if fortran else array.reshape(shape)  # a transposed array is saved as it lies
    return array.view(np.ndarray)


def _data_offset(whole, member):
    """Where a member's bytes begin: behind its local header, whose name and extra field have their own lengths."""
    name, extra = struct.unpack_from("<HH", whole, member.header_offset + 26)
    return member.header_offset + 30 + name + extra


def _inflate(stream):
    """The rest of a stream, in a mapped file that has no name: a compressed model need not fit in memory."""
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(stream, file, BLOCK)
        file.flush()
        return np.memmap(file, np.uint8, "r")


def write_npz(file: Path, arrays: dict, progress: Callable[[int], object] = lambda size: None) -> None:
    """Write a .npz as np.savez would; (nested) lists of equal arrays are stacked on new first axes as they go out."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, tree in arrays.items():
            # A fixed date, so that equal contents are equal files.
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as stream:
                shape, dtype = _stacked(tree)
                dtype = np.dtype("V2") if dtype == bfloat16() else dtype
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for array in _leaves(tree):
                    for block in checked_blocks(name, array):
                        stream.write(block)
                        progress(len(block))


def _stacked(tree):
    """Shape and dtype of nested lists of arrays once stacked."""
    if isinstance(tree, list):
        shape, dtype = _stacked(tree[0])
        return (len(tree), *shape), dtype
    return tree.shape, tree.dtype


def _leaves(tree):
    if isinstance(tree, list):
        for branch in tree:
            yield from _leaves(branch)
    else:
        yield tree
