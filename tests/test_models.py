"""The whole model: prefill, decode and extend on every engine, tap by tap, and every field of the config matters."""

from dataclasses import fields, replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from export.model import graphs
from numpy_ref import checkpoint
from numpy_ref.model import paligemma
from torch_impl.load import from_params

from .cases import BUDGETS, MODEL
from .models import CONFIGS, random_batch, random_params
from .parity import DTYPES, Recorder, assert_parity, cast, evaluate_reference, evaluate_runtime, flat_outputs, to_torch

CAPACITY = 27
TWO = "prefill of two pictures a row"
FURTHER = {"decode": [[7], [11], [13]], "extend": [[7, 5, 3], [11, 2, 23], [13, 31, 19]]}  # tokens behind a cache
VISION = "encode_image"
TEXT = "prefill from the features of two pictures a row"


def inputs(config, dtype, pictures=1):
    pixel_values, input_ids, lengths = random_batch(config, pictures=pictures)
    return {"pixel_values": pixel_values.astype(dtype), "input_ids": input_ids, "lengths": lengths}


def reference(config, stage, dtype=np.float64):
    """Taps and outputs of the reference. The others continue from prefill's cache, with stale slots behind it."""
    params, recorder = random_params(config, dtype=dtype), Recorder()
    arguments = inputs(config, dtype, 2 if stage in (TWO, TEXT) else 1)
    if stage == VISION:
        arguments = {"pixel_values": arguments["pixel_values"]}
        features = paligemma.encode_image(params, config, **arguments, tap=recorder)
        return {**recorder.values, **named(features)}, arguments
    if stage == TEXT:
        features = paligemma.encode_image(random_params(config), config, arguments["pixel_values"].astype(np.float64))
        arguments["pixel_values"] = features.astype(np.float32).astype(dtype)
    if stage not in FURTHER:
        outputs = paligemma.prefill(params, config, **arguments, capacity=CAPACITY, tap=recorder)
        return {**recorder.values, **named(outputs)}, arguments
    _, cache = paligemma.prefill(random_params(config), config, **inputs(config, np.float64), capacity=CAPACITY)
    stale = np.arange(CAPACITY)[None, None, :, None] >= arguments["lengths"][:, None, None, None]
    cache = [tuple(np.where(stale, 1e4, array).astype(np.float32).astype(dtype) for array in layer) for layer in cache]
    arguments = {"input_ids": np.array(FURTHER[stage]), "lengths": arguments["lengths"], "cache": cache}
    outputs = getattr(paligemma, stage)(params, config, **arguments, tap=recorder)
    return {**recorder.values, **named(outputs)}, arguments


def named(outputs):
    if not isinstance(outputs, tuple):
        return {"out.image_features": outputs}
    logits, cache = outputs
    return {"out.logits": logits, **flat_outputs(cache, "out.present")}


def run_torch(config, stage, dtype):
    _, arguments = reference(config, stage, dtype)
    model = from_params(config, random_params(config), torch.float64 if dtype == np.float64 else torch.float32)
    recorder = Recorder()
    extra = {"capacity": CAPACITY} if stage.startswith("prefill") else {}
    with torch.inference_mode():
        outputs = getattr(model, stage.split()[0])(**to_torch(arguments), **extra, tap=recorder)
    return {name: value.numpy() for name, value in {**recorder.values, **named(outputs)}.items()}


