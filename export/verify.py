"""Proof that a bundle is the model, against the NumPy reference in float64.

Two views of it. Part by part: every function of the forward pass and of one decode step is built as a graph over
the bundle's own weights, given the reference's input, and compared at every tap; one layer is in memory at a time,
and an error stays where it arises. End to end: the shipped, optimised graphs run as a host runs them, prefill and
several decode steps that feed on each other, and logits and cache are compared.
"""

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
from tqdm import tqdm

from numpy_ref import checkpoint as checkpoints
from numpy_ref.errors import PaliGemmaError
from numpy_ref.generate import NumpyEngine, pad_prompts
from numpy_ref.model import layers, paligemma, segmentation
from numpy_ref.tokenizer import known_ids

from . import drift
from .bundle import weights
from .model import graphs
from .runtime import session_options
from .session import CPU, CUDA, Session, choose_provider

#: Largest |a - b| / max|reference| of any tap, by precision of the weights. Worst of 20 random models
#: (python -m tests.calibrate): float32 1.1e-6, float16 2.1e-3, bfloat16 2.1e-2, int8 and int4 7.6e-2.
#: What int4 costs shows in a trained model, on whose logits for noise it is off by 0.4.
BUDGETS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2, "int4": 0.8}
BUDGETS |= {"int4-float16": BUDGETS["int4"], "int4-bfloat16": BUDGETS["int4"]}
#: What few bits may cost on pictures of noise, where a model is least sure: mean divergence from the reference in nats.
#: A quantized bundle of a trained model has less on pictures of its kind (python -m export.drift).
DIVERGENCES = {"int8": 0.05, "int4": 0.5, "int4-float16": 0.5, "int4-bfloat16": 0.5}
STEPS, EXAMPLES = 4, 3
# The slow evaluator of the onnx package stands in where the runtime has no kernel: bfloat16 without a GPU.
SMALL = 20_000_000


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst tap of a part of the model."""

    stage: str
    part: str
    taps: int
    error: float
    worst: str
    trouble: str = ""  # what is not finite, if anything is

    def figures(self) -> dict:
        """What bundle.json keeps of it: nothing is written where there was trouble."""
        return {name: value for name, value in asdict(self).items() if name != "trouble"}


@dataclass(frozen=True)
class Part:
    """One call of the forward pass: `numpy_ref.<module>.<function>(p, **arguments)` and its namesake."""

    stage: str
    name: str
    module: str
    function: str
    weights: str  # the path of p
    arguments: dict
    taps: bool = False
    leaf: bool = False  # p is spread as keyword arguments

    def call(self, package: str, *first, p=None, **arguments):
        """Call the function of `numpy_ref` or `export`."""
        function = getattr(importlib.import_module(f"{package}.model.{self.module}"), self.function)
        return function(*first, **(p if self.leaf else {"p": p}), **arguments)


def verify(bundle, checkpoint) -> list[dict]:
    """Compare an opened bundle with the checkpoint it was made from. Prints the table and returns its rows.

    Raises PaliGemmaError if a budget is exceeded, a tap is absent, or this machine cannot run the precision.
    """
    budget = BUDGETS[bundle.description.precision]
    compared = rows(bundle, checkpoint)
    print(table(compared, budget))
    failed = [
        f"{row.stage} {row.part} {row.trouble or f'{row.error:.1e}'}" for row in compared if not row.error <= budget
    ]
    if failed:
        # Products and cache outgrow float16, and so does a residual stream that is in it.
        half = weights.stream_dtype(bundle.description.precision) == ir.DataType.FLOAT16
        other = "--residual float32" if bundle.description.residual == "float16" else "bfloat16 or float32"
        overflow = half and any(row.trouble for row in compared)
        advice = f"; float16 ends at {np.finfo(np.float16).max}, export {other}" if overflow else ""
        told = f"the bundle differs from the reference by more than {budget:.0e}"
        raise PaliGemmaError(f"{told}: {'; '.join(failed)}{advice}")
    results = [{**row.figures(), "budget": budget} for row in compared]
    if (precision := bundle.description.precision) in DIVERGENCES:
        found = drift_of(bundle, checkpoint)
        print(drift.table(precision, found))
        if not found["kl_mean"] <= DIVERGENCES[precision]:
            raise PaliGemmaError(f"the bundle drifts by {found['kl_mean']} nats, more than {DIVERGENCES[precision]}")
        results.append({"stage": "drift", "part": "distributions", **found})
    return results


def check(checkpoint, precision) -> None:
    """Raise PaliGemmaError if this machine cannot verify a bundle of this precision."""
    if not precision.endswith("bfloat16") or choose_provider("auto") == CUDA:
        return
    if precision in weights.QUANTIZED or _size(checkpoint) > SMALL:
        raise PaliGemmaError(f"--verify in {precision} needs a CUDA device for this model: the CPU has no kernels")


def rows(bundle, checkpoint) -> list[Row]:
    """Both views of a bundle: its parts, and, where this machine has the kernels, end to end.

    A quantized one is seen end to end alone, against the weights before they were rounded.
    """
    precision = bundle.description.precision
    half = weights.stream_dtype(precision) != ir.DataType.FLOAT
    provider = choose_provider("auto") if half else CPU
    check(checkpoint, precision)
    if precision in weights.QUANTIZED:
        return compare_stages(checkpoint, bundle, provider)
    rounded = _rounded(checkpoint, precision)
    compared = list(compare_parts(rounded, bundle, provider))
    if precision != "bfloat16" or provider == CUDA:
        compared += compare_stages(rounded, bundle, provider)
    return compared


def compare_parts(checkpoint, bundle, provider=CPU) -> Iterator[Row]:
    """One row a part: its worst tap."""
    precision = bundle.description.precision
    config, dtype = checkpoint.config, weights.FLOATS[precision]
    tensors = weights.apart(config, weights.plan(config, precision, bundle.operators), bundle.path)
    total = 2 + config.vision.depth + 2 * (config.text.depth + 2) + 2
    walk = parts(checkpoint)
    with tqdm(total=total, desc="verifying", unit="part", leave=False, disable=None, delay=1) as bar:
        part = next(walk)
        while part:
            recorder = _Recorder()
            taps = {"tap": recorder} if part.taps else {}
            p = _at(checkpoint.params, part.weights)
            result = part.call("numpy_ref", p=p, **part.arguments, **taps)
            reference = {**recorder.values, **_named(result)}
            actual = _run_part(part, p, tensors, dtype, bundle.path, provider)
            yield _row(part.stage, part.name, reference, actual)
            bar.update()
            try:
                part = walk.send(result)
            except StopIteration:
                part = None


def parts(checkpoint):
    """The calls of prefill and of one decode step, in order: yields a Part, is sent the reference's result."""
    config, inputs = checkpoint.config, example(checkpoint.config)
    vision, text, pixels = config.vision, config.text, inputs.pixel_values.astype(np.float64)

    x = yield Part("prefill", "vision.patch_embed", "siglip", "patch_embed", "vision.patch_embed",
                   {"config": vision, "pixel_values": pixels})  # fmt: skip
    x = x + checkpoint.params["vision"]["position_embedding"].astype(np.float64)
    for i in range(vision.depth):
        path = f"vision.blocks.{i}"
        x = yield Part("prefill", path, "siglip", "block", path, {"config": vision, "x": x}, taps=True)
    x = yield Part(
        "prefill", "vision.norm", "layers", "layer_norm", "vision.norm", {"x": x, "eps": vision.eps}, leaf=True
    )
    image = yield Part("prefill", "projector", "layers", "linear", "projector", {"x": x}, leaf=True)

    def embed(stage, ids):
        return Part(stage, "text.embedding", "gemma", "embed", "text",
                    {"config": text, "ids": ids, "dtype": np.float64})  # fmt: skip

    words = yield embed("prefill", inputs.input_ids[:, vision.patches :])
    size = inputs.input_ids.shape[1]
    positions = np.broadcast_to(np.arange(size)[None], inputs.input_ids.shape)
    masks = {w: paligemma.prefix_mask(inputs.lengths, inputs.lengths, size, w) for w in {*text.windows, None}}
    x, cache = yield from _decoder("prefill", text, np.concatenate([image, words], 1), positions, masks)
    cache = [tuple(paligemma.pad_cache(array, inputs.capacity) for array in layer) for layer in cache]
    yield Part("prefill", "logits", "gemma", "logits", "text",
               {"config": text, "x": x[np.arange(len(x)), inputs.lengths - 1]})  # fmt: skip

    x = yield embed("decode", inputs.steps[0])
    masks = {w: paligemma.decode_mask(inputs.lengths, inputs.capacity, w) for w in {*text.windows, None}}
    x, _ = yield from _decoder("decode", text, x, inputs.lengths[:, None], masks, cache, inputs.lengths)
    yield Part("decode", "logits", "gemma", "logits", "text", {"config": text, "x": x[:, 0]})


