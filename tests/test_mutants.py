"""Break the reference on purpose: the recorded answers of transformers must notice every time."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from numpy_ref import checkpoint
from numpy_ref.generate import pad_prompts
from numpy_ref.model import gemma, layers, paligemma, siglip

from .make_goldens import GOLDEN
from .test_golden import BUDGET, prompts


def golden_error(name: str) -> float:
    """Largest error of the reference's logits against the recorded ones, of the largest."""
    loaded, golden = checkpoint.load(GOLDEN / name), load_file(GOLDEN / name / "golden.safetensors")
    input_ids, lengths = pad_prompts(prompts(loaded.config), 0)
    pixel_values = golden["pixel_values"].astype(np.float64)
    logits, _ = paligemma.prefill(loaded.params, loaded.config, pixel_values, input_ids, lengths, 40)
    return float(np.abs(logits - golden["logits"]).max() / np.abs(golden["logits"]).max())


def erf_gelu(x):
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def interleaved_rope(x, cos, sin):
    first, second = x[..., 0::2], x[..., 1::2]
    return np.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(x.shape)


def plain_scale(x, scale, eps):
    return layers.rms_norm(x, scale - 1, eps)


def norm_after_residual(p, config, x, rotary, mask, cache=None, start=None, tap=layers.identity):
    update, cache = gemma.attention(p["attention"], config, x, rotary, mask, cache, start)
    x = gemma.rms_norm(x + update, **p["attention_norm"], eps=config.eps)
    return gemma.rms_norm(x + gemma.mlp(p["mlp"], x), **p["mlp_norm"], eps=config.eps), cache


def scaled_image(p, config, pixel_values, input_ids, tap=layers.identity):
    image = paligemma.encode_image(p, config, pixel_values) * np.sqrt(config.text.width)
    text = gemma.embed(p["text"], config.text, input_ids[:, config.vision.patches :], image.dtype)
    return np.concatenate([image, text], axis=1)


def causal_prefix(prefix_lengths, lengths, size, window=None):
    steps = np.arange(size)
    return (steps[None, None] <= steps[None, :, None]) & (steps[None, None] < lengths[:, None, None])


def ten_eps(norm):
    return lambda x, *arguments, eps, **weights: norm(x, *arguments, eps=10 * eps, **weights)


def ddof_one(x, scale, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True, ddof=1) + eps) * scale + bias


def fast_positions(positions, *arguments):
    """Twice as fast; a shift would change nothing, since only differences of positions count."""
    return layers.rope_angles(2 * positions, *arguments)


def no_cap(query, key, value, mask=None, cap=None, tap=layers.identity, original=layers.attend):
    return original(query, key, value, mask, None, tap)


MUTANTS = {
    "erf gelu in the decoder": (gemma, "gelu", erf_gelu),
    "erf gelu in the vision tower": (siglip, "gelu", erf_gelu),
    "ten times the eps, decoder": (gemma, "rms_norm", ten_eps(layers.rms_norm)),
    "ten times the eps, vision": (siglip, "layer_norm", ten_eps(layers.layer_norm)),
    "ddof 1 in layer norm": (siglip, "layer_norm", ddof_one),
    "interleaved rope": (gemma, "rope", interleaved_rope),
    "positions twice as fast": (gemma, "rope_angles", fast_positions),
    "scale instead of 1 + scale": (gemma, "rms_norm", plain_scale),
    "no sqrt(D) on the text": (gemma, "embed", lambda p, config, ids, dtype: layers.embedding(ids, p["embedding"], dtype)),
    "sqrt(D) on the picture": (paligemma, "embed_prefix", scaled_image),
    "causal prefix": (paligemma, "prefix_mask", causal_prefix),
    "norm after the residual": (gemma, "block", norm_after_residual),
}  # fmt: skip
MUTANTS_OF_2 = {
    "no attention softcap": (gemma, "attend", no_cap),
    "no final softcap": (gemma, "softcap", lambda x, cap: x),
}


def cases():
    for name, mutant in MUTANTS.items():
        for model in ("paligemma1", "paligemma2"):
            yield pytest.param(model, mutant, id=f"{model}: {name}")
    for name, mutant in MUTANTS_OF_2.items():
        yield pytest.param("paligemma2", mutant, id=f"paligemma2: {name}")


@pytest.mark.parametrize("name", ["paligemma1", "paligemma2"])
def test_the_reference_passes(name):
    assert golden_error(name) <= BUDGET


@pytest.mark.parametrize(("name", "mutant"), [*cases()])
def test_mutant_is_noticed(name, mutant, monkeypatch):
    module, function, replacement = mutant
    assert callable(getattr(module, function))
    monkeypatch.setattr(module, function, replacement)
    assert golden_error(name) > 2 * BUDGET


def test_ignoring_the_window_is_noticed(monkeypatch):
    """The prefix ignores the window, so it shows only in what follows the prompt."""
    loaded, golden = checkpoint.load(GOLDEN / "paligemma2"), load_file(GOLDEN / "paligemma2" / "golden.safetensors")

    def tokens():
        input_ids, lengths = pad_prompts(prompts(loaded.config), 0)
        logits, cache = paligemma.prefill(loaded.params, loaded.config, golden["pixel_values"], input_ids, lengths, 40)
        rows = []
        for _ in range(golden["tokens"].shape[1]):
            rows.append(logits.argmax(-1))
            logits, cache = paligemma.decode(loaded.params, loaded.config, rows[-1][:, None], lengths, cache)
            lengths = lengths + 1
        return np.stack(rows, 1)

    assert np.array_equal(tokens(), golden["tokens"])
    monkeypatch.setattr(paligemma, "decode_mask", without_window)
    assert not np.array_equal(tokens(), golden["tokens"])


def without_window(lengths, capacity, window=None, size=1, original=paligemma.decode_mask):
    return original(lengths, capacity, size=size)


def not_causal(lengths, capacity, window=None, size=1, original=paligemma.decode_mask):
    """Each of several new tokens sees all of them."""
    return np.repeat(original(lengths + size - 1, capacity, window), size, axis=1)


@pytest.mark.parametrize("mask", [paligemma.decode_mask, without_window, not_causal])
def test_given_all_tokens_at_once_each_is_the_next_of_those_before(mask, monkeypatch):
    """The recorded answer, at once: behind each of its tokens the likeliest is the next, unless the mask is wrong."""
    loaded, golden = checkpoint.load(GOLDEN / "paligemma2"), load_file(GOLDEN / "paligemma2" / "golden.safetensors")
    input_ids, lengths = pad_prompts(prompts(loaded.config), 0)
    _, cache = paligemma.prefill(loaded.params, loaded.config, golden["pixel_values"], input_ids, lengths, 40)
    right = mask is paligemma.decode_mask
    monkeypatch.setattr(paligemma, "decode_mask", mask)
    logits, _ = paligemma.extend(loaded.params, loaded.config, golden["tokens"][:, :-1], lengths, cache)
    assert np.array_equal(logits.argmax(-1), golden["tokens"][:, 1:]) == right
