"""Files of tensors, whatever their names: mapping safetensors and npz, writing them whole or not at all.

Reading maps the file, so that a model is paged in as it is used. Writing takes arrays a block of rows at a time:
the libraries' own writers hold a whole shard in memory.
"""

import glob
import json
import math
import os
import shutil
import struct
import tempfile
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from .errors import PaliGemmaError, quote

BLOCK = 32 * 2**20  # bytes converted at once
JSON_MOST = 16 * 2**20  # bytes of a JSON file; the largest that there is, an index of shards, has a tenth
INFLATION_MOST = 100  # how often its own size a compressed npz may unfold to; weights hardly shrink at all
STRIP = 128  # columns of a transposed matrix turned at once
SHARD = 5 * 10**9  # bytes of a safetensors file before the next one is begun
_PART = ".part"  # how the names of unfinished folders end


def within(folder, name: str) -> Path:
    """The path of a file of a folder that may come from a stranger; whether it exists is another question.

    A link may not lead out of the folder, except as in a Hugging Face cache: from snapshots/<revision> to blobs.
    Raises PaliGemmaError for a link that does, and for a name that is more than a name.
    """
    file = Path(folder) / name
    try:
        home, target = Path(folder).resolve(), file.resolve()
        file.is_file()  # which a name that is too long fails
    except (OSError, ValueError, RuntimeError):  # the last is a circle of links
        target = None
    if target is None or Path(name).name != name or name in ("", ".."):
        raise PaliGemmaError(f"{folder}: {quote(name)} is not a file name of this folder")
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if target.parent not in homes:
        raise PaliGemmaError(f"{file}: this link leads out of its folder; put a copy of the file in its place")
    return file


