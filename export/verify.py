"""Proof that a bundle is the model: every named intermediate value against the NumPy reference in float64.

Two views of the graphs are compared. With taps and without optimisation, each tap of prefill and of one decode
step. As shipped and optimised, logits and cache of prefill and of several decode steps that feed on each other.
"""

from dataclasses import dataclass

import numpy as np
import onnxruntime

from numpy_ref import paligemma
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import pad_prompts
from numpy_ref.tokenizer import known_ids

from . import bundle as bundles
from . import graphs, weights
from .session import CPU, Session

#: Largest |a - b| / max|reference| of any tap. The worst float32 tap of 20 random models measured 1.6e-6.
BUDGETS = {"float32": 1e-4}
STEPS = 4


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst tap of a part of the model."""

    stage: str
    part: str
    taps: int
    error: float
    worst: str


def verify(checkpoint, directory, precision="float32") -> list[dict]:
    """Compare the bundle in `directory` with the reference. Prints the table and returns its rows.

    Raises PaliGemmaError if a budget is exceeded or a tap is absent.
    """
    rows = [*compare_taps(checkpoint, directory), *compare_stages(checkpoint, directory)]
    budget = BUDGETS[precision]
    print(table(rows, budget))
    failed = [f"{row.stage} {row.worst} {row.error:.1e}" for row in rows if not row.error <= budget]
    if failed:
        raise PaliGemmaError(f"the bundle differs from the reference by more than {budget:.0e}: {'; '.join(failed)}")
    return [{**vars(row), "budget": budget} for row in rows]


def compare_taps(checkpoint, directory) -> list[Row]:
    """Every tap of prefill and of one decode step, by part of the model."""
    config, inputs = checkpoint.config, example(checkpoint.config)
    reference = _Recorder()
    _, cache = paligemma.prefill(checkpoint.params, config, *inputs.prefill(np.float64), tap=reference)
    outputs = _run_taps(graphs.prefill_model, config, directory, inputs.prefill_feeds())
    rows = _by_part("prefill taps", reference.values, outputs)

    cache = [tuple(array.astype(np.float32) for array in layer) for layer in cache]
    feeds = {"input_ids": inputs.steps[0], "lengths": inputs.lengths, **_past(cache)}
    reference = _Recorder()
    cache = [tuple(array.astype(np.float64) for array in layer) for layer in cache]
    paligemma.decode(checkpoint.params, config, inputs.steps[0], inputs.lengths, cache, tap=reference)
    return rows + _by_part("decode taps", reference.values, _run_taps(graphs.decode_model, config, directory, feeds))


def compare_stages(checkpoint, directory) -> list[Row]:
    """Logits and cache of the shipped graphs, run as a host runs them."""
    config, inputs = checkpoint.config, example(checkpoint.config)
    session = Session(bundles.load(directory), "cpu")
    expected, cache = paligemma.prefill(checkpoint.params, config, *inputs.prefill(np.float64))
    logits, buffers = session.prefill(*inputs.prefill(np.float32))
    rows = [_row("prefill", "logits", {"logits": expected}, {"logits": logits})]
    rows.append(_row("prefill", "cache", *_caches(cache, buffers, inputs.lengths)))
    lengths = inputs.lengths
    for step, ids in enumerate(inputs.steps):
        expected, cache = paligemma.decode(checkpoint.params, config, ids, lengths, cache)
        logits, buffers = session.decode(ids, lengths, buffers)
        lengths = lengths + 1
        rows.append(_row(f"decode {step + 1}", "logits", {"logits": expected}, {"logits": logits}))
    rows.append(_row(f"decode {STEPS}", "cache", *_caches(cache, buffers, lengths)))
    return rows


@dataclass(frozen=True)
class Example:
    """Seeded inputs: two rows of unequal length, and the tokens of the decode steps."""

    pixel_values: np.ndarray
    input_ids: np.ndarray
    lengths: np.ndarray
    capacity: int
    steps: list[np.ndarray]

    def prefill(self, dtype):
        return self.pixel_values.astype(dtype), self.input_ids, self.lengths, self.capacity

    def prefill_feeds(self):
        names = ("pixel_values", "input_ids", "lengths", "capacity")
        return dict(zip(names, (*self.prefill(np.float32)[:3], np.array(self.capacity)), strict=True))


def example(config, seed=0) -> Example:
    """Pictures of noise and prompts of random ids."""
    random = np.random.default_rng(seed)
    drawable = np.flatnonzero(known_ids(config))
    image = [config.image_token] * config.vision.patches
    prompts = [[*image, config.bos, *random.choice(drawable, size).tolist()] for size in (3, 6)]
    input_ids, lengths = pad_prompts(prompts, config.pad)
    size = config.vision.image_size
    pixels = random.uniform(-1, 1, (len(prompts), 3, size, size)).astype(np.float32)
    steps = [random.choice(drawable, (len(prompts), 1)) for _ in range(STEPS)]
    return Example(pixels, input_ids, lengths, input_ids.shape[1] + STEPS, steps)


def table(rows, budget) -> str:
    """The rows as text."""
    lines = [f"{'stage':<14}{'part':<22}{'taps':>5}  {'error':>8}  {'budget':>8}      worst"]
    for row in rows:
        verdict = "ok  " if row.error <= budget else "FAIL"
        lines.append(
            f"{row.stage:<14}{row.part:<22}{row.taps:>5}  {row.error:>8.1e}  {budget:>8.0e}  {verdict} {row.worst}"
        )
    return "\n".join(lines)


class _Recorder:
    def __init__(self):
        self.values = {}

    def __call__(self, name, value):
        self.values[name] = value
        return value


def _run_taps(make, config, directory, feeds) -> dict:
    """Build a graph with taps over the bundle's weights, run it unoptimised, and return the taps."""
    placed = weights.plan(config)
    model = make(config, weights.initializer(placed), taps=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    session = onnxruntime.InferenceSession(graphs.serialize(model), options, providers=[CPU])
    names = [output.name for output in session.get_outputs() if output.name.startswith("tap.")]
    return {name.removeprefix("tap."): value for name, value in zip(names, session.run(names, feeds), strict=True)}


def _past(cache) -> dict:
    return {
        f"past_key_values.{i}.{kind}": array
        for i, layer in enumerate(cache)
        for kind, array in zip(("key", "value"), layer, strict=True)
    }


def _caches(cache, buffers, lengths):
    """Both caches by name, each row up to its length: what lies behind has no meaning."""
    reference = {name.removeprefix("past_key_values."): array for name, array in _past(cache).items()}

    def filled(array):
        return np.concatenate([row[:, :length].ravel() for row, length in zip(array, lengths, strict=True)])

    return (
        {name: filled(array) for name, array in reference.items()},
        {name: filled(array) for name, array in buffers.numpy().items()},
    )


def _by_part(stage, reference, values) -> list[Row]:
    """Group taps: each block of a tower is a part, and so is whatever lies outside the blocks."""
    if reference.keys() != values.keys():
        names = ", ".join(sorted(reference.keys() ^ values.keys()))
        raise PaliGemmaError(f"{stage}: graph and reference do not have the same taps: {names}")
    parts: dict[str, list[str]] = {}
    for name in reference:
        steps = name.split(".")
        parts.setdefault(".".join(steps[:3]) if "blocks" in steps else name, []).append(name)
    return [
        _row(stage, part, {name: reference[name] for name in names}, {name: values[name] for name in names})
        for part, names in parts.items()
    ]


def _row(stage, part, reference, values) -> Row:
    errors = {name: relative_error(values[name], reference[name]) for name in reference}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else np.inf)
    return Row(stage, part, len(errors), errors[worst], worst)


def relative_error(value, reference) -> float:
    """max|a - b| / max|b|; infinite where shapes differ or a value is not finite."""
    if value.shape != reference.shape or not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - reference).max() / max(np.abs(reference).max(), np.finfo(np.float64).tiny))
