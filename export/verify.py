"""Proof that a bundle is the model, against the NumPy reference in float64.

Two views of it. Part by part: the bundle's own graphs are cut at their taps, and each part, a layer for instance, is
given the reference's values where it was cut off and compared at all of its taps; one part is in memory at a time, and
an error stays where it arises. End to end: the shipped, optimised graphs run as a host runs them, prefill, whole and in
its two halves, and several decode steps that feed on each other, then the same tokens at once (extend), and logits and
cache are compared.
"""

import base64
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
from numpy.typing import DTypeLike
from PIL import Image
from tqdm import tqdm

from numpy_ref import checkpoint as checkpoints
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.checkpoint.adapter import in_memory
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.engine import Engine, NumpyEngine
from numpy_ref.errors import PaliGemmaError
from numpy_ref.files import read_json
from numpy_ref.generate import pad_prompts
from numpy_ref.model import paligemma, segmentation
from numpy_ref.model.layers import Pair
from numpy_ref.tokenizer import Tokenizer, known_ids

from . import drift
from .bundle import Bundle, weights
from .bundle.example import FILE, NEW_TOKENS
from .model import graphs
from .model.layers import PORTABLE
from .model.paligemma import FEATURES
from .runtime import session_options
from .session import CPU, CUDA, Session, choose_provider, cuda

