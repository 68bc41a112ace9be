"""Stage 3: the numbers of each bundle that runs wholly on the device, against the NumPy reference."""

from collections.abc import Sequence
from functools import cache

import numpy as np

from numpy_ref import checkpoint as checkpoints
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.engine import Engine, NumpyEngine
from numpy_ref.generate import answers, generate, pad_prompts
from numpy_ref.model import paligemma
from numpy_ref.model.layers import Pair, Params
from numpy_ref.model.sampling import Sampling, log_probability, sample
from numpy_ref.tokenizer import Tokenizer, known_ids

from ..bundle import Bundle, weights
from ..session import Session, cuda
from ..session.engine import Cache
from ..verify import BUDGETS, STEPS, relative_error
from . import models
from .stage import LABEL, Found, Settings

LIMIT, PART_LIMIT = 150, 40
BATCHES = ((4,), (3, 9, 5))  # tokens of the prompts, behind the picture
PROMPTS = ("caption en", "detect star", "segment star", "answer en how many shapes are there?")
NEW_TOKENS = 24
#: Temperature, top-k, top-p.
DRAWS = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 40, 0.9), (2.0, 5, 1.0), (1.0, 0, 0.5))
UNIFORMS = 40
EDGE = 1e-5  # a uniform number this close to where the next token begins may be rounded past it
LOGPROB_BUDGET = 1e-4  # of a log-probability, from the same logits


def parts(settings: Settings) -> list[str]:
    return models.shipped_names()


def run(part: str, settings: Settings, found: Found) -> None:
    bundle = models.shipped(settings, part)
    engine, (precision, _) = models.opened(bundle, settings), models.form(part.split()[0])
    budget, errors = budget_of(precision), {}
    for sizes in BATCHES:
        errors |= compare(engine, rounded(precision), sizes)
        worst = max(errors.values())
        found.add(budget=budget, errors=errors, worst=worst, differs=not worst <= budget)
    found.add(**greedy(engine, bundle, budget))
    found.add(**draws(engine))
    found.add(differs=found["differs"] or bool(found["tokens_differ"] or found["draws_differ"]))


def budget_of(precision: str) -> float:
    """What `--verify` allows; of a precision that it has no line for, the widest of those in its name."""
    known = [BUDGETS[name] for name in precision.split("-") if name in BUDGETS]
    return BUDGETS.get(precision) or max(known)


@cache
def rounded(precision: str) -> tuple[PaliGemmaConfig, Params]:
    """The shipped model with the weights that the bundle has: rounding those is not an error of the graph."""
    checkpoint = checkpoints.load()
    if precision not in weights.FLOATS:
        return checkpoint.config, checkpoint.params
    dtype = weights.FLOATS[precision].numpy()
    flat = {path: array.astype(dtype) for path, array in checkpoints.flatten(checkpoint.params).items()}
    return checkpoint.config, checkpoints.unflatten(flat)


def compare(engine: Session, model: tuple[PaliGemmaConfig, Params], sizes: Sequence[int]) -> dict[str, float]:
    """Relative errors of logits and cache of prefill and of several decode steps, by name."""
    config, params = model
    batch, random = len(sizes), np.random.default_rng(len(sizes))
    drawable, size = np.flatnonzero(known_ids(config)), config.vision.image_size
    image = [config.image_token] * config.vision.patches
    ids, lengths = pad_prompts(
        [[*image, config.bos, *random.choice(drawable, n - 1).tolist()] for n in sizes], config.pad
    )
    pixels = random.uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
    capacity, errors = ids.shape[1] + STEPS, {}
    expected, cache = paligemma.prefill(params, config, pixels.astype(np.float64), ids, lengths, capacity)
    logits, buffers = engine.prefill(pixels, ids, lengths, capacity)
    errors[f"batch {batch} prefill logits"] = relative_error(cuda.on_host(logits), expected)
    errors[f"batch {batch} prefill cache"] = cache_error(cache, buffers, lengths)
    for step in range(STEPS):
        token = random.choice(drawable, (batch, 1))
        expected, cache = paligemma.decode(params, config, token, lengths, cache)
        logits, buffers = engine.decode(token, lengths, buffers)
        lengths = lengths + 1
        errors[f"batch {batch} decode {step + 1} logits"] = relative_error(cuda.on_host(logits), expected)
    errors[f"batch {batch} decode {STEPS} cache"] = cache_error(cache, buffers, lengths)
    return errors


def cache_error(cache: list[Pair], buffers: Cache, lengths: np.ndarray) -> float:
    """The largest relative error of a layer's keys or values, each row up to its length."""

    def filled(array):
        rows = zip(array, lengths, strict=True)
        return np.concatenate([row[:, :length].ravel() for row, length in rows]).astype(np.float64)

    def error(i, kind, array):
        return relative_error(filled(cuda.on_host(buffers.buffers[f"{i}.{kind}"])), filled(array))

    return max(
        error(i, kind, array)
        for i, layer in enumerate(cache)
        for kind, array in zip(("key", "value"), layer, strict=True)
    )


