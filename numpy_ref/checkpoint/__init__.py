"""Checkpoints on disk <-> the nested dict of arrays that the model runs on.

Two families are read and written: Hugging Face directories, and big_vision `.npz` files. Tensors' names are in
layouts.py, the configuration's in hugging_face.py, the bytes of files in safetensors.py and npz.py. Loading maps the
files and takes views, so nothing is read before it is used (but for the attention kernels of a npz, whose axes have to
be reordered). Both directions are strict: every missing, unexpected or misshapen tensor is named.

    python -m numpy_ref.checkpoint convert SRC DST      a DST that ends in .npz is written as big_vision's
"""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PaliGemmaConfig, check
from ..errors import PaliGemmaError, listed, note
from ..files import json_bytes, new_directory, new_file, read_json, within
from . import adapter as adapters
from . import hub, kinds
from .blocks import dtypes
from .hugging_face import GENERATION, PADDING, from_hf, not_done, resize_from_hf, resize_to_hf, to_hf
from .layouts import (
    FUSED,
    KEY_VALUE,
    QUERY,
    canonical,
    config_of_npz,
    npz_shapes,
    parameters,
    pooling_head,
    saved_name,
    split_fused,
    unwrapped,
)
from .npz import map_npz, write_npz
from .safetensors import map_safetensors, write_safetensors
from .tree import flatten, unflatten

#: The trained model that ships with the package.
SHIPPED = Path(__file__).parent.parent / "shipped"
#: What travels with a checkpoint beside its weights.
COMPANIONS = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "vae.npz", "vae-oid.npz",
)  # fmt: skip
_TOKENIZERS, _CODECS = COMPANIONS[:2], COMPANIONS[-2:]

# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: `params` is the nested dict, whose leaves are views of mapped files.

    With an adapter the weights that it changes are no arrays but computed where they are read (adapter.py);
    `adapter.in_memory` makes arrays of them. Each tensor keeps the dtype that it is stored in, so that a bfloat16
    model with float32 norms keeps those exact: what computes casts it to its own dtype, and export to the one that
    was asked for. (transformers casts all to the one dtype that it is given.) `dtype` is what most of the numbers have.
    `folder` is where its tokenizer lies; `resize` names its preprocessing (`image.RESIZES`).
    """

    path: Path
    config: PaliGemmaConfig
    params: dict
    dtype: np.dtype
    resize: str = "bicubic"

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def load(name: str | Path | None = None, adapter: str | Path | None = None) -> Checkpoint:
    """Load a Hugging Face PaliGemma directory, one named by its Hub id (`hub.directory`), or a big_vision .npz file.

    `adapter` is the directory or Hub id of a LoRA adapter to merge into it; then `name` may be left out for the base
    that the adapter was trained on. Without both it is the model that ships. Raises PaliGemmaError that names what is
    wrong.
    """
    if adapter is None:
        path = hub.directory(SHIPPED if name is None else name)
        return _load_npz(path) if path.suffix == ".npz" else _load_directory(path)
    folder = hub.directory(adapter)
    return adapters.adapt(load(adapters.base_of(folder) if name is None else name), folder)


def load_config(path: str | Path) -> PaliGemmaConfig:
    """Read `config.json` of a directory."""
    path = hub.directory(path)
    kinds.refuse_others(path)
    if not path.is_dir():
        raise PaliGemmaError(f"{path}: no such checkpoint directory")
    file = within(path, "config.json")
    try:
        fields = read_json(file)
        kinds.refuse_quantized(file.name, fields)
        return from_hf(fields, _generation(path))
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}") from None


def _generation(path):
    """The contents of generation_config.json, if there is one; a line on stderr for what it asks and nobody does."""
    file = within(path, GENERATION)
    if not file.exists():
        return None
    found = read_json(file)
    if asked := not_done(found) if isinstance(found, dict) else []:
        note(f"{path}: {GENERATION} asks for {', '.join(asked)}; that is not done, or left to the options of commands")
    if isinstance(found, dict) and found.get("eos_token_id") is None:
        note(f"{path}: {GENERATION} names no eos_token_id, so that, as in transformers, nothing ends an answer early")
    return found


def _load_directory(path) -> Checkpoint:
    config = load_config(path)
    tensors, wrappers = unwrapped(map_safetensors(path))
    if wrappers:
        note(f"{path}: every tensor's name begins with {wrappers}, which is taken off")
    if (path / adapters.CONFIG).exists():
        note(f"{path}: there is an adapter beside the model, which is left alone; --adapter {path} would apply it")
    stored = {}
    for name, array in tensors.items():
        if canonical(name) in stored:
            raise PaliGemmaError(f"{path}: tensor {name} is stored twice, under two spellings of its name")
        stored[canonical(name)] = array
    _drop_tied_head(path, config, stored)
    wanted = {parameter.hf.name: parameter.hf.shape for parameter in parameters(config)}
    unused = pooling_head(config.vision)
    if unused.keys() & stored.keys():  # checked like the rest, and then left where it lies
        wanted |= unused
    _compare(path, wanted, stored, "config.json asks for", saved_name)
    dtype = _main_dtype(path, stored, saved_name)
    flat = {p.path: p.hf.layout.read(stored[p.hf.name], p.shape) for p in parameters(config)}
    return Checkpoint(path, config, unflatten(flat), dtype, load_resize(path, config.vision.image_size))


def _load_npz(path) -> Checkpoint:
    if not path.is_file():
        raise PaliGemmaError(f"{path}: no such checkpoint file")
    stored = {}
    for name, array in map_npz(path).items():
        if name.removeprefix("params/") in stored:
            raise PaliGemmaError(f"{path}: tensor {name} is stored twice, with and without params/")
        stored[name.removeprefix("params/")] = array
    split_fused(path, stored)
    config = config_of_npz(path, {name: array.shape for name, array in stored.items()})
    check(config, path)
    _compare(path, npz_shapes(config), stored, "the other tensors ask for")
    dtype = _main_dtype(path, stored)
    flat = {p.path: p.bv.layout.read(stored[p.bv.name][p.bv.index], p.shape) for p in parameters(config)}
    return Checkpoint(path, config, unflatten(flat), dtype, "bilinear")


def load_resize(path: str | Path, size: int | None) -> str:
    """The preprocessing to pictures of `size` that a directory's files select; bicubic without any.

    As in transformers, `processor_config.json` counts where it describes the image processor.
    """
    processor, preprocessor = (within(path, name) for name in ("processor_config.json", "preprocessor_config.json"))
    try:
        for file, key in [(processor, "image_processor"), (preprocessor, None)]:
            settings = read_json(file) if file.exists() else None
            if key and isinstance(settings, dict):
                settings = settings.get(key)
            if settings is not None:
                return resize_from_hf(settings, size, file.name)
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}") from None
    return "bicubic"


def _compare(path, wanted, stored, source, spell=str) -> None:
    """The differences between the shapes wanted and the arrays stored, in one line: ten of them, of each kind some."""
    missing = [f"missing {spell(name)} {list(wanted[name])}" for name in wanted.keys() - stored.keys()]
    unexpected = [f"unexpected {name} {list(stored[name].shape)}" for name in stored.keys() - wanted.keys()]
    misshapen = [
        f"{spell(name)} has shape {list(stored[name].shape)}, {source} {list(wanted[name])}"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != wanted[name]
    ]
    rows = itertools.zip_longest(*map(sorted, (missing, unexpected, misshapen)))
    if problems := [problem for row in rows for problem in row if problem]:
        raise PaliGemmaError(f"{path}: the tensors are not those of the model: {listed(problems, '; ')}")


def _drop_tied_head(path, config, stored) -> None:
    """A tied checkpoint may still carry its head, which must then be the embedding table, or stand in for it."""
    if not config.text.tied or "lm_head.weight" not in stored:
        return
    table_name = "language_model.embed_tokens.weight"
    head, table = stored["lm_head.weight"], stored.setdefault(table_name, stored["lm_head.weight"])
    if table is not head:
        # Rows from the image token on are random padding, drawn separately for both (transformers' conversion).
        rows = min(config.image_token, *head.shape[:1], *table.shape[:1])
        step = 4096
        same = head.shape == table.shape and all(
            np.array_equal(head[i : min(i + step, rows)], table[i : min(i + step, rows)]) for i in range(0, rows, step)
        )
        if not same:
            raise PaliGemmaError(
                f"{path}: language_model.lm_head.weight differs from the embedding table although "
                "config.json says tie_word_embeddings; set it to false"
            )
    del stored["lm_head.weight"]


def _main_dtype(path, stored, spell=str) -> np.dtype:
    """The dtype that most of the numbers of a checkpoint have; a tensor of one that no weights have is named."""
    known, counts = dtypes().values(), Counter()
    for array in stored.values():
        counts[array.dtype] += array.size
    odd = sorted(f"{spell(name)} is {array.dtype}" for name, array in stored.items() if array.dtype not in known)
    if odd:
        raise PaliGemmaError(f"{path}: float64, float32, float16 and bfloat16 are known, but {listed(odd, '; ')}")
    return counts.most_common(1)[0][0]


# --- writing -----------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    config: PaliGemmaConfig,
    params: dict,
    files: dict[str, bytes] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a Hugging Face directory: config.json, safetensors, and `files` (name -> contents) beside them.

    Raises PaliGemmaError if the folder exists or the tensors are not those of the config.
    """
    flat = _checked(config, params)
    if from_hf(to_hf(config)) != config:
        raise PaliGemmaError(f"{path}: config.json has no words for this config: {config}")
    tensors = {saved_name(p.hf.name): p.hf.layout.write(flat[p.path], p.hf.shape) for p in parameters(config)}
    with new_directory(path) as folder:
        write_safetensors(folder, tensors, *filter(None, [progress]))
        (folder / "config.json").write_text(json.dumps(to_hf(config), indent=2) + "\n")
        for name, contents in (files or {}).items():
            (folder / name).write_bytes(contents)