#: Largest |a - b| / max|reference| of any tap, by precision of the weights. Worst of 20 random models
#: (python -m tests.calibrate): float32 1.1e-6, float16 2.1e-3, bfloat16 2.1e-2, int8 and int4 7.6e-2.
#: Parts of fused graphs, with heads of 16, alone: float32 1.0e-6, float16 2.2e-3, int8 6.0e-2, int4 3.6e-1.
#: What int4 costs shows in a trained model, on whose logits for noise it is off by 0.4, and int2 calibrated by 0.8.
BUDGETS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "int8": 0.2, "int4": 0.8, "int2": 1.6}
BUDGETS |= {"int4-float16": BUDGETS["int4"], "int4-bfloat16": BUDGETS["int4"]}
#: What few bits may cost on pictures of noise, where a model is least sure: mean divergence from the reference in nats.
#: A quantized bundle of a trained model has less on pictures of its kind (python -m export.drift).
DIVERGENCES = {"int8": 0.05, "int4": 0.5, "int2": 0.5, "int4-float16": 0.5, "int4-bfloat16": 0.5}
STEPS, EXAMPLES = 4, 3
# The slow evaluator of the onnx package stands in where the runtime has no kernel: bfloat16 without a GPU.
SMALL = 20_000_000
# Taps inside of a layer are compared together; every other tap is a part of its own.
_LAYER = re.compile(r"(.*\bblocks\.\d+)\..*")


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst tap of a part of the model."""

    stage: str
    part: str
    operators: str  # of the graph that was run
    taps: int
    error: float
    worst: str
    unseen: tuple[str, ...] = ()  # taps of the reference whose values that graph does not have
    trouble: str = ""  # what is not finite, if anything is

    def figures(self) -> dict:
        """What bundle.json keeps of it: nothing is written where there was trouble."""
        return {name: value for name, value in asdict(self).items() if name != "trouble"}


@dataclass(frozen=True)
class Part:
    """A layer of a graph, or what lies between layers: cut off at taps of the parts before it."""

    name: str
    taps: list[str]
    model: ir.Model  # outputs are tap.{name}, and present.{i}.key and value of a decoder layer
    inputs: dict[str, str]  # name of the model's input -> the tap, or input of the whole graph, that it is


Run = Callable[[ir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]]  # a model and its inputs -> its outputs


def verify(bundle: Bundle, checkpoint: Checkpoint) -> list[dict]:
    """Compare an opened bundle with the checkpoint it was made from. Prints the table and returns its rows.

    Raises PaliGemmaError if a budget is exceeded, a tap is absent, or this machine cannot run the precision.
    """
    precision, compared = bundle.description.precision, rows(bundle, checkpoint)
    # Products and cache outgrow float16, and so does a residual stream that is in it.
    advice = "--residual float32" if bundle.description.residual == "float16" else "bfloat16 or float32"
    results = judge(compared, precision, notes(compared, bundle), advice)
    if precision not in DIVERGENCES:
        return results
    provider = "cuda" if precision.endswith("bfloat16") else "cpu"  # which has no kernels for it
    return [*results, judge_drift(Session(bundle, provider), checkpoint, precision)]


def judge(compared: list[Row], precision: str, remarks: Sequence[str] = (), instead: str = "float32") -> list[dict]:
    """Print the table and what there is to say about it, and give the rows as they are kept.

    Raises PaliGemmaError if one exceeds the budget; `instead` is what to export where it is float16 that overflows.
    """
    budget = BUDGETS[precision]
    print(table(compared, budget))
    for line in remarks:
        print(line)
    failed = [
        f"{row.stage} {row.part} {row.trouble or f'{row.error:.1e}'}" for row in compared if not row.error <= budget
    ]
    if failed:
        overflow = weights.stream_dtype(precision) == ir.DataType.FLOAT16 and any(row.trouble for row in compared)
        advice = f"; float16 ends at {np.finfo(np.float16).max}, export {instead}" if overflow else ""
        difference = f"the bundle differs from the reference by more than {budget:.0e}"
        raise PaliGemmaError(f"{difference}: {'; '.join(failed)}{advice}")
    return [{**row.figures(), "budget": budget} for row in compared]


def judge_drift(engine: Engine, checkpoint: Checkpoint, precision: str) -> dict:
    """Print how far a quantized engine drifts, and give that as it is kept; PaliGemmaError if it is too far."""
    found = drift_of(engine, checkpoint)
    print(drift.table(precision, found))
    if not found["kl_mean"] <= DIVERGENCES[precision]:
        raise PaliGemmaError(f"the bundle drifts by {found['kl_mean']} nats, more than {DIVERGENCES[precision]}")
    return {"stage": "drift", "part": "distributions", **found}


def check(checkpoint: Checkpoint, precision: str) -> None:
    """Raise PaliGemmaError if this machine cannot verify a bundle of this precision."""
    if not precision.endswith("bfloat16") or choose_provider("auto") == CUDA:
        return
    if precision in weights.QUANTIZED or _size(checkpoint) > SMALL:
        raise PaliGemmaError(f"--verify in {precision} needs a CUDA device for this model: the CPU has no kernels")


def rows(bundle: Bundle, checkpoint: Checkpoint) -> list[Row]:
    """Both views of a bundle: its parts, and, where this machine has the kernels, end to end.

    A quantized one is compared with the weights before they were rounded.
    """
    precision = bundle.description.precision
    checkpoint = replace(checkpoint, params=in_memory(checkpoint.params))
    half = weights.stream_dtype(precision) != ir.DataType.FLOAT
    provider = choose_provider("auto") if half else CPU
    check(checkpoint, precision)
    stored = as_stored(checkpoint, precision)
    compared, reference = compare_parts(stored, bundle, provider)
    if precision != "bfloat16" or provider == CUDA:
        compared += compare_stages(stored, bundle, provider, reference)
    return compared + compare_example(stored, bundle)


# --- part by part ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What the reference makes of an example: the features of its pictures, and logits and cache of each step."""

    features: np.ndarray  # [B, P, D]
    steps: list[tuple[np.ndarray, list[Pair]]]  # prefill, and decode steps


