"""The proof itself: parts of the shipped graphs, every tap that they have, and that what is wrong shows in its row."""

import re
from collections import Counter
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export import bundle, verify
from export.bundle import weights
from export.model import fused, fused_half, gemma, graphs, layers, paligemma, siglip
from export.model.layers import FUSED, PORTABLE
from numpy_ref.checkpoint import Checkpoint
from numpy_ref.errors import PaliGemmaError

from .models import random_params, with_heads

BUILD = {"prefill": graphs.prefill_model, "decode": graphs.decode_model, "extend": graphs.extend_model}
CONFIGS = {
    "paligemma1": with_heads("paligemma1"),
    "paligemma2": with_heads("paligemma2", windows=(4, None, 3), attn_softcap=2.0),
}


def build(config, graph, precision, operators, taps=False):
    placed, dtype = weights.plan(config, precision, operators), weights.stream_dtype(precision)
    return BUILD[graph](config, weights.initializer(placed, graph=graph), dtype, taps, operators)


def taps_of(model) -> set[str]:
    """Their names, with * for the number of the layer."""
    names = [value.name for value in model.graph.outputs]
    return {re.sub(r"\d+", "*", name.removeprefix("tap.")) for name in names if name.startswith("tap.")}


HIDDEN = {"vision.blocks.*.attention.scores", "vision.blocks.*.attention.weights"}
UNCAPPED = {"text.blocks.*.attention.scores", "text.blocks.*.attention.weights"}
HALF = UNCAPPED | {"text.blocks.*.attention.query"}
#: What fused graphs have no value for: attention in one operator keeps its scores, one that rotates its queries too.
ABSENT = {
    ("paligemma1", "prefill", "float32"): HIDDEN | UNCAPPED,
    ("paligemma2", "prefill", "float32"): HIDDEN,  # the operator has no softcap
    ("paligemma1", "prefill", "float16"): HIDDEN | HALF,
    ("paligemma2", "prefill", "float16"): HIDDEN | HALF,
    ("paligemma1", "decode", "float32"): UNCAPPED,
    ("paligemma2", "decode", "float32"): UNCAPPED,
    ("paligemma1", "decode", "float16"): HALF | {f"text.blocks.*.attention.{name}" for name in ("key", "value")},
    ("paligemma2", "decode", "float16"): HALF | {f"text.blocks.*.attention.{name}" for name in ("key", "value")},
    ("paligemma1", "extend", "float32"): set(),
    ("paligemma2", "extend", "float16"): set(),
}


@pytest.mark.parametrize(("name", "graph", "precision"), ABSENT)
def test_fused_graphs_keep_every_tap_but_these(name, graph, precision):
    models = {operators: build(CONFIGS[name], graph, precision, operators, True) for operators in (PORTABLE, FUSED)}
    assert taps_of(models[PORTABLE]) - taps_of(models[FUSED]) == ABSENT[name, graph, precision]
    assert taps_of(models[FUSED]) <= taps_of(models[PORTABLE])


@pytest.mark.parametrize("operators", [PORTABLE, FUSED])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("graph", BUILD)
@pytest.mark.parametrize("name", CONFIGS)
def test_taps_only_add_to_the_shipped_graph(name, graph, precision, operators):
    """Without what the taps alone need, a graph that has them is the one that ships."""
    shipped = build(CONFIGS[name], graph, precision, operators)
    tapped = build(CONFIGS[name], graph, precision, operators, taps=True)
    names = [value.name for value in tapped.graph.outputs if not value.name.startswith("tap.")]
    assert names == [value.name for value in shipped.graph.outputs]
    assert shape_of(tapped.graph, names) == shape_of(shipped.graph, names)


def shape_of(graph, names) -> list:
    """What these outputs are made by: operators in their order, with attributes, and where each has its inputs from."""
    graph = ir.convenience.extract(graph, list(graph.inputs), names)
    places = {value: (i, j) for i, node in enumerate(graph) for j, value in enumerate(node.outputs)}
    return [
        (
            node.op_type,
            {name: str(attribute.value) for name, attribute in node.attributes.items()},
            [None if value is None else places.get(value) or constant(value) for value in node.inputs],
        )
        for node in graph
    ]


def constant(value):
    """A weight or an input by its name; a number by itself, since names of numbers count."""
    return str(value.const_value.numpy().tolist()) if value.name.startswith("const_") else value.name


