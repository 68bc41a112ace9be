"""Checkpoints on disk <-> the nested dict of arrays that the model runs on.

This is the only file that knows foreign tensor names and layouts. In the nested dict a kernel is
[in, out]; Hugging Face stores [out, in]. Loading maps the files and takes transposed views, so nothing
is read before it is used. Both directions are strict: every missing, unexpected or misshapen tensor is named.
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .config import PaliGemmaConfig, from_hf, to_hf
from .errors import PaliGemmaError

#: The trained model that ships with the package.
SHIPPED = Path(__file__).parent / "shipped"

# --- our parameters, and what Hugging Face calls them ------------------------------------------------------

COPY = (lambda stored: stored, lambda ours, shape: ours)
TRANSPOSE = (lambda stored: stored.T, lambda ours, shape: ours.T)
# A patch convolution [D, 3, p, p] is a matrix [3*p*p, D] over flattened patches.
CONVOLUTION = (
    lambda stored: stored.reshape(stored.shape[0], -1).T,
    lambda ours, shape: ours.T.reshape(shape),
)


@dataclass(frozen=True)
class Parameter:
    """One tensor: its path and shape here, its Hugging Face name and shape, and the layout between them."""

    path: str
    shape: tuple[int, ...]
    hf_name: str
    hf_shape: tuple[int, ...]
    layout: tuple = COPY

    def from_hf(self, stored):
        return self.layout[0](stored)

    def to_hf(self, array):
        return self.layout[1](array, self.hf_shape)


def parameters(config: PaliGemmaConfig) -> list[Parameter]:
    """Every tensor of a model, in the order of the forward pass."""
    return [*_vision_parameters(config), *_text_parameters(config)]


def _kernel(path, hf, inputs, outputs):
    return Parameter(f"{path}.kernel", (inputs, outputs), f"{hf}.weight", (outputs, inputs), TRANSPOSE)


def _vector(path, hf, size):
    return Parameter(path, (size,), hf, (size,))


def _dense(path, hf, inputs, outputs):
    return [_kernel(path, hf, inputs, outputs), _vector(f"{path}.bias", f"{hf}.bias", outputs)]


def _layer_norm(path, hf, width):
    return [_vector(f"{path}.scale", f"{hf}.weight", width), _vector(f"{path}.bias", f"{hf}.bias", width)]


def _vision_parameters(config):
    vision, hf = config.vision, "vision_tower"
    width, patch = vision.width, vision.patch_size
    embeddings = f"{hf}.embeddings"
    yield Parameter(
        "vision.patch_embed.kernel", (3 * patch * patch, width),
        f"{embeddings}.patch_embedding.weight", (width, 3, patch, patch), CONVOLUTION,
    )  # fmt: skip
    yield _vector("vision.patch_embed.bias", f"{embeddings}.patch_embedding.bias", width)
    table = (vision.patches, width)
    yield Parameter("vision.position_embedding", table, f"{embeddings}.position_embedding.weight", table)
    for i in range(vision.depth):
        ours, layer = f"vision.blocks.{i}", f"{hf}.encoder.layers.{i}"
        yield from _layer_norm(f"{ours}.attention_norm", f"{layer}.layer_norm1", width)
        for name, foreign in [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj")]:
            yield from _dense(f"{ours}.attention.{name}", f"{layer}.self_attn.{foreign}", width, width)
        yield from _layer_norm(f"{ours}.mlp_norm", f"{layer}.layer_norm2", width)
        yield from _dense(f"{ours}.mlp.up", f"{layer}.mlp.fc1", width, vision.mlp)
        yield from _dense(f"{ours}.mlp.down", f"{layer}.mlp.fc2", vision.mlp, width)
    yield from _layer_norm("vision.norm", f"{hf}.post_layernorm", width)
    yield from _dense("projector", "multi_modal_projector.linear", width, config.text.width)


def _text_parameters(config):
    text, hf = config.text, "language_model"
    width, queries, keys = text.width, text.heads * text.head_dim, text.kv_heads * text.head_dim
    table = (text.vocab, width)
    yield Parameter("text.embedding", table, f"{hf}.embed_tokens.weight", table)
    for i in range(text.depth):
        ours, layer = f"text.blocks.{i}", f"{hf}.layers.{i}"
        # "post_attention_layernorm" is the norm BEFORE the MLP in Gemma 1 and the one AFTER attention in Gemma 2.
        before_mlp = "pre_feedforward_layernorm" if text.post_norms else "post_attention_layernorm"
        yield _vector(f"{ours}.attention_norm.scale", f"{layer}.input_layernorm.weight", width)
        yield _kernel(f"{ours}.attention.query", f"{layer}.self_attn.q_proj", width, queries)
        yield _kernel(f"{ours}.attention.key", f"{layer}.self_attn.k_proj", width, keys)
        yield _kernel(f"{ours}.attention.value", f"{layer}.self_attn.v_proj", width, keys)
        yield _kernel(f"{ours}.attention.output", f"{layer}.self_attn.o_proj", queries, width)
        if text.post_norms:
            yield _vector(f"{ours}.post_attention_norm.scale", f"{layer}.post_attention_layernorm.weight", width)
        yield _vector(f"{ours}.mlp_norm.scale", f"{layer}.{before_mlp}.weight", width)
        yield _kernel(f"{ours}.mlp.gate", f"{layer}.mlp.gate_proj", width, text.mlp)
        yield _kernel(f"{ours}.mlp.up", f"{layer}.mlp.up_proj", width, text.mlp)
        yield _kernel(f"{ours}.mlp.down", f"{layer}.mlp.down_proj", text.mlp, width)
        if text.post_norms:
            yield _vector(f"{ours}.post_mlp_norm.scale", f"{layer}.post_feedforward_layernorm.weight", width)
    yield _vector("text.norm.scale", f"{hf}.norm.weight", width)
    if not text.tied:
        yield _kernel("text.head", "lm_head", width, text.vocab)


# Two spellings of one layout: on disk before transformers 5, and in its memory since.
_PREFIXES = [
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision_tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\.|^model\.language_model\."), "language_model."),
]


def canonical(hf_name: str) -> str:
    """The name of a tensor as `parameters` spells it, whichever transformers version wrote it."""
    for pattern, prefix in _PREFIXES:
        if pattern.match(hf_name):
            return pattern.sub(prefix, hf_name, count=1)
    return hf_name


def saved_name(name: str) -> str:
    """The spelling that all transformers versions read: the on-disk one of the released checkpoints."""
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1)


# --- nested dicts ------------------------------------------------------------------------------------------


def flatten(tree, prefix="") -> dict:
    """{"a": [{"b": x}]} -> {"a.0.b": x}."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def unflatten(flat: dict):
    """The inverse of `flatten`: levels whose keys are all numbers become lists."""
    if "" in flat:
        return flat[""]
    groups: dict[str, dict] = {}
    for path, value in flat.items():
        head, _, rest = path.partition(".")
        groups.setdefault(head, {})[rest] = value
    tree = {head: unflatten(group) for head, group in groups.items()}
    return [tree[str(i)] for i in range(len(tree))] if all(head.isdigit() for head in tree) else tree


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model: `params` is the nested dict, whose leaves are views of mapped files."""

    path: Path
    config: PaliGemmaConfig
    params: dict
    dtype: np.dtype


def load(path=SHIPPED) -> Checkpoint:
    """Load a Hugging Face PaliGemma directory. Raises PaliGemmaError that names what is wrong."""
    path = Path(path)
    config = load_config(path)
    stored = {}
    for name, array in _read_safetensors(path).items():
        if canonical(name) in stored:
            raise PaliGemmaError(f"{path}: tensor {name} is stored twice, under two spellings of its name")
        stored[canonical(name)] = array
    _drop_tied_head(path, config, stored)
    flat = _match(path, config, stored)
    dtype = _common_dtype(path, stored)
    return Checkpoint(path, config, unflatten(flat), dtype)


def load_config(path) -> PaliGemmaConfig:
    """Read `config.json` of a directory."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise PaliGemmaError(f"{path}: no such checkpoint directory")
    try:
        return from_hf(read_json(file))
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}") from None