def compare_parts(checkpoint: Checkpoint, bundle: Bundle, provider: str = CPU) -> tuple[list[Row], Reference]:
    """One row a part of prefill, of a decode step and of extend; and what the reference answered to the first two."""
    config, inputs = checkpoint.config, example(checkpoint.config)
    feeds = dict(zip(("pixel_values", "input_ids", "lengths", "capacity"), inputs.prefill(np.float32), strict=True))
    prefill = Comparison.of_graph("prefill", config, bundle, provider, feeds)
    decode = Comparison.of_graph(
        "decode", config, bundle, provider, {"input_ids": inputs.steps[0], "lengths": inputs.lengths}
    )
    ids = np.concatenate(inputs.steps, axis=1)
    extend = Comparison.of_graph("extend", config, bundle, provider, {"input_ids": ids, "lengths": inputs.lengths})
    total = len(prefill.parts) + len(decode.parts) + len(extend.parts)
    with tqdm(total=total, desc="verifying", unit="part", leave=False, disable=None, delay=1) as bar:
        prefill.progress = decode.progress = extend.progress = bar.update
        features = paligemma.encode_image(checkpoint.params, config, inputs.pixel_values.astype(np.float64), prefill)
        first = paligemma.prefill(checkpoint.params, config, features, *inputs.prompts, prefill)
        for i, layer in enumerate(first[1]):
            past = {f"past_key_values.{i}.{kind}": a for kind, a in zip(("key", "value"), layer, strict=True)}
            decode.values |= past
            extend.values |= past
        second = paligemma.decode(checkpoint.params, config, inputs.steps[0], inputs.lengths, first[1], decode)
        _, cache = paligemma.extend(checkpoint.params, config, ids, inputs.lengths, first[1], extend)
    compared = [*prefill.finish(first[1], inputs.lengths), *decode.finish(second[1], inputs.lengths + 1)]
    compared += extend.finish(cache, inputs.lengths + STEPS)
    return compared, Reference(features, [first, second])


class Comparison:
    """A tap for the reference: each part of a graph is run, and compared, once the reference has come that far.

    A part is given the reference's values, in float64, where it is cut off. They are dropped when no part takes them.
    """

    def __init__(self, stage: str, parts: list[Part], operators: str, run: Run, inputs: dict[str, Any]):
        self.stage, self.parts, self.operators, self.run, self.values = stage, parts, operators, run, dict(inputs)
        self.progress = lambda: None
        self.lengths, self.size = inputs["lengths"], inputs["input_ids"].shape[1]
        self.rows, self.cache, self.recorded = [], {}, {}

    @classmethod
    def of_graph(
        cls, stage: str, config: PaliGemmaConfig, bundle: Bundle, provider: str, inputs: dict[str, Any]
    ) -> "Comparison":
        """Of a graph of a bundle, by the name of the stage."""
        # Without a device nothing but ONNX's own evaluator multiplies bfloat16, and it has standard operators alone.
        by_evaluator = bundle.description.precision == "bfloat16" and provider != CUDA
        operators = PORTABLE if by_evaluator else bundle.operators
        parts = cut(tapped_model(config, bundle, stage, operators))
        run = partial(_evaluate if by_evaluator else run_unoptimised, directory=bundle.path, provider=provider)
        return cls(stage, parts, operators, run, inputs)

    def __call__(self, name: str, value: np.ndarray) -> np.ndarray:
        """Take in a value of the reference, and run the next part if there now is all that it is compared with."""
        self.recorded[name] = value
        if self.parts and self.recorded.keys() >= set(self.parts[0].taps):
            self._compare(self.parts.pop(0))
            self.recorded = {}
            self.progress()
        return value

    def finish(self, cache: list[Pair], lengths: np.ndarray) -> list[Row]:
        """The rows of all parts, and one of what they wrote into the cache, each row up to its length."""
        if self.parts:
            raise PaliGemmaError(f"{self.stage}: the graph has taps that the reference lacks: {self.parts[0].taps}")
        return [*self.rows, compared_row(self.stage, "cache", self.operators, *both_caches(cache, self.cache, lengths))]

    def _compare(self, part):
        unseen = tuple(_within(part.name, name) for name in self.recorded if name not in part.taps)
        if unseen and self.operators == PORTABLE:
            raise PaliGemmaError(f"{self.stage} {part.name}: the graph lacks the taps {', '.join(unseen)}")
        feeds = {value.name: (self.values[part.inputs[value.name]], value.dtype) for value in part.model.graph.inputs}
        found = self.run(part.model, _cast(feeds))
        expected, actual = {}, {}
        for name in part.taps:
            value, reference = found[f"tap.{name}"], self.recorded[name]
            token = is_token(reference.shape, self.lengths, self.size)
            if name.endswith("attention.scores") and reference.shape[-1] == self.size:  # before the mask
                token = token & (np.arange(self.size) < self.lengths[:, None])[:, None, None]
            self.values[name], token = (
                as_in_graph(array, value.shape, self.lengths, self.size) for array in (reference, token)
            )
            expected[_within(part.name, name)] = np.where(token, self.values[name], 0)
            actual[_within(part.name, name)] = np.where(token, value, 0).astype(np.float64)
        self.cache |= {name.removeprefix("present."): array for name, array in found.items() if "present." in name}
        self.rows.append(compared_row(self.stage, part.name, self.operators, expected, actual, unseen))
        needed = {name for later in self.parts for name in later.inputs.values()}
        self.values = {name: value for name, value in self.values.items() if name in needed}


