"""Configurations as frozen data, and their translation from and to Hugging Face `config.json`.

Nothing in the model branches on a variant's name: PaliGemma 1 and 2 differ in these fields alone.
Sources: big_vision `models/ppp/gemma.py` and `models/vit.py`; transformers `configuration_*.py`.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import PaliGemmaError, quote


@dataclass(frozen=True)
class SiglipConfig:
    """The vision tower (SigLIP So400m/14 by default)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp: int = 4304
    heads: int = 16
    eps: float = 1e-6

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class GemmaConfig:
    """The decoder (Gemma 2B by default; the fields from `query_scalar` on are Gemma 2's)."""

    vocab: int = 257216  # rows of the embedding table
    width: int = 2048
    depth: int = 18
    mlp: int = 16384
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    rope_base: float = 10000.0
    eps: float = 1e-6
    tied: bool = True  # the head is the embedding table
    query_scalar: float = 256.0  # queries are scaled by query_scalar ** -0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None
    post_norms: bool = False
    windows: tuple[int | None, ...] = ()  # one sliding window a layer, None for full attention

    @property
    def query_scale(self) -> float:
        return 1 / math.sqrt(self.query_scalar)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True)
class PaliGemmaConfig:
    """Both towers, the ids of the control tokens, and the longest sequence the decoder knows."""

    vision: SiglipConfig = SiglipConfig()
    text: GemmaConfig = GemmaConfig()
    image_token: int = 257152
    pad: int = 0
    eos: int = 1
    bos: int = 2
    max_length: int = 8192


def alternating_windows(depth: int, window: int | None) -> tuple[int | None, ...]:
    """Gemma 2 slides its window on layers 0, 2, 4 …; () when there is no window."""
    return tuple(window if layer % 2 == 0 else None for layer in range(depth)) if window else ()


def _gemma2(width, depth, mlp, heads, kv_heads, head_dim, query_scalar) -> GemmaConfig:
    return GemmaConfig(
        width=width, depth=depth, mlp=mlp, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        query_scalar=query_scalar, attn_softcap=50.0, final_softcap=30.0, post_norms=True,
        windows=alternating_windows(depth, 4096),
    )  # fmt: skip


_DECODERS = {
    "paligemma-3b": GemmaConfig(),
    "paligemma2-3b": _gemma2(2304, 26, 9216, 8, 4, 256, 256.0),
    "paligemma2-10b": _gemma2(3584, 42, 14336, 16, 8, 256, 256.0),
    "paligemma2-28b": _gemma2(4608, 46, 36864, 32, 16, 128, 4608 / 32),
}

#: The released models by name, "paligemma-3b-224" … "paligemma2-28b-896".
VARIANTS = {
    f"{name}-{size}": PaliGemmaConfig(vision=SiglipConfig(image_size=size), text=decoder)
    for name, decoder in _DECODERS.items()
    for size in (224, 448, 896)
}

# What transformers assumes of a field that config.json leaves out: of a sub-config that is present
# (the class defaults), and of one that is absent altogether (PaliGemma's own defaults).
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
_VISION_ABSENT = {
    "hidden_size": 1152, "intermediate_size": 4096, "num_hidden_layers": 27, "num_attention_heads": 16,
    "patch_size": 14,
}  # fmt: skip
_TEXT_ABSENT = {
    "model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384,
    "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257152,
}  # fmt: skip
_TEXT_DEFAULTS = {
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 8192, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
}  # fmt: skip
# "gelu" in a Gemma 1 config is a legacy spelling of the tanh form (transformers #29402).
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
#: Conversions to Hugging Face put at most this many rows behind the vocabulary: the image token, then noise.
PADDING = 64
_MOST_LAYERS = 1000  # the largest release has 46; a damaged number must not be worked through layer by layer


