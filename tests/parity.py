"""The parity runner: one case, any engine, every tap compared with the NumPy reference in float64.

Errors are max|a - b| / max|reference| per tap.
"""

import importlib

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import torch

from export.model import graphs
from export.runtime import session_options
from numpy_ref import checkpoint
from torch_impl.load import to_tensor

ENGINES = ("numpy", "torch", "onnx.reference", "onnxruntime")
DTYPES = (np.float64, np.float32)


class Recorder:
    """A tap that keeps what it sees and insists on one name, one value."""

    def __init__(self):
        self.values = {}

    def __call__(self, name, value):
        assert name not in self.values, f"tap {name} was called twice"
        self.values[name] = value
        return value


def assert_parity(actual: dict, expected: dict, dtype, budget: float) -> float:
    """The same taps, shapes and dtype, finite, and within the budget; names the first bad tap. The worst error."""
    assert expected, "no taps were recorded"
    assert actual.keys() == expected.keys(), f"taps differ: {sorted(actual.keys() ^ expected.keys())}"
    worst = 0.0
    for name, reference in expected.items():
        value = actual[name]
        assert value.shape == reference.shape, f"{name}: shape {value.shape}, not {reference.shape}"
        assert value.dtype == np.dtype(dtype), f"{name}: dtype {value.dtype}, not {np.dtype(dtype)}"
        assert value.size, f"{name}: empty"
        assert np.isfinite(value).all(), f"{name}: not finite"
        error = relative_error(value, reference)
        assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"
        worst = max(worst, error)
    return worst


def relative_error(value, reference) -> float:
    return float(np.abs(value.astype(np.float64) - reference).max() / max(np.abs(reference).max(), 1e-300))


def flat_outputs(outputs, prefix="output") -> dict:
    """Nested tuples and lists of arrays as a dict of names."""
    if isinstance(outputs, tuple | list):
        return {k: v for i, item in enumerate(outputs) for k, v in flat_outputs(item, f"{prefix}.{i}").items()}
    return {prefix: outputs}


def run_case(case, engine: str, dtype, seed=0) -> dict:
    """Taps and outputs of a case on an engine, as NumPy arrays."""
    arguments = cast(case.arguments(np.random.default_rng(seed)), dtype)
    return {
        "numpy": run_numpy,
        "torch": run_torch,
        "onnx.reference": lambda case, arguments: run_onnx(case, arguments, evaluate_reference),
        "onnxruntime": lambda case, arguments: run_onnx(case, arguments, evaluate_runtime),
    }[engine](case, arguments)


def cast(arguments, dtype):
    """Floating arrays of a nested structure in a dtype; arguments are made in float32, so both dtypes agree."""
    if isinstance(arguments, dict):
        return {key: cast(value, dtype) for key, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        return type(arguments)(cast(value, dtype) for value in arguments)
    if isinstance(arguments, np.ndarray) and arguments.dtype.kind == "f":
        return arguments.astype(np.float32).astype(dtype)
    return arguments


def run_numpy(case, arguments) -> dict:
    function = getattr(importlib.import_module(f"numpy_ref.model.{case.module}"), case.function)
    recorder = Recorder()
    taps = {"tap": recorder} if case.taps else {}
    outputs = function(**arguments, **taps)
    return {**recorder.values, **flat_outputs(outputs)}


def run_torch(case, arguments) -> dict:
    arguments, recorder = dict(arguments), Recorder()
    taps = {"tap": recorder} if case.taps else {}
    if case.torch is None:
        function = getattr(importlib.import_module(f"torch_impl.model.{case.module}"), case.function)
    else:
        function = torch_module(case, arguments)
    with torch.inference_mode():
        outputs = function(**to_torch(arguments), **taps)
    return {name: value.numpy() for name, value in {**recorder.values, **flat_outputs(outputs)}.items()}


def torch_module(case, arguments):
    """The case's module with the case's weights, strictly loaded; its arguments lose p and config."""
    weights, config = arguments.pop("p"), arguments.pop("config", None)
    owner, _, method = case.torch.partition(".")
    module = getattr(importlib.import_module(f"torch_impl.model.{case.module}"), owner)(config or case.config)
    state = {name: to_tensor(array) for name, array in checkpoint.flatten(weights).items()}
    module.load_state_dict(state, strict=not case.partial, assign=True)
    return getattr(module, method) if method else module


def to_torch(arguments):
    if isinstance(arguments, dict):
        return {key: to_torch(value) for key, value in arguments.items()}
    if isinstance(arguments, tuple | list):
        return type(arguments)(to_torch(value) for value in arguments)
    if isinstance(arguments, np.ndarray):
        return to_tensor(arguments)
    if isinstance(arguments, type) and issubclass(arguments, np.floating):
        return torch.float64 if arguments is np.float64 else torch.float32
    return arguments


def run_onnx(case, arguments, evaluate) -> dict:
    """Build the case's function as a model (arrays are inputs, weights are initializers) and evaluate it."""
    function = getattr(importlib.import_module(f"export.model.{case.module}"), case.function)
    weights = {path: ir.tensor(array, name=path) for path, array in checkpoint.flatten(arguments.pop("p", {})).items()}
    model, feeds = graphs.trace(function, arguments, weights, case.taps)
    values = evaluate(graphs.serialize(model), feeds)
    return {name.removeprefix("out."): value for name, value in values.items()}


def evaluate_reference(model: bytes, feeds) -> dict:
    """ONNX's own Python evaluator."""
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load_from_string(model))
    values = evaluator.run(None, feeds)
    return dict(zip(evaluator.output_names, (np.asarray(value) for value in values), strict=True))


def evaluate_runtime(model: bytes, feeds) -> dict:
    """ONNX Runtime on the CPU, unoptimised: its fused kernels keep float32 attributes."""
    session = onnxruntime.InferenceSession(model, session_options(optimized=False), providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))