def _within(part, name) -> str:
    """What a tap is called within its part."""
    return "output" if name == part else name.removeprefix(f"{part}.")


def tapped_model(config: PaliGemmaConfig, bundle: Bundle, graph: str, operators: str) -> ir.Model:
    """A graph of the bundle over its weights, with every tap as an output; or the same of other operators."""
    precision, residual = bundle.description.precision, None
    placed = weights.plan(config, precision, bundle.operators)
    if operators == bundle.operators:
        initializer = weights.initializer(placed, bundle.path, graph)
        residual = weights.FLOATS.get(bundle.description.residual or "")
    else:
        initializer = weights.apart(config, placed, bundle.path)
    build = {"prefill": graphs.prefill_model, "decode": graphs.decode_model, "extend": graphs.extend_model}[graph]
    return build(config, initializer, weights.stream_dtype(precision), True, operators, residual)


def cut(model: ir.Model) -> list[Part]:
    """The parts of a model with taps, in order. Each begins at taps of those before it and ends at its own."""
    outputs = {str(value.name): value for value in model.graph.outputs}
    taps = {name.removeprefix("tap."): value for name, value in outputs.items() if name.startswith("tap.")}
    known, parts = {value: str(value.name) for value in model.graph.inputs}, []
    for name, own in ((name, [*own]) for name, own in groupby(taps, key=lambda tap: _LAYER.sub(r"\1", tap))):
        ends = [taps[tap] for tap in own]
        if name.startswith("text.blocks."):
            ends += [outputs[f"present.{name.rpartition('.')[2]}.{kind}"] for kind in ("key", "value")]
        graph = ir.convenience.extract(model.graph, list(known), ends)
        for value in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(value)
        names = {str(value.name): name for value, name in known.items()}
        inputs = {str(value.name): names[str(value.name)] for value in graph.inputs}
        parts.append(Part(name, own, ir.Model(graph, ir_version=model.ir_version), inputs))
        known |= {_tapped(taps[tap]): tap for tap in own}
    return parts


def _tapped(output: ir.Value) -> ir.Value:
    """The value that an output is of: a tap puts an Identity between them."""
    node = output.producer()
    assert node is not None
    assert node.inputs[0] is not None
    return node.inputs[0]


def as_in_graph(array: np.ndarray, shape: Sequence[int], lengths: np.ndarray, size: int) -> np.ndarray:
    """A value of the reference in the shape that a fused graph has it in; unchanged if it does not fit.

    All rows may lie along one axis, [1, B * T, D] for [B, T, D]; or there may be each row's last position alone, [1, B,
    D] for [B, T, D] and [B, N, 1, H] for [B, N, T, H]. `size` is T.
    """
    if array.size == math.prod(shape):
        return array.reshape(shape)
    if array.ndim < 3 or array.size != math.prod(shape) * size:
        return array
    by_position = array.reshape(len(array), -1, size, array.shape[-1])
    return np.take_along_axis(by_position, lengths[:, None, None, None] - 1, 2).reshape(shape)


