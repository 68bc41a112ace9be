"""The same model as other runtimes' own libraries take it; a bundle (export/bundle) is what this project's hosts take.

transformers.js   a folder as on the Hub, with onnx/, several precisions side by side
genai             a folder for onnxruntime-genai, in Python, C++, C# and Java
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from numpy_ref import __version__, files
from numpy_ref import checkpoint as checkpoints
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.checkpoint.blocks import Rows
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError, note
from numpy_ref.tokenizer import read_contents
from numpy_ref.tokenizer.convert import convert

from .. import bundle as bundles
from ..bundle import weights
from ..model import graphs
from ..model.layers import FUSED, PORTABLE

BUNDLE, TRANSFORMERS_JS, GENAI = LAYOUTS = ("bundle", "transformers.js", "genai")
RECORD = "export.json"  # what each precision in the folder was made of, and the tables of --verify
PRECISIONS = ("float32", "float16", "int8", "int4")
SAMPLE = 1024  # numbers of each tensor that a checkpoint is known again by


@dataclass(frozen=True)
class Graph:
    """A graph with a file of its own weights beside it. `build(initializer, taps) -> model` makes it."""

    file: str  # its path in the folder
    build: Callable
    placed: dict[str, weights.Stored]

    @property
    def data(self) -> str:
        """The path of the weights."""
        return f"{self.file}_data"

    def model(self, taps: bool = False) -> ir.Model:
        """The model over its weights; with every tap as an output."""
        return self.build(weights.initializer(self.placed, file=Path(self.data).name), taps=taps)


@dataclass(frozen=True)
class Layout:
    """What a folder will hold, or holds, of one precision; `made` are the files that are not graphs, {path: bytes}."""

    name: str
    config: PaliGemmaConfig
    resize: str
    precision: str
    operators: str
    vision: Graph
    embedding: Graph
    decoder: Graph
    made: dict[str, bytes]

    @property
    def graphs(self) -> tuple[Graph, ...]:
        return self.vision, self.embedding, self.decoder


Verify = Callable[[Layout, Path, Checkpoint], list[dict]]


def prepare(
    checkpoint: Checkpoint, name: str, precision: str = "float32", max_length: int | None = None,
    operators: str | None = None,
) -> Layout:  # fmt: skip
    """Everything about a layout of a checkpoint but the bytes of its weights."""
    from . import genai, transformers_js

    if precision not in PRECISIONS:
        raise PaliGemmaError(f"--layout {name}: in {', '.join(PRECISIONS)}, not in {precision}")
    if precision == "float16" and operators == FUSED:
        raise PaliGemmaError(f"--operators fused: not with --layout {name} in float16; leave it out")
    config = replace(checkpoint.config, max_length=bundles.checked_length(checkpoint.config, max_length))
    operators = operators or (PORTABLE if precision == "float16" else FUSED)
    module = {TRANSFORMERS_JS: transformers_js, GENAI: genai}[name]
    names, suffix = module.NAMES, module.SUFFIXES[precision]
    dtype = weights.stream_dtype(precision)

    def graph(name, build, used):
        placed = weights.plan(config, precision, PORTABLE, used, one_form=True)  # whose kernels are not joined

        def built(initializer, taps=False):
            return build(config, initializer, dtype=dtype, taps=taps, operators=operators)

        return Graph(f"{name}{suffix}.onnx", built, placed)

    def vision(config, initializer, **chosen):
        return graphs.vision_encoder_model(config, initializer, checkpoint.resize, **chosen)

    return Layout(
        name, config, checkpoint.resize, precision, operators,
        graph(names[0], vision, graphs.VISION),
        graph(names[1], module.embedding, graphs.TABLE),
        graph(names[2], graphs.merged_model, graphs.DECODER[config.text.tied]),
        _tokenizer_files(checkpoint)
        | {path: files.json_bytes(contents) for path, contents in module.configuration(checkpoint, config).items()},
    )  # fmt: skip


def plan(checkpoint: Checkpoint, name: str, precision: str, max_length: int | None, operators: str | None) -> dict:
    """What `write` would do, without writing: bytes of each file, and of memory beyond the mapped checkpoint."""
    layout = prepare(checkpoint, name, precision, max_length, operators)
    sizes = {path: len(contents) for path, contents in layout.made.items()}
    for graph in layout.graphs:
        sizes |= {graph.file: len(graphs.serialize(graph.model())), graph.data: weights.size(graph.placed)}
    return {
        "files": dict(sorted(sizes.items())),
        "memory": max(weights.memory(graph.placed) for graph in layout.graphs),
    }


def write(
    checkpoint: Checkpoint, output: str | Path, name: str, precision: str = "float32", max_length: int | None = None,
    verify: Verify | None = None, operators: str | None = None,
) -> None:  # fmt: skip
    """Export a loaded checkpoint into the directory `output`.

    It is a new one, or one for transformers.js that gets another precision. `verify(layout, folder, checkpoint) ->
    table` is run before anything gets its name; RECORD keeps what it returns. Raises PaliGemmaError if anything is
    wrong, and leaves `output` as it was.
    """
    from . import transformers_js

    layout, output = prepare(checkpoint, name, precision, max_length, operators), Path(output)
    arrays = checkpoints.flatten(checkpoint.params)
    mark = fingerprint(arrays)
    with _destination(output, layout, mark) as (folder, before):
        bundles.check_space(output, folder, sum(weights.size(graph.placed) for graph in layout.graphs))
        sums = {}
        for graph in layout.graphs:
            (folder / graph.file).parent.mkdir(exist_ok=True)
            (folder / graph.file).write_bytes(graphs.serialize(graph.model()))
            sums[graph.data] = _write_weights(folder / graph.data, graph.placed, arrays)
        entry: dict[str, Any] = {"producer": f"paligemma-onnx {__version__}", "operators": layout.operators}
        if verify:
            entry["parity"] = verify(layout, folder, checkpoint)
        made = layout.made
        if name == TRANSFORMERS_JS:
            client = transformers_js.of_client([*before.get("precisions", {}), precision])
            config = json.loads(made["config.json"]) | {transformers_js.CLIENT: client}
            made = made | {"config.json": files.json_bytes(config)}
        for path, contents in made.items():
            (folder / path).write_bytes(contents)
        written = [path for graph in layout.graphs for path in (graph.file, graph.data)]
        entry["files"] = {
            path: asdict(bundles.File((folder / path).stat().st_size, sums.get(path) or bundles.sha256(folder / path)))
            for path in written
        }
        record = {"layout": name, "checkpoint": mark, "precisions": {**before.get("precisions", {}), precision: entry}}
        (folder / RECORD).write_bytes(files.json_bytes(record))
    if "tokenizer.json" not in layout.made:
        note(f"export-onnx: warning: {checkpoint.path} has no tokenizer that {name} can read; it knows only ids")


def _write_weights(file, placed, arrays: Mapping[str, Rows]) -> str:
    total = weights.size(placed)
    with tqdm(total=total, desc=file.stem, unit="B", unit_scale=True, leave=False, disable=None, delay=1) as bar:
        return weights.write(file, placed, arrays, bar.update)


@contextmanager
def _destination(output, layout, mark):
    """Yield a folder to write into, whose files will be those of `output`, and the record that there is of others."""
    if not (layout.name == TRANSFORMERS_JS and (output / RECORD).is_file()):
        with files.new_directory(output) as folder:
            yield folder, {}
        return
    before = files.read_json(output / RECORD)
    if not isinstance(before, dict) or (before.get("layout"), before.get("checkpoint")) != (layout.name, mark):
        raise PaliGemmaError(f"{output}: exists already, and is of another checkpoint; name another --output")
    if layout.precision in before["precisions"]:
        raise PaliGemmaError(f"{output}: has {layout.precision} already; remove the folder or name another")
    with files.added_files(output) as folder:
        yield folder, before


def fingerprint(arrays: Mapping[str, Rows]) -> str:
    """What a checkpoint's weights are known again by: a digest of the beginning of each tensor."""
    digest = hashlib.sha256()
    for path, array in sorted(arrays.items()):
        rows = max(1, SAMPLE // max(1, int(np.prod(array.shape[1:]))))
        first = np.ascontiguousarray(np.asarray(array[:rows], np.float32)).reshape(-1)[:SAMPLE]
        digest.update(f"{path} {list(array.shape)}\n".encode() + first.tobytes())
    return digest.hexdigest()


def _tokenizer_files(checkpoint) -> dict[str, bytes]:
    """The tokenizer as JSON, made of a SentencePiece model if there is none; nothing if that cannot be."""
    found = checkpoints.companions(checkpoint)
    contents = found.get("tokenizer.json")
    if contents is None and "tokenizer.model" in found:
        contents = convert(read_contents(checkpoint.folder / "tokenizer.model"), checkpoint.config)
    if contents is None:
        return {}
    described = found.get("tokenizer_config.json") or files.json_bytes(TOKENIZER)
    return {"tokenizer.json": contents, "tokenizer_config.json": described}


#: For checkpoints that do not say it themselves.
TOKENIZER = {
    "tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>",
    "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "processor_class": "PaliGemmaProcessor",
}  # fmt: skip
