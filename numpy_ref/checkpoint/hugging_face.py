"""Hugging Face's configuration files <-> this project's: `config.json`, and the two for generation and pictures.

Their names and defaults are known here alone; the names of tensors are in layouts.py.
Source: transformers `configuration_paligemma.py`, `configuration_gemma.py`, `configuration_gemma2.py`,
`configuration_siglip.py` and `image_processing_siglip.py`.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace

from ..config import GemmaConfig, PaliGemmaConfig, SiglipConfig, alternating_windows, check
from ..errors import PaliGemmaError, quote

GENERATION = "generation_config.json"
#: Its fields that are read, or change no greedy answer: how the work is done, and what is returned besides.
_GENERATION_READ = {
    "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "compile_config", "disable_compile", "low_memory",
    "continuous_batching_config", "prefill_chunk_size", "use_mtp", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "max_length", "early_stopping", "length_penalty",
}  # fmt: skip
#: Values of the others that ask for nothing.
_GENERATION_NEUTRAL = {
    "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "num_return_sequences": 1,
    "remove_invalid_values": False, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "num_beam_groups": 1,
    "diversity_penalty": 0.0, "renormalize_logits": False, "token_healing": False, "guidance_scale": 1.0,
}  # fmt: skip
_NEVER = object()  # equal to no value

# --- config.json -------------------------------------------------------------------------------------------

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
#: Fields of config.json that are read by nobody here, and why that changes no answer.
IGNORED = {
    "architectures": "what class wrote it; model_type says what it is",
    "_name_or_path": "where it was",
    "transformers_version": "what wrote it",
    "dtype": "the tensors have their own",
    "torch_dtype": "the tensors have their own",
    "hidden_size": "of the top level: text_config's counts, and this one is wrong in PaliGemma 2",
    "vocab_size": "of the top level: text_config's counts",
    "_vocab_size": "an old name of that",
    "projection_dim": "the projector's shape is that of its tensors",
    "num_image_tokens": "follows from the picture's and the patches' size",
    "num_hidden_layers": "of the top level: the towers' count",
    "initializer_range": "for training from nothing",
    "attention_dropout": "for training",
    "use_cache": "whether the cache is used changes no answer",
    "cache_implementation": "whatever it is, the answer is the same",
    "output_attentions": "what is returned besides",
    "output_hidden_states": "what is returned besides",
    "return_dict": "what is returned besides",
    "chunk_size_feed_forward": "how the work is cut up",
    "is_encoder_decoder": "PaliGemma is none",
    "id2label": "for classifiers",
    "label2id": "for classifiers",
    "problem_type": "for classifiers",
    "vision_use_head": "the pooling head is no part of PaliGemma",
    "ignore_index": "for the loss of old versions",
}
_MAX_LAYERS = 1000  # the largest release has 46; a damaged number must not be worked through layer by layer


def from_hf(hf: Mapping, generation: object = None) -> PaliGemmaConfig:
    """Translate the contents of a Hugging Face `config.json`, and of the `generation_config.json` beside it, if any.

    As in transformers, the second says what ends an answer wherever it exists, and the first where it does not. Raises
    PaliGemmaError for anything whose mathematics this project does not have.
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
        bos=_token_id(hf, text, "bos_token_id", 2),
        **_ends(_first(hf, text, "eos_token_id"), generation),
        max_length=_integer(text, "max_position_embeddings"),
    )
    check(config)
    return config


def _ends(eos: object, generation: object) -> dict:
    """The fields eos and stops, from config.json's eos_token_id and the contents of generation_config.json."""
    own = _ids("config.json", eos)
    if generation is None:
        stops = [1] if own is None else own  # 1 is that of every release
    else:
        if not isinstance(generation, Mapping):
            raise PaliGemmaError(f"{GENERATION}: it is not a JSON object")
        stops = _ids(GENERATION, generation.get("eos_token_id")) or []
    eos = next((token for token in own or [1] if token in stops or not stops), stops[0] if stops else 1)
    return {"eos": eos, "stops": None if stops == [eos] else tuple(stops)}


def _ids(source: str, value: object) -> list[int] | None:
    """A token id, or a list of them, as a list; None if there is none."""
    if value is None:
        return None
    return [_id("eos_token_id", each, source) for each in (value if isinstance(value, list) else [value])]


def not_done(generation: Mapping) -> list[str]:
    """What a `generation_config.json` asks for that this project does not do: each field and its value."""
    asked = {name: value for name, value in generation.items() if name not in _GENERATION_READ and value is not None}
    return [f"{name} {quote(value)}" for name, value in asked.items() if value != _GENERATION_NEUTRAL.get(name, _NEVER)]


def _vision_from_hf(vision: Mapping) -> SiglipConfig:
    kind = vision.get("model_type", "siglip_vision_model")
    _require(kind == "siglip_vision_model", f"vision_config.model_type is {quote(kind)}, not 'siglip_vision_model'")
    activation = vision["hidden_act"]
    _require(
        activation in _GELU_TANH, f"vision_config.hidden_act is {quote(activation)}; only gelu_pytorch_tanh is known"
    )
    _require(vision["num_channels"] == 3, f"vision_config.num_channels is {quote(vision['num_channels'])}, not 3")
    return SiglipConfig(
        image_size=_integer(vision, "image_size"),
        patch_size=_integer(vision, "patch_size"),
        width=_integer(vision, "hidden_size"),
        depth=_integer(vision, "num_hidden_layers", maximum=_MAX_LAYERS),
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
    both_ways = text.get("use_bidirectional_attention")
    _require(
        both_ways in (None, True),
        "text_config.use_bidirectional_attention is false; PaliGemma's prefix is bidirectional",
    )
    rope = _rope(text)
    depth, head_dim = _integer(text, "num_hidden_layers", maximum=_MAX_LAYERS), _integer(text, "head_dim")
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
        final_softcap=_softcap(text, "final_logit_softcapping"),  # Gemma 1 has none, but what is there is applied
    )
    if kind == "gemma":
        return config
    return replace(
        config,
        query_scalar=_number(text, "query_pre_attn_scalar"),
        attn_softcap=_softcap(text, "attn_logit_softcapping"),
        post_norms=True,
        windows=_windows_from_hf(text, depth),
    )