def _decoder(stage, config, x, positions, masks, cache=None, start=None):
    rotary = layers.rope_angles(positions, config.head_dim, config.rope_base, np.float64)
    caches = []
    for i in range(config.depth):
        arguments = {"config": config, "x": x, "rotary": rotary, "mask": masks[config.window(i)]}
        if cache is not None:
            arguments |= {"cache": cache[i], "start": start}
        path = f"text.blocks.{i}"
        x, layer = yield Part(stage, path, "gemma", "block", path, arguments, taps=True)
        caches.append(layer)
    x = yield Part(stage, "text.norm", "layers", "rms_norm", "text.norm", {"x": x, "eps": config.eps}, leaf=True)
    return x, caches


def compare_stages(checkpoint, bundle, provider=CPU) -> list[Row]:
    """Logits and cache of the shipped graphs, run as a host runs them."""
    config, inputs = checkpoint.config, example(checkpoint.config)
    session = Session(bundle, "cuda" if provider == CUDA else "cpu")
    expected, cache = paligemma.prefill(checkpoint.params, config, *inputs.prefill(np.float64))
    logits, buffers = session.prefill(*inputs.prefill(np.float32))
    rows = [_row("end to end", "prefill logits", {"logits": expected}, {"logits": logits})]
    rows.append(_row("end to end", "prefill cache", *_caches(cache, buffers, inputs.lengths)))
    lengths = inputs.lengths
    for step, ids in enumerate(inputs.steps):
        expected, cache = paligemma.decode(checkpoint.params, config, ids, lengths, cache)
        logits, buffers = session.decode(ids, lengths, buffers)
        lengths = lengths + 1
        rows.append(_row("end to end", f"decode {step + 1} logits", {"logits": expected}, {"logits": logits}))
    rows.append(_row("end to end", f"decode {STEPS} cache", *_caches(cache, buffers, lengths)))
    if session.masks:
        codes = np.random.default_rng(0).integers(0, segmentation.CODES, (4, segmentation.CELLS**2))
        expected = segmentation.decoder_of(checkpoint)(codes)
        rows.append(_row("end to end", "masks", {"masks": expected}, {"masks": session.masks(codes)}))
    return rows


