"""Drawing tokens: by hand, by property, and by counting."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpy_ref.model.sampling import invert_cdf, keep_top_p, sample

KNOWN = np.array([True] * 6 + [False])


def test_greedy_takes_the_likeliest_known():
    logits = np.array([[0.0, 3, 1, 3, 2, 0, 99], [9, 0, 0, 0, 0, 0, 99]])
    assert sample(logits, KNOWN).tolist() == [1, 0]  # the first of equals; never the unknown last


WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
LOGITS = np.array([*np.log(WEIGHTS), -9, -9, 99], np.float32)


def drawn(uniform, **cuts):
    """The tokens that these uniform numbers draw."""
    count = len(uniform)
    return sample(np.tile(LOGITS, (count, 1)), KNOWN, 1.0, uniform=np.array(uniform, np.float32), **cuts).tolist()


def test_top_k_by_hand():
    """Two stay, and share 4 to 3."""
    assert drawn([0, 0.57, 0.572, 0.9999], top_k=2) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, 1), (0.3, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.95, 4), (1.0, 4)]
)
def test_top_p_keeps_the_shortest_head_that_reaches_it(top_p, kept):
    assert (keep_top_p(WEIGHTS[None], top_p) > 0).sum() == kept


def test_top_k_comes_before_top_p():
    # Of the two that stay, the first has 4/7 = 0.571.
    assert drawn([0.9999], top_k=2, top_p=0.57) == [0]
    assert drawn([0.9999], top_k=2, top_p=0.58) == [1]


def test_inverting_the_cdf():
    weights = np.tile([0.4, 0.3, 0.2, 0.1], (5, 1))
    uniform = np.array([0.0, 0.39, 0.41, 0.71, 0.999999])
    assert invert_cdf(weights, uniform).tolist() == [0, 0, 1, 2, 3]


@given(
    st.integers(0, 2**32 - 1), st.floats(0.1, 3), st.integers(0, 8), st.floats(0, 1), st.floats(0, 1, exclude_max=True)
)
def test_a_draw_is_known_and_inside_the_cut(seed, temperature, top_k, top_p, uniform):
    logits = np.random.default_rng(seed).standard_normal((2, 7)).astype(np.float32)
    tokens = sample(logits, KNOWN, temperature, top_k, top_p, np.array([uniform] * 2, np.float32))
    assert KNOWN[tokens].all()
    if top_k:
        ranks = (np.where(KNOWN, logits, -np.inf) > logits[np.arange(2), tokens][:, None]).sum(-1)
        assert (ranks < top_k).all()


def frequencies(logits, known, temperature, top_k, top_p):
    """How often each token should be drawn: logits [V] -> [V]."""
    weights = np.where(known, np.exp(logits.astype(np.float64) / temperature), 0)
    order = np.argsort(-weights)
    ranked = weights[order] / weights.sum()
    if top_k:
        ranked[top_k:] = 0
        ranked /= ranked.sum()
    ranked[np.cumsum(ranked) - ranked >= top_p] = 0
    expected = np.zeros(len(logits))
    expected[order] = ranked / ranked.sum()
    return expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.5, 3, 1.0), (1.0, 0, 0.8)]
)
def test_frequencies_follow_the_distribution(temperature, top_k, top_p):
    logits = np.array([1.0, 0.2, -0.5, 2.0, 0.1, -1.0, 9.0], np.float32)
    expected = frequencies(logits, KNOWN, temperature, top_k, top_p)
    count = 200_000
    uniform = np.random.default_rng(0).random(count, np.float32)
    tokens = sample(np.tile(logits, (count, 1)), KNOWN, temperature, top_k, top_p, uniform)
    observed = np.bincount(tokens, minlength=7) / count
    assert np.abs(observed - expected).max() < 4.5 * np.sqrt(0.25 / count)  # 4.5 standard errors at their widest
    assert (observed[expected == 0] == 0).all()


@pytest.mark.parametrize("uniform", [0.25, 0.5, 0.75])
def test_an_exact_tie_goes_to_the_next(uniform):
    """Four weights of a quarter: a number on the edge between two is the first of the second."""
    weights = np.full((1, 4), 0.25, np.float32)
    assert invert_cdf(weights, np.array([uniform], np.float32)).tolist() == [round(4 * uniform)]