def _rope(text: Mapping) -> Mapping:
    """What is said of the rotary embedding; like transformers, `rope_scaling` counts before `rope_parameters`."""
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    _require(isinstance(rope, Mapping), f"text_config.rope_parameters is {quote(rope)}, not an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _require(rope_type == "default", f"text_config rope type is {quote(rope_type)}; only 'default' is known")
    for name, value in rope.items():
        _require(
            not isinstance(value, Mapping), f"text_config.rope_parameters has {quote(name)} for itself; one is known"
        )
    part = rope.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    _require(part in (None, 1), f"text_config.partial_rotary_factor is {quote(part)}; only 1 is known")
    return rope


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
    eos = config.eos if config.stops is None else [*config.stops]
    hf_text: dict[str, object] = {
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
        "eos_token_id": eos,
        "bos_token_id": config.bos,
    }
    if text.final_softcap:
        hf_text["final_logit_softcapping"] = text.final_softcap
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
        "eos_token_id": eos,
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


def _require(holds: bool, problem: str, source: str = "config.json") -> None:
    if not holds:
        raise PaliGemmaError(f"{source}: {problem}")


def _section(hf: Mapping, key: str, absent: Mapping) -> Mapping:
    section = absent if hf.get(key) is None else hf[key]
    _require(isinstance(section, Mapping), f"{key} is {quote(section)}, not an object")
    return section


def _integer(section: Mapping, key: str, maximum: int = 2**31 - 1) -> int:
    value = section.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= maximum:
        raise PaliGemmaError(f"config.json: {key} must be a whole number from 1 to {maximum}, not {quote(value)}")
    return value


def _image_token(hf: Mapping) -> int:
    names = ("image_token_index", "image_token_id")  # the second is transformers' newer spelling
    found = [hf[name] for name in names if hf.get(name) is not None]
    _require(found[1:] in ([], found[:1]), f"{' and '.join(names)} differ: {quote(found)}")
    return _id("image_token_index", found[0] if found else 256000)


def _first(hf: Mapping, text: Mapping, key: str) -> object:
    """A field of the top level, or of the text's section where that is silent."""
    return hf[key] if hf.get(key) is not None else text.get(key)


def _token_id(hf: Mapping, text: Mapping, key: str, default: int) -> int:
    value = _first(hf, text, key)
    if isinstance(value, list):
        _require(len(value) == 1, f"{key} is {quote(value)}; one such token is known, not several")
        value = value[0]
    value = default if value is None else value
    if key == "pad_token_id" and value == -1:  # "none": what fills the places that nobody reads does not matter
        value = default
    return _id(key, value)


def _id(key: str, value: object, source: str = "config.json") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise PaliGemmaError(f"{source}: {key} must be a token id, not {quote(value)}")
    return value


def _number(section: Mapping, key: str) -> float:
    value = section.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise PaliGemmaError(f"config.json: {key} must be a positive number, not {quote(value)}")
    return float(value)


def _softcap(section: Mapping, key: str) -> float | None:
    return None if section.get(key) is None else _number(section, key)


# --- preprocessor_config.json ------------------------------------------------------------------------------

_PILLOW_FILTERS = {"bilinear": 2, "bicubic": 3}
_KNOWN_SETTINGS: dict[str, list] = {
    "do_convert_rgb": [True], "do_resize": [True], "do_center_crop": [False], "do_pad": [False],
    "do_rescale": [True], "do_normalize": [True], "image_mean": [[0.5] * 3, 0.5], "image_std": [[0.5] * 3, 0.5],
}  # fmt: skip


def resize_from_hf(hf: object, size: int | None = None, source: str = "preprocessor_config.json") -> str:
    """The name of the preprocessing that the contents of a `preprocessor_config.json` describe.

    Transformers' own bilinear filter rounds to bytes where big_vision's cuts off: up to one step of 255 lies between
    them. With `size`, its pictures must be of this size. Raises PaliGemmaError for one that this project does not have.
    """
    if not isinstance(hf, dict):
        raise PaliGemmaError(f"{source} does not hold a JSON object")
    hf = {key: value for key, value in hf.items() if value is not None}  # null means the default
    for key, allowed in _KNOWN_SETTINGS.items():
        if key in hf and hf[key] not in allowed:
            raise PaliGemmaError(f"{source}: {key} is {quote(hf[key])}; only {allowed[0]!r} is known")
    factor = hf.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise PaliGemmaError(f"{source}: rescale_factor is {quote(factor)}; only 1/255 is known")
    if size and hf.get("size", size) not in (size, {"height": size, "width": size}):
        raise PaliGemmaError(f"{source}: size is {quote(hf['size'])}, but the model takes {size} by {size}")
    resample = hf.get("resample", _PILLOW_FILTERS["bicubic"])
    for name, number in _PILLOW_FILTERS.items():
        if resample == number:
            return name
    raise PaliGemmaError(f"{source}: resample is {quote(resample)}; 3 (bicubic) and 2 (bilinear) are known")


def resize_to_hf(resize: str, vision: SiglipConfig) -> dict:
    """The `preprocessor_config.json` of a preprocessing, for a vision config."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": _PILLOW_FILTERS[resize],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_seq_length": vision.patches,
    }
