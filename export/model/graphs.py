"""The models with their inputs, outputs and weights; the one file that begins graphs and ends them.

Weights come through `initializer(path) -> tensor`: a reference into the bundle's weights file when exporting,
arrays in memory when testing. With `taps`, every named intermediate value becomes a further output.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from onnx_ir import DataType
from onnxscript import GraphBuilder

from numpy_ref.checkpoint import flatten, parameters, unflatten
from numpy_ref.config import PaliGemmaConfig
from numpy_ref.model.layers import Params, identity
from numpy_ref.model.segmentation import CELLS, SIDE

from . import fused, fused_half, image, merged, paligemma, sampling, segmentation
from .layers import HALF, PORTABLE, Op, cast_to

# The lowest that have the operators: the older it is, the older the runtimes that read it (export/README.md).
OPSET = 20  # Gelu, and the lowest that has what the graphs beside the two towers need
OPSET_HALF = 23  # Attention
OPSET_PORTABLE = 24  # TensorScatter, the cache write in place
IR_VERSIONS = {OPSET: 9, OPSET_HALF: 11, OPSET_PORTABLE: 11}  # the versions of the file format that came with them
BATCH = "batch_size"  # what other layouts' clients call it
#: How the paths of the weights begin that their graphs read; of the decoder by whether its head is the table.
VISION, TABLE = ("vision.", "projector."), ("text.embedding",)
DECODER = {True: ("text.",), False: ("text.blocks.", "text.norm.", "text.head.")}
Initializer = Callable[[str], Any]  # path -> tensor; or a weight of `quantized`


def prefill_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE, residual: DataType | None = None,
) -> ir.Model:  # fmt: skip
    """prefill.onnx: pixel_values, input_ids, lengths, capacity -> logits, present.{i}.key/value.

    `dtype` is the weights' and the cache's, `residual` the residual stream's (None: float32, or float64 if it is that).
    """
    builder, p = _start("prefill", config, initializer, lambda path: True, operators, dtype, residual)
    size = config.vision.image_size
    return _prefill(builder, p, config, builder.input("pixel_values", _pixels(dtype), ["B*N", 3, size, size]), taps)


def vision_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE, residual: DataType | None = None,
) -> ir.Model:  # fmt: skip
    """vision.onnx, the first half of prefill: pixel_values -> image_features, for any number of prompts."""
    builder, p = _start(
        "vision", config, initializer, lambda path: not path.startswith("text."), operators, dtype, residual
    )
    op, pixels, size = _op(builder), _pixels(dtype), config.vision.image_size
    pixel_values = builder.input("pixel_values", pixels, ["B*N", 3, size, size])
    features = paligemma.encode_image(op, p, config, cast_to(op, pixel_values, op.residual), _tap(builder, taps))
    features = cast_to(op, features, pixels)
    features.dtype = pixels
    return _finish(builder, {paligemma.FEATURES: (features, _features_shape(config))})


def prefill_text_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE, residual: DataType | None = None,
) -> ir.Model:  # fmt: skip
    """prefill_text.onnx, the second half: as prefill.onnx, with image_features in place of pixel_values."""
    builder, p = _start(
        "prefill_text", config, initializer, lambda path: path.startswith("text."), operators, dtype, residual
    )
    features = builder.input(paligemma.FEATURES, _pixels(dtype), _features_shape(config))
    return _prefill(builder, p, config, features, taps)


def decode_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE, residual: DataType | None = None,
) -> ir.Model:  # fmt: skip
    """decode.onnx: input_ids, lengths, past_key_values.{i}.key/value -> logits, present.{i}.key/value."""
    return _further_model("decode", paligemma.decode, 1, config, initializer, dtype, taps, operators, residual)


def extend_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE, residual: DataType | None = None,
) -> ir.Model:  # fmt: skip
    """extend.onnx: decode's inputs and outputs, for several tokens a row: input_ids [B, T] -> logits [B, T, V]."""
    return _further_model("extend", paligemma.extend, "T", config, initializer, dtype, taps, operators, residual)


def _further_model(name, function, size, config, initializer, dtype, taps, operators, residual) -> ir.Model:
    """A graph of tokens behind a cache, `size` a row."""
    builder, p = _start(name, config, initializer, lambda path: path.startswith("text."), operators, dtype, residual)
    input_ids = builder.input("input_ids", DataType.INT64, ["B", size])
    lengths = builder.input("lengths", DataType.INT32, ["B"])
    cache = [
        tuple(builder.input(f"past_key_values.{i}.{kind}", dtype, _cache_shape(config)) for kind in ("key", "value"))
        for i in range(config.text.depth)
    ]
    logits, cache = function(_op(builder), p, config, input_ids, lengths, cache, _tap(builder, taps))
    return _finish(builder, _logits_and_cache(config, logits, cache, ["B", *([] if size == 1 else [size])]))


