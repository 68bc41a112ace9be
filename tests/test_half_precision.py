"""The reference in half precision: what is lifted to float32 on the way is, and each result is rounded once.

Mutants that a comparison of whole models is too coarse for: a softmax, rotary angles or a norm in half precision.
"""

import ml_dtypes
import numpy as np
import pytest

from numpy_ref.model import contrastive, gemma, layers

from .models import CONFIGS, random_params

HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
WIDTH = 96


@pytest.fixture(params=HALVES, ids=str)
def half(request):
    return request.param


def normal(dtype, *shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


def mean_ulps(value, exact) -> float:
    """How far a rounded result is from the exact one, in units of its last place, on average: 1/4 if rounded once."""
    spacing = np.spacing(np.abs(exact.astype(np.float64)).astype(np.float32)) * 2.0 ** (23 - MANTISSA[value.dtype])
    return float((np.abs(value.astype(np.float64) - exact) / spacing).mean())


MANTISSA = {HALVES[0]: 10, HALVES[1]: 7}
ONCE = 0.3  # measured 0.25 for each function; rounding twice 0.35 and more


def scaled_late(x, scale, eps):
    """The mutant: the norm is rounded before it is scaled."""
    x32 = layers.upcast(x)
    normed = (x32 / np.sqrt((x32 * x32).mean(-1, keepdims=True) + eps)).astype(x.dtype)
    return normed * (1 + scale.astype(x.dtype))


def exact_norm(x, scale, eps):
    return layers.rms_norm(x.astype(np.float64), scale.astype(np.float64), eps)


def test_the_norm_is_rounded_once(half):
    x, scale = normal(half, 500, WIDTH), normal(half, WIDTH, seed=1, scale=0.3)
    exact = exact_norm(x, scale, 1e-6)
    assert mean_ulps(layers.rms_norm(x, scale, 1e-6), exact) < ONCE
    assert mean_ulps(scaled_late(x, scale, 1e-6), exact) > ONCE


def test_angles_are_of_float32(half):
    """A position beyond what half precision counts: 2049 is 2048 in float16, and 257 is 256 in bfloat16."""
    positions = np.array([[2049, 2050, 257, 1023]])
    exact = layers.rope_angles(positions, 32, 10000.0, np.float64)
    given = layers.rope_angles(positions, 32, 10000.0, layers.upcast(np.zeros(1, half)).dtype)
    coarse = layers.rope_angles(positions, 32, 10000.0, half)
    for right, value, wrong in zip(exact, given, coarse, strict=True):
        assert np.abs(value - right).max() < 1e-3
        assert np.abs(wrong.astype(np.float64) - right).max() > 0.1


def test_the_decoder_turns_by_angles_of_float32(half, monkeypatch):
    config, asked = CONFIGS["paligemma1"], []

    def angles(positions, head_dim, base, dtype):
        asked.append(np.dtype(dtype))
        return layers.rope_angles(positions, head_dim, base, dtype)

    monkeypatch.setattr(gemma, "rope_angles", angles)
    masks = dict.fromkeys([None, *config.text.windows], np.ones((1, 3, 3), bool))
    x, p = normal(half, 1, 3, config.text.width), random_params(config)["text"]
    hidden, _ = gemma.decoder(p, config.text, x, np.arange(3)[None], masks)
    assert hidden.dtype == half
    assert asked == [np.float32]


def test_the_weights_of_attention_are_rounded_once(half):
    query, key = normal(half, 1, 2, 50, 16, seed=2), normal(half, 1, 2, 301, 16, seed=3)
    seen = {}

    def tap(name, value):
        seen[name] = value
        return value

    layers.attend(query, key, key, tap=tap)
    scores, weights = seen["scores"], seen["weights"]
    assert scores.dtype == half
    exact = layers.softmax(scores.astype(np.float64))
    assert weights.dtype == half
    large = exact > 1e-3  # below that float16 has no full mantissa
    assert mean_ulps(weights[large], exact[large]) < ONCE
    assert mean_ulps(layers.softmax(scores).astype(half)[large], exact[large]) > ONCE


def test_products_keep_their_dtype(half):
    """NumPy's own product of bfloat16 is float32."""
    x, y = normal(half, 3, 8), normal(half, 8, 5)
    assert layers.matmul(x, y).dtype == layers.linear(x, y).dtype == half
    assert contrastive.similarity(x, x, np.float32(0.5)).dtype == half