def read_json(file: Path):
    """Parse a JSON file; PaliGemmaError if it is absent, larger than JSON_MOST, or not JSON."""
    try:
        if (size := Path(file).stat().st_size) > JSON_MOST:
            raise PaliGemmaError(f"{Path(file).name} has {size} bytes, more than the {JSON_MOST} that are read")
        return json.loads(Path(file).read_bytes())
    except FileNotFoundError:
        raise PaliGemmaError(f"{Path(file).name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PaliGemmaError(f"{Path(file).name} is not readable JSON ({error})") from None


def bfloat16() -> np.dtype:
    """NumPy's bfloat16, which lives in a package of its own."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def dtypes() -> dict[str, np.dtype]:
    """The dtypes that a checkpoint may have, by their safetensors names."""
    return {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": bfloat16()}


# --- safetensors -------------------------------------------------------------------------------------------


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
        listed = {name for name, target in weight_map.items() if target == file}
        if listed != shard.keys():
            names = ", ".join(sorted(listed ^ shard.keys()))
            raise PaliGemmaError(f"{path / file}: shard and index disagree about {names}")
        tensors |= shard
    return tensors


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
        reason = _odd_entry(file) or error
        raise PaliGemmaError(f"{file}: not a whole safetensors file ({reason}); download or copy it again") from None
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
    header.pop("__metadata__", None)
    body = np.memmap(file, np.uint8, "r", offset=8 + header_size) if header else None
    known, tensors = dtypes(), {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = known.get(entry["dtype"])
        if dtype is None:
            raise PaliGemmaError(f"{file}: tensor {name} has dtype {entry['dtype']}, not F32, F16, BF16 or F64")
        tensors[name] = body[begin:end].view(dtype).reshape(entry["shape"]).view(np.ndarray)
    return tensors


def _odd_entry(file) -> str | None:
    """The first tensor of a header whose dtype, shape and place do not fit each other or the file; None if all do."""
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    try:
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(header_size, file.stat().st_size)))
        body = file.stat().st_size - 8 - header_size
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in sizes:
                return f"tensor {name} has dtype {dtype}, not {', '.join(sizes)}"
            if math.prod(shape) * sizes[dtype] != end - begin:
                return f"tensor {name} is said to be {dtype} {shape}, but {end - begin} bytes are given to it"
            if end > body:
                return f"tensor {name} ends at byte {end} of {body}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # not even a header: the library's own words will do
    return None


def write_safetensors(folder: Path, tensors: dict[str, np.ndarray], progress=lambda size: None) -> None:
    """Write tensors into a folder, in order, as one file or as shards with an index."""
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
        _write_safetensors_file(folder / name, shard, progress)


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


def _write_safetensors_file(file, tensors, progress):
    names = {dtype: name for name, dtype in dtypes().items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
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


def all_finite(array) -> bool:
    """Whether no number of an array is a NaN or infinite.

    Read as whole numbers, with and without sign, those sort behind all others: two maxima over the bytes as they lie,
    without a temporary, ten times as fast as np.isfinite in bfloat16.
    """
    kinds, infinity = (f"i{array.dtype.itemsize}", f"u{array.dtype.itemsize}"), np.array([np.inf, -np.inf], array.dtype)
    return all(array.view(kind).max(initial=0) < bound.view(kind) for kind, bound in zip(kinds, infinity, strict=True))


def check_finite(name, array) -> None:
    """Raise PaliGemmaError that names the tensor and the place of its first NaN or infinity, if it has one."""
    if not all_finite(array):
        place = first_not_finite(array)
        raise PaliGemmaError(
            f"tensor {name} holds {array[place]} at {list(place)}, and nothing can be computed with that; "
            "get the checkpoint again, or train it with a lower learning rate"
        )


def first_not_finite(array, dtype=None) -> tuple[int, ...] | None:
    """The index of the first number that, in `dtype`, is a NaN or infinite; None if all are finite."""
    dtype, seen = dtype or array.dtype, 0
    for block in blocks(array, dtype):
        numbers = np.frombuffer(block, np.uint8).view(dtype)
        if not all_finite(numbers):
            return tuple(int(i) for i in np.unravel_index(seen + np.isfinite(numbers).argmin(), array.shape))
        seen += numbers.size
    return None


def checked_blocks(name, array):
    """The `blocks` of an array in its own dtype, each looked at as it passes: `check_finite` without another pass."""
    for block in blocks(array):
        if not all_finite(np.frombuffer(block, np.uint8).view(array.dtype)):
            check_finite(name, array)
        yield block


def blocks(array, dtype=None):
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


# --- npz ---------------------------------------------------------------------------------------------------


def map_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz as views of the mapped file; a compressed one is inflated into a file that vanishes.

    Two-byte void is how NumPy saves bfloat16, and is returned as that. Nothing is ever unpickled.
    """
    tensors = {}
    try:
        with zipfile.ZipFile(file) as archive:
            _check_compression(file, archive)
            whole = np.memmap(file, np.uint8, "r")
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
    if needed > INFLATION_MOST * file.stat().st_size:
        raise PaliGemmaError(
            f"{file}: its compressed arrays unfold to {needed / 1e9:.1f} GB, {INFLATION_MOST} times the file or more, "
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


def write_npz(file: Path, arrays: dict, progress=lambda size: None) -> None:
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


# --- whole or absent ---------------------------------------------------------------------------------------


@contextmanager
def new_directory(path):
    """Yield a temporary sibling that becomes `path` if all goes well, and vanishes if not.

    What processes that were killed while making `path` left beside it is removed first. Raises PaliGemmaError if
    `path` exists, be it only by the end, or cannot be made.
    """
    path = absent(path, "folder")
    with _parents(path), _sibling(path) as temporary:
        yield temporary
        _give_name(temporary, path, "folder", os.rename)  # refused where another process has put something meanwhile


@contextmanager
def new_file(path):
    """As `new_directory`, for one file."""
    path = absent(path, "file")
    with _parents(path), _sibling(path) as folder:
        yield folder / path.name
        _give_name(folder / path.name, path, "file", os.link)  # a rename would replace another process's file


def absent(path, kind) -> Path:
    """The path, if nothing is there yet; PaliGemmaError if there is."""
    path = Path(path)
    if os.path.lexists(path):
        raise PaliGemmaError(f"{path}: output {kind} exists already; remove it or name another")
    return path


def _give_name(temporary, path, kind, move) -> None:
    try:
        move(temporary, path)
    except OSError:
        os.rename(temporary, absent(path, kind))  # a disk without hard links, or an error to tell


@contextmanager
def _sibling(path):
    """A folder beside `path`, locked while it is in use and removed at the end."""
    _remove_left_overs(path)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
        with _locked(folder):
            if not folder.exists():
                continue  # another process took it for a left-over in the moment before it was locked
            try:
                folder.chmod(0o755)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _remove_left_overs(path) -> None:
    """Remove the siblings that `_sibling` made for processes that have ended since.

    The lock of a process ends with it, however it ends. Where there are no locks, left-overs stay, and do no harm.
    """
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}{_PART}"):
        with _locked(left_over, wait=False) as held:
            if held:
                shutil.rmtree(left_over, ignore_errors=True)


@contextmanager
def _locked(folder, wait=True):
    """Lock a folder; yields whether that worked. It does not on Windows, and on some disks of other machines."""
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except (ImportError, OSError):
        held = False
    try:
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _parents(path):
    """Make the folders above `path`, and take away again those that were made if what follows fails."""
    made = []
    try:
        for parent in reversed(path.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                made.append(parent)
        yield
    except BaseException as error:
        for parent in reversed(made):
            with suppress(OSError):  # somebody else's file is in it by now
                parent.rmdir()
        if isinstance(error, OSError):
            raise PaliGemmaError(f"{path}: cannot be written ({error.strerror or error})") from None
        raise