def run_onnx(config, stage, dtype, evaluate):
    _, arguments = reference(config, stage, dtype)
    params = checkpoint.flatten(random_params(config, dtype=dtype))
    makers = {"decode": graphs.decode_model, "extend": graphs.extend_model}
    makers |= {VISION: graphs.vision_model, TEXT: graphs.prefill_text_model}
    model = makers.get(stage, graphs.prefill_model)(
        config, lambda path: ir.tensor(params[path], name=path), ir.DataType.from_numpy(np.dtype(dtype)), taps=True
    )
    feeds = dict(arguments)
    if stage.startswith("prefill"):
        feeds["capacity"] = np.array(CAPACITY)
    if stage == TEXT:
        feeds["image_features"] = feeds.pop("pixel_values")
    if stage in FURTHER:
        for i, layer in enumerate(feeds.pop("cache")):
            feeds[f"past_key_values.{i}.key"], feeds[f"past_key_values.{i}.value"] = layer
    values = evaluate(graphs.serialize(model), feeds)
    kinds = {"key": 0, "value": 1}
    renamed = {}
    for name, value in values.items():
        if name.startswith("tap."):
            renamed[name.removeprefix("tap.")] = value
        elif name in ("logits", "image_features"):
            renamed[f"out.{name}"] = value
        else:
            _, layer, kind = name.split(".")
            renamed[f"out.present.{layer}.{kinds[kind]}"] = value
    return renamed


ENGINES = {
    "numpy": lambda config, stage, dtype: reference(config, stage, dtype)[0],
    "torch": run_torch,
    "onnx.reference": lambda *arguments: run_onnx(*arguments, evaluate_reference),
    "onnxruntime": lambda *arguments: run_onnx(*arguments, evaluate_runtime),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("stage", ["prefill", TWO, VISION, TEXT, *FURTHER])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tap(name, engine, stage, dtype):
    config = CONFIGS[name]
    expected, _ = reference(config, stage)
    assert_parity(ENGINES[engine](config, stage, dtype), expected, dtype, BUDGETS[MODEL][dtype])


@pytest.mark.parametrize("name", CONFIGS)
def test_training_forward(name):
    config = CONFIGS[name]
    arguments = {**cast(inputs(config, np.float64), np.float64), "prefix_lengths": np.array([10, 12, 11], np.int32)}
    numpy_taps, torch_taps = Recorder(), Recorder()
    paligemma.forward(random_params(config), config, **arguments, tap=numpy_taps)
    with torch.inference_mode():
        from_params(config, random_params(config), torch.float64)(**to_torch(arguments), tap=torch_taps)
    actual = {key: value.numpy() for key, value in torch_taps.values.items()}
    assert_parity(actual, numpy_taps.values, np.float64, 1e-10)


# Other values for each field, of a model whose weights still fit it. Fields that only shape the weights are
# covered by the strict loader.
CHANGES = {
    "vision": {"heads": 5, "eps": 1e-2},
    "text": {
        "rope_base": 1000.0, "eps": 1e-2, "query_scalar": 3.0, "attn_softcap": None,
        "final_softcap": None, "windows": (None, None, None),
    },
}  # fmt: skip
SHAPES_ONLY = {
    "vision": {"image_size", "patch_size", "width", "depth", "mlp"},
    "text": {"vocab", "width", "depth", "mlp", "heads", "kv_heads", "head_dim", "tied", "post_norms"},
}


@pytest.mark.parametrize(("part", "field"), [(part, field) for part in CHANGES for field in CHANGES[part]])
def test_every_field_changes_something(part, field):
    config, value = CONFIGS["paligemma2"], CHANGES[part][field]
    changed = replace(config, **{part: replace(getattr(config, part), **{field: value})})
    arguments, params = cast(inputs(config, np.float64), np.float64), random_params(config)
    before = decode_twice(params, config, arguments)
    after = decode_twice(params, changed, arguments)
    assert np.abs(before - after).max() > 1e-6 * np.abs(before).max()


def decode_twice(params, config, arguments):
    logits, cache = paligemma.prefill(params, config, **arguments, capacity=CAPACITY)
    second, _ = paligemma.decode(params, config, np.array([[7], [11], [13]]), arguments["lengths"], cache)
    return np.stack([logits, second])


def test_every_field_is_listed():
    config = CONFIGS["paligemma2"]
    for part in ("vision", "text"):
        assert {field.name for field in fields(getattr(config, part))} == {*CHANGES[part], *SHAPES_ONLY[part]}
