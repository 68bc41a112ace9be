"""Checkpoints on disk <-> the nested dict of arrays that the model runs on.

Two families are read and written: Hugging Face directories, and big_vision `.npz` files. This is the only file
that knows their names and layouts. In the nested dict a kernel is [in, out]; Hugging Face stores [out, in], big_vision
stacks the layers and keeps the heads apart. Loading maps the files and takes views, so nothing is read before it is
used. Both directions are strict: every missing, unexpected or misshapen tensor is named.

    python -m numpy_ref.checkpoint convert SRC DST      a DST that ends in .npz is written as big_vision's
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .config import VARIANTS, GemmaConfig, PaliGemmaConfig, SiglipConfig, from_hf, to_hf
from .errors import PaliGemmaError
from .storage import map_npz, map_safetensors, new_directory, new_file, read_json, write_npz, write_safetensors

#: The trained model that ships with the package.
SHIPPED = Path(__file__).parent / "shipped"
#: What travels with a checkpoint beside its weights.
COMPANIONS = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip

# --- layouts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a stored array becomes ours, and back: read(stored, our shape), write(ours, stored shape)."""

    read: Callable
    write: Callable


COPY = Layout(lambda stored, shape: stored, lambda ours, shape: ours)
TRANSPOSE = Layout(lambda stored, shape: stored.T, lambda ours, shape: ours.T)
RESHAPE = Layout(lambda stored, shape: stored.reshape(shape), lambda ours, shape: ours.reshape(shape))
#: A patch convolution [D, 3, p, p] is a matrix [3*p*p, D] over flattened patches.
CONVOLUTION = Layout(
    lambda stored, shape: stored.reshape(stored.shape[0], -1).T, lambda ours, shape: ours.T.reshape(shape)
)
#: The same convolution as flax keeps it, [p, p, 3, D].
FLAX_CONVOLUTION = Layout(
    lambda stored, shape: stored.transpose(2, 0, 1, 3).reshape(shape),
    lambda ours, shape: ours.reshape(shape[2], shape[0], shape[1], shape[3]).transpose(1, 2, 0, 3),
)
#: Projections with the heads first, [N, D, H], beside ours [D, N*H].
HEADS_FIRST = Layout(
    lambda stored, shape: stored.transpose(1, 0, 2).reshape(shape),
    lambda ours, shape: ours.reshape(shape[1], shape[0], shape[2]).transpose(1, 0, 2),
)


