"""Weights in the order that this machine's kernels read them, kept in the bundle.

ONNX Runtime reorders most weights when it opens a graph, into a private copy a session. It can save what it made; here
those bytes go behind the plain weights in the weights file, and the graphs' own tensors say where (an entry
"prepacked_0" of a tensor's external data: operator and hash | offset; length; padding). Then every session of every
process maps them, and what two graphs share is there once. The graphs and the plain weights stay as they are: on
another kind of processor the hash differs, and the runtime makes its copy as ever.

The runtime believes such an entry: a kernel reads as many bytes as it needs, whatever length is given. So entries are
used only where this machine wrote them, or has compared them with what it would have written (`source`).
"""

import hashlib
import platform
import tempfile
from pathlib import Path

import onnx
import onnxruntime

from numpy_ref.errors import PaliGemmaError

from ..runtime import session_options
from . import digests, weights

ENTRY = "prepacked_"  # what the keys begin with
PAGE, HUGE_PAGE = 4096, 2**21  # bytes; what is mapped begins on one
PIECE = 2**24  # bytes copied at once, and from which on a huge page is worth what may be left of the one before


def prepack(folder: Path, graphs: dict[str, Path]) -> None:
    """Add to a bundle's weights file what its `graphs` are repacked into, and to the graphs where it is.

    Takes the memory of one repacked graph, and for a while the disk of its weights twice.
    """
    placed: dict[str, str] = {}  # operator and hash -> where its pieces are in the weights file
    with open(folder / weights.FILE, "r+b") as file:
        file.seek(0, 2)
        for name, graph in graphs.items():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                saved = _save(graph, Path(temporary), name)
                model = onnx.load(graph, load_external_data=False)
                for tensor in model.graph.initializer:
                    for key, value in saved.get(tensor.name, []):
                        tensor.external_data.add(key=key, value=_place(value, Path(temporary) / name, file, placed))
                graph.write_bytes(model.SerializeToString())


def processor() -> str:
    """What repacked weights depend on: the kind of processor, and the runtime's version."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, onnxruntime {onnxruntime.__version__}"


def _save(graph, folder, name, entries=None) -> dict[str, list[tuple[str, str]]]:
    """Let the runtime save a graph as it repacked it; by weight, the entries that say where its bytes are."""
    entries = {
        **(entries or {}),
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": name,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1",
    }
    options = session_options(entries)
    options.optimized_model_filepath = str(folder / f"{name}.onnx")
    try:
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common class
        raise PaliGemmaError(f"{name}.onnx: ONNX Runtime cannot repack it ({error})") from None
    saved = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return {
        tensor.name: [(pair.key, pair.value) for pair in tensor.external_data if pair.key.startswith(ENTRY)]
        for tensor in saved.graph.initializer
    }


def source(graph: Path, weights_digest: str, on_cpu: bool = True) -> tuple[Path | bytes, dict[str, str]]:
    """What to open a graph from, and the entries of options to open it with.

    The file itself, where it names no repacked weights, or those that this machine's kernels read. Else its bytes
    without them, and the runtime makes its own copy. The first look at a graph from elsewhere takes as long as
    repacking it; what was found is remembered in the user's cache. Raises PaliGemmaError if pieces have another length
    than the kernels read.
    """
    contents = graph.read_bytes()
    if ENTRY.encode() not in contents:
        return graph, {}
    key = _key(contents, weights_digest)
    if on_cpu and digests.is_noted("prepacked", key):
        return graph, {}
    plain, listed = _without_entries(graph, contents)
    place = {"session.model_external_initializers_file_folder_path": str(graph.parent.resolve())}
    if not on_cpu or not _is_same(graph, listed, _repacked(graph, plain, place)):
        return plain, place
    digests.note("prepacked", key)
    return graph, {}


def remember(graph: Path, weights_digest: str) -> None:
    """Note that a graph's repacked weights were made here."""
    digests.note("prepacked", _key(graph.read_bytes(), weights_digest))


def _key(contents: bytes, weights_digest: str) -> str:
    return hashlib.sha256(f"{processor()}\n{weights_digest}\n".encode() + contents).hexdigest()


def _without_entries(graph, contents) -> tuple[bytes, list[str]]:
    """A graph without what it says of repacked weights, and that."""
    try:
        model = onnx.load_from_string(contents)
    except Exception as error:  # protobuf's own
        raise PaliGemmaError(f"{graph}: not an ONNX graph ({error})") from None
    listed = []
    for tensor in model.graph.initializer:
        kept = [pair for pair in tensor.external_data if not pair.key.startswith(ENTRY)]
        listed += [pair.value for pair in tensor.external_data if pair.key.startswith(ENTRY)]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
    plain = model.SerializeToString()
    if ENTRY.encode() in plain:  # in a graph within the graph, for one
        raise PaliGemmaError(f"{graph}: repacked weights where export-onnx puts none; export the bundle again")
    return plain, listed


def _repacked(graph, plain: bytes, place: dict[str, str]) -> list[str]:
    """What this machine would say of a graph's repacked weights; nothing where there is no room to find out."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return [value for found in _save(plain, Path(folder), graph.stem, place).values() for _, value in found]
    except (OSError, PaliGemmaError):
        return []


def _is_same(graph, listed: list[str], wanted: list[str]) -> bool:
    """Whether a graph names the repacked weights that are wanted here, all of them known.

    Raises PaliGemmaError if one is known, but its pieces are not as long as it is read, or lie askew.
    """
    known = dict(map(_lengths, wanted))
    for value in listed:
        identity, lengths = _lengths(value)
        if lengths != known.get(identity, lengths):
            raise PaliGemmaError(
                f"{graph}: its repacked weights have other lengths than this processor reads; export the bundle again"
            )
        if identity in known and not all(map(_is_on_page, value.split("|")[1:])):
            raise PaliGemmaError(f"{graph}: its repacked weights are not on pages of the file; export the bundle again")
    return {identity for identity, _ in map(_lengths, listed)} <= known.keys()


def _is_on_page(piece: str) -> bool:
    """Whether a piece begins on a page: kernels may read sixty-four bytes at once, of a place that divides by that."""
    offset = piece.split(";")[0]
    return offset.isascii() and offset.isdecimal() and int(offset) % PAGE == 0


def _lengths(value: str) -> tuple[str, list[list[str]]]:
    """An entry -> operator and hash, and (length, padding) of each piece as they are written."""
    identity, *pieces = value.split("|")
    return identity, [piece.split(";")[1:] for piece in pieces]


def _place(value, source, file, placed) -> str:
    """Append the pieces that an entry names to the weights file, unless they are there; the entry for their place."""
    identity, *pieces = value.split("|")
    if identity not in placed:
        entry = [identity]
        for piece in pieces:
            offset, length, padding = (int(number) for number in piece.split(";"))
            page = HUGE_PAGE if length >= PIECE else PAGE
            file.seek(-(-file.tell() // page) * page)
            entry.append(f"{file.tell()};{length};{padding}")
            _copy(source, offset, length, file)
        placed[identity] = "|".join(entry)
    return placed[identity]


def _copy(source, offset, length, file):
    with open(source, "rb") as stream:
        stream.seek(offset)
        while length:
            length -= file.write(stream.read(min(length, PIECE)))
