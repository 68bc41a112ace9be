"""The bundle: a directory with everything that a host needs to run the model, and its description."""

import hashlib
import itertools
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from onnx_ir import DataType
from tqdm import tqdm

from numpy_ref import __version__, segmentation, storage
from numpy_ref import checkpoint as checkpoints
from numpy_ref.config import PaliGemmaConfig, from_hf, to_hf
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import RESIZES
from numpy_ref.tokenizer import Tokenizer, known_ids

from . import graphs, weights

FORMAT = "paligemma-onnx"
VERSION = 1
DESCRIPTION = "bundle.json"
PRECISIONS = {"float32": DataType.FLOAT, "float16": DataType.FLOAT16, "bfloat16": DataType.BFLOAT16}
SPARE = 16 * 2**20  # bytes on top of the weights: graphs, tokenizer, description
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files were checked."""

    path: Path
    config: PaliGemmaConfig
    description: dict

    @property
    def max_length(self) -> int:
        return self.description["max_length"]

    @property
    def weight_bytes(self) -> int:
        return self.description["files"][weights.FILE]["bytes"]


def plan(checkpoint, precision="float32", max_length=None) -> dict:
    """What `write` would do, without writing: bytes of each file, and of memory beyond the mapped checkpoint."""
    config, dtype = checkpoint.config, PRECISIONS[precision]
    _check_length(config, max_length)
    placed = weights.plan(config, dtype)
    files = {weights.FILE: weights.size(placed)}
    models = _graphs(checkpoint, _tokenizer(checkpoint), placed, dtype)
    files |= {f"{name}.onnx": len(contents) for name, (_, contents) in models.items()}
    files |= {name: (checkpoint.folder / name).stat().st_size for name in _tokenizer_files(checkpoint)}
    return {"files": files, "memory": weights.memory(placed)}


def write(checkpoint, output, precision="float32", max_length=None, verify=None) -> None:
    """Export a loaded checkpoint into the new directory `output`.

    `verify(bundle, checkpoint) -> table` is run before the directory gets its name; what it returns is kept in
    bundle.json. Raises PaliGemmaError, and leaves nothing behind, if anything is wrong.
    """
    config, dtype = checkpoint.config, PRECISIONS[precision]
    max_length = _check_length(config, max_length)
    tokenizer = _tokenizer(checkpoint)
    placed = weights.plan(config, dtype)
    with storage.new_directory(output) as folder:
        _check_space(folder, output, weights.size(placed))
        arrays = checkpoints.flatten(checkpoint.params)
        with _progress("weights", weights.size(placed)) as bar:
            digest = weights.write(folder / weights.FILE, placed, arrays, bar.update)
        models = _graphs(checkpoint, tokenizer, placed, dtype)
        for name, (_, contents) in models.items():
            (folder / f"{name}.onnx").write_bytes(contents)
        for name in _tokenizer_files(checkpoint):
            shutil.copyfile(checkpoint.folder / name, folder / name)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "producer": f"paligemma-onnx {__version__}",
            "precision": precision,
            "max_length": max_length,
            "config": to_hf(config),
            "tokens": _tokens(config, tokenizer),
            "prompt": "<image> * image_tokens, bos, tokens of the prefix, newline",
            "image": {"size": config.vision.image_size, "resize": checkpoint.resize, "mean": 0.5, "std": 0.5},
            "opset": graphs.OPSET,
            "graphs": {name: {"file": f"{name}.onnx", **graphs.describe(model)} for name, (model, _) in models.items()},
            "files": {
                file.name: {
                    "bytes": file.stat().st_size,
                    "sha256": digest if file.name == weights.FILE else sha256(file),
                }
                for file in sorted(folder.iterdir())
            },
            "parity": None,
        }
        if verify:
            description["parity"] = verify(Bundle(folder, config, description), checkpoint)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def load(path) -> Bundle:
    """Open a bundle: its version is known, its files are all there, and each has the SHA-256 that it had.

    Raises PaliGemmaError that names the first difference.
    """
    path = Path(path)
    if not path.is_dir():
        raise PaliGemmaError(f"{path}: no such bundle directory; export-onnx makes one")
    try:
        description = storage.read_json(path / DESCRIPTION)
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}; is this a bundle written by export-onnx?") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise PaliGemmaError(f"{path}: {DESCRIPTION} does not describe a {FORMAT} bundle")
    if description.get("version") != VERSION:
        raise PaliGemmaError(
            f"{path}: bundle version {description.get('version')!r}, but this program reads {VERSION}; export it again"
        )
    try:
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in description["files"].items()}
        config = from_hf(description["config"])
        description["max_length"] = int(description["max_length"])
        known_settings = description["image"]["resize"] in RESIZES and description["precision"] in PRECISIONS
        listed = description["graphs"]
        graphs_listed = {listed[name]["file"] for name in {"prefill", "decode", *listed}}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PaliGemmaError(f"{path}: {DESCRIPTION} is damaged ({error!r}); export the bundle again") from None
    if not known_settings:
        raise PaliGemmaError(f"{path}: {DESCRIPTION} names a precision or preprocessing that this program lacks")
    if missing := graphs_listed - files.keys():
        raise PaliGemmaError(f"{path}: {DESCRIPTION} lists no checksum for {', '.join(sorted(missing))}")
    _check_files(path, files)
    return Bundle(path, config, description)


def shipped() -> Path:
    """The bundle of the model that ships, exported into the user's cache on first use."""
    source = checkpoints.SHIPPED
    names = ("config.json", "model.safetensors", "tokenizer.model", *segmentation.FILES[:1])
    parts = [*(source / name for name in names), *sorted(Path(__file__).parent.glob("*.py"))]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    path = Path(platformdirs.user_cache_dir("paligemma-onnx", appauthor=False)) / f"shipped-{digest}"
    if not path.exists():
        print(f"exporting the shipped model to {path}", file=sys.stderr)
        try:
            write(checkpoints.load(source), path)
        except PaliGemmaError:
            if not path.exists():  # another process may have been faster
                raise
    return path


