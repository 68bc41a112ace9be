"""The bundle: a directory with everything that a host needs to run the model, and its description."""

import hashlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from numpy_ref import __version__, knows, memory
from numpy_ref import checkpoint as checkpoints
from numpy_ref.checkpoint import Checkpoint, hub, kinds
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError, note
from numpy_ref.files import absent, json_bytes, new_directory, opened, read_json, within
from numpy_ref.model import segmentation
from numpy_ref.tokenizer import Tokenizer, known_ids, read_contents
from numpy_ref.tokenizer.convert import convert

from ..model import graphs
from ..model.layers import FUSED, HALF, PORTABLE
from ..runtime import check_path
from . import digests, example, prepack, weights
from .description import Description, File, Graph, Image, Tokens, Value
from .rounded import Rounded

DESCRIPTION = "bundle.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
WITH_WEIGHTS = ("prefill", "decode", "extend", "vision", "prefill_text")  # the graphs that read the weights file
ROTATED = 16  # what divides the head sizes that GroupQueryAttention rotates


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files were checked."""

    path: Path
    description: Description

    @property
    def config(self) -> PaliGemmaConfig:
        return self.description.config

    @property
    def max_length(self) -> int:
        return self.description.max_length

    @property
    def is_prepacked(self) -> bool:
        """Whether the weights are there in the order of this machine's kernels too."""
        return self.description.prepacked == prepack.processor()

    @property
    def operators(self) -> str:
        """Which set of operators its graphs have."""
        return self.description.operators

    def graph_file(self, name: str) -> Path:
        """The .onnx file of a graph."""
        return self.path / self.description.graphs[name].file

    @property
    def only_for_cpu(self) -> str:
        """Why it cannot run wholly on a CUDA device, and what to do about it; empty if it can."""
        precision = self.description.precision
        if weights.stream_dtype(precision) not in HALF:
            if precision in weights.QUANTIZED:
                return f"an {precision} bundle is for the CPU; for CUDA export it with --precision int4-float16"
            if self.operators != PORTABLE:
                advice = "--precision float16, or --operators portable"
                return f"a float32 bundle with fused operators is for the CPU; for CUDA export it with {advice}"
        if "sample_device" not in self.description.graphs:
            return "it has no graph that samples on the device, as newer bundles have; for CUDA export it again"
        return ""

    @property
    def weight_bytes(self) -> int:
        return self.description.files[weights.FILE].bytes