def save_npz(
    path: str | Path, config: PaliGemmaConfig, params: dict, progress: Callable[[int], object] | None = None
) -> None:
    """Write a big_vision file. The rows from the image token on, which big_vision does not have, are left out.

    Final softcap, sliding windows, the longest sequence and stop tokens are left to whoever reads it (`npz_omits`).
    Raises PaliGemmaError if the file exists, or if anything else of the config would come back different.
    """
    flat = _checked(config, params)
    rows = min(config.text.vocab, config.image_token)
    config = replace(config, text=replace(config.text, vocab=rows), image_token=rows)
    _check_representable(path, config, flat["text.embedding"].shape[0] - rows)
    flat["text.embedding"] = flat["text.embedding"][:rows]
    arrays: dict[str, Any] = {}  # arrays, or lists of those that are stacked
    stacked = defaultdict(list)
    for p in parameters(config):
        stacked[p.bv.name].append(flat[p.path].dtype)
    for p in parameters(config):
        piece = p.bv.layout.write(flat[p.path], p.bv.shape).astype(np.result_type(*stacked[p.bv.name]), copy=False)
        if p.bv.index:
            _nest(arrays.setdefault(p.bv.name, []), p.bv.index, piece)
        else:
            arrays[p.bv.name] = piece
    if config.text.kv_heads == config.text.heads:
        layers = zip(arrays.pop(QUERY), arrays.pop(KEY_VALUE), strict=True)
        arrays[FUSED] = [[query, *pair] for query, pair in layers]
    with new_file(path) as file:
        write_npz(file, arrays, *filter(None, [progress]))


def npz_omits(checkpoint: Checkpoint) -> list[str]:
    """What a big_vision file of this model does not say, so that big_vision's own holds for it: names and values."""
    config = checkpoint.config
    omitted = {
        "final softcap": config.text.final_softcap,
        "sliding window": next((window for window in config.text.windows if window), None),
        "longest sequence": None if config.max_length == PaliGemmaConfig().max_length else config.max_length,
        "resize": None if checkpoint.resize == "bilinear" else checkpoint.resize,
        "stop tokens": None if config.stops is None else list(config.stops) or "none",
    }
    return [f"{name} {value}" for name, value in omitted.items() if value]