@dataclass(frozen=True)
class Foreign:
    """A tensor as another project stores it; `index` is its place in an array that stacks several."""

    name: str
    shape: tuple[int, ...]
    layout: Layout = COPY
    index: tuple[int, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One tensor: its path and shape here, in a Hugging Face directory, and in a big_vision npz."""

    path: str
    shape: tuple[int, ...]
    hf: Foreign
    bv: Foreign | None


# --- the table of names ------------------------------------------------------------------------------------


def parameters(config: PaliGemmaConfig) -> list[Parameter]:
    """Every tensor of a model, in the order of the forward pass."""
    return [*_vision_parameters(config), *_text_parameters(config)]


def _vision_parameters(config) -> Iterator[Parameter]:
    vision = config.vision
    width, patch, heads = vision.width, vision.patch_size, vision.heads
    hf, bv = "vision_tower.embeddings", "img/Transformer/encoderblock"
    yield Parameter(
        "vision.patch_embed.kernel", (3 * patch * patch, width),
        Foreign(f"{hf}.patch_embedding.weight", (width, 3, patch, patch), CONVOLUTION),
        Foreign("img/embedding/kernel", (patch, patch, 3, width), FLAX_CONVOLUTION),
    )  # fmt: skip
    yield _same("vision.patch_embed.bias", (width,), f"{hf}.patch_embedding.bias", "img/embedding/bias")
    table = (vision.patches, width)
    yield Parameter(
        "vision.position_embedding", table, Foreign(f"{hf}.position_embedding.weight", table),
        Foreign("img/pos_embedding", (1, *table), RESHAPE),
    )  # fmt: skip
    for i in range(vision.depth):
        ours, layer = f"vision.blocks.{i}", f"vision_tower.encoder.layers.{i}"
        attention = f"{bv}/MultiHeadDotProductAttention_0"
        yield from _layer_norm(f"{ours}.attention_norm", width, f"{layer}.layer_norm1", f"{bv}/LayerNorm_0", i)
        for name, foreign in [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")]:
            apart = (heads, width // heads)
            yield _kernel(f"{ours}.attention.{name}", width, width, f"{layer}.self_attn.{foreign}",
                          Foreign(f"{attention}/{name}/kernel", (width, *apart), RESHAPE, (i,)))  # fmt: skip
            yield Parameter(
                f"{ours}.attention.{name}.bias", (width,), Foreign(f"{layer}.self_attn.{foreign}.bias", (width,)),
                Foreign(f"{attention}/{name}/bias", apart, RESHAPE, (i,)),
            )  # fmt: skip
        yield _kernel(f"{ours}.attention.output", width, width, f"{layer}.self_attn.out_proj",
                      Foreign(f"{attention}/out/kernel", (*apart, width), RESHAPE, (i,)))  # fmt: skip
        yield _same(f"{ours}.attention.output.bias", (width,), f"{layer}.self_attn.out_proj.bias",
                    f"{attention}/out/bias", i)  # fmt: skip
        yield from _layer_norm(f"{ours}.mlp_norm", width, f"{layer}.layer_norm2", f"{bv}/LayerNorm_1", i)
        yield from _dense(f"{ours}.mlp.up", width, vision.mlp, f"{layer}.mlp.fc1", f"{bv}/MlpBlock_0/Dense_0", i)
        yield from _dense(f"{ours}.mlp.down", vision.mlp, width, f"{layer}.mlp.fc2", f"{bv}/MlpBlock_0/Dense_1", i)
    yield from _layer_norm("vision.norm", width, "vision_tower.post_layernorm", "img/Transformer/encoder_norm")
    yield from _dense("projector", width, config.text.width, "multi_modal_projector.linear", "img/head")


def _text_parameters(config) -> Iterator[Parameter]:
    text = config.text
    width, heads, kv_heads, head_dim = text.width, text.heads, text.kv_heads, text.head_dim
    hf, bv = "language_model", "llm/layers"
    yield _same("text.embedding", (text.vocab, width), f"{hf}.embed_tokens.weight", "llm/embedder/input_embedding")
    for i in range(text.depth):
        ours, layer = f"text.blocks.{i}", f"{hf}.layers.{i}"
        # "post_attention_layernorm" is the norm BEFORE the MLP in Gemma 1 and the one AFTER attention in Gemma 2.
        before_mlp = "pre_feedforward_layernorm" if text.post_norms else "post_attention_layernorm"

        def norm(name, hf_name, bv_name, ours=ours, layer=layer, i=i):
            return _same(f"{ours}.{name}.scale", (width,), f"{layer}.{hf_name}.weight", f"{bv}/{bv_name}/scale", i)

        yield norm("attention_norm", "input_layernorm", "pre_attention_norm")
        yield _kernel(f"{ours}.attention.query", width, heads * head_dim, f"{layer}.self_attn.q_proj",
                      Foreign(f"{bv}/attn/q_einsum/w", (heads, width, head_dim), HEADS_FIRST, (i,)))  # fmt: skip
        for pair, (name, foreign) in enumerate([("key", "k_proj"), ("value", "v_proj")]):
            stacked = Foreign(f"{bv}/attn/kv_einsum/w", (kv_heads, width, head_dim), HEADS_FIRST, (i, pair))
            path, hf_name = f"{ours}.attention.{name}", f"{layer}.self_attn.{foreign}"
            yield _kernel(path, width, kv_heads * head_dim, hf_name, stacked)
        yield _kernel(f"{ours}.attention.output", heads * head_dim, width, f"{layer}.self_attn.o_proj",
                      Foreign(f"{bv}/attn/attn_vec_einsum/w", (heads, head_dim, width), RESHAPE, (i,)))  # fmt: skip
        if text.post_norms:
            yield norm("post_attention_norm", "post_attention_layernorm", "post_attention_norm")
        yield norm("mlp_norm", before_mlp, "pre_ffw_norm")
        for pair, (name, foreign) in enumerate([("gate", "gate_proj"), ("up", "up_proj")]):
            yield _kernel(f"{ours}.mlp.{name}", width, text.mlp, f"{layer}.mlp.{foreign}",
                          Foreign(f"{bv}/mlp/gating_einsum", (width, text.mlp), COPY, (i, pair)))  # fmt: skip
        yield _kernel(f"{ours}.mlp.down", text.mlp, width, f"{layer}.mlp.down_proj",
                      Foreign(f"{bv}/mlp/linear", (text.mlp, width), COPY, (i,)))  # fmt: skip
        if text.post_norms:
            yield norm("post_mlp_norm", "post_feedforward_layernorm", "post_ffw_norm")
    yield _same("text.norm.scale", (width,), f"{hf}.norm.weight", "llm/final_norm/scale")
    if not text.tied:  # big_vision has no such models
        yield _kernel("text.head", width, text.vocab, "lm_head", None)


def _same(path, shape, hf_name, bv_name, layer=None) -> Parameter:
    """A tensor that is stored as it is."""
    index = () if layer is None else (layer,)
    return Parameter(path, shape, Foreign(hf_name, shape), Foreign(bv_name, shape, COPY, index))


def _kernel(path, inputs, outputs, hf_name, bv) -> Parameter:
    hf = Foreign(f"{hf_name}.weight", (outputs, inputs), TRANSPOSE)
    return Parameter(f"{path}.kernel", (inputs, outputs), hf, bv)


def _dense(path, inputs, outputs, hf_name, bv_name, layer=None):
    index = () if layer is None else (layer,)
    yield _kernel(path, inputs, outputs, hf_name, Foreign(f"{bv_name}/kernel", (inputs, outputs), COPY, index))
    yield _same(f"{path}.bias", (outputs,), f"{hf_name}.bias", f"{bv_name}/bias", layer)


def _layer_norm(path, width, hf_name, bv_name, layer=None):
    yield _same(f"{path}.scale", (width,), f"{hf_name}.weight", f"{bv_name}/scale", layer)
    yield _same(f"{path}.bias", (width,), f"{hf_name}.bias", f"{bv_name}/bias", layer)


# Two spellings of one layout: on disk before transformers 5, and in its memory since.
_PREFIXES = [
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "vision_tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\.|^model\.language_model\."), "language_model."),
]


def canonical(hf_name: str) -> str:
    """The name of a tensor as the table spells it, whichever transformers version wrote it."""
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
    """A loaded model: `params` is the nested dict, whose leaves are views of mapped files.

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


def load(path=SHIPPED) -> Checkpoint:
    """Load a Hugging Face PaliGemma directory or a big_vision .npz file.

    Raises PaliGemmaError that names what is wrong.
    """
    path = Path(path)
    return _load_npz(path) if path.suffix == ".npz" else _load_directory(path)


def load_config(path) -> PaliGemmaConfig:
    """Read `config.json` of a directory."""
    if not Path(path).is_dir():
        raise PaliGemmaError(f"{path}: no such checkpoint directory")
    try:
        return from_hf(read_json(Path(path) / "config.json"))
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}") from None