def from_hf(hf: Mapping) -> PaliGemmaConfig:
    """Translate the contents of a Hugging Face `config.json`.

    Raises PaliGemmaError for anything whose mathematics this project does not have.
    """
    _require(isinstance(hf, Mapping), "it is not a JSON object")
    _require(hf.get("model_type") == "paligemma", f"model_type is {quote(hf.get('model_type'))}, not 'paligemma'")
    vision = {**_VISION_DEFAULTS, **_section(hf, "vision_config", _VISION_ABSENT)}
    text = _section(hf, "text_config", _TEXT_ABSENT)
    kind = text.get("model_type", "gemma")
    _require(kind in list(_TEXT_DEFAULTS), f"text_config.model_type is {quote(kind)}; gemma and gemma2 are known")
    text = {**_TEXT_DEFAULTS[kind], **text}
    # The sub-config's own flag counts only where the top level is silent.
    tied = hf.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    _require(isinstance(tied, bool), f"tie_word_embeddings is {quote(tied)}, not true or false")
    config = PaliGemmaConfig(
        vision=_vision_from_hf(vision),
        text=_text_from_hf(text, kind, tied),
        image_token=_image_token(hf),
        pad=_token_id(hf, text, "pad_token_id", 0),
        eos=_token_id(hf, text, "eos_token_id", 1),
        bos=_token_id(hf, text, "bos_token_id", 2),
        max_length=_integer(text, "max_position_embeddings"),
    )
    check(config)
    return config


def _vision_from_hf(vision: Mapping) -> SiglipConfig:
    activation = vision["hidden_act"]
    _require(
        activation in _GELU_TANH, f"vision_config.hidden_act is {quote(activation)}; only gelu_pytorch_tanh is known"
    )
    _require(vision["num_channels"] == 3, f"vision_config.num_channels is {quote(vision['num_channels'])}, not 3")
    return SiglipConfig(
        image_size=_integer(vision, "image_size"),
        patch_size=_integer(vision, "patch_size"),
        width=_integer(vision, "hidden_size"),
        depth=_integer(vision, "num_hidden_layers", most=_MOST_LAYERS),
        mlp=_integer(vision, "intermediate_size"),
        heads=_integer(vision, "num_attention_heads"),
        eps=_number(vision, "layer_norm_eps"),
    )


def _text_from_hf(text: Mapping, kind: str, tied: bool) -> GemmaConfig:
    # The field that transformers reads, for either kind.
    key = "hidden_act" if kind == "gemma" else "hidden_activation"
    activation = text.get(key) or "gelu_pytorch_tanh"
    _require(
        activation in _GELU_TANH or (activation == "gelu" and kind == "gemma"),
        f"text_config.{key} is {quote(activation)}; only gelu_pytorch_tanh is known",
    )
    _require(not text.get("attention_bias"), "text_config.attention_bias is true; Gemma has no attention bias")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    _require(isinstance(rope, Mapping), f"text_config.rope_parameters is {quote(rope)}, not an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require(rope_type == "default", f"text_config rope type is {quote(rope_type)}; only 'default' is known")
    depth, head_dim = _integer(text, "num_hidden_layers", most=_MOST_LAYERS), _integer(text, "head_dim")
    config = GemmaConfig(
        vocab=_integer(text, "vocab_size"),
        width=_integer(text, "hidden_size"),  # never the top-level hidden_size, which is wrong for PaliGemma 2
        depth=depth,
        mlp=_integer(text, "intermediate_size"),
        heads=_integer(text, "num_attention_heads"),
        kv_heads=_integer(text, "num_key_value_heads"),
        head_dim=head_dim,
        rope_base=_number({"rope_theta": 10000.0, **text, **rope}, "rope_theta"),
        eps=_number(text, "rms_norm_eps"),
        tied=tied,
        query_scalar=float(head_dim),
    )
    if kind == "gemma":
        return config
    return replace(
        config,
        query_scalar=_number(text, "query_pre_attn_scalar"),
        attn_softcap=_softcap(text, "attn_logit_softcapping"),
        final_softcap=_softcap(text, "final_logit_softcapping"),
        post_norms=True,
        windows=_windows_from_hf(text, depth),
    )


def _windows_from_hf(text: Mapping, depth: int) -> tuple[int | None, ...]:
    if not text.get("sliding_window"):
        return ()
    window, kinds = _integer(text, "sliding_window"), text.get("layer_types")
    if kinds is None:
        return alternating_windows(depth, window)
    meanings = {"sliding_attention": window, "full_attention": None}
    known = isinstance(kinds, list) and len(kinds) == depth and all(kind in list(meanings) for kind in kinds)
    _require(known, f"text_config.layer_types must name sliding_attention or full_attention for each of {depth} layers")
    return tuple(meanings[kind] for kind in kinds)


def to_hf(config: PaliGemmaConfig) -> dict:
    """The inverse of `from_hf`: a `config.json` that transformers loads as the same model."""
    vision, text = config.vision, config.text
    hf_text = {
        "model_type": "gemma2" if text.post_norms else "gemma",
        "vocab_size": text.vocab,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "rms_norm_eps": text.eps,
        "rope_theta": text.rope_base,
        "max_position_embeddings": config.max_length,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "num_image_tokens": vision.patches,
        "tie_word_embeddings": text.tied,
        "pad_token_id": config.pad,
        "eos_token_id": config.eos,
        "bos_token_id": config.bos,
    }
    if text.post_norms:
        scalar = text.query_scalar
        window = next((window for window in text.windows if window), None)
        hf_text |= {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": text.attn_softcap,
            "final_logit_softcapping": text.final_softcap,
            "sliding_window": window,
            "layer_types": [
                "sliding_attention" if text.window(layer) else "full_attention" for layer in range(text.depth)
            ],
        }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": config.image_token,
        "pad_token_id": config.pad,
        "eos_token_id": config.eos,
        "bos_token_id": config.bos,
        "hidden_size": text.width,
        "projection_dim": text.width,
        "tie_word_embeddings": text.tied,
        "text_config": hf_text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "intermediate_size": vision.mlp,
            "num_attention_heads": vision.heads,
            "num_image_tokens": vision.patches,
            "num_channels": 3,
            "layer_norm_eps": vision.eps,
            "hidden_act": "gelu_pytorch_tanh",
            "projection_dim": text.width,
            "vision_use_head": False,
        },
    }


