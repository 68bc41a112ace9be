"""The names and layouts of other projects' tensors: the only file that knows them.

One line a tensor says its path and shape here, in a Hugging Face directory, and in a big_vision npz. Here a kernel
is [in, out]; Hugging Face stores [out, in], big_vision stacks the layers and keeps the heads apart.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import VARIANTS, GemmaConfig, PaliGemmaConfig, SiglipConfig
from ..errors import PaliGemmaError

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
    in_npz: Foreign | None  # None for what big_vision does not have: an untied head

    @property
    def bv(self) -> Foreign:
        """`in_npz`. Raises PaliGemmaError where there is none."""
        if self.in_npz is None:
            raise PaliGemmaError(f"a big_vision file has no {self.path}")
        return self.in_npz


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


def pooling_head(vision: SiglipConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of SigLIP's pooling head in a Hugging Face directory, under the table's spelling.

    transformers makes and saves one wherever `vision_use_head` is not false, although PaliGemma never calls it.
    """
    width, mlp, head = vision.width, vision.mlp, "vision_tower.head"
    shapes = {"attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,)}
    for name, rows, columns in [("attention.out_proj", width, width), ("mlp.fc1", mlp, width), ("mlp.fc2", width, mlp)]:
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    shapes |= {"probe": (1, 1, width), "layernorm.weight": (width,), "layernorm.bias": (width,)}
    return {f"{head}.{name}": shape for name, shape in shapes.items()}


# Where every head has a key of its own, big_vision keeps the three projections in one array [L, 3, N, D, H].
QUERY, KEY_VALUE, FUSED = (f"llm/layers/attn/{name}_einsum/w" for name in ("q", "kv", "qkv"))

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


# What training tools put in front of every name: peft, DistributedDataParallel, torch.compile.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")


def unwrapped(tensors: dict) -> tuple[dict, str]:
    """Tensors without the prefixes of wrappers that all of their names share, and those prefixes in a row."""
    taken = ""
    while wrapper := next((w for w in _WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), None):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
        taken += wrapper
    return tensors, taken


def saved_name(name: str) -> str:
    """The spelling that all transformers versions read: the on-disk one of the released checkpoints."""
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("language_model.", "language_model.model.", 1)


def module_name(hf_name: str) -> str:
    """The dotted name of a kernel's module in transformers' model (5.0 or later), which adapters go by."""
    module = hf_name.removesuffix(".weight")
    return module if module.startswith("lm_head") else f"model.{module}"


# --- big_vision's shapes ---------------------------------------------------------------------------------


# A config whose sizes are all different, so that its shapes tell which size each axis of each array is.
_MARKS = PaliGemmaConfig(
    vision=SiglipConfig(image_size=45, patch_size=5, width=77, depth=13, mlp=17, heads=7),
    text=GemmaConfig(vocab=19, width=23, depth=29, mlp=31, heads=37, kv_heads=41, head_dim=43, post_norms=True),
)
_SIZES = {
    5: "patch size", 81: "patches", 77: "vision width", 13: "vision depth", 17: "vision mlp", 7: "vision heads",
    11: "vision head_dim", 19: "vocabulary", 23: "width", 29: "depth", 31: "mlp", 37: "heads", 41: "kv_heads",
    43: "head_dim",
}  # fmt: skip


def config_of_npz(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> PaliGemmaConfig:
    """What the shapes of a big_vision file say; what they do not say is as in big_vision's own configs.

    That is: no final softcap and no sliding window even for Gemma 2, which transformers has (its README calls the
    former "better for transfer"); the image token is the first id past the table, since big_vision has none.
    """
    size = _sizes_of_npz(path, shapes)
    vision = SiglipConfig(
        image_size=round(size["patches"] ** 0.5) * size["patch size"], patch_size=size["patch size"],
        width=size["vision width"], depth=size["vision depth"], mlp=size["vision mlp"], heads=size["vision heads"],
    )  # fmt: skip
    text = GemmaConfig(
        vocab=size["vocabulary"], width=size["width"], depth=size["depth"], mlp=size["mlp"], heads=size["heads"],
        kv_heads=size["kv_heads"], head_dim=size["head_dim"], query_scalar=float(size["head_dim"]),
    )  # fmt: skip
    if shapes.keys() & {"llm/layers/post_attention_norm/scale", "llm/layers/post_ffw_norm/scale"}:  # Gemma 2
        released = VARIANTS["paligemma2-28b-224"].text
        is_28b = (text.width, text.heads, text.head_dim) == (released.width, released.heads, released.head_dim)
        scalar = released.query_scalar if is_28b else text.query_scalar
        text = replace(text, post_norms=True, attn_softcap=50.0, query_scalar=scalar)
    return PaliGemmaConfig(vision=vision, text=text, image_token=text.vocab)


def _sizes_of_npz(path, shapes) -> dict[str, int]:
    """Each size as most arrays have it, so that one array of a wrong shape is the one that is named."""
    witnesses: dict[str, list] = {size: [] for size in _SIZES.values()}
    votes: dict[str, dict] = {size: {} for size in _SIZES.values()}
    for name, marks in npz_shapes(_MARKS).items():
        found = shapes.get(name, ())
        for axis, mark in enumerate(marks):
            if mark in _SIZES:
                witnesses[_SIZES[mark]].append(name)
                if len(found) == len(marks) and found[axis] > 0:
                    votes[_SIZES[mark]].setdefault(found[axis], []).append(name)
    for size, ballot in votes.items():
        counts = sorted((len(names) for names in ballot.values()), reverse=True)
        if not ballot or counts[:1] == counts[1:2]:
            found = ", ".join(f"{name} {list(shapes.get(name, []))}" for name in dict.fromkeys(witnesses[size]))
            raise PaliGemmaError(f"{path}: not a big_vision PaliGemma: no {size} is to be had from {found}")
    return {size: max(ballot.items(), key=lambda each: len(each[1]))[0] for size, ballot in votes.items()}


def npz_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each stacked array of a big_vision file."""
    shapes = {}
    for parameter in parameters(config):
        last = shapes.get(parameter.bv.name, ())[: len(parameter.bv.index)]
        counts = tuple(max(n, i + 1) for n, i in zip(last or parameter.bv.index, parameter.bv.index, strict=True))
        shapes[parameter.bv.name] = (*counts, *parameter.bv.shape)
    return shapes


def split_fused(path: str | Path, stored: dict[str, np.ndarray]) -> None:
    """Replace the one array of projections by views under the names that other models have."""
    if (fused := stored.pop(FUSED, None)) is None:
        return
    # Two witnesses of the width: if one of them is wrong, comparing all shapes will name it.
    witnesses = [
        stored[name].shape[-1:] for name in ("llm/final_norm/scale", "llm/embedder/input_embedding") if name in stored
    ]
    if fused.ndim != 5 or fused.shape[1] != 3 or (witnesses and fused.shape[3:4] not in witnesses):
        raise PaliGemmaError(f"{path}: {FUSED} has shape {list(fused.shape)}, not [layers, 3, heads, width, head_dim]")
    for name in (QUERY, KEY_VALUE):
        if name in stored:
            raise PaliGemmaError(f"{path}: both {FUSED} and {name} are stored")
    stored[QUERY], stored[KEY_VALUE] = fused[:, 0], fused[:, 1:]