def vision_encoder_model(
    config: PaliGemmaConfig, initializer: Initializer, resize: str, dtype: DataType = DataType.FLOAT,
    taps: bool = False, operators: str = PORTABLE,
) -> ir.Model:  # fmt: skip
    """Of other layouts: pixel_values, pictures of one size in 0 … 255 -> image_features. It resizes them."""
    builder, p = _start_growing("vision_encoder", config, initializer, VISION, operators, dtype)
    pictures = builder.input("pixel_values", DataType.FLOAT, [BATCH, 3, "height", "width"])
    features = merged.encode_picture(_op(builder), p, config, pictures, resize, _tap(builder, taps))
    return _finish_in_float(builder, paligemma.FEATURES, features, [BATCH, config.vision.patches, config.text.width])


def embed_tokens_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE,
) -> ir.Model:  # fmt: skip
    """Of other layouts: input_ids -> inputs_embeds, without pictures."""
    builder, p = _start_growing("embed_tokens", config, initializer, TABLE, operators, dtype)
    input_ids = builder.input("input_ids", DataType.INT64, [BATCH, "sequence_length"])
    embeddings = merged.embed(_op(builder), p, config, input_ids, _tap(builder, taps))
    return _finish_in_float(builder, "inputs_embeds", embeddings, [BATCH, "sequence_length", config.text.width])


def embedding_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE,
) -> ir.Model:  # fmt: skip
    """Of other layouts: input_ids, image_features -> inputs_embeds, the features in the places of the image tokens."""
    builder, p = _start_growing("embedding", config, initializer, TABLE, operators, dtype)
    input_ids = builder.input("input_ids", DataType.INT64, [BATCH, "sequence_length"])
    shape = ["pictures", "image_tokens", config.text.width]  # none of them behind the prompt
    features = builder.input(paligemma.FEATURES, DataType.FLOAT, shape)
    embeddings = merged.embed_with_features(_op(builder), p, config, input_ids, features, _tap(builder, taps))
    return _finish_in_float(builder, "inputs_embeds", embeddings, [BATCH, "sequence_length", config.text.width])


def merged_model(
    config: PaliGemmaConfig, initializer: Initializer, dtype: DataType = DataType.FLOAT, taps: bool = False,
    operators: str = PORTABLE,
) -> ir.Model:  # fmt: skip
    """Of other layouts: inputs_embeds, attention_mask, past_key_values.{i}.key/value -> logits, present.{i}.key/value.

    Names of sizes are the clients': the first cache is empty, and they set every size to 0 but that of BATCH.
    """
    builder, p = _start_growing("decoder", config, initializer, DECODER[config.text.tied], operators, dtype)
    embeddings = builder.input("inputs_embeds", DataType.FLOAT, [BATCH, "sequence_length", config.text.width])
    attention_mask = builder.input("attention_mask", DataType.INT64, [BATCH, "total_sequence_length"])
    shapes = [
        [BATCH, config.text.kv_heads, size, config.text.head_dim]
        for size in ("past_sequence_length", "total_sequence_length")
    ]
    cache = [
        tuple(builder.input(f"past_key_values.{i}.{kind}", dtype, shapes[0]) for kind in ("key", "value"))
        for i in range(config.text.depth)
    ]
    logits, cache = merged.decoder(_op(builder), p, config, embeddings, attention_mask, cache, _tap(builder, taps))
    outputs: dict[str, tuple] = {"logits": (logits, [BATCH, 1, config.text.vocab])}
    for i, layer in enumerate(cache):
        outputs |= {
            f"present.{i}.{kind}": (value, shapes[1]) for kind, value in zip(("key", "value"), layer, strict=True)
        }
    return _finish(builder, outputs)


def masks_model(params: Params) -> ir.Model:
    """masks.onnx: codes int64 [B, 16] -> masks float32 [B, 64, 64]. Its small weights are inside."""
    builder = _builder("masks")
    flat = flatten({"codebook": params["codebook"], "decoder": params["decoder"]})
    tensors = {path: ir.tensor(np.asarray(array, np.float32), name=path) for path, array in flat.items()}
    p = unflatten({path: builder.initializer(tensor, path) for path, tensor in tensors.items()})
    codes = builder.input("codes", DataType.INT64, ["B", CELLS * CELLS])
    masks = segmentation.decode(_op(builder), p, codes)
    masks.dtype, masks.shape = DataType.FLOAT, ir.Shape(["B", SIDE, SIDE])
    builder.add_output(masks, "masks")
    return _model(builder)