def test_the_reference_in_the_shape_of_the_graph():
    batch, heads, size, width = 2, 3, 5, 7
    x = np.arange(batch * heads * size * width).reshape(batch, heads, size, width)
    lengths = np.array([2, 5])
    assert np.array_equal(verify.as_in_graph(x, x.shape, lengths, size), x)
    rows = verify.as_in_graph(x[:, 0], (1, batch * size, width), lengths, size)
    assert np.array_equal(rows[0, 3], x[0, 0, 3])
    assert np.array_equal(rows[0, size + 3], x[1, 0, 3])
    last = verify.as_in_graph(x[:, 0], (1, batch, width), lengths, size)
    assert np.array_equal(last[0], [x[0, 0, 1], x[1, 0, 4]])
    by_head = verify.as_in_graph(x, (batch, heads, 1, width), lengths, size)
    assert np.array_equal(by_head[:, :, 0], [x[0, :, 1], x[1, :, 4]])
    assert verify.as_in_graph(x, (batch, heads, size, 2), lengths, size) is x
    scores = np.zeros((batch, 1, heads * size, size))
    token = verify.is_token(scores.shape, lengths, size).reshape(batch, heads, size, size)
    assert token.all((1, 3)).tolist() == [[True, True, False, False, False], [True] * 5]
    assert verify.is_token((batch, 4, width), lengths, size).all()  # patches


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_rows_are_of_the_operators_that_ship(tmp_path, precision):
    opened, model = written(tmp_path, "paligemma2", precision)
    found = verify.rows(opened, model)
    assert {row.operators for row in found} == {FUSED}
    parts = Counter(row.stage for row in found)
    vision, text = model.config.vision.depth, model.config.text.depth
    assert parts["prefill"] == 2 + vision + 2 + 2 + text + 3
    assert parts["decode"] == parts["extend"] == 1 + text + 3
    assert all(row.error <= verify.BUDGETS[precision] for row in found)
    unseen = {f"{row.part}.{name}" for row in found if row.stage == "decode" for name in row.unseen}
    absent = ABSENT["paligemma2", "decode", precision]
    assert {re.sub(r"\d+", "*", name) for name in unseen} == absent
    notes = verify.notes(found, opened)
    assert notes[0].startswith("not apart in fused graphs")
    assert [line.split()[:2] for line in notes[1:]][-1] == ["decode", "text.blocks.*"]


@pytest.mark.parametrize("half", ["vision", "prefill_text"])
def test_a_half_that_is_wrong_shows_in_its_rows(tmp_path, monkeypatch, half):
    """Where the other half, and prefill whole, are right."""
    build = {"vision": "vision_model", "prefill_text": "prefill_text_model"}[half]
    made = getattr(graphs, build)

    def wrong(config, *arguments, **keywords):
        changes = (
            {"vision": replace(config.vision, eps=1.0)} if half == "vision" else {"text": replace(config.text, eps=1.0)}
        )
        return made(replace(config, **changes), *arguments, **keywords)

    monkeypatch.setattr(graphs, build, wrong)
    opened, model = written(tmp_path, "paligemma1", "float32")
    failed = {
        f"{row.stage} {row.part}" for row in verify.rows(opened, model) if not row.error <= verify.BUDGETS["float32"]
    }
    values = {"vision": {"vision image_features"}, "prefill_text": set()}[half]
    assert failed == {f"end to end {row}" for row in values | {"prefill_text logits", "prefill_text cache"}}


def test_what_was_not_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "choose_provider", lambda wanted: verify.CPU)
    opened, model = written(tmp_path, "paligemma1", "bfloat16")
    assert opened.operators == FUSED
    found = verify.rows(opened, model)
    assert {row.operators for row in found} == {PORTABLE}
    (note,) = verify.notes(found, opened)
    assert "portable operators with a float32 stream" in note
    assert "(fused, a bfloat16 stream) were not run" in note


def written(tmp_path, name, precision):
    config = CONFIGS[name]
    model = Checkpoint(Path("."), config, random_params(config, 5), np.dtype("f8"))
    bundle.write(model, tmp_path / "out", precision)
    return bundle.load(tmp_path / "out"), model


# --- mutants: each in the table of a set of operators, and the parts whose rows must show it ------------------


def with_eps(norm):
    def mutant(*arguments, **keywords):
        given = signature(norm).bind(*arguments, **keywords)
        given.arguments["eps"] = 1.0
        return norm(*given.args, **given.kwargs)

    return mutant


def with_text(function, **changes):
    """An attention that sees another configuration: another factor, no softcap."""

    def mutant(op, p, config, *arguments, **keywords):
        return function(op, p, replace(config, **changes), *arguments, **keywords)

    return mutant


def swapped(op, p, config, *arguments, original=fused.attention, **keywords):
    """An attention that gives back values as keys."""
    y, (key, value) = original(op, p, config, *arguments, **keywords)
    return y, (value, key)


def without_window(mask):
    return lambda op, lengths, capacity, window=None, size=1: mask(op, lengths, capacity, size=size)


def not_causal(op, lengths, capacity, window=None, size=1):
    """A mask by which the first of several new tokens sees the one behind it too."""
    if size == 1:
        return fused.decode_mask(op, lengths, capacity, window)
    return paligemma.decode_mask.portable(op, op.Add(lengths, 1), capacity, window, size)