def check(config: PaliGemmaConfig, source="config.json") -> None:
    """Raise PaliGemmaError, naming the source, if the sizes cannot belong together."""
    vision, text = config.vision, config.text
    table = [
        (vision.image_size >= vision.patch_size, "the image size is smaller than the patch size"),
        (vision.width % vision.heads == 0, f"{vision.heads} vision heads do not divide the width {vision.width}"),
        (text.heads % text.kv_heads == 0, f"{text.kv_heads} key/value heads do not divide {text.heads} heads"),
        (text.head_dim % 2 == 0, f"head_dim {text.head_dim} is odd; the rotary embedding needs pairs"),
        (
            vision.patches < config.max_length,
            f"the {vision.patches} patches of a picture do not fit into {config.max_length} positions",
        ),
        (max(config.bos, config.pad) < text.vocab, f"bos or pad lies past the {text.vocab} embeddings"),
    ]
    for holds, problem in table:
        _require(holds, problem, source)


def _require(holds: bool, problem: str, source="config.json") -> None:
    if not holds:
        raise PaliGemmaError(f"{source}: {problem}")


def _section(hf: Mapping, key: str, absent: Mapping) -> Mapping:
    section = absent if hf.get(key) is None else hf[key]
    _require(isinstance(section, Mapping), f"{key} is {quote(section)}, not an object")
    return section


def _integer(section: Mapping, key: str, most: int = 2**31 - 1) -> int:
    value = section.get(key)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
    _require(is_count, f"{key} must be a whole number from 1 to {most}, not {quote(value)}")
    return value


def _image_token(hf: Mapping) -> int:
    names = ("image_token_index", "image_token_id")  # the second is transformers' newer spelling
    return _id("image_token_index", next((hf[name] for name in names if hf.get(name) is not None), 256000))


def _token_id(hf: Mapping, text: Mapping, key: str, default: int) -> int:
    value = hf.get(key) if hf.get(key) is not None else text.get(key)
    if isinstance(value, list):
        _require(len(value) == 1, f"{key} is {quote(value)}; one such token is known, not several")
        value = value[0]
    value = default if value is None else value
    if key == "pad_token_id" and value == -1:  # "none": what fills the places that nobody reads does not matter
        value = default
    return _id(key, value)


def _id(key: str, value: object) -> int:
    is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    _require(is_id, f"{key} must be a token id, not {quote(value)}")
    return value


def _number(section: Mapping, key: str) -> float:
    value = section.get(key)
    _require(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max,
        f"{key} must be a positive number, not {quote(value)}",
    )
    return float(value)


def _softcap(section: Mapping, key: str) -> float | None:
    return _number(section, key) if section.get(key) else None  # big_vision writes 0 for "none"
