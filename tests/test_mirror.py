"""The three implementations have the same functions, arguments and weight names, and import in one direction."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import export.model.gemma
import export.model.layers
import export.model.paligemma
import export.model.sampling
import export.model.segmentation
import export.model.siglip
import numpy_ref.model.contrastive
import numpy_ref.model.gemma
import numpy_ref.model.layers
import numpy_ref.model.paligemma
import numpy_ref.model.sampling
import numpy_ref.model.segmentation
import numpy_ref.model.siglip
import torch_impl.model.contrastive
import torch_impl.model.gemma
import torch_impl.model.layers
import torch_impl.model.paligemma
import torch_impl.model.segmentation
import torch_impl.model.siglip
from export.bundle import weights
from export.model import graphs
from export.model.layers import FUSED, PORTABLE
from export.runtime import session_options
from numpy_ref.checkpoint import flatten, parameters
from torch_impl.model.paligemma import PaliGemma

from .models import CONFIGS, random_params, with_heads

ROOT = Path(__file__).parent.parent
FILES = ("layers", "siglip", "gemma", "paligemma", "segmentation", "contrastive")
SHARED = {"identity", "scoped"}  # taps, which the siblings import from the reference
NUMPY_ONLY = {"matmul"}  # whose twins are operators
# Training's pass over every position; what only training needs; the way from masks to tokens, which is data's.
NOT_EXPORTED = {"forward", "batch_norm_training", "encoder", "encode", "quantize"}
# Masks in a picture and files of weights: of the reference alone.
REFERENCE_ONLY = {"crop", "paste", "spell", "run_lengths", "names", "load", "find", "decoder_of", "recall_at_1"}
# Functions of the reference that are methods of a larger module in PyTorch.
METHODS = {
    ("gemma", "embed"): "Decoder.embed",
    ("gemma", "logits"): "Decoder.logits",
    ("segmentation", "encode"): "Codec.encode",
    ("segmentation", "decode"): "Codec.decode",
    ("contrastive", "embed_image"): "Contrastive.embed_image",
    ("contrastive", "embed_text"): "Contrastive.embed_text",
    **{("paligemma", name): f"PaliGemma.{name}" for name in
       ("encode_image", "embed_prefix", "forward", "hidden_states", "prefill", "decode", "extend", "further_states")},
}  # fmt: skip


def public_functions(module):
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def arguments(function, *dropped):
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in dropped]


CASES = [
    (file, name)
    for file in FILES
    for name in public_functions(getattr(numpy_ref.model, file))
    if name not in SHARED | NUMPY_ONLY | REFERENCE_ONLY
]  # fmt: skip


EXPORTED = [
    (file, name)
    for file, name in CASES
    if (file != "contrastive" and name not in NOT_EXPORTED) or (file, name) == ("siglip", "encoder")
]
EXPORTED += [
    ("sampling", name)
    for name in ("sample", "log_probability", "likeliest", "location_spread", "keep_top_p", "invert_cdf")
]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_torch_has_the_same_function(file, name):
    reference = getattr(getattr(numpy_ref.model, file), name)
    module = getattr(torch_impl.model, file)
    owner = METHODS.get((file, name))
    if owner is None and not hasattr(module, name):
        owner = "".join(part.title() for part in name.split("_")) + ".forward"
    if owner is None:
        assert arguments(getattr(module, name)) == arguments(reference)
    else:
        cls, method = owner.split(".")
        twin = getattr(getattr(module, cls), method)
        assert arguments(twin, "self") == arguments(reference, "p", "config")


@pytest.mark.parametrize(("file", "name"), EXPORTED)
def test_export_has_the_same_function(file, name):
    twin = getattr(getattr(export.model, file), name)
    reference = getattr(getattr(numpy_ref.model, file), name)
    assert arguments(twin)[0] == "op"
    assert arguments(twin, "op") == arguments(reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_weight_namespace(name):
    config = CONFIGS[name]
    params = flatten(random_params(config, dtype=np.float32))
    expected = {path: array.shape for path, array in params.items()}
    assert {p.path: p.shape for p in parameters(config)} == expected
    assert {path: tuple(t.shape) for path, t in PaliGemma(config).state_dict().items()} == expected
    model = graphs.prefill_model(config, lambda path: ir.tensor(params[path], name=path))
    initializers = {
        value.name: tuple(value.const_value.shape)
        for value in model.graph.initializers.values()
        if not value.name.startswith("const_")
    }
    assert initializers == expected


@pytest.mark.parametrize("operators", [PORTABLE, FUSED])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("graph", ["prefill", "decode", "extend"])
@pytest.mark.parametrize("name", CONFIGS)
def test_nodes_are_named_by_their_modules(name, graph, precision, operators):
    """Each by a module of the model, whose own weights it reads; every module of every block has nodes of its own."""
    config = with_heads(name)
    placed, build = (
        weights.plan(config, precision, operators),
        {"prefill": graphs.prefill_model, "decode": graphs.decode_model, "extend": graphs.extend_model},
    )
    model = build[graph](
        config, weights.initializer(placed, graph=graph), weights.stream_dtype(precision), operators=operators
    )
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    paths = {stored.path for stored in placed.values() if graph == "prefill" or stored.path.startswith("text.")}
    modules = {path.rsplit(".", count)[0] for path in paths for count in range(1, path.count(".") + 1)}
    found = {name.rpartition("/")[0] for name in names}
    assert found <= modules | {graph}
    for path in paths:
        if ".blocks." in path:
            block, module = re.match(r"(.*\.blocks\.\d+)\.(\w+)", path).groups()
            assert any(each.startswith(f"{block}.{module}") for each in found), (block, module)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and not value.name.startswith("const_"):
                assert value.name.startswith(node.name.rpartition("/")[0] + "."), (node.name, value.name)


def test_profiles_and_errors_show_the_modules(tmp_path):
    config = CONFIGS["paligemma1"]
    params = flatten(random_params(config, dtype=np.float32))
    model = graphs.decode_model(config, lambda path: ir.tensor(params[path], name=path))
    options = session_options()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(graphs.serialize(model), options, providers=["CPUExecutionProvider"])
    shape = (1, config.text.kv_heads, 9, config.text.head_dim)
    cache = {value.name: np.zeros(shape, np.float32) for value in session.get_inputs()[2:]}
    session.run(None, {"input_ids": np.array([[3]]), "lengths": np.array([4], np.int32), **cache})
    events = json.loads(Path(session.end_profiling()).read_text())
    timed = {event["name"].removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"}
    assert {f"text.blocks.{i}.attention.output/MatMul" for i in range(config.text.depth)} <= timed
    with pytest.raises(Exception, match="Name:'text/Gather'"):  # the runtime's exceptions have no common class
        session.run(None, {"input_ids": np.array([[config.text.vocab]]), "lengths": np.array([4], np.int32), **cache})


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("numpy_ref", {"torch", "torch_impl", "export", "onnx", "onnx_ir", "onnxscript", "onnxruntime"}),
        ("torch_impl", {"export", "onnx", "onnx_ir", "onnxscript", "onnxruntime"}),
        ("export", {"torch", "torch_impl", "transformers"}),
    ],
)
def test_imports_flow_one_way(package, forbidden):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported(file) & forbidden, file


def modules(package: str) -> list[str]:
    """The modules of a package, by name, but those that are commands, and those that need an extra."""
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sorted((ROOT / package).rglob("*.py"))]
    return [name.removesuffix(".__init__") for name in names if not name.endswith(("__main__", "ray_workers"))]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(result.stdout.split())


def test_the_reference_needs_only_numpy():
    names = " ".join(f"import {module};" for module in modules("numpy_ref"))
    loaded = modules_after(f"import numpy_ref; {names.rstrip(';')}")
    assert not loaded & {"torch", "onnx", "onnxruntime", "PIL", "sentencepiece", "safetensors", "ml_dtypes", "tqdm"}


def test_exporting_needs_no_torch():
    names = "; ".join(f"import {module}" for module in modules("export"))
    assert not modules_after(names) & {"torch", "transformers", "torch_impl"}