def sha256(file) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _graphs(checkpoint, tokenizer, placed, dtype) -> dict:
    """The models and their bytes: name -> (model, contents)."""
    config, codec = checkpoint.config, segmentation.find(checkpoint.folder)
    models = {
        "prefill": graphs.prefill_model(config, weights.initializer(placed), dtype),
        "decode": graphs.decode_model(config, weights.initializer(placed), dtype),
        "preprocess": graphs.preprocess_model(config, checkpoint.resize),
        "sample": graphs.sample_model(known_ids(config, tokenizer.size if tokenizer else None)),
    }
    if codec:
        models["masks"] = graphs.masks_model(segmentation.load(codec))
    return {name: (model, graphs.serialize(model)) for name, model in models.items()}


def _progress(label, total):
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=None, delay=1)


def _check_space(folder, output, size) -> None:
    free = shutil.disk_usage(folder).free
    needed = size + SPARE
    if free < needed:
        raise PaliGemmaError(f"{output}: the disk has {free / 1e9:.1f} GB free, the bundle needs {needed / 1e9:.1f} GB")


def _tokenizer_files(checkpoint) -> list[str]:
    return [name for name in TOKENIZER_FILES if (checkpoint.folder / name).is_file()]


def _check_files(path, files) -> None:
    for name, (size, digest) in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise PaliGemmaError(f"{file}: this file of the bundle is missing; copy or export the bundle again")
        if file.stat().st_size != size:
            raise PaliGemmaError(f"{file}: {file.stat().st_size} bytes where {DESCRIPTION} says {size}; copy it again")
        if sha256(file) != digest:
            raise PaliGemmaError(f"{file}: contents differ from their SHA-256 in {DESCRIPTION}; copy it again")


def _check_length(config, max_length) -> int:
    least = config.vision.patches + 3  # the picture, bos, one token of a prompt, the newline
    if max_length is None:
        return config.max_length
    if not least <= max_length <= config.max_length:
        raise PaliGemmaError(
            f"--max-length {max_length}: this model takes from {least} ({config.vision.patches} of them the picture) "
            f"to {config.max_length} positions"
        )
    return max_length


def _tokenizer(checkpoint):
    """The checkpoint's tokenizer, or None with a warning: graphs can be used without one."""
    if not _tokenizer_files(checkpoint):
        print(f"export-onnx: warning: {checkpoint.path} has no tokenizer; the bundle knows only ids", file=sys.stderr)
        return None
    return Tokenizer.load(checkpoint.folder, checkpoint.config)


def _tokens(config, tokenizer) -> dict:
    known = known_ids(config, tokenizer.size if tokenizer else None)
    return {
        "image": config.image_token,
        "image_tokens": config.vision.patches,
        "bos": config.bos,
        "eos": config.eos,
        "pad": config.pad,
        "newline": tokenizer.newline if tokenizer else None,
        "known": _ranges(known),
    }


def _ranges(known) -> list[list[int]]:
    """A boolean row as [first, past the last] pairs."""
    edges = [i for i in range(1, len(known)) if known[i] != known[i - 1]]
    edges = [0, *edges, len(known)]
    return [[a, b] for a, b in itertools.pairwise(edges) if known[a]]