def preprocess_model(config: PaliGemmaConfig, resize: str) -> ir.Model:
    """preprocess.onnx: image uint8 [H, W, 3] -> pixel_values float32 [1, 3, S, S]."""
    builder = _builder("preprocess")
    picture, size = builder.input("image", DataType.UINT8, ["H", "W", 3]), config.vision.image_size
    pixel_values = image.preprocess(_op(builder), picture, size, resize)
    pixel_values.dtype, pixel_values.shape = DataType.FLOAT, ir.Shape([1, 3, size, size])
    builder.add_output(pixel_values, "pixel_values")
    return _model(builder)


def sample_model(known: np.ndarray, on_device: bool = False, constrained: bool = False) -> ir.Model:
    """sample.onnx: logits, temperature, top_k, top_p, uniform -> token, logprob. `known` [V]: what may be drawn.

    `on_device` makes it sample_device.onnx, which has `count` int64 [1] in place of top_k (`sampling.sample_among`);
    `constrained` makes that constrain.onnx, which is told what may be drawn for each row: `allowed` bool [B, V].
    """
    builder = _builder("constrain" if constrained else "sample_device" if on_device else "sample")
    logits = builder.input("logits", DataType.FLOAT, ["B", len(known)])
    temperature, top_p = (builder.input(name, DataType.FLOAT, []) for name in ("temperature", "top_p"))
    top_k = builder.input("count", DataType.INT64, [1]) if on_device else builder.input("top_k", DataType.INT64, [])
    uniform = builder.input("uniform", DataType.FLOAT, ["B"])
    if constrained:
        drawable = builder.input("allowed", DataType.BOOL, ["B", len(known)])
    else:
        drawable = builder.initializer(ir.tensor(known, name="known"), "known")
    sample = sampling.sample_among if on_device else sampling.sample
    token = sample(_op(builder), logits, drawable, temperature, top_k, top_p, uniform)
    logprob = sampling.log_probability(_op(builder), logits, token)
    for value, name, dtype in ((token, "token", DataType.INT64), (logprob, "logprob", DataType.FLOAT)):
        value.dtype, value.shape = dtype, ir.Shape(["B"])
        builder.add_output(value, name)
    return _model(builder)


def reorder_model(config: PaliGemmaConfig, dtype: DataType) -> ir.Model:
    """A cache with its rows in another order: past_key_values.{i}.key and .value, rows -> present.{i}.key, .value."""
    builder = _builder("reorder")
    rows = builder.input("rows", DataType.INT64, ["R"])
    for name in (f"{i}.{kind}" for i in range(config.text.depth) for kind in ("key", "value")):
        past = builder.input(f"past_key_values.{name}", dtype, _cache_shape(config))
        present = builder.op.Gather(past, rows, axis=0)
        present.dtype, present.shape = dtype, ir.Shape(["R", *_cache_shape(config)[1:]])
        builder.add_output(present, f"present.{name}")
    return _model(builder)


def repeat_model(vocab: int) -> ir.Model:
    """logits [B, V] in another order, or some of them several times: logits, rows -> repeated."""
    builder = _builder("repeat")
    logits, rows = builder.input("logits", DataType.FLOAT, ["B", vocab]), builder.input("rows", DataType.INT64, ["R"])
    repeated = builder.op.Gather(logits, rows, axis=0)
    repeated.dtype, repeated.shape = DataType.FLOAT, ir.Shape(["R", vocab])
    builder.add_output(repeated, "repeated")
    return _model(builder)


def likeliest_model(vocab: int) -> ir.Model:
    """`sampling.likeliest`: logits, among, count, ends -> ids, logprobs, ended."""
    builder = _builder("likeliest")
    logits, among = (
        builder.input("logits", DataType.FLOAT, ["B", vocab]),
        builder.input("among", DataType.BOOL, [vocab]),
    )
    count, ends = builder.input("count", DataType.INT64, [1]), builder.input("ends", DataType.INT64, ["E"])
    ids, logprobs, ended = sampling.likeliest(_op(builder), logits, among, count, ends)
    for value, name, dtype, size in (
        (ids, "ids", DataType.INT64, "N"), (logprobs, "logprobs", DataType.FLOAT, "N"),
        (ended, "ended", DataType.FLOAT, "E"),
    ):  # fmt: skip
        value.dtype, value.shape = dtype, ir.Shape(["B", size])
        builder.add_output(value, name)
    return _model(builder)


