"""Graphs of ONNX Runtime's own operators: the same numbers as the reference, with the operators that they are for."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export import bundle, verify
from export.bundle import weights
from export.model import graphs
from export.model.layers import FUSED, PORTABLE
from export.session import Session
from numpy_ref import checkpoint
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.engine import NumpyEngine
from numpy_ref.errors import PaliGemmaError

from .models import CONFIGS, random_batch, random_params, with_heads

BUDGET = 1e-5  # of the largest value; measured 1.5e-6


MODELS = {
    "paligemma1": with_heads("paligemma1"),
    "paligemma2": with_heads("paligemma2"),
    "short windows": with_heads("paligemma2", windows=tuple([3, None, 1, 2][: CONFIGS["paligemma2"].text.depth])),
    "odd head dim": CONFIGS["paligemma2"],
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    config = MODELS[request.param]
    depth = config.text.depth
    windows = (config.text.windows * depth)[:depth]
    config = replace(config, text=replace(config.text, windows=windows))
    return Checkpoint(Path("."), config, random_params(config, 5), np.dtype("f8"))


@pytest.mark.parametrize("operators", [PORTABLE, FUSED])
def test_fused_graphs_keep_the_float32_budget(tmp_path, model, operators, capsys):
    bundle.write(model, tmp_path / "out", operators=operators)
    opened = bundle.load(tmp_path / "out")
    assert opened.description.operators == operators
    for row in verify.compare_stages(model, opened):
        assert row.error < BUDGET, row


@pytest.mark.parametrize("operators", [PORTABLE, FUSED])
def test_a_batch_may_have_more_tokens_than_the_model_has_positions(tmp_path, operators):
    """All of them lie in one line in fused graphs, and tables of rotary positions are as long as one row may be."""
    config = replace(with_heads("paligemma1"), max_length=30)
    made = Checkpoint(Path("."), config, random_params(config, 5, np.float32), np.dtype("f4"))
    bundle.write(made, tmp_path / "out", operators=operators)
    pixels, ids, lengths = random_batch(config, (3, 7, 5, 6))
    assert ids.size > config.max_length
    session = Session(bundle.load(tmp_path / "out"), "cpu")
    for engine in (session, Session(bundle.load(tmp_path / "out"), "cpu", in_halves=True)):
        expected, cache = NumpyEngine(made).prefill(pixels, ids, lengths, 20)
        found, buffers = engine.prefill(pixels, ids, lengths, 20)
        assert np.abs(found - expected).max() < BUDGET * np.abs(expected).max()
        more = np.array([[5], [6], [7], [8]])
        expected, _ = NumpyEngine(made).decode(more, lengths, cache)
        assert np.abs(engine.decode(more, lengths, buffers)[0] - expected).max() < BUDGET * np.abs(expected).max()


@pytest.mark.parametrize("residual", ["float32", "float16"])
def test_fused_graphs_in_half_precision_keep_its_budget(tmp_path, model, residual):
    """On the CPU provider, which has the operators in float16; bfloat16 needs a device (`python -m export.gpu_check`)."""
    if model.config.text.head_dim % 16:
        with pytest.raises(PaliGemmaError, match="multiple of 16, and those of this model have 10"):
            bundle.write(model, tmp_path / "out", "float16", operators=FUSED)
        bundle.write(model, tmp_path / "out", "float16")
        assert bundle.load(tmp_path / "out").operators == PORTABLE
        return
    bundle.write(model, tmp_path / "out", "float16", residual=residual)
    opened = bundle.load(tmp_path / "out")
    assert (opened.operators, opened.description.residual) == (FUSED, residual)
    found = verify.rows(opened, model)
    assert {row.stage for row in found} == {"prefill", "decode", "extend", "end to end"}
    for row in found:
        assert row.error < verify.BUDGETS["float16"], row


def test_the_residual_stream_is_what_was_asked_for(tmp_path):
    loaded = checkpoint.load()
    for precision, operators, residual in (
        ("float16", None, "float32"), ("bfloat16", None, "bfloat16"), ("float16", PORTABLE, "float32"),
        ("int4-float16", None, "float32"), ("int4-bfloat16", None, "bfloat16"), ("int4", None, "float32"),
    ):  # fmt: skip
        assert bundle.prepare(loaded, precision, operators=operators).description.residual == residual
    for precision, operators, residual in (("float32", None, "float16"), ("float16", PORTABLE, "float16"),
                                           ("float16", None, "bfloat16"), ("int8", None, "float16")):  # fmt: skip
        with pytest.raises(PaliGemmaError, match=f"--residual {residual}: with {operators or FUSED} operators in"):
            bundle.prepare(loaded, precision, operators=operators, residual=residual)


def test_joined_weights_are_those_of_the_checkpoint(tmp_path):
    """The kernels of queries, keys and values lie side by side, column by column, and so do biases."""
    loaded = checkpoint.load()
    bundle.write(loaded, tmp_path / "out", "float16")
    placed = weights.plan(loaded.config, "float16", FUSED)
    assert "text.blocks.0.attention.query_key_value.kernel" in placed
    assert "text.blocks.0.attention.query.kernel" not in placed
    apart = weights.apart(loaded.config, placed, tmp_path / "out")
    for path, array in checkpoint.flatten(loaded.params).items():
        assert np.array_equal(apart(path).numpy(), np.asarray(array, np.float16)), path


def operators_of(model, graph, operators, precision="float32"):
    placed = weights.plan(model.config, precision, operators)
    build = {"prefill": graphs.prefill_model, "decode": graphs.decode_model}[graph]
    dtype = weights.stream_dtype(precision)
    made = build(model.config, weights.initializer(placed, graph=graph), dtype, operators=operators)
    return Counter(node.op_type for node in made.graph)


def test_the_operators_are_those_that_are_meant():
    loaded = checkpoint.load()
    vision, text = loaded.config.vision.depth, loaded.config.text.depth
    prefill, decode = (operators_of(loaded, graph, FUSED) for graph in ("prefill", "decode"))
    assert prefill["MultiHeadAttention"] == vision + text
    assert decode["GroupQueryAttention"] == text
    assert decode["SimplifiedLayerNormalization"] == 2 * text + 1
    half = {graph: operators_of(loaded, graph, FUSED, "float16") for graph in ("prefill", "decode")}
    assert half["decode"]["GroupQueryAttention"] == half["prefill"]["GroupQueryAttention"] == text
    assert half["prefill"]["Attention"] == vision
    assert half["decode"]["SimplifiedLayerNormalization"] == 1  # the others are of sums
    assert half["decode"]["SkipSimplifiedLayerNormalization"] == 2 * text
    assert half["prefill"]["SkipLayerNormalization"] == vision
    assert half["decode"]["MatMul"] == 5 * text  # query, key and value; output; gate; up; down
    assert not {"Softmax", "TensorScatter", "RotaryEmbedding"} & {*half["prefill"], *half["decode"]}
    assert not {"Softmax", "TensorScatter"} & {*prefill, *decode}  # no scores, no copy of the cache
    portable = operators_of(loaded, "decode", PORTABLE)
    assert not {"GroupQueryAttention", "MatMulNBits", "SimplifiedLayerNormalization"} & {*portable}
    assert sum(decode.values()) < 0.4 * sum(portable.values())


def test_kernels_side_by_side_are_one():
    loaded = checkpoint.load()
    text = loaded.config.text.depth
    assert (
        operators_of(loaded, "decode", FUSED, "int4")["MatMulNBits"] == 4 * text + 1
    )  # qkv, output, gate-up, down; head
    assert operators_of(loaded, "decode", PORTABLE, "int4")["MatMulNBits"] == 7 * text + 1
    placed = weights.plan(loaded.config, "int4")
    model = graphs.decode_model(loaded.config, weights.initializer(placed, graph="decode"), operators=FUSED)
    names = set(model.graph.initializers)
    assert "text.blocks.0.mlp.gate.kernel.int4.packed" in names
    assert "text.blocks.0.mlp.up.kernel.int4" not in names


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_both_kinds_of_operators_run_the_same_file(tmp_path, precision):
    """One weights file under either; distributions hardly differ."""
    loaded = checkpoint.load()
    example = verify.example(loaded.config)
    found = {}
    for operators in (PORTABLE, FUSED):
        bundle.write(loaded, tmp_path / operators, precision, operators=operators)
        session = Session(bundle.load(tmp_path / operators), "cpu")
        logits, cache = session.prefill(*example.prefill(np.float32))
        found[operators] = logits, session.decode(example.steps[0], example.lengths, cache)[0]
    files = [(tmp_path / operators / weights.FILE).read_bytes() for operators in (PORTABLE, FUSED)]
    assert files[0] == files[1]
    for a, b in zip(found[PORTABLE], found[FUSED], strict=True):
        # A value at the edge of a step of eight bits may be rounded to either side.
        assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_a_cache_that_is_copied_gives_the_same(tmp_path):
    """Hosts that cannot bind one buffer as past and present feed the outputs back."""
    loaded = checkpoint.load()
    bundle.write(loaded, tmp_path / "out")
    opened, example = bundle.load(tmp_path / "out"), verify.example(loaded.config)
    session = Session(opened, "cpu")
    logits, cache = session.prefill(*example.prefill(np.float32))
    apart = onnxruntime.InferenceSession(opened.path / "decode.onnx", providers=["CPUExecutionProvider"])
    past = {f"past_key_values.{name}": array for name, array in cache.numpy().items()}
    names, lengths = [value.name for value in apart.get_outputs()], example.lengths
    for ids in example.steps:
        values = dict(zip(names, apart.run(None, {"input_ids": ids, "lengths": lengths, **past}), strict=True))
        logits, cache = session.decode(ids, lengths, cache)
        assert np.array_equal(values["logits"], logits)
        past = {name.replace("present", "past_key_values"): array for name, array in values.items() if name != "logits"}
        lengths = lengths + 1


def test_a_wrong_fused_operator_is_noticed(tmp_path, monkeypatch):
    from export.model import fused

    monkeypatch.setattr(fused, "_MASKED", -1.0)  # padding that is hardly masked
    with pytest.raises(PaliGemmaError, match="prefill logits"):
        bundle.write(checkpoint.load(), tmp_path / "out", verify=verify.verify)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", weights.PRECISIONS)
@pytest.mark.parametrize("operators", [PORTABLE, FUSED])
def test_tensors_begin_on_pages(precision, operators):
    """So that they can be mapped; kernels that are taken as one follow each other without a gap."""
    end, gaps = 0, set()
    for stored in weights.plan(checkpoint.load().config, precision, operators).values():
        if stored.offset % 4096:
            assert stored.offset == end
            gaps.add(stored.path.split(".")[-2])
        end = stored.offset + stored.length
    assert gaps <= {"key", "value", "up"}