def _load_directory(path) -> Checkpoint:
    config = load_config(path)
    stored = {}
    for name, array in map_safetensors(path).items():
        if canonical(name) in stored:
            raise PaliGemmaError(f"{path}: tensor {name} is stored twice, under two spellings of its name")
        stored[canonical(name)] = array
    _drop_tied_head(path, config, stored)
    wanted = {parameter.hf.name: parameter.hf.shape for parameter in parameters(config)}
    _compare(path, wanted, stored, "config.json asks for", saved_name)
    dtype = _common_dtype(path, stored, saved_name)
    flat = {p.path: p.hf.layout.read(stored[p.hf.name], p.shape) for p in parameters(config)}
    return Checkpoint(path, config, unflatten(flat), dtype, load_resize(path))


def _load_npz(path) -> Checkpoint:
    if not path.is_file():
        raise PaliGemmaError(f"{path}: no such checkpoint file")
    stored = {name.removeprefix("params/"): array for name, array in map_npz(path).items()}
    config = _config_of_npz(path, stored)
    _compare(path, _npz_shapes(config), stored, "the other tensors ask for")
    dtype = _common_dtype(path, stored)
    flat = {p.path: p.bv.layout.read(stored[p.bv.name][p.bv.index], p.shape) for p in parameters(config)}
    return Checkpoint(path, config, unflatten(flat), dtype, "bilinear")


