"""Agreement with transformers where many things vary at once: configurations drawn at random, and sampling."""

import numpy as np
import pytest

from numpy_ref import checkpoint
from numpy_ref.generate import pad_prompts
from numpy_ref.model.sampling import sample

from . import make_goldens
from .test_golden import greedy, open_engine

transformers = pytest.importorskip("transformers", reason="it is compared with transformers")
BUDGET = 1e-4  # of the largest logit, in float32
COUNT, NEW_TOKENS = 60, 6


def drawn(seed):
    """A small model of transformers' of random sizes: sections of its config, and the keywords of its class."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    kv_heads, group, head_dim = int(rng.integers(1, 4)), int(rng.integers(1, 4)), 2 * int(rng.integers(2, 8))
    vision_heads = int(rng.integers(1, 4))
    kind, depth = one_of("gemma", "gemma2"), int(rng.integers(1, 5))
    text = {
        "vocab_size": int(rng.integers(60, 300)), "head_dim": head_dim,
        "hidden_size": kv_heads * group * int(rng.integers(2, 12)),  # transformers asks for a multiple of the heads
        "intermediate_size": int(rng.integers(5, 60)), "num_hidden_layers": depth, "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * group, "rms_norm_eps": 10.0 ** rng.uniform(-8, -1),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0 ** rng.uniform(1, 6)},
        "final_logit_softcapping": one_of(None, 5.0, 30.0),  # a lower one makes ties of large logits
    }  # fmt: skip
    if kind == "gemma2":
        text |= {
            "attn_logit_softcapping": one_of(None, 0.7, 50.0), "query_pre_attn_scalar": int(rng.integers(1, 300)),
            "sliding_window": int(rng.integers(2, 40)),
            "layer_types": [one_of("sliding_attention", "full_attention") for _ in range(depth)],
        }  # fmt: skip
    patch = int(rng.integers(2, 8))
    vision = {
        "image_size": patch * int(rng.integers(1, 5)) + int(rng.integers(0, patch)), "patch_size": patch,
        "num_attention_heads": vision_heads, "hidden_size": vision_heads * int(rng.integers(2, 12)),
        "intermediate_size": int(rng.integers(3, 40)), "num_hidden_layers": int(rng.integers(1, 4)),
        "layer_norm_eps": 10.0 ** rng.uniform(-8, -1), "vision_use_head": one_of(True, False),
    }  # fmt: skip
    return kind, text, vision, one_of(True, False)


def build(kind, text, vision, tied, seed):
    """The model with random weights."""
    import torch

    config = transformers.PaliGemmaConfig(
        text_config={"model_type": kind, **text}, vision_config={"model_type": "siglip_vision_model", **vision},
        image_token_index=text["vocab_size"] - 3, projection_dim=text["hidden_size"], tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if "embed_tokens" in name else 1.5
            parameter.normal_(std=0.3 if parameter.dim() == 1 else scale / parameter.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(COUNT))
def test_random_configurations(tmp_path, seed):
    """Two rows of unequal length: logits of the prompts and greedy tokens; every sixth model on all engines."""
    build(*drawn(seed), seed).save_pretrained(tmp_path / "hf")
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    rng = np.random.default_rng(seed)
    words = [rng.integers(3, model.config.text_config.vocab_size - 4, size).tolist() for size in (2, 7)]
    rows = [make_goldens.row_ids(model.config, [2, *prefix]) for prefix in words]
    pixels = make_goldens.pixels(model.config, 2, seed)
    expected = [make_goldens.answer(model, *pair, NEW_TOKENS) for pair in zip(pixels, rows, strict=True)]
    reference = np.stack([logits for logits, _ in expected])
    loaded = checkpoint.load(tmp_path / "hf")
    for kind in ["numpy", "torch", "onnx"] if seed % 6 == 0 else ["numpy"]:
        engine = open_engine(kind, loaded, tmp_path / "bundle")
        logits, _ = engine.prefill(pixels, *pad_prompts(rows, 0), 2 * max(map(len, rows)))
        assert np.abs(logits - reference).max() <= BUDGET * np.abs(reference).max(), kind
        assert greedy(engine, pixels, rows, NEW_TOKENS).tolist() == [tokens for _, tokens in expected], kind


# --- sampling ----------------------------------------------------------------------------------------------

DRAWS = 5000


def warped(logits, temperature, top_k, top_p):
    """The distribution that transformers draws from."""
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps = [TemperatureLogitsWarper(temperature)]
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    scores = LogitsProcessorList(steps)(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None])
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("seed", range(30))
def test_what_is_drawn_is_distributed_as_in_transformers(seed):
    """Over an even grid of uniforms each token comes as often as its probability says, to one draw."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(40)).astype(np.float32)
    temperature, top_k, top_p = float(rng.uniform(0.3, 2)), int(rng.integers(0, 20)), float(rng.uniform(0.3, 1.05))
    top_p = min(top_p, 1.0)
    expected = warped(logits, temperature, top_k, top_p)
    uniforms = ((np.arange(DRAWS) + 0.5) / DRAWS).astype(np.float32)
    tokens = sample(np.tile(logits, (DRAWS, 1)), np.ones(40, bool), temperature, top_k, top_p, uniforms)
    counts = np.bincount(tokens, minlength=40)
    assert np.abs(counts - DRAWS * expected).max() <= 1.5
    assert (counts > 0).sum() > 1 or expected.max() > 0.999