@dataclass(frozen=True)
class Contents:
    """What a bundle will hold, known before a byte of it is written."""

    placed: dict[str, weights.Stored]
    made: dict[str, bytes]  # file name -> its bytes
    copies: dict[str, Path]  # file name -> where it lies now
    description: Description
    asked: dict  # what example.json asks
    tokenizer: Tokenizer | None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file; of the description before `--verify` adds its table, of the example before its answer."""
        sizes = {name: file.bytes for name, file in self.description.files.items()}
        return {**sizes, DESCRIPTION: len(json_bytes(self.description.to_json()))}


def plan(
    checkpoint: Checkpoint,
    precision: str = "float32",
    max_length: int | None = None,
    operators: str | None = None,
    residual: str | None = None,
    prepacked: bool = False,
) -> dict:
    """What `write` would do, without writing: bytes of each file, and of memory beyond the mapped checkpoint.

    With `prepacked` the weights are counted twice, which is about what their second copy takes.
    """
    _check_prepacked(precision, prepacked)
    contents = prepare(checkpoint, precision, max_length, operators, residual)
    sizes = {**contents.sizes, weights.FILE: contents.sizes[weights.FILE] * (2 if prepacked else 1)}
    return {"files": sizes, "memory": weights.memory(contents.placed)}


def _check_prepacked(precision, prepacked) -> None:
    if prepacked and weights.stream_dtype(precision) in HALF:
        raise PaliGemmaError(f"--prepack: it is for kernels of the CPU, and {precision} is for CUDA; leave it out")


def prepare(
    checkpoint: Checkpoint,
    precision: str = "float32",
    max_length: int | None = None,
    operators: str | None = None,
    residual: str | None = None,
) -> Contents:
    """Everything about the bundle of a checkpoint but the bytes of its weights."""
    config, operators = checkpoint.config, _operators(checkpoint.config, precision, operators)
    residual, max_length = _residual(precision, operators, residual), checked_length(config, max_length)
    files = {name: within(checkpoint.folder, name) for name in (*TOKENIZER_FILES, knows.FILE)}
    copies = {name: file for name, file in files.items() if file.is_file()}
    tokenizer = Tokenizer.load(checkpoint.folder, config) if {*TOKENIZER_FILES} & copies.keys() else None
    knows.load(checkpoint.folder)  # which refuses what is wrong before it is copied
    placed = weights.plan(config, precision, operators)
    models = _models(checkpoint, tokenizer, placed, weights.stream_dtype(precision), operators, residual)
    made = {f"{name}.onnx": graphs.serialize(model) for name, model in models.items()}
    if "tokenizer.model" in copies and "tokenizer.json" not in copies:
        converted = convert(read_contents(copies["tokenizer.model"]), config)
        made |= {"tokenizer.json": converted} if converted else {}
    asked = example.question(config, tokenizer, "masks" in models)
    made[example.FILE] = example.as_json(asked)
    sizes = {weights.FILE: weights.size(placed), **{name: len(contents) for name, contents in made.items()}}
    sizes |= {name: source.stat().st_size for name, source in copies.items()}
    description = Description(
        producer=f"paligemma-onnx {__version__}",
        precision=precision,
        operators=operators,
        residual=residual,
        max_length=max_length,
        config=config,
        tokens=_tokens(config, tokenizer),
        prompt="<image> * image_tokens a picture, bos, tokens of the prefix, newline",
        image=Image(config.vision.image_size, checkpoint.resize, mean=0.5, std=0.5),
        opset=graphs.opset_of(config, operators, weights.stream_dtype(precision)),
        graphs={name: _described(f"{name}.onnx", model) for name, model in models.items()},
        files={name: File(sizes[name], "0" * 64) for name in sorted(sizes)},
    )
    return Contents(placed, made, copies, description, asked, tokenizer)


def write(
    checkpoint: Checkpoint,
    output: str | Path,
    precision: str = "float32",
    max_length: int | None = None,
    verify: Callable[[Bundle, Checkpoint], list[dict]] | None = None,
    operators: str | None = None,
    prepacked: bool = False,
    residual: str | None = None,
    answered: bool = False,
    calibrate: Callable[[Path], Rounded] | None = None,
) -> None:
    """Export a loaded checkpoint into the new directory `output`.

    With `prepacked` the weights are there once more, in the order of this machine's kernels (prepack.py). With
    `answered` the bundle answers its own example.json, whose answer is else null. `calibrate(folder)` rounds weights of
    four bits (calibration), in a folder that is there for as long as they are read.
    `verify(bundle, checkpoint) -> table` is run before the directory gets its name; what it returns is kept in
    bundle.json. Raises PaliGemmaError, and leaves nothing behind, if anything is wrong.
    """
    output = absent(output, "folder")
    _check_prepacked(precision, prepacked)
    contents = prepare(checkpoint, precision, max_length, operators, residual)
    with new_directory(output) as folder:
        needed = sum(contents.sizes.values()) * (4 if prepacked else 1)
        check_space(output, folder, needed)  # what a killed export left is gone by now
        arrays = checkpoints.flatten(checkpoint.params)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            rounded = calibrate(Path(aside)) if calibrate else None
            with _progress("weights", weights.size(contents.placed)) as bar:
                written = weights.write(folder / weights.FILE, contents.placed, arrays, bar.update, rounded)
        sums = {weights.FILE: written}
        for name, made in contents.made.items():
            (folder / name).write_bytes(made)
        for name, source in contents.copies.items():
            shutil.copyfile(source, folder / name)
        description = replace(contents.description, calibration=rounded.calibration if rounded else None)
        if answered:
            _answer(folder, contents)
        if prepacked:
            prepack.prepack(folder, {name: folder / description.graphs[name].file for name in WITH_WEIGHTS})
            description, sums = replace(description, prepacked=prepack.processor()), {}
        before = digests.state(folder / weights.FILE)
        files = {
            name: File((folder / name).stat().st_size, sums.get(name) or sha256(folder / name))
            for name in description.files
        }
        description = replace(description, files=files)
        if verify:
            description = replace(description, parity=verify(Bundle(folder, description), checkpoint))
        (folder / DESCRIPTION).write_bytes(json_bytes(description.to_json()))
    if prepacked:
        for graph in WITH_WEIGHTS:
            prepack.remember(output / description.graphs[graph].file, description.files[weights.FILE].sha256)
    if not sums:  # then it was read again after it was written
        digests.remember(output / weights.FILE, description.files[weights.FILE].sha256, before)
    if contents.tokenizer is None:
        _warn(f"{checkpoint.path} has no tokenizer; the bundle knows only ids")
    elif "tokenizer.json" not in description.files:
        _warn("this tokenizer.model has no counterpart as tokenizer.json; hosts without SentencePiece cannot use it")


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint can be asked in words; a random one, say, cannot."""
    return any((checkpoint.folder / name).is_file() for name in TOKENIZER_FILES)