def spread_model(vocab: int, locations: np.ndarray) -> ir.Model:
    """`sampling.location_spread`: logits -> spread. `locations` [L]: the ids of the location tokens."""
    builder = _builder("spread")
    logits = builder.input("logits", DataType.FLOAT, ["B", vocab])
    ids = builder.initializer(ir.tensor(np.asarray(locations, np.int64), name="locations"), "locations")
    spread = sampling.location_spread(_op(builder), logits, ids)
    spread.dtype, spread.shape = DataType.FLOAT, ir.Shape(["B"])
    builder.add_output(spread, "spread")
    return _model(builder)


def describe(model: ir.Model) -> dict:
    """The inputs and outputs of a model as plain data, for bundle.json."""

    def entry(value):
        return {"name": value.name, "dtype": value.dtype.name.lower(), "shape": _dims(value.shape)}

    return {"inputs": [entry(v) for v in model.graph.inputs], "outputs": [entry(v) for v in model.graph.outputs]}


def serialize(model: ir.Model) -> bytes:
    """The .onnx file's bytes; external weights stay references."""
    return ir.to_proto(model).SerializeToString()


def trace(
    function: Callable, arguments: dict[str, Any], weights: dict[str, Any] | None = None, taps: bool = False
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A model of one function, and what to feed it.

    `function(op, **arguments)` is a function of the export files. Arrays anywhere in `arguments` become inputs,
    other values are passed on (a NumPy dtype as its ONNX namesake). `weights` {path: tensor} become the argument p.
    Outputs are named `output[.i…]`, taps by their names, all behind the prefix `out.`, since a tap and a weight
    may share a name. Returns the model and {input name: array}.
    """
    feeds, values = {}, {}
    _walk(arguments, "in", lambda name, array: feeds.setdefault(name, array))
    double = any(array.dtype == np.float64 for array in feeds.values())
    residual = DataType.DOUBLE if double else DataType.FLOAT
    builder = _builder(getattr(function, "__name__", "function"), residual=residual, opset=OPSET_PORTABLE)
    for name, array in feeds.items():
        values[name] = builder.input(name, DataType.from_numpy(array.dtype), list(array.shape))
    keywords = _walk(arguments, "in", lambda name, array: values[name])
    if weights:
        keywords["p"] = _declare(builder, weights)
    recorded = {}

    def record(name, value):
        recorded[name] = value
        return value

    result = function(_op(builder), **keywords, **({"tap": record} if taps else {}))
    _walk(result, "output", recorded.setdefault, leaf=ir.Value)
    for name, value in recorded.items():
        builder.add_output(builder.op.Identity(value), f"out.{name}")
    return _model(builder), feeds


def _walk(tree, name, visit, leaf=np.ndarray):
    """Rebuild a nested structure with `visit(name, leaf)` in place of its leaves."""
    if isinstance(tree, leaf):
        return visit(name, tree)
    if isinstance(tree, dict):
        return {key: _walk(value, f"{name}.{key}", visit, leaf) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_walk(value, f"{name}.{i}", visit, leaf) for i, value in enumerate(tree))
    if isinstance(tree, type) and issubclass(tree, np.generic):
        return DataType.from_numpy(np.dtype(tree))
    return tree


def opset_of(config: PaliGemmaConfig, operators: str, dtype: DataType) -> int:
    """The opset of prefill and decode with these operators, their cache in this dtype.

    Runtimes before 1.24 count one key too many in GroupQueryAttention's windows. They do not read OPSET_PORTABLE.
    """
    text, longest = config.text, config.max_length
    is_windowed = any(window is not None and window < longest for window in text.windows)
    if operators == PORTABLE or text.head_dim % fused.HEADS or is_windowed:
        return OPSET_PORTABLE
    return OPSET_HALF if dtype in HALF else OPSET


def _builder(name, instead=None, residual=DataType.FLOAT, max_length=None, opset=OPSET) -> GraphBuilder:
    """A graph to add nodes to. Its `op` carries what `layers.Op` says."""
    builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": opset}, name=name))
    op = _op(builder)
    op.instead, op.residual, op.max_length, op.rounded = instead or {}, residual, max_length, {}
    op.paths, op.module = {}, ""
    return builder


def _op(builder: GraphBuilder) -> Op:
    return cast(Op, builder.op)  # to which `_builder` adds what the library's own type does not have


def _start(name, config, initializer, used, operators, dtype, residual, replaced=None, opset=None):
    """A builder, and the parameters as initializers of its graph, each under its tensor's name.

    `replaced` are functions in whose place others stand, whatever the operators; `opset` is for graphs that need less.
    """
    instead = {} if operators == PORTABLE else fused_half.INSTEAD if dtype in HALF else fused.INSTEAD
    residual = residual or (DataType.DOUBLE if dtype == DataType.DOUBLE else DataType.FLOAT)
    if not opset:
        opset = OPSET_PORTABLE if name == "extend" else opset_of(config, operators, dtype)  # it has portable attention
    builder, found = _builder(name, instead | (replaced or {}), residual, config.max_length, opset), {}
    for path in (parameter.path for parameter in parameters(config) if used(parameter.path)):
        weight = initializer(path)
        found[weight.name if isinstance(weight, ir.TensorProtocol) else path] = weight
    return builder, _declare(builder, found)


def _start_growing(name, config, initializer, used, operators, dtype):
    """The same for the graphs of other layouts, of the weights whose paths begin with one of `used`."""
    return _start(
        name, config, initializer, lambda path: path.startswith(used), operators, dtype, None,
        merged.INSTEAD, OPSET,
    )  # fmt: skip


def _declare(builder, weights):
    """Weights {path: tensor} as a tree of initializers; a quantized one declares its own."""
    declared = {
        path: builder.initializer(weight, weight.name)
        if isinstance(weight, ir.TensorProtocol)
        else weight.declare(builder)
        for path, weight in weights.items()
    }
    _op(builder).paths = {weight: path for path, weight in declared.items()}
    return unflatten(declared)


def _tap(builder, taps):
    if not taps:
        return identity

    def record(name, value):
        # An Identity, since one value may carry several names, and an output needs its own.
        builder.add_output(builder.op.Identity(value), f"tap.{name}")
        return value

    return record


def _logits_and_cache(config, logits, cache, rows=("B",)) -> dict:
    outputs = {"logits": (logits, [*rows, config.text.vocab])}
    for i, layer in enumerate(cache):
        for kind, value in zip(("key", "value"), layer, strict=True):
            outputs[f"present.{i}.{kind}"] = (value, _cache_shape(config))
    return outputs


def _finish(builder, outputs) -> ir.Model:
    """The model with its outputs {name: (value, shape)}, and the taps behind them."""
    taps = list(builder.graph.outputs)
    builder.graph.outputs.clear()
    for name, (value, shape) in outputs.items():
        value.shape = ir.Shape(shape)
        builder.add_output(value, name)
    builder.graph.outputs.extend(taps)
    return _model(builder)


def _model(builder) -> ir.Model:
    _name_nodes(builder.graph)
    for name in [name for name, value in builder.graph.initializers.items() if not value.uses()]:
        del builder.graph.initializers[name]  # packed into another
    version = IR_VERSIONS[builder.graph.opset_imports[""]]
    return ir.Model(builder.graph, ir_version=version, producer_name="paligemma-onnx")


def _finish_in_float(builder, name, value, shape) -> ir.Model:
    """The model with one output, in float32."""
    value = cast_to(_op(builder), value, DataType.FLOAT)
    value.dtype = DataType.FLOAT
    return _finish(builder, {name: (value, shape)})


def _name_nodes(graph):
    """Name each node by the module that it belongs to, and by its operator: text.blocks.3.attention/Transpose_1.

    What belongs to none has the graph's name before it. These are the names in viewers, profiles and error messages.
    """
    seen = Counter()
    for node in graph:
        module = node.metadata_props["namespace"].replace("/", ".") or graph.name
        name = f"{module}/{node.op_type}"
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
        node.metadata_props.clear()  # the builder's notes to itself


def _prefill(builder, p, config, pictures, taps) -> ir.Model:
    """The model of prefill, whose first input is `pictures`: pixel values, or features."""
    input_ids = builder.input("input_ids", DataType.INT64, ["B", "T"])
    lengths = builder.input("lengths", DataType.INT32, ["B"])
    capacity = builder.input("capacity", DataType.INT64, [])
    tap = _tap(builder, taps)
    logits, cache = paligemma.prefill(_op(builder), p, config, pictures, input_ids, lengths, capacity, tap)
    return _finish(builder, _logits_and_cache(config, logits, cache))


def _pixels(dtype):
    """The dtype of pictures at a graph's border: hosts need know no half precision."""
    return DataType.DOUBLE if dtype == DataType.DOUBLE else DataType.FLOAT


def _features_shape(config):
    return ["B*N", config.vision.patches, config.text.width]


def _cache_shape(config):
    return ["B", config.text.kv_heads, "C", config.text.head_dim]


def _dims(shape):
    return [dim if isinstance(dim, int) else str(dim.value) for dim in shape]
