"""Every field of transformers' own config classes is read, refused, or ignored for a reason; what is read means the same."""

import pytest
import transformers

from numpy_ref.checkpoint.hugging_face import IGNORED, from_hf, not_done, to_hf
from numpy_ref.config import VARIANTS
from numpy_ref.errors import PaliGemmaError

CLASSES = {
    "gemma": transformers.GemmaConfig, "gemma2": transformers.Gemma2Config,
    "siglip_vision_model": transformers.SiglipVisionConfig, "paligemma": transformers.PaliGemmaConfig,
}  # fmt: skip


def sections(kind):
    """A config.json as transformers writes it, section by section."""
    text = {**CLASSES[kind](head_dim=32).to_dict()}
    vision = CLASSES["siglip_vision_model"](image_size=28, patch_size=14).to_dict()
    return {**CLASSES["paligemma"](text_config=text, vision_config=vision).to_dict()}


#: Read, though from a copy of the section, whose reader is not seen.
READ = {
    "top": {"model_type", "image_token_index", "image_token_id", "text_config", "vision_config", "pad_token_id",
            "eos_token_id", "bos_token_id", "tie_word_embeddings"},
    "text": {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "max_position_embeddings",
             "rms_norm_eps", "pad_token_id", "eos_token_id", "bos_token_id", "tie_word_embeddings", "rope_parameters",
             "rope_scaling", "rope_theta", "attention_bias", "use_bidirectional_attention", "query_pre_attn_scalar",
             "sliding_window", "layer_types", "final_logit_softcapping", "attn_logit_softcapping"},
    "vision": {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_no_field_is_passed_over(kind):
    whole = sections(kind)
    for name, section in [("top", whole), ("text", whole["text_config"]), ("vision", whole["vision_config"])]:
        unknown = {field for field, value in section.items() if field not in READ[name] | IGNORED.keys()}
        assert not unknown, f"{name}: {unknown}"


def changed(kind, name, **changes):
    whole = sections(kind)
    section = whole if name == "top" else whole[f"{name}_config"]
    section.update(changes)
    return whole


OTHERS = {  # another value of each field that is read: what it may be, and makes a difference
    "top": {"image_token_index": 77, "pad_token_id": 3, "eos_token_id": [4, 5], "bos_token_id": 6,
            "tie_word_embeddings": False},
    "text": {"vocab_size": 300000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 99,
             "rms_norm_eps": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
             "rope_scaling": {"rope_type": "default", "rope_theta": 7.0}, "final_logit_softcapping": 3.0},
    "vision": {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 6,
               "image_size": 42, "patch_size": 7, "layer_norm_eps": 0.5},
}  # fmt: skip
GEMMA2 = {"query_pre_attn_scalar": 5.0, "sliding_window": 7, "attn_logit_softcapping": 3.0}


@pytest.mark.parametrize(
    ("kind", "name", "field"),
    [(kind, name, field) for kind in ("gemma", "gemma2") for name in OTHERS for field in OTHERS[name]]
    + [("gemma2", "text", field) for field in GEMMA2],
)
def test_what_is_read_makes_a_difference(kind, name, field):
    value = {**OTHERS[name], **GEMMA2}[field]
    extra = {"layer_types": None} if field == "num_hidden_layers" and name == "text" else {}
    assert from_hf(changed(kind, name, **{field: value}, **extra)) != from_hf(changed(kind, name, **extra))


@pytest.mark.parametrize("field", IGNORED)
def test_what_is_ignored_makes_none(field):
    if field in ("hidden_size", "vocab_size", "num_hidden_layers"):
        assert from_hf(changed("gemma", "top", **{field: 7})) == from_hf(sections("gemma"))
        return
    for name in ("top", "text", "vision"):
        assert from_hf(changed("gemma2", name, **{field: "another"})) == from_hf(sections("gemma2"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("text", {"attention_bias": True}, "attention_bias is true"),
        ("text", {"use_bidirectional_attention": False}, "use_bidirectional_attention is false"),
        ("text", {"final_logit_softcapping": 0}, "final_logit_softcapping must be a positive number, not 0"),
        ("text", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be a positive number, not 0.0"),
        ("text", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ("text", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ("text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
        ("text", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters has 'full_attention'"),
        ("text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("vision", {"model_type": "clip_vision_model"}, "vision_config.model_type is 'clip_vision_model'"),
        ("vision", {"num_channels": 1}, "num_channels is 1"),
        ("vision", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            "top",
            {"image_token_index": 5, "image_token_id": 6},
            r"image_token_index and image_token_id differ: \[5, 6\]",
        ),
        ("top", {"model_type": "gemma3"}, "model_type is 'gemma3'"),
    ],
)
def test_what_is_not_done_is_refused_by_name(name, changes, message):
    with pytest.raises(PaliGemmaError, match=message):
        from_hf(changed("gemma2", name, **changes))


def test_rope_scaling_counts_before_rope_parameters():
    both = {"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}, "rope_parameters": {"rope_theta": 9.0}}
    whole = changed("gemma", "text", **both)
    ours = from_hf(whole).text.rope_base
    theirs = transformers.GemmaConfig(**whole["text_config"]).rope_parameters["rope_theta"]
    assert ours == theirs == 7.0


# --- what ends an answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "eos", "ends"),
    [
        (None, None, 1, (1,)),
        (7, None, 7, (7,)),
        ([7], None, 7, (7,)),
        ([7, 8], None, 7, (7, 8)),
        (7, {"eos_token_id": 9}, 9, (9,)),
        (7, {"eos_token_id": [9, 7]}, 7, (9, 7)),
        (7, {"eos_token_id": [9, 8]}, 9, (9, 8)),
        (7, {"eos_token_id": None}, 7, ()),  # as in transformers: nothing does
        (7, {}, 7, ()),
        (None, {"eos_token_id": 9}, 9, (9,)),
    ],
)
def test_what_ends_an_answer(config, generation, eos, ends):
    whole = {**to_hf(VARIANTS["paligemma-3b-224"]), "eos_token_id": config}
    whole["text_config"] = {**whole["text_config"], "eos_token_id": None}
    found = from_hf(whole, generation)
    assert (found.eos, found.ends) == (eos, ends)
    assert from_hf(to_hf(found)).ends == ends


def test_the_texts_own_eos_counts_last():
    whole = {**to_hf(VARIANTS["paligemma-3b-224"]), "eos_token_id": None}
    whole["text_config"] = {**whole["text_config"], "eos_token_id": 12}
    assert from_hf(whole).ends == (12,)


@pytest.mark.parametrize(("value", "message"), [("1", "'1'"), ([1, -1], "-1"), (True, "True"), ([[1]], r"\[1\]")])
def test_a_stop_token_is_an_id(value, message):
    with pytest.raises(PaliGemmaError, match=f"generation_config.json: eos_token_id must be a token id, not {message}"):
        from_hf(to_hf(VARIANTS["paligemma-3b-224"]), {"eos_token_id": value})


def test_what_generation_asks_for_and_is_not_done():
    assert not_done(transformers.GenerationConfig(eos_token_id=1, cache_implementation="hybrid").to_dict()) == []
    assert not_done(transformers.GenerationConfig()._get_default_generation_params()) == []
    asked = {"repetition_penalty": 1.2, "suppress_tokens": [5], "do_sample": True, "temperature": 0.6, "num_beams": 3}
    assert not_done({**asked, "eos_token_id": 1}) == [
        "repetition_penalty 1.2", "suppress_tokens [5]", "do_sample True", "temperature 0.6", "num_beams 3",
    ]  # fmt: skip