def load_resize(path) -> str:
    """The preprocessing that a directory's `preprocessor_config.json` selects; bicubic without one."""
    from .image import resize_from_hf

    file = Path(path) / "preprocessor_config.json"
    if not file.exists():
        return "bicubic"
    try:
        return resize_from_hf(read_json(file))
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{path}: {error}") from None


def _config_of_npz(path, stored) -> PaliGemmaConfig:
    """What the shapes of a big_vision file say; what they do not say is as in big_vision's own configs.

    That is: no final softcap and no sliding window even for Gemma 2, which transformers has (its README calls the
    former "better for transfer"); the image token is the first id past the table, since big_vision has none.
    """

    def shape(name, rank):
        array = stored.get(name)
        if array is None or array.ndim != rank or 0 in array.shape:
            found = "missing" if array is None else f"of shape {list(array.shape)}"
            raise PaliGemmaError(f"{path}: not a big_vision PaliGemma: {name} is {found}")
        return array.shape

    patch, _, _, vision_width = shape("img/embedding/kernel", 4)
    block = "img/Transformer/encoderblock"
    depth, _, vision_heads, _ = shape(f"{block}/MultiHeadDotProductAttention_0/query/kernel", 4)
    side = round(shape("img/pos_embedding", 3)[1] ** 0.5)
    vision = SiglipConfig(
        image_size=side * patch, patch_size=patch, width=vision_width, depth=depth,
        mlp=shape(f"{block}/MlpBlock_0/Dense_0/kernel", 3)[2], heads=vision_heads,
    )  # fmt: skip
    vocab, width = shape("llm/embedder/input_embedding", 2)
    depth, heads, _, head_dim = shape("llm/layers/attn/q_einsum/w", 4)
    text = GemmaConfig(
        vocab=vocab, width=width, depth=depth, mlp=shape("llm/layers/mlp/linear", 3)[1], heads=heads,
        kv_heads=shape("llm/layers/attn/kv_einsum/w", 5)[2], head_dim=head_dim, query_scalar=float(head_dim),
    )  # fmt: skip
    if stored.keys() & {"llm/layers/post_attention_norm/scale", "llm/layers/post_ffw_norm/scale"}:  # Gemma 2
        released = VARIANTS["paligemma2-28b-224"].text
        is_28b = (width, heads, head_dim) == (released.width, released.heads, released.head_dim)
        scalar = released.query_scalar if is_28b else float(head_dim)
        text = replace(text, post_norms=True, attn_softcap=50.0, query_scalar=scalar)
    return PaliGemmaConfig(vision=vision, text=text, image_token=vocab)


def _npz_shapes(config) -> dict[str, tuple[int, ...]]:
    """The shape of each stacked array of a big_vision file."""
    shapes = {}
    for parameter in parameters(config):
        last = shapes.get(parameter.bv.name, ())[: len(parameter.bv.index)]
        counts = tuple(max(n, i + 1) for n, i in zip(last or parameter.bv.index, parameter.bv.index, strict=True))
        shapes[parameter.bv.name] = (*counts, *parameter.bv.shape)
    return shapes


def _compare(path, wanted, stored, source, spell=str) -> None:
    """Every difference between the shapes wanted and the arrays stored, in one line."""
    problems = [f"missing {spell(name)} {list(wanted[name])}" for name in wanted.keys() - stored.keys()]
    problems += [f"unexpected {name} {list(stored[name].shape)}" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{spell(name)} has shape {list(stored[name].shape)}, {source} {list(wanted[name])}"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != wanted[name]
    ]
    if problems:
        raise PaliGemmaError(f"{path}: the tensors are not those of the model: {'; '.join(sorted(problems))}")


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


def _common_dtype(path, stored, spell=str) -> np.dtype:
    """The one dtype of a checkpoint; a tensor of another is named."""
    from .storage import dtypes

    counts = Counter(array.dtype for array in stored.values())
    common = counts.most_common(1)[0][0]
    odd = sorted(f"{spell(name)} is {array.dtype}" for name, array in stored.items() if array.dtype != common)
    if odd:
        raise PaliGemmaError(f"{path}: tensors of a checkpoint share one dtype, here {common}, but {'; '.join(odd)}")
    if common not in dtypes().values():
        raise PaliGemmaError(f"{path}: tensors are {common}; float64, float32, float16 and bfloat16 are known")
    return common