def _check_representable(path, config, rows_cut) -> None:
    """Raise if the shapes of a big_vision file would not bring back this config."""
    if not config.text.tied:
        raise PaliGemmaError(f"{path}: a big_vision file has no untied head")
    if rows_cut > PADDING:
        raise PaliGemmaError(f"{path}: a big_vision file ends before the image token, but {rows_cut} rows follow it")
    read = config_of_npz(path, npz_shapes(config))
    text = replace(read.text, final_softcap=config.text.final_softcap, windows=config.text.windows)
    read = replace(read, text=text, max_length=config.max_length, stops=config.stops)
    theirs, ours = flatten(asdict(read)), flatten(asdict(config))
    odd = [f"{name} {ours[name]} (it means {theirs[name]})" for name in ours if ours[name] != theirs[name]]
    if odd:
        raise PaliGemmaError(f"{path}: a big_vision file cannot say {', '.join(odd)}")


def _nest(pieces: list, index, piece) -> None:
    """Append a piece at its index: (layer,), or (layer, which of a pair). Pieces come in order."""
    if len(index) > 1:
        if index[1] == 0:
            pieces.append([])
        pieces = pieces[-1]
    pieces.append(piece)


def _checked(config, params) -> dict:
    """The flat parameters, if they are those of the config."""
    flat = flatten(params)
    wanted = {parameter.path: parameter.shape for parameter in parameters(config)}
    _compare("parameters", wanted, flat, "the config asks for")
    return flat


def convert(source: str | Path, target: str | Path, tokenizer: str | Path | None = None) -> list[str]:
    """Between the two families, tensor by tensor; a target that ends in .npz is big_vision's.

    A directory gets the files that travel with the source, and `tokenizer` (a tokenizer.model or tokenizer.json)
    for its own. Returns what the target cannot say (`npz_omits`).
    """
    from tqdm import tqdm

    checkpoint, target = load(source), Path(target)
    to_npz = target.suffix == ".npz"
    if to_npz and tokenizer:
        raise PaliGemmaError(f"{target}: a .npz has no room for a tokenizer; keep {tokenizer} beside it")
    files = {} if to_npz else companions(checkpoint, tokenizer)
    total = sum(array.nbytes for array in flatten(checkpoint.params).values())
    with tqdm(total=total, desc=target.name, unit="B", unit_scale=True, leave=False, disable=None, delay=1) as bar:
        if to_npz:
            save_npz(target, checkpoint.config, checkpoint.params, bar.update)
            return npz_omits(checkpoint)
        save(target, checkpoint.config, checkpoint.params, files, bar.update)
        return []


def left_behind(source: str | Path, target: str | Path) -> list[str]:
    """The tokenizer and mask codec of a directory that a .npz as target has no room for, unless they are beside it."""
    folder, target = hub.directory(source), Path(target)
    if target.suffix != ".npz" or not folder.is_dir():
        return []
    return [
        name for name in (*_TOKENIZERS, *_CODECS) if (folder / name).is_file() and not (target.parent / name).exists()
    ]


def companions(checkpoint: Checkpoint, tokenizer: str | Path | None = None) -> dict[str, bytes]:
    """The files that go beside the weights of a directory, by name."""
    from ..tokenizer import Json, SentencePiece, Tokenizer, read_contents

    from_npz = checkpoint.path.suffix == ".npz"
    names = _TOKENIZERS if from_npz else COMPANIONS  # a npz lies among files that may not be its own
    found = [file for name in names if (file := within(checkpoint.folder, name)).is_file()]
    files = {file.name: read_contents(file) for file in found}
    if from_npz:
        picture = resize_to_hf(checkpoint.resize, checkpoint.config.vision)
        files["preprocessor_config.json"] = json_bytes(picture)
    if tokenizer:
        backend = Json if Path(tokenizer).suffix == ".json" else SentencePiece
        contents = read_contents(tokenizer)
        Tokenizer(backend(contents, tokenizer), checkpoint.config)  # before anything is written
        files = {name: files[name] for name in files if name not in _TOKENIZERS} | {backend.FILE: contents}
    return files
