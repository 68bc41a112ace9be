"""Weights in the order that this machine's kernels read them, kept in the bundle.

ONNX Runtime reorders most weights when it opens a graph, into a private copy a session. It can save what it made; here
those bytes go behind the plain weights in the weights file, and the graphs' own tensors say where (an entry
"prepacked_0" of a tensor's external data: operator and hash | offset; length; padding). Then every session of every
process maps them, and what two graphs share is there once. The graphs and the plain weights stay as they are: on
another kind of processor the hash differs, and the runtime makes its copy as ever.
"""

import platform
import tempfile
from pathlib import Path

import onnx
import onnxruntime

from numpy_ref.errors import PaliGemmaError

from ..runtime import session_options
from . import weights

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


def _save(graph, folder, name) -> dict[str, list[tuple[str, str]]]:
    """Let the runtime save a graph as it repacked it; by weight, the entries that say where its bytes are."""
    entries = {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": name,
        "session.optimized_model_external_initializers_min_size_in_bytes": "1",
    }
    options = session_options(entries)
    options.optimized_model_filepath = str(folder / f"{name}.onnx")
    try:
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common class
        raise PaliGemmaError(f"{graph}: ONNX Runtime cannot repack it ({error})") from None
    saved = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return {
        tensor.name: [(pair.key, pair.value) for pair in tensor.external_data if pair.key.startswith(ENTRY)]
        for tensor in saved.graph.initializer
    }


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