def read_json(file: Path):
    """Parse a JSON file; PaliGemmaError if it is absent or not JSON."""
    try:
        return json.loads(Path(file).read_bytes())
    except FileNotFoundError:
        raise PaliGemmaError(f"{Path(file).name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PaliGemmaError(f"{Path(file).name} is not readable JSON ({error})") from None


def _match(path, config, stored) -> dict:
    """Pair what is stored with what the config asks for; every difference is named in one line."""
    wanted = {parameter.hf_name: parameter for parameter in parameters(config)}
    problems = [f"missing {saved_name(name)} {list(wanted[name].hf_shape)}" for name in wanted.keys() - stored.keys()]
    problems += [f"unexpected {name} {list(stored[name].shape)}" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{saved_name(name)} has shape {list(stored[name].shape)}, config.json asks for {list(wanted[name].hf_shape)}"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != wanted[name].hf_shape
    ]
    if problems:
        raise PaliGemmaError(f"{path}: tensors do not match config.json: {'; '.join(sorted(problems))}")
    return {parameter.path: parameter.from_hf(stored[name]) for name, parameter in wanted.items()}


def _drop_tied_head(path, config, stored) -> None:
    """A tied checkpoint may still carry its head. It must then be the embedding table."""
    if not config.text.tied or "lm_head.weight" not in stored:
        return
    head, table = stored["lm_head.weight"], stored.get("language_model.embed_tokens.weight")
    if table is not None:
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


def _common_dtype(path, stored) -> np.dtype:
    """The one dtype of a checkpoint; a tensor of another is named."""
    counts = Counter(array.dtype for array in stored.values())
    common = counts.most_common(1)[0][0]
    odd = sorted(f"{saved_name(name)} is {array.dtype}" for name, array in stored.items() if array.dtype != common)
    if odd:
        raise PaliGemmaError(f"{path}: tensors of a checkpoint share one dtype, here {common}, but {'; '.join(odd)}")
    return common


def _read_safetensors(path: Path) -> dict:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return _map_safetensors(path / "model.safetensors")
    try:
        weight_map = read_json(index).get("weight_map")
    except (PaliGemmaError, AttributeError) as error:
        raise PaliGemmaError(f"{path}: {index.name}: {error}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise PaliGemmaError(f"{index}: no weight_map of tensor name to file")
    tensors: dict = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise PaliGemmaError(f"{index}: shard {file!r} is not a file name of this folder")
        shard = _map_safetensors(path / file)
        listed = {name for name, target in weight_map.items() if target == file}
        if listed != shard.keys():
            names = ", ".join(sorted(listed ^ shard.keys()))
            raise PaliGemmaError(f"{path / file}: shard and index disagree about {names}")
        tensors |= shard
    return tensors


def _map_safetensors(file: Path) -> dict:
    """Map one safetensors file: name -> read-only array, a view of the mapping.

    The library checks the header; the arrays are mapped here because its own would be copies.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise PaliGemmaError(f"{file}: no such file")
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise PaliGemmaError(f"{file}: not a whole safetensors file ({error}); download or copy it again") from None
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
    header.pop("__metadata__", None)
    body = np.memmap(file, np.uint8, "r", offset=8 + header_size) if header else None
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = _dtypes().get(entry["dtype"])
        if dtype is None:
            raise PaliGemmaError(f"{file}: tensor {name} has dtype {entry['dtype']}, not F32, F16, BF16 or F64")
        tensors[name] = body[begin:end].view(dtype).reshape(entry["shape"]).view(np.ndarray)
    return tensors


def _dtypes() -> dict:
    import ml_dtypes

    return {"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


# --- writing -----------------------------------------------------------------------------------------------


def save(path, config: PaliGemmaConfig, params: dict, files: dict[str, bytes] | None = None) -> None:
    """Write a Hugging Face directory: config.json, model.safetensors, and `files` (name -> contents) beside them.

    Raises PaliGemmaError if the folder exists or the tensors are not those of the config.
    """
    from safetensors.numpy import save_file

    flat = flatten(params)
    wanted = {parameter.path: parameter for parameter in parameters(config)}
    differing = sorted(
        path
        for path in wanted.keys() | flat.keys()
        if path not in wanted or path not in flat or tuple(flat[path].shape) != wanted[path].shape
    )
    if differing:
        raise PaliGemmaError(f"parameters do not match the config: {', '.join(differing)}")
    tensors = {
        saved_name(parameter.hf_name): np.ascontiguousarray(parameter.to_hf(flat[path]))
        for path, parameter in wanted.items()
    }
    with new_directory(path) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(to_hf(config), indent=2) + "\n")
        for name, contents in (files or {}).items():
            (folder / name).write_bytes(contents)


@contextmanager
def new_directory(path):
    """Yield a temporary sibling that becomes `path` if all goes well, and vanishes if not.

    Raises PaliGemmaError if `path` exists or cannot be made.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise PaliGemmaError(f"{path}: output folder exists already; remove it or name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise PaliGemmaError(f"{path}: cannot write there ({error.strerror})") from None
    try:
        temporary.chmod(0o755)
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise PaliGemmaError(f"{path}: cannot write there ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