def is_token(shape: Sequence[int], lengths: np.ndarray, size: int) -> np.ndarray:
    """Where a value of the reference stands at a token: False at padding, where graphs may compute what they like."""
    if len(shape) < 3 or shape[-2] % size:
        return np.ones(shape, bool)  # it has no positions of the text, or but one
    token = (np.arange(size) < lengths[:, None])[:, None, :, None]
    return np.broadcast_to(token, (len(lengths), math.prod(shape[1:-1]) // size, size, shape[-1])).reshape(shape)


def run_unoptimised(model: ir.Model, feeds: dict[str, np.ndarray], directory: Path, provider: str = CPU) -> dict:
    """Run a model whose weights lie in `directory`, unoptimised."""
    entries = {
        "session.model_external_initializers_file_folder_path": str(directory), "session.disable_prepacking": "1",
    }  # fmt: skip
    options = session_options(entries, optimized=False)
    session = onnxruntime.InferenceSession(graphs.serialize(model), options, providers=[provider])
    dtypes = {value.name: value.dtype for value in model.graph.inputs}
    given = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, dtypes[name])  # NumPy has no bfloat16
        for name, array in feeds.items()
    }
    names = [output.name for output in session.get_outputs()]
    found = session.run_with_ort_values(names, given)
    return {name: cuda.on_host(value) for name, value in zip(names, found, strict=True)}


def _evaluate(model, feeds, directory, provider=CPU) -> dict:
    """The same in the slow evaluator of the onnx package."""
    proto = onnx.load_from_string(graphs.serialize(model))
    onnx.load_external_data_for_model(proto, str(directory))
    evaluator = onnx.reference.ReferenceEvaluator(proto)
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


# --- end to end --------------------------------------------------------------------------------------------


def compare_stages(
    checkpoint: Checkpoint, bundle: Bundle, provider: str = CPU, reference: Reference | None = None
) -> list[Row]:
    """Logits and cache of the shipped graphs, run as a host runs them. `reference` is what `compare_parts` gave."""
    inputs = example(checkpoint.config)
    session = Session(bundle, "cuda" if provider == CUDA else "cpu")
    reference = complete(checkpoint, inputs, reference)
    (expected, cache), *steps = reference.steps

    def row(part, *values, operators=bundle.operators):
        return compared_row("end to end", part, operators, *values)

    def prefilled(graph, pictures):
        logits, buffers = session.prefill(pictures, *inputs.prompts)
        compared = [row(f"{graph} logits", {"logits": expected}, {"logits": logits})]
        return [*compared, row(f"{graph} cache", *both_caches(cache, buffers.numpy(), inputs.lengths))], buffers

    rows, buffers = prefilled("prefill", inputs.pixel_values)
    for step, (after, _) in enumerate(steps):
        logits, buffers = session.decode(inputs.steps[step], inputs.lengths + step, buffers)
        rows.append(row(f"decode {step + 1} logits", {"logits": after}, {"logits": logits}))
    rows.append(row(f"decode {STEPS} cache", *both_caches(steps[-1][1], buffers.numpy(), inputs.lengths + STEPS)))
    _, buffers = session.prefill(*inputs.prefill(np.float32))
    logits, buffers = session.extend(np.concatenate(inputs.steps, axis=1), inputs.lengths, buffers)
    stepped = np.stack([after for after, _ in steps], axis=1)
    rows.append(row("extend logits", {"logits": stepped}, {"logits": logits}))
    rows.append(row("extend cache", *both_caches(steps[-1][1], buffers.numpy(), inputs.lengths + STEPS)))
    if session.has_halves:  # last: a session that has opened them takes them from then on
        features = session.encode(inputs.pixel_values)
        found = np.stack([each.value for each in features])
        rows.append(row("vision image_features", {FEATURES: reference.features}, {FEATURES: found}))
        rows += prefilled("prefill_text", features)[0]
    if session.masks:
        decode_masks = segmentation.decoder_of(checkpoint)
        assert decode_masks is not None, "a bundle's mask codec comes from its checkpoint"
        codes = np.random.default_rng(0).integers(0, segmentation.CODES, (4, segmentation.CELLS**2))
        expected = decode_masks(codes)
        rows.append(row("masks", {"masks": expected}, {"masks": session.masks(codes)}, operators=PORTABLE))
    return rows