def drift_of(bundle, checkpoint) -> dict:
    """How far a quantized bundle's distributions are from the reference's, over the answers to a few examples."""
    found, config = drift.Drift(), checkpoint.config
    provider = "cuda" if bundle.description.precision.endswith("bfloat16") else "cpu"  # which has no kernels for it
    reference, session, known = NumpyEngine(checkpoint), Session(bundle, provider), known_ids(config)
    for seed in range(EXAMPLES):
        inputs = example(config, seed)
        prompts = [row[:length].tolist() for row, length in zip(inputs.input_ids, inputs.lengths, strict=True)]
        drift.follow(reference, session, inputs.pixel_values, prompts, known, found, STEPS + 1)
    return found.figures()


@dataclass(frozen=True)
class Example:
    """Seeded inputs: two rows of unequal length, and the tokens of the decode steps."""

    pixel_values: np.ndarray
    input_ids: np.ndarray
    lengths: np.ndarray
    capacity: int
    steps: list[np.ndarray]

    def prefill(self, dtype):
        """The arguments of prefill, pictures in `dtype`."""
        return self.pixel_values.astype(dtype), self.input_ids, self.lengths, self.capacity


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
    lines = [f"{'stage':<12}{'part':<22}{'taps':>5}  {'error':>8}  {'budget':>8}        worst tap"]
    for row in rows:
        verdict = "ok  " if row.error <= budget else "FAIL"
        worst = row.worst if row.taps > 1 else ""
        numbers = f"{row.taps:>5}  {row.error:>8.1e}  {budget:>8.0e}"
        lines.append(f"{row.stage:<12}{row.part:<22}{numbers}  {verdict}  {worst}".rstrip())
    return "\n".join(lines)


class _Recorder:
    def __init__(self):
        self.values = {}

    def __call__(self, name, value):
        self.values[name] = value
        return value


