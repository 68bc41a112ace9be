"""Contrastive learning: losses by hand, gradients by finite differences, the pooling head against transformers."""

import math

import numpy as np
import pytest
import torch

from numpy_ref.config import SiglipConfig
from numpy_ref.model import contrastive
from torch_impl.load import to_tensor
from torch_impl.model import contrastive as twin

LOSSES = {
    "siglip_loss": {"log_temperature": np.array(1.7), "bias": np.array(-3.0)},
    "clip_loss": {"log_temperature": np.array(1.7)},
}


def pairs(count=5, width=7, seed=0):
    rng = np.random.default_rng(seed)
    return {"image": rng.standard_normal((count, width)), "text": rng.standard_normal((count, width))}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name):
    """The twin's automatic gradients of every argument, against the reference's slope in float64."""
    arguments = pairs() | LOSSES[name]
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in arguments.items()}
    getattr(twin, name)(**tensors).backward()
    step = 1e-6
    for key, value in arguments.items():
        slope = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[place] += sign * step
                ends.append(getattr(contrastive, name)(**{**arguments, key: moved}))
            slope[place] = (ends[0] - ends[1]) / (2 * step)
        assert np.abs(tensors[key].grad.numpy() - slope).max() < 1e-7 * max(1, np.abs(slope).max()), key


def test_losses_by_hand():
    """Two pairs, orthogonal: what each sum comes to, written out."""
    unit = np.eye(2)
    same, other = math.log1p(math.exp(-(2 - 1))), math.log1p(math.exp(0 - 1))  # scores 2 and 0, bias -1
    assert contrastive.siglip_loss(unit, unit, math.log(2), -1.0) == pytest.approx(same + other)
    assert contrastive.clip_loss(unit, unit, math.log(2)) == pytest.approx(math.log(math.exp(2) + 1) - 2)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_prefer_the_right_pairs(name):
    unit, settings = np.eye(4), LOSSES[name]
    loss = getattr(contrastive, name)
    assert loss(unit, unit, **settings) < loss(unit, unit[[1, 0, 2, 3]], **settings)


def test_clip_is_even_in_its_two_sides():
    image, text = pairs().values()
    assert contrastive.clip_loss(image, text, 0.3) == pytest.approx(contrastive.clip_loss(text, image, 0.3))


def test_recall():
    image = np.eye(3)
    assert contrastive.recall_at_1(image, image) == 1
    assert contrastive.recall_at_1(image, image[[1, 0, 2]]) == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("ignore")
def test_the_pooling_head_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    torch.manual_seed(0)
    foreign = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=19, num_hidden_layers=1, num_attention_heads=3, image_size=21, patch_size=7,
        layer_norm_eps=1e-2,
    )  # fmt: skip
    head = transformers.SiglipVisionModel(foreign).eval().head.double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    projections = zip(*(np.split(weights[f"attention.in_proj_{kind}"], 3) for kind in ("weight", "bias")), strict=True)
    attention = {
        name: {"kernel": kernel.T, "bias": bias}
        for name, (kernel, bias) in zip(("query", "key", "value"), projections, strict=True)
    }

    def dense(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    p = {
        "probe": weights["probe"][0],
        "attention": {**attention, "output": dense("attention.out_proj")},
        "norm": {"scale": weights["layernorm.weight"], "bias": weights["layernorm.bias"]},
        "mlp": {"up": dense("mlp.fc1"), "down": dense("mlp.fc2")},
    }
    x = np.random.default_rng(0).standard_normal((2, 9, 24))
    config = SiglipConfig(image_size=21, patch_size=7, width=24, depth=1, mlp=19, heads=3, eps=1e-2)
    with torch.inference_mode():
        expected = head(to_tensor(x))
    assert np.abs(contrastive.pool(p, config, x) - expected.numpy()).max() < 1e-12