# --- writing -----------------------------------------------------------------------------------------------


def save(path, config: PaliGemmaConfig, params: dict, files: dict[str, bytes] | None = None, progress=None) -> None:
    """Write a Hugging Face directory: config.json, safetensors, and `files` (name -> contents) beside them.

    Raises PaliGemmaError if the folder exists or the tensors are not those of the config.
    """
    flat = _checked(config, params)
    tensors = {saved_name(p.hf.name): p.hf.layout.write(flat[p.path], p.hf.shape) for p in parameters(config)}
    with new_directory(path) as folder:
        write_safetensors(folder, tensors, *filter(None, [progress]))
        (folder / "config.json").write_text(json.dumps(to_hf(config), indent=2) + "\n")
        for name, contents in (files or {}).items():
            (folder / name).write_bytes(contents)


def save_npz(path, config: PaliGemmaConfig, params: dict, progress=None) -> None:
    """Write a big_vision file. The rows from the image token on, which big_vision does not have, are left out.

    Raises PaliGemmaError if the file exists or the model has a head of its own.
    """
    if not config.text.tied:
        raise PaliGemmaError(f"{path}: a big_vision file has no untied head")
    flat = _checked(config, params)
    rows = min(config.text.vocab, config.image_token)
    config = replace(config, text=replace(config.text, vocab=rows))
    flat["text.embedding"] = flat["text.embedding"][:rows]
    arrays: dict[str, np.ndarray | list] = {}
    for p in parameters(config):
        piece = p.bv.layout.write(flat[p.path], p.bv.shape)
        if p.bv.index:
            _nest(arrays.setdefault(p.bv.name, []), p.bv.index, piece)
        else:
            arrays[p.bv.name] = piece
    with new_file(path) as file:
        write_npz(file, arrays, *filter(None, [progress]))


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


def convert(source, target, tokenizer=None) -> None:
    """Between the two families, tensor by tensor; a target that ends in .npz is big_vision's.

    Files that travel with a Hugging Face checkpoint are copied; `tokenizer` is a tokenizer.model for an npz.
    """
    from tqdm import tqdm

    checkpoint, target = load(source), Path(target)
    total = sum(array.nbytes for array in flatten(checkpoint.params).values())
    with tqdm(total=total, desc=target.name, unit="B", unit_scale=True, leave=False, disable=None, delay=1) as bar:
        if target.suffix == ".npz":
            save_npz(target, checkpoint.config, checkpoint.params, bar.update)
            return
        files = {name: (checkpoint.path / name).read_bytes() for name in _companions(checkpoint.path)}
        if checkpoint.path.suffix == ".npz":
            files |= _files_for_npz(checkpoint, tokenizer)
        save(target, checkpoint.config, checkpoint.params, files, bar.update)


def _companions(path) -> list[str]:
    return [name for name in COMPANIONS if (path / name).is_file()]


def _files_for_npz(checkpoint, tokenizer) -> dict[str, bytes]:
    from .image import resize_to_hf

    picture = resize_to_hf(checkpoint.resize, checkpoint.config.vision)
    files = {"preprocessor_config.json": (json.dumps(picture, indent=1) + "\n").encode()}
    beside = checkpoint.folder / "tokenizer.model"
    source = Path(tokenizer) if tokenizer else beside if beside.is_file() else None
    if source:
        try:
            files["tokenizer.model"] = source.read_bytes()
        except OSError as error:
            raise PaliGemmaError(f"{source}: cannot read the tokenizer ({error.strerror})") from None
    return files


def main(argv=None):
    import argparse

    options = argparse.ArgumentParser(prog="python -m numpy_ref.checkpoint", allow_abbrev=False)
    command = options.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "convert", help="Hugging Face directory <-> big_vision .npz"
    )
    command.add_argument("source", metavar="SRC", help="a Hugging Face directory or a .npz")
    command.add_argument("target", metavar="DST", help="a new directory, or a new file that ends in .npz")
    command.add_argument("--tokenizer", metavar="FILE", help="the tokenizer.model that goes with a .npz")
    arguments = options.parse_args(argv)
    convert(arguments.source, arguments.target, arguments.tokenizer)
    print(f"wrote {arguments.target}")
    return 0


if __name__ == "__main__":
    import sys

    from .cli import run

    sys.exit(run("python -m numpy_ref.checkpoint", main))