def compare_example(checkpoint: Checkpoint, bundle: Bundle) -> list[Row]:
    """What example.json has the bundle answer, token by token, against the reference in float32; no row if nothing.

    The error is by how much the reference prefers another token, relative to its largest logit: 0 where it is the same,
    and where two are nearly as likely no more than the two may be off. The end of an answer counts like a token.
    """
    example = read_json(bundle.path / FILE)
    if not example["answer"]:
        return []
    engine, answer = NumpyEngine(checkpoint), example["answer"]["tokens"]
    picture = np.frombuffer(base64.b64decode(example["image"]["rgb"]), np.uint8)
    image = Image.fromarray(picture.reshape(example["image"]["height"], example["image"]["width"], 3))
    ids, size = np.array([example["input_ids"]]), len(example["input_ids"])
    known = known_ids(checkpoint.config, Tokenizer.load(bundle.path, checkpoint.config).size)
    most, ended = example_steps(checkpoint), len(answer) < NEW_TOKENS and size + len(answer) < bundle.max_length
    expected = [[token] for token in answer] + [[*checkpoint.config.ends]] * ended
    logits, cache = engine.prefill(engine.preprocess(image), ids, np.array([size], np.int32), size + len(answer))
    errors = []
    for step, tokens in enumerate(expected[:most]):
        found = np.where(known, logits[0], -np.inf)
        errors.append(float((found.max() - found[tokens].max()) / np.abs(logits).max()))
        if step + 1 < len(expected[:most]):
            logits, cache = engine.decode(np.array([tokens]), np.array([size + step], np.int32), cache)
    worst = int(np.argmax(errors))
    return [Row("example", "tokens", bundle.operators, len(errors), errors[worst], f"token {worst + 1}")]


def example_steps(checkpoint: Checkpoint) -> int:
    """How many tokens of the example the reference follows: of a large model only the first few."""
    return NEW_TOKENS + 1 if _size(checkpoint) <= SMALL else STEPS + 1


def complete(checkpoint: Checkpoint, inputs: "Example", reference: Reference | None = None) -> Reference:
    """What the reference makes of an example through all decode steps, of which some may be there already."""
    params, config = checkpoint.params, checkpoint.config
    if reference is None:
        features = paligemma.encode_image(params, config, inputs.pixel_values.astype(np.float64))
        reference = Reference(features, [paligemma.prefill(params, config, features, *inputs.prompts)])
    found = [*reference.steps]
    for step in range(len(found) - 1, STEPS):
        found.append(paligemma.decode(params, config, inputs.steps[step], inputs.lengths + step, found[-1][1]))
    return Reference(reference.features, found)


def drift_of(engine: Engine, checkpoint: Checkpoint) -> dict:
    """How far an engine's distributions are from the reference's, over the answers to a few examples."""
    found, config = drift.Drift(), checkpoint.config
    reference, known = NumpyEngine(checkpoint), known_ids(config)
    for seed in range(EXAMPLES):
        inputs = example(config, seed)
        prompts = [row[:length].tolist() for row, length in zip(inputs.input_ids, inputs.lengths, strict=True)]
        drift.follow(reference, engine, inputs.pixel_values, prompts, known, found, STEPS + 1)
    return found.figures()


