"""Reading and writing safetensors files, one or several shards with an index.

The format is eight bytes of header size, a JSON header {name: {dtype, shape, data_offsets}}, and the bytes of the
tensors. The safetensors library checks the header of every file that is read. The rest is done by hand, because the
library copies: it reads into new arrays, where these are views of the mapped file, paged in as they are used; and it
writes whole contiguous arrays, where this takes a block at a time of arrays that are mapped, transposed or not yet
drawn. So a model need not fit in memory.

This module is named after the format. `from safetensors import …` means the library, also in here.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import PaliGemmaError, listed, quote
from ..files import opened, read_json, within
from .blocks import checked_blocks, dtypes

MAX_HEADER_BYTES = 10**8  # the library's own limit
SHARD = 5 * 10**9  # bytes of a file before the next one starts


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's model.safetensors, or of the shards that its index names, as read-only views.

    Where both are, the single file counts, as in transformers.
    """
    single, index = within(path, "model.safetensors"), within(path, "model.safetensors.index.json")
    if single.exists():
        return map_safetensors_file(single)
    if not index.exists():
        raise PaliGemmaError(f"{path}: neither {single.name} nor {index.name}; the weights are needed as safetensors")
    try:
        weight_map = read_json(index).get("weight_map")
    except (PaliGemmaError, AttributeError) as error:
        raise PaliGemmaError(f"{path}: {index.name}: {error}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise PaliGemmaError(f"{index}: no weight_map of tensor name to file")
    tensors: dict = {}
    for file in sorted(set(weight_map.values())):
        shard = map_safetensors_file(within(path, file))
        mapped = {name for name, target in weight_map.items() if target == file}
        if mapped != shard.keys():
            names = listed(sorted(mapped ^ shard.keys()))
            raise PaliGemmaError(f"{path / file}: shard and index disagree about {names}")
        tensors |= shard
    return tensors


def _quantized(dtype) -> str:
    """What weights of another dtype probably are, and what to do; nothing for a dtype that none have."""
    kinds = {"I32": "GPTQ or AWQ", "U8": "bitsandbytes or packed in 4 bits", "I8": "int8"}
    kind = kinds.get(dtype) or ("float8 or smaller" if dtype.startswith(("F8", "F6", "F4")) else None)
    return f": quantized weights ({kind}); take the float checkpoint that they were made from" if kind else ""


def map_safetensors_file(file: Path) -> dict[str, np.ndarray]:
    """One safetensors file: name -> read-only view.

    The library checks the header; the arrays are mapped here because its own would be copies.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise PaliGemmaError(f"{file}: no such file")
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        reason = _find_bad_entry(file) or error
        raise PaliGemmaError(f"{file}: not a whole safetensors file ({reason}); download or copy it again") from None
    with opened(file) as stream:
        header, offset = _read_header(stream)
        if not header:
            return {}  # an empty file cannot be mapped
        body = np.memmap(stream, np.uint8, "r", offset=offset)
    known, tensors = dtypes(), {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = known.get(entry["dtype"])
        if dtype is None:
            stored = entry["dtype"]
            raise PaliGemmaError(
                f"{file}: tensor {name} has dtype {stored}, not {', '.join(known)}{_quantized(stored)}"
            )
        try:
            tensors[name] = body[begin:end].view(dtype).reshape(entry["shape"]).view(np.ndarray)
        except (ValueError, OverflowError):  # none of it, in a shape that no array has
            raise PaliGemmaError(f"{file}: tensor {name} has the shape {quote(entry['shape'])}") from None
    return tensors


def _read_header(stream) -> tuple[dict, int]:
    """An opened file's header, {tensor: {dtype, shape, data_offsets}}, and the byte at which the tensors begin."""
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(min(size, MAX_HEADER_BYTES)))
    header.pop("__metadata__", None)
    return header, 8 + size


def _find_bad_entry(file) -> str | None:
    """The first tensor of a header whose dtype, shape and place do not fit each other or the file; None if all do."""
    known = dtypes()
    try:
        with opened(file) as stream:
            header, offset = _read_header(stream)
        body = file.stat().st_size - offset
        for name, entry in header.items():
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in known:
                return f"tensor {name} has dtype {dtype}, not {', '.join(known)}"
            if math.prod(shape) * known[dtype].itemsize != end - begin:
                return f"tensor {name} is said to be {dtype} {shape}, but {end - begin} bytes are given to it"
            if end > body:
                return f"tensor {name} ends at byte {end} of {body}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # not even a header: the library's own words will do
    return None


def write_safetensors(folder: Path, tensors: dict, progress: Callable[[int], object] = lambda size: None) -> None:
    """Write tensors (arrays, or what gives rows as they do) into a folder, in order, as one file or indexed shards."""
    shards = _shards(tensors)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {
            "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    for name, shard in zip(names, shards, strict=True):
        write_safetensors_file(folder / name, shard, progress)


def _shards(tensors):
    shards: list[dict] = [{}]
    size = 0
    for name, array in tensors.items():
        if size and size + array.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards


def write_safetensors_file(file: Path, tensors: dict, progress: Callable[[int], object] = lambda size: None) -> None:
    """Write tensors, as `write_safetensors` takes them, into one file."""
    names = {dtype: name for name, dtype in dtypes().items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the body to 8 bytes
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, array in tensors.items():
            for block in checked_blocks(name, array):
                stream.write(block)
                progress(len(block))