def turned_late(op, lengths, capacity, window=None, size=1):
    """A mask of half precision that tells the place of each token one too small, so that its key is written there."""
    right = fused_half.decode_mask(op, lengths, capacity, window, size)
    return (
        right
        if size != 1
        else replace(right, last=op.Sub(right.last, op.Cast(op.Constant(value_int=1), to=ir.DataType.INT32)))
    )


PREFILL, DECODE, EXTEND = (
    {f"{stage} text.blocks.{i}" for i in range(3)} for stage in ("prefill", "decode", "extend")
)  # fmt: skip
TEXT = PREFILL | DECODE | EXTEND
WINDOWED = (DECODE | EXTEND) - {"decode text.blocks.1", "extend text.blocks.1"}
VISION = {f"prefill vision.blocks.{i}" for i in range(2)}
NORMS = TEXT | {f"{stage} {part}" for stage in ("prefill", "decode", "extend") for part in ("text.norm", "cache")}
# In float32 the last layer of prefill calls `prefix_attention` itself.
CALLED = TEXT - {"prefill text.blocks.2"}
MUTANTS = {
    "eps of the decoder's norms": ("float32", layers.rms_norm, with_eps(fused.rms_norm), NORMS),
    "eps of the tower's norms": (
        "float32", layers.layer_norm, with_eps(fused.layer_norm), VISION | {"prefill vision.norm"},
    ),
    "a factor of the scores": ("float32", gemma.attention, with_text(fused.attention, query_scalar=16.0), CALLED),
    "no softcap": ("float32", gemma.attention, with_text(fused.attention, attn_softcap=None), CALLED),
    "heads of the tower": ("float32", siglip.attention, with_text(fused.patch_attention, heads=1), VISION),
    "values as keys": ("float32", gemma.attention, swapped, {f"{stage} cache" for stage in ("prefill", "decode", "extend")}),
    "no window": ("float32", paligemma.decode_mask, without_window(fused.decode_mask), WINDOWED),
    "new tokens that see one another": ("float32", paligemma.decode_mask, not_causal, EXTEND),
    "eps of a sum's norm": (
        "float16", layers.add_rms_norm, with_eps(fused_half.add_rms_norm), NORMS,
    ),
    "a factor of the scores in half precision": (
        "float16", gemma.attention, with_text(fused_half.attention, query_scalar=16.0), TEXT,
    ),
    "no softcap in half precision": (
        "float16", gemma.attention, with_text(fused_half.attention, attn_softcap=None), TEXT,
    ),
    "no window in half precision": (
        "float16", paligemma.decode_mask, without_window(fused_half.decode_mask), WINDOWED,
    ),
    "a place too early": ("float16", paligemma.decode_mask, turned_late, DECODE | {"decode cache"}),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_fused_function_shows_in_its_rows(tmp_path, monkeypatch, mutant):
    """And in no other part's: what is around it is given the reference's values."""
    precision, function, wrong, expected = MUTANTS[mutant]
    table = fused_half.INSTEAD if precision == "float16" else fused.INSTEAD
    assert function in table
    monkeypatch.setitem(table, function, wrong)
    opened, model = written(tmp_path, "paligemma2", precision)
    found, _ = verify.compare_parts(verify.as_stored(model, precision), opened)
    failed = {f"{row.stage} {row.part}" for row in found if not row.error <= verify.BUDGETS[precision]}
    assert failed == expected


def test_a_wrong_factor_in_prefill_shows_in_its_rows(tmp_path, monkeypatch):
    """In the tiles of an attention without a softcap, and in the last layer, which has a function of its own."""
    monkeypatch.setattr(fused, "prefix_attention", with_text(fused.prefix_attention, query_scalar=16.0))
    opened, model = written(tmp_path, "paligemma1", "float32")
    found, _ = verify.compare_parts(model, opened)
    failed = {f"{row.stage} {row.part}" for row in found if not row.error <= verify.BUDGETS["float32"]}
    assert failed == PREFILL


def test_padding_that_is_seen_shows_in_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "_MASKED", -1.0)
    opened, model = written(tmp_path, "paligemma1", "float32")
    found, _ = verify.compare_parts(model, opened)
    failed = {f"{row.stage} {row.part}" for row in found if not row.error <= verify.BUDGETS["float32"]}
    assert failed == PREFILL


def test_a_tap_that_is_lost_in_portable_graphs_is_named(tmp_path, monkeypatch):
    config = CONFIGS["paligemma1"]
    model = Checkpoint(Path("."), config, random_params(config, 5), np.dtype("f8"))
    bundle.write(model, tmp_path / "out", operators=PORTABLE)
    attention = gemma.attention.portable

    def deaf(op, p, config, x, rotary, mask, cache=None, start=None, tap=None):
        return attention(op, p, config, x, rotary, mask, cache, start)

    monkeypatch.setattr(gemma, "attention", deaf)
    with pytest.raises(PaliGemmaError, match=r"prefill text\.blocks\.0: the graph lacks the taps attention\.query"):
        verify.rows(bundle.load(tmp_path / "out"), model)