def _rounded(checkpoint, precision):
    """The checkpoint as its bundle stores it: what rounding does to the weights is not an error of the graph."""
    if precision == "float32":
        return checkpoint
    dtype = weights.FLOATS[precision].numpy()
    flat = {path: array.astype(dtype, copy=False) for path, array in checkpoints.flatten(checkpoint.params).items()}
    return replace(checkpoint, params=checkpoints.unflatten(flat))


def _size(checkpoint) -> int:
    return sum(array.size for array in checkpoints.flatten(checkpoint.params).values())


def _at(tree, path: str):
    for step in path.split("."):
        tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    return tree


def _named(result, name="output") -> dict:
    """Arrays of a nested result by name, as `graphs.trace` names them."""
    if isinstance(result, tuple | list):
        return {k: v for i, item in enumerate(result) for k, v in _named(item, f"{name}.{i}").items()}
    return {name: result}


def _run_part(part, p, tensors, dtype, directory, provider) -> dict:
    """Build the part over the bundle's weights and run it; its taps and outputs."""
    used = {path: tensors(f"{part.weights}.{path}") for path in checkpoints.flatten(p) if _is_used(part, path)}
    arguments = _lower(part.arguments, np.float32)  # the stream; only the cache is in half precision
    if "cache" in arguments:
        arguments["cache"] = _lower(arguments["cache"], dtype.numpy())

    def function(op, p, **keywords):
        return part.call("export", op, p=p, **keywords)

    model, feeds = graphs.trace(function, arguments, used, part.taps)
    values = _evaluate(model, feeds, directory, provider, dtype)
    return {name.removeprefix("out."): np.asarray(value, np.float64) for name, value in values.items()}


def _is_used(part, path) -> bool:
    """Embedding and logits take the decoder's p, but nothing of its layers."""
    return part.weights != "text" or not path.startswith(("blocks.", "norm."))


def _lower(tree, dtype):
    if isinstance(tree, np.ndarray):
        with np.errstate(over="ignore"):  # an infinity shows in the taps
            return tree.astype(dtype) if tree.dtype.kind == "f" else tree
    if isinstance(tree, dict):
        return {key: _lower(value, dtype) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_lower(value, dtype) for value in tree)
    return ir.DataType.from_numpy(np.dtype(dtype)) if tree is np.float64 else tree


def _evaluate(model, feeds, directory, provider, dtype) -> dict:
    """Run a model whose weights lie in `directory`, unoptimised."""
    if dtype == ir.DataType.BFLOAT16 and provider != CUDA:
        proto = onnx.load_from_string(graphs.serialize(model))
        onnx.load_external_data_for_model(proto, str(directory))
        evaluator = onnx.reference.ReferenceEvaluator(proto)
        return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
    entries = {
        "session.model_external_initializers_file_folder_path": str(directory),
        "session.disable_prepacking": "1",
    }
    options = session_options(entries, optimized=False)
    session = onnxruntime.InferenceSession(graphs.serialize(model), options, providers=[provider])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))


def _caches(cache, buffers, lengths):
    """Both caches by name, each row up to its length: what lies behind has no meaning."""
    reference = {
        f"{i}.{kind}": array
        for i, layer in enumerate(cache)
        for kind, array in zip(("key", "value"), layer, strict=True)
    }

    def filled(array):
        rows = zip(array, lengths, strict=True)
        return np.concatenate([row[:, :length].ravel() for row, length in rows]).astype(np.float64)

    return (
        {name: filled(array) for name, array in reference.items()},
        {name: filled(array) for name, array in buffers.numpy().items()},
    )


def _row(stage, part, reference, values) -> Row:
    if reference.keys() != values.keys():
        names = ", ".join(sorted(reference.keys() ^ values.keys()))
        raise PaliGemmaError(f"{stage} {part}: graph and reference do not have the same taps: {names}")
    errors = {name: relative_error(values[name], reference[name]) for name in reference}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else np.inf)
    return Row(stage, part, len(errors), errors[worst], worst, _trouble(reference, values))


def _trouble(reference, values) -> str:
    """The first tap that holds a NaN or infinity, and how large the reference is there; nothing if all are finite."""
    for name, expected in reference.items():
        if not np.isfinite(values[name]).all():
            return f"{name} is not finite where the reference reaches {np.abs(expected).max():.3g}"
    return ""


def relative_error(value, reference) -> float:
    """max|a - b| / max|b|; infinite where shapes differ or a value is not finite."""
    if value.shape != reference.shape or not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - reference).max() / max(np.abs(reference).max(), np.finfo(np.float64).tiny))