@dataclass(frozen=True)
class Example:
    """Seeded inputs: two rows of unequal length, and the tokens of the decode steps."""

    pixel_values: np.ndarray
    input_ids: np.ndarray
    lengths: np.ndarray
    capacity: int
    steps: list[np.ndarray]

    def prefill(self, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """The arguments of prefill, pictures in `dtype`."""
        return self.pixel_values.astype(dtype), *self.prompts

    @property
    def prompts(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The same but the pictures."""
        return self.input_ids, self.lengths, self.capacity


def example(config: PaliGemmaConfig, seed: int = 0) -> Example:
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


# --- the table ---------------------------------------------------------------------------------------------


def table(rows: list[Row], budget: float) -> str:
    """The rows as text."""
    lines = [f"{'stage':<12}{'part':<27}{'operators':<11}{'taps':>4}  {'error':>8}  {'budget':>8}        worst tap"]
    for row in rows:
        verdict = "ok  " if row.error <= budget else "FAIL"
        worst = row.worst if row.taps > 1 else ""
        numbers = f"{row.taps:>4}  {row.error:>8.1e}  {budget:>8.0e}"
        lines.append(f"{row.stage:<12}{row.part:<27}{row.operators:<11}{numbers}  {verdict}  {worst}".rstrip())
    return "\n".join(lines)


def notes(rows: list[Row], bundle: Bundle) -> list[str]:
    """What the rows do not show: values that the graphs do not have apart, and graphs that were not run."""
    lines = []
    unseen = {(row.stage, re.sub(r"\d+", "*", row.part)): row.unseen for row in rows if row.unseen}
    if unseen:
        lines.append(f"not apart in {bundle.operators} graphs, seen in what is made of them and end to end:")
        lines += [f"{stage:<12}{part:<27}{', '.join(names)}" for (stage, part), names in unseen.items()]
    if bundle.description.precision == "bfloat16" and not any(row.stage == "end to end" for row in rows):
        lines.append(
            "without a CUDA device: portable operators with a float32 stream, in ONNX's evaluator, over the bundle's "
            f"weights; its own graphs ({bundle.operators}, a {bundle.description.residual} stream) were not run"
        )
    return lines


def as_stored(checkpoint: Checkpoint, precision: str) -> Checkpoint:
    """The checkpoint as its bundle stores it: what half precision does to the weights is not an error of the graph."""
    if precision == "float32" or precision in weights.QUANTIZED:
        return checkpoint
    dtype = weights.FLOATS[precision].numpy()
    flat = {path: array.astype(dtype, copy=False) for path, array in checkpoints.flatten(checkpoint.params).items()}
    return replace(checkpoint, params=checkpoints.unflatten(flat))


def _size(checkpoint) -> int:
    return sum(array.size for array in checkpoints.flatten(checkpoint.params).values())


def _cast(feeds) -> dict:
    """Inputs {name: (array, dtype)} in their dtypes."""
    with np.errstate(over="ignore"):  # an infinity shows in the taps
        return {name: np.asarray(array).astype(dtype.numpy()) for name, (array, dtype) in feeds.items()}


def both_caches(cache: list[Pair], written: dict[str, np.ndarray], lengths: np.ndarray) -> tuple[dict, dict]:
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
        {name: filled(array) for name, array in written.items()},
    )


def compared_row(
    stage: str, part: str, operators: str, reference: dict[str, np.ndarray], values: dict[str, np.ndarray],
    unseen: tuple[str, ...] = (),
) -> Row:  # fmt: skip
    """The row of a part: its values by tap, and the reference's. PaliGemmaError unless they have the same taps."""
    if reference.keys() != values.keys():
        names = ", ".join(sorted(reference.keys() ^ values.keys()))
        raise PaliGemmaError(f"{stage} {part}: graph and reference do not have the same values: {names}")
    errors = {name: relative_error(values[name], reference[name]) for name in reference}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else np.inf)
    return Row(stage, part, operators, len(errors), errors[worst], worst, unseen, _trouble(reference, values))


def _trouble(reference, values) -> str:
    """The first tap that holds a NaN or infinity, and how large the reference is there; nothing if all are finite."""
    for name, expected in reference.items():
        if not np.isfinite(values[name]).all():
            return f"{name} is not finite where the reference reaches {np.abs(expected).max():.3g}"
    return ""


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """max|a - b| / max|b|; infinite where shapes differ or a value is not finite."""
    if value.shape != reference.shape or not np.isfinite(value).all():
        return float("inf")
    return float(np.abs(value - reference).max() / max(np.abs(reference).max(), np.finfo(np.float64).tiny))