def _answer(folder, contents) -> None:
    """Put the bundle's answer into its example; where it cannot be run here, say why."""
    try:
        found = example.answered(contents.asked, folder, contents.description, contents.tokenizer)
    except PaliGemmaError as error:
        _warn(f"{example.FILE} has no answer: {error}")
    else:
        (folder / example.FILE).write_bytes(example.as_json(found))


def load(path: str | Path) -> Bundle:
    """Open a bundle: its version is known, its files are all there, and each has the SHA-256 that it had.

    Raises PaliGemmaError that names the first difference.
    """
    bundle = load_but_weights(path)
    check_weights(bundle)
    return bundle


def load_but_weights(path: str | Path) -> Bundle:
    """Open a bundle with all of its files checked, but of the weights only the size: their SHA-256 takes long."""
    path = hub.directory(path)
    kind = kinds.kind(path)
    if kind == kinds.CHECKPOINT:
        raise PaliGemmaError(f"{path}: a checkpoint, not a bundle: export-onnx {path} --output DIR makes one of it")
    if kind == kinds.ADAPTER:
        advice = f"export-onnx BASE --adapter {path} --output DIR makes one of it and its base"
        raise PaliGemmaError(f"{path}: an adapter, not a bundle: {advice}")
    if not path.is_dir():
        raise PaliGemmaError(f"{path}: no such bundle directory; export-onnx makes one")
    check_path(path)
    file = within(path, DESCRIPTION)
    try:
        contents = read_json(file)
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}; is this a bundle written by export-onnx?") from None
    bundle = Bundle(path, Description.from_json(contents, file))
    for name, listed in bundle.description.files.items():
        file = within(path, name)
        _check_size(file, listed.bytes)
        if name != weights.FILE:
            _check_digest(file, listed.sha256)
    _check_sizes(bundle)
    return bundle


def _check_sizes(bundle: Bundle) -> None:
    """Raise PaliGemmaError if the sizes of a config need more weights than there are, or arrays than there is memory.

    Before anything is made in these sizes: a graph of a kilobyte may declare any. No precision takes fewer than four
    bits a weight.
    """
    config, file = bundle.config, bundle.path / weights.FILE
    least = sum(math.prod(parameter.shape) for parameter in checkpoints.parameters(config)) // 2
    if least > bundle.weight_bytes:
        raise PaliGemmaError(
            f"{bundle.path / DESCRIPTION}: a model of its config has {_amount(least)} of weights at least, and "
            f"{file.name} {_amount(bundle.weight_bytes)}; export the bundle again"
        )
    vision, vocab = config.vision, config.text.vocab
    arrays = 8 * vision.image_size**2 * 3 + 64 * vision.patches + 16 * vocab  # a picture, its ids, and a row of logits
    memory.check(arrays, f"{bundle.path}: a picture and a row of logits")


def check_weights(bundle: Bundle) -> None:
    """Raises PaliGemmaError unless the weights file has the SHA-256 that it had."""
    file, digest = bundle.path / weights.FILE, bundle.description.files[weights.FILE].sha256
    before = digests.state(file)
    _check_digest(file, digest)
    digests.remember(file, digest, before)


def check_weights_once(bundle: Bundle) -> None:
    """The same, but of a file that was checked and has not been written since nothing is read (digests.py)."""
    if not digests.is_known(bundle.path / weights.FILE, bundle.description.files[weights.FILE].sha256):
        check_weights(bundle)


def shipped(for_cuda: bool = False) -> Bundle:
    """The shipped model's bundle, exported into the user's cache on first use, and again if it is damaged.

    For CUDA it has operators of its own: in float32 the fused ones have kernels on the CPU alone.
    """
    parts = [*sorted(checkpoints.SHIPPED.iterdir()), *sources()]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    path = digests.cache_folder() / f"shipped-{'cuda-' if for_cuda else ''}{digest}"
    if path.exists():
        try:
            return load(path)
        except PaliGemmaError:
            shutil.rmtree(path, ignore_errors=True)
    note(f"exporting the shipped model to {path}")
    try:
        write(checkpoints.load(checkpoints.SHIPPED), path, operators=PORTABLE if for_cuda else FUSED, answered=True)
    except PaliGemmaError:
        if not path.exists():  # another process may have been faster
            raise
    return load(path)


def sources() -> list[Path]:
    """The files of the code that a bundle is made by."""
    packages = Path(__file__).parents[1], checkpoints.SHIPPED.parent
    return [file for package in packages for file in sorted(package.rglob("*.py"))]


