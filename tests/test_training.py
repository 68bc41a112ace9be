"""The loss, and that a few steps lower it."""

import itertools

import numpy as np
import pytest
import torch

from numpy_ref import paligemma
from numpy_ref.tokenizer import SentencePiece, Tokenizer
from torch_impl import tokenizer_training, train
from torch_impl.load import from_params, to_params

from .models import CONFIGS, random_batch, random_params
from .test_checkpoint import same


def test_the_loss_is_the_mean_over_suffix_tokens_then_rows():
    """Against the formula written out over the reference's logits."""
    config = CONFIGS["paligemma1"]
    params = random_params(config)
    model = from_params(config, params, torch.float64)
    rng = np.random.default_rng(0)
    pixels, _, _ = random_batch(config)
    image = [config.image_token] * config.vision.patches
    examples = [
        (pixels[i].astype(np.float64), [*image, 2, *rng.integers(3, 50, n)], [*rng.integers(3, 50, m), config.eos])
        for i, (n, m) in enumerate([(3, 2), (1, 5), (4, 1)])
    ]
    batch = train.collate(examples, config.pad)
    loss = train.prefix_lm_loss(model, batch)

    logits = paligemma.forward(
        params, config, batch["pixel_values"].numpy(), batch["input_ids"].numpy(),
        batch["lengths"].numpy(), batch["prefix_lengths"].numpy(),
    )  # fmt: skip
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = []
    for row, (_, prompt, suffix) in zip(log_probabilities, examples, strict=True):
        places = range(len(prompt) - 1, len(prompt) + len(suffix) - 1)
        rows.append(-np.mean([row[place, token] for place, token in zip(places, suffix, strict=True)]))
    assert loss.item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_no_gradient_from_prefix_or_padding():
    """Changing what is padded changes neither loss nor gradient."""
    config = CONFIGS["paligemma1"]
    model = from_params(config, random_params(config), torch.float64)
    pixels, ids, lengths = random_batch(config)
    examples = [
        (p.astype(np.float64), row[: n - 1].tolist(), [7, 1]) for p, row, n in zip(pixels, ids, lengths, strict=True)
    ]
    gradients = []
    for pad in (0, 9):
        model.zero_grad()
        train.prefix_lm_loss(model, train.collate(examples, pad)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-12), name


@pytest.mark.filterwarnings("ignore")
def test_a_few_steps_lower_the_loss_and_repeat():
    (model, tokenizer_model), (again, _) = train.start(0), train.start(0)
    for each in (model, again):
        train.train(each, tokenizer_model, 30, 0, 8, 1e-3, False, lambda *_: None)
    assert same(to_params(model), to_params(again))
    examples = train.Examples(tokenizer_model, model.config, seed=99)
    batch = train.collate([example for example, _ in zip(examples, range(32), strict=False)], 0)
    with torch.inference_mode():
        fresh = train.PaliGemma(model.config)
        assert train.prefix_lm_loss(model, batch) < 0.6 * train.prefix_lm_loss(fresh, batch)


def test_the_tokenizer_repeats():
    first, second = (tokenizer_training.train_tokenizer(0) for _ in range(2))
    assert first == second
    config = train.small_config(tokenizer_training.VOCAB)
    tokenizer = Tokenizer(SentencePiece(first), config)
    assert len(tokenizer.encode("a large red circle on a striped ground")) == 8
    assert tokenizer.size == config.image_token == tokenizer_training.VOCAB


def test_the_learning_rate():
    rates = [train.learning_rate(step, 1000, 1.0, 100) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[99] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))
    assert 0.01 <= rates[-1] < 0.011
