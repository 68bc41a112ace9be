"""Every node of a bundle for CUDA has a CUDA kernel for the types that it is given.

No GPU is needed: `cuda_kernels.json` has what ONNX Runtime's own documentation says. A node without a kernel would run on
the CPU, with a copy there and back at every token.
"""

import json
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest

from export import graphs, weights
from export.layers import OPERATORS
from numpy_ref import checkpoint
from numpy_ref.config import VARIANTS

TABLE = json.loads((Path(__file__).parent / "cuda_kernels.json").read_text())["kernels"]
MODELS = {
    "shipped": checkpoint.load_config(checkpoint.SHIPPED),
    **{name: VARIANTS[f"{name}-224"] for name in ("paligemma-3b", "paligemma2-3b")},
}
NAMES = {  # as the documentation calls them
    ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "double", ir.DataType.INT64: "int64", ir.DataType.INT32: "int32", ir.DataType.BOOL: "bool",
    ir.DataType.UINT8: "uint8", ir.DataType.INT8: "int8",
}  # fmt: skip


def few_layers(config):
    """A model's first three layers: the others are like them."""
    text = replace(config.text, depth=3, windows=config.text.windows[:3])
    return replace(config, vision=replace(config.vision, depth=2), text=text)


def without_kernel(model):
    """The nodes whose operator, or a type that it is given, is not in the table."""
    found = []
    for node in model.graph:
        if node.op_type == "Constant":  # folded into an initializer
            continue
        allowed = TABLE.get(f"{node.domain}.{node.op_type}".lstrip("."))
        if allowed is None:
            found.append(node.op_type)
            continue
        given = node.inputs
        kinds = [allowed[1]] * len(given) if allowed[0] == "*" else allowed
        assert len(given) <= len(kinds), node.op_type
        for i, (value, kind) in enumerate(zip(given, kinds, strict=False)):
            if value is None:
                continue
            assert value.dtype is not None, f"the type of input {i} of {node.op_type} is not known"
            if NAMES[value.dtype] not in kind.split():
                found.append(f"{node.op_type} of {NAMES[value.dtype]}")
    return sorted(set(found))


@pytest.mark.parametrize("operators", OPERATORS)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("graph", ["prefill", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_every_node_has_a_kernel(name, graph, precision, operators):
    config = few_layers(MODELS[name])
    build = {"prefill": graphs.prefill_model, "decode": graphs.decode_model}[graph]
    initializer = weights.initializer(weights.plan(config, precision), graph=graph)
    assert without_kernel(build(config, initializer, weights.FLOATS[precision], operators=operators)) == []


def test_a_node_without_one_is_found():
    """float32 has no GroupQueryAttention on CUDA, and eight bits no MatMulIntegerToFloat at all."""
    config = few_layers(MODELS["shipped"])
    model = graphs.decode_model(config, weights.initializer(weights.plan(config), graph="decode"), operators="fused")
    assert without_kernel(model) == ["GroupQueryAttention of float"]
    model = graphs.prefill_model(config, weights.initializer(weights.plan(config, "int8")), operators="portable")
    assert "MatMulIntegerToFloat" in without_kernel(model)