def sha256(file: str | Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _operators(config, precision, wanted) -> str:
    """Fused, unless others are wanted or the heads do not fit; PaliGemmaError if they do not and fused is wanted."""
    half, size = weights.stream_dtype(precision) in HALF, config.text.head_dim
    if not half or size % ROTATED == 0:
        return wanted or FUSED
    if wanted == FUSED:
        raise PaliGemmaError(
            f"--operators fused: in half precision they take heads whose size is a multiple of {ROTATED}, and those of "
            f"this model have {size}; export it with --operators portable"
        )
    return PORTABLE


def _residual(precision, operators, wanted) -> str:
    """The dtype of the residual stream.

    Float32 in float16, which Gemma's stream may outgrow; bfloat16 in bfloat16, as transformers and big_vision have it.
    Portable graphs have it in float32. PaliGemmaError if another is wanted.
    """
    stream = weights.stream_dtype(precision)
    own = next(name for name, dtype in weights.FLOATS.items() if dtype == stream)
    allowed = {"float32", own} if operators == FUSED else {"float32"}
    if wanted and wanted not in allowed:
        raise PaliGemmaError(
            f"--residual {wanted}: with {operators} operators in {precision} it is {' or '.join(sorted(allowed))}"
        )
    return wanted or (own if own in allowed and own != "float16" else "float32")


def _models(checkpoint, tokenizer, placed, dtype, operators, residual) -> dict:
    """The graphs of a bundle by name."""
    config, codec = checkpoint.config, segmentation.find(checkpoint.folder)
    known = known_ids(config, tokenizer.size if tokenizer else None)
    chosen = {"operators": operators, "residual": weights.FLOATS[residual]}
    models = {
        "prefill": graphs.prefill_model(config, weights.initializer(placed), dtype, **chosen),
        "decode": graphs.decode_model(config, weights.initializer(placed, graph="decode"), dtype, **chosen),
        "extend": graphs.extend_model(config, weights.initializer(placed, graph="extend"), dtype, **chosen),
        "vision": graphs.vision_model(config, weights.initializer(placed), dtype, **chosen),
        "prefill_text": graphs.prefill_text_model(config, weights.initializer(placed), dtype, **chosen),
        "preprocess": graphs.preprocess_model(config, checkpoint.resize),
        "sample": graphs.sample_model(known),
        "sample_device": graphs.sample_model(known, on_device=True),
        "constrain": graphs.sample_model(known, on_device=True, constrained=True),
    }
    if codec:
        models["masks"] = graphs.masks_model(segmentation.load(codec))
    return models


def _warn(message) -> None:
    note(f"export-onnx: warning: {message}")


def _progress(label, total):
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, disable=None, delay=1)


def check_space(output: Path, folder: Path, needed: int) -> None:
    """Raise PaliGemmaError if the disk of a folder has not so many bytes free for what will be `output`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PaliGemmaError(f"{output}: the disk has {_amount(free)} free, the export needs {_amount(needed)}")


def _amount(size) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _check_size(file, size) -> None:
    if not file.is_file():
        raise PaliGemmaError(f"{file}: this file of the bundle is missing; copy or export the bundle again")
    if file.stat().st_size != size:
        raise PaliGemmaError(f"{file}: {file.stat().st_size} bytes where {DESCRIPTION} says {size}; copy it again")


def _check_digest(file, digest) -> None:
    if sha256(file) != digest:
        raise PaliGemmaError(f"{file}: contents differ from their SHA-256 in {DESCRIPTION}; copy it again")


def checked_length(config: PaliGemmaConfig, max_length: int | None) -> int:
    """How many positions a prompt and its answer may have, the model's own if not said; PaliGemmaError if it cannot."""
    least = config.vision.patches + 3  # the picture, bos, one token of a prompt, the newline
    if max_length is None:
        return config.max_length
    if not least <= max_length <= config.max_length:
        raise PaliGemmaError(
            f"--max-length {max_length}: this model takes from {least} ({config.vision.patches} of them the picture) "
            f"to {config.max_length} positions"
        )
    return max_length


def _described(file, model) -> Graph:
    return Graph(file, **{key: [Value(**value) for value in found] for key, found in graphs.describe(model).items()})


def _tokens(config, tokenizer) -> Tokens:
    known = known_ids(config, tokenizer.size if tokenizer else None)
    return Tokens(
        image=config.image_token,
        image_tokens=config.vision.patches,
        bos=config.bos,
        eos=config.eos,
        stops=[*config.ends],
        pad=config.pad,
        newline=tokenizer.newline if tokenizer else None,
        known=_ranges(known),
    )


def _ranges(known) -> list[list[int]]:
    """A boolean row as [first, past the last] pairs."""
    edges = [i for i in range(1, len(known)) if known[i] != known[i - 1]]
    edges = [0, *edges, len(known)]
    return [[a, b] for a, b in itertools.pairwise(edges) if known[a]]