# --- tokens ------------------------------------------------------------------------------------------------


@cache
def reference() -> NumpyEngine:
    return NumpyEngine(checkpoints.load())


def greedy(engine: Session, bundle: Bundle, budget: float) -> dict:
    """Greedy answers about the example picture, beside the reference's; a tie within the budget may go either way."""
    tokenizer, pixels = Tokenizer.load(bundle.path, engine.config), models.picture(engine)
    same, ties, differ = 0, 0, []
    for text in PROMPTS:
        prompt, known = tokenizer.prompt(text), tokenizer.known()
        expected = spoken(reference(), pixels, prompt, known)
        actual = spoken(engine, pixels, prompt, known)
        if actual == expected:
            same += 1
        elif is_tie(pixels, prompt, expected, actual, budget):
            ties += 1
        else:
            differ.append({"prompt": text, "expected": expected, "actual": actual})
    return {"tokens_same": same, "tokens_tied": ties, "tokens_differ": differ}


def spoken(engine: Engine, pixels: np.ndarray, prompt: list[int], known: np.ndarray) -> list[int]:
    return answers(list(generate(engine, pixels, [prompt], known, NEW_TOKENS)), engine.config.ends)[0]


def is_tie(pixels: np.ndarray, prompt: list[int], expected: list[int], actual: list[int], budget: float) -> bool:
    """Whether the reference's logits for two answers, where they part, are closer than twice the budget."""
    engine = reference()
    ends = ([*expected, engine.config.eos], [*actual, engine.config.eos])
    at = next(i for i, (a, b) in enumerate(zip(*ends, strict=False)) if a != b)
    ids, lengths = pad_prompts([[*prompt, *expected[:at]]], engine.config.pad)
    logits, _ = engine.prefill(pixels, ids, lengths, ids.shape[1])
    return bool(abs(logits[0, ends[0][at]] - logits[0, ends[1][at]]) <= 2 * budget * np.abs(logits).max())


def draws(engine: Session) -> dict:
    """Tokens drawn on the device from fixed uniform numbers, and their log-probabilities, beside the reference's.

    The reference draws from the same logits.
    """
    config, random = engine.config, np.random.default_rng(5)
    tokenizer = Tokenizer.load(engine.bundle.path, config)
    ids, lengths = pad_prompts([tokenizer.prompt(text) for text in PROMPTS[:3]], config.pad)
    logits, _ = engine.prefill(models.picture(engine, len(ids)), ids, lengths, ids.shape[1] + 1)
    values, known, edges, differ = cuda.on_host(logits), tokenizer.known(), 0, []
    worst = 0.0  # error of a log-probability
    for temperature, top_k, top_p in DRAWS:
        for _ in range(UNIFORMS):
            uniform = random.random(len(ids), np.float32)
            actual, logprob = engine.draw(logits, known, Sampling(temperature, top_k, top_p), uniform)
            worst = max(worst, float(np.abs(logprob - log_probability(values, actual)).max()))
            nearby = [np.clip(uniform + shift, 0, 1 - 2**-24).astype(np.float32) for shift in (0, -EDGE, EDGE)]
            allowed = [sample(values, known, temperature, top_k, top_p, number) for number in nearby]
            edges += int((actual != allowed[0]).sum())
            if not np.any([actual == tokens for tokens in allowed], 0).all():
                drawn = {"drawn": actual.tolist(), "expected": allowed[0].tolist(), "uniform": uniform.tolist()}
                differ.append({"temperature": temperature, "top_k": top_k, "top_p": top_p, **drawn})
    if not worst <= LOGPROB_BUDGET:
        differ.append({"log_probability_error": worst})
    count = len(DRAWS) * UNIFORMS * len(ids)
    return {"draws": count, "draws_at_an_edge": edges, "draws_differ": differ[:5], "log_probability_error": worst}


def lines(part: str, found: dict) -> list[str]:
    if "draws" not in found:
        return [f"{part:<{LABEL}}worst error {found['worst']:.1e} of {found['budget']:.0e}"]
    worst = max(found["errors"], key=found["errors"].get)
    tokens = f"{found['tokens_same']} of {len(PROMPTS)} answers the same"
    tokens += f", {found['tokens_tied']} part at a tie" if found["tokens_tied"] else ""
    tokens += f", {len(found['tokens_differ'])} DIFFER" if found["tokens_differ"] else ""
    drawn = "draws DIFFER" if found["draws_differ"] else f"{found['draws']} draws the same"
    text = f"{part:<{LABEL}}error {found['worst']:.1e} of {found['budget']:.0e} ({worst}); {tokens}; {drawn}"
    return [text]
