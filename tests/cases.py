"""The case table: every function of the model with arguments for it. Adding a function means adding a line."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from numpy_ref.checkpoint import unflatten
from numpy_ref.model import layers
from numpy_ref.model.contrastive import ContrastiveConfig, TextConfig
from torch_impl.model.contrastive import Contrastive
from torch_impl.model.segmentation import Codec, CodecConfig

from .models import CONFIGS, random_params

LEAF, BLOCK, MODEL = "leaf", "block", "model"
EPS = np.finfo(np.float64).eps, np.finfo(np.float32).eps
# Largest error per tap in float64 and float32: three to four times the worst of 20 seeds over all engines, as
# `python -m tests.calibrate` measured it. In float64 leaf 2.9 eps (attend), block 24.5 eps (gemma.decoder); in
# float32 leaf 24.5 eps (rope_angles, whose powers of the base differ in the last bits), block 23.9 eps.
# The model budgets are the design's.
BUDGETS = {
    LEAF: {np.float64: 12 * EPS[0], np.float32: 98 * EPS[1]},
    BLOCK: {np.float64: 90 * EPS[0], np.float32: 75 * EPS[1]},
    MODEL: {np.float64: 1e-10, np.float32: 1e-4},
}


@dataclass(frozen=True)
class Case:
    """One function of `numpy_ref.<module>` and its namesakes.

    `arguments(rng)` gives keyword arguments; `torch` names the module (or its method) that carries the function
    in PyTorch; `partial` says that only some of that module's weights are used.
    """

    name: str
    module: str
    function: str
    arguments: Callable
    level: str = LEAF
    taps: bool = False
    torch: str | None = None
    config: object = None
    partial: bool = False
    exported: bool = True
    runtime_float64: bool = True  # ONNX Runtime has no convolution in float64

    def runs_on(self, engine, dtype) -> bool:
        if engine.startswith("onnx") and not self.exported:
            return False
        return engine != "onnxruntime" or dtype is not np.float64 or self.runtime_float64


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def positions(rng, batch, length):
    return rng.integers(0, 90, (batch, length))


def causal(length, keys):
    mask = np.arange(keys)[None] <= np.arange(length)[:, None] + keys - length
    return np.stack([mask, mask, np.ones_like(mask)])


PG1, PG2 = CONFIGS["paligemma1"], CONFIGS["paligemma2"]
B, T, S, N, K, H, D = 3, 5, 7, 6, 2, 10, 11


def leaf_cases():
    layer = {
        "linear": lambda r: {"x": normal(r, B, T, D), "kernel": normal(r, D, 13)},
        "linear with bias": lambda r: {"x": normal(r, B, T, D), "kernel": normal(r, D, 13), "bias": normal(r, 13)},
        "embedding": lambda r: {
            "ids": r.integers(0, 17, (B, T)), "table": normal(r, 17, D), "dtype": None,
        },
        "gelu": lambda r: {"x": 3 * normal(r, B, T, D)},
        "softmax": lambda r: {"x": 5 * normal(r, B, T, D)},
        "softmax of large values": lambda r: {"x": 1000 + normal(r, B, T, D)},
        "softcap": lambda r: {"x": 9 * normal(r, B, T, D), "cap": 5.0},
        "softcap of none": lambda r: {"x": 9 * normal(r, B, T, D), "cap": None},
        "layer_norm": lambda r: {"x": 2 + 3 * normal(r, B, T, D), "scale": normal(r, D), "bias": normal(r, D), "eps": 1e-2},
        "rms_norm": lambda r: {"x": 3 * normal(r, B, T, D), "scale": normal(r, D), "eps": 1e-2},
        "rope_angles": lambda r: {"positions": positions(r, B, T), "head_dim": H, "base": 37.0, "dtype": None},
        "rope": lambda r: {"x": normal(r, B, N, T, H), "cos": normal(r, B, 1, T, H // 2), "sin": normal(r, B, 1, T, H // 2)},
        "split_heads": lambda r: {"x": normal(r, B, T, N * H), "heads": N},
        "merge_heads": lambda r: {"x": normal(r, B, N, T, H)},
        "write_cache": lambda r: {"cache": normal(r, B, K, S, H), "update": normal(r, B, K, 1, H), "start": np.array([0, 6, 3])},
    }  # fmt: skip
    attend = {
        "attend, one head a query": lambda r: {
            "query": normal(r, B, N, T, H), "key": normal(r, B, N, S, H), "value": normal(r, B, N, S, H)},
        "attend, grouped queries": lambda r: {
            "query": normal(r, B, N, T, H), "key": normal(r, B, K, S, H), "value": normal(r, B, K, S, H),
            "mask": causal(T, S)},
        "attend, one key head": lambda r: {
            "query": normal(r, B, N, T, H), "key": normal(r, B, 1, S, H), "value": normal(r, B, 1, S, H),
            "mask": causal(T, S), "cap": 2.0},
    }  # fmt: skip
    for name, arguments in layer.items():
        function = name.split()[0]
        yield Case(name, "layers", function, arguments)
    for name, arguments in attend.items():
        yield Case(name, "layers", "attend", arguments, taps=True)
    masks = {
        "prefix_mask": lambda r: {"prefix_lengths": np.array([2, 5, 3]), "lengths": np.array([4, 5, 7]), "size": 7},
        "prefix_mask, window": lambda r: {
            "prefix_lengths": np.array([2, 1, 3]), "lengths": np.array([4, 5, 7]), "size": 7, "window": 2},
        "decode_mask": lambda r: {"lengths": np.array([0, 5, 6]), "capacity": 7},
        "decode_mask, window": lambda r: {"lengths": np.array([0, 5, 6]), "capacity": 7, "window": 3},
        "decode_mask, several": lambda r: {"lengths": np.array([0, 4, 3]), "capacity": 7, "size": 3},
        "decode_mask, several in a window": lambda r: {
            "lengths": np.array([0, 4, 3]), "capacity": 7, "window": 2, "size": 3},
    }  # fmt: skip
    for name, arguments in masks.items():
        yield Case(name, "paligemma", name.split(",")[0], arguments)
    for pictures in (1, 2):
        batch = lambda r, count=B * pictures: {"images": normal(r, count, 5, D), "input_ids": positions(r, B, T)}  # noqa: E731
        yield Case(f"join_pictures, {pictures} a row", "paligemma", "join_pictures", batch)
    yield Case("pad_cache", "paligemma", "pad_cache", lambda r: {"array": normal(r, B, K, T, H), "capacity": S})


def weights(config, *path):
    """The weights at a path of a random model."""
    tree = random_params(config, seed=7)
    for step in path:
        tree = tree[step]
    return tree


def block_cases():
    vision = PG1.vision
    pixels = lambda r: r.uniform(-1, 1, (B, 3, 23, 23)).astype(np.float32)  # noqa: E731
    patches = lambda r: normal(r, B, vision.patches, vision.width)  # noqa: E731
    for function, owner, arguments, taps in [
        ("patch_embed", "PatchEmbed", lambda r: {"p": weights(PG1, "vision", "patch_embed"), "config": vision, "pixel_values": pixels(r)}, False),
        ("attention", "Attention", lambda r: {"p": weights(PG1, "vision", "blocks", 1, "attention"), "config": vision, "x": patches(r)}, True),
        ("mlp", "Mlp", lambda r: {"p": weights(PG1, "vision", "blocks", 1, "mlp"), "x": patches(r)}, False),
        ("block", "Block", lambda r: {"p": weights(PG1, "vision", "blocks", 0), "config": vision, "x": patches(r)}, True),
        ("encoder", "Encoder", lambda r: {"p": weights(PG1, "vision"), "config": vision, "pixel_values": pixels(r)}, True),
    ]:  # fmt: skip
        yield Case(f"siglip.{function}", "siglip", function, arguments, BLOCK, taps, owner, vision)

    for name, model in CONFIGS.items():
        text = model.text
        x = lambda r, text=text: normal(r, B, T, text.width)  # noqa: E731

        def rotary(r, text=text):
            return layers.rope_angles(positions(r, B, T), text.head_dim, text.rope_base, np.float32)

        def cached(r, text=text):
            shape = (B, text.kv_heads, S, text.head_dim)
            mask = np.arange(S)[None, None] <= np.array([0, 4, 6])[:, None, None]
            return {
                "x": normal(r, B, 1, text.width),
                "rotary": layers.rope_angles(positions(r, B, 1), text.head_dim, text.rope_base, np.float32),
                "mask": mask, "cache": (normal(r, *shape), normal(r, *shape)), "start": np.array([0, 4, 6]),
            }  # fmt: skip

        def fresh(r, x=x, rotary=rotary):
            return {"x": x(r), "rotary": rotary(r), "mask": causal(T, T)}

        def at(*path, model=model):
            return weights(model, "text", *path)

        table = [
            ("mlp", "mlp", "Mlp", lambda r, at=at, x=x: {"p": at("blocks", 0, "mlp"), "x": x(r)}, False),
            ("attention", "attention", "Attention", lambda r, at=at, t=text, f=fresh: {"p": at("blocks", 1, "attention"), "config": t, **f(r)}, True),
            ("attention with a cache", "attention", "Attention", lambda r, at=at, t=text, f=cached: {"p": at("blocks", 1, "attention"), "config": t, **f(r)}, True),
            ("block", "block", "Block", lambda r, at=at, t=text, f=fresh: {"p": at("blocks", 1), "config": t, **f(r)}, True),
            ("block with a cache", "block", "Block", lambda r, at=at, t=text, f=cached: {"p": at("blocks", 1), "config": t, **f(r)}, True),
            ("decoder", "decoder", "Decoder", lambda r, at=at, t=text, x=x: {
                "p": at(), "config": t, "x": x(r), "positions": np.tile(np.arange(T), (B, 1)),
                "masks": {window: causal(T, T) for window in {*t.windows, None}}}, True),
            ("embed", "embed", "Decoder.embed", lambda r, at=at, t=text: {
                "p": at(), "config": t, "ids": r.integers(0, t.vocab, (B, T)), "dtype": None}, False),
            ("logits", "logits", "Decoder.logits", lambda r, at=at, t=text: {"p": at(), "config": t, "x": normal(r, B, t.width)}, False),
        ]  # fmt: skip
        for label, function, owner, arguments, taps in table:
            yield Case(f"gemma.{label}, {name}", "gemma", function, arguments, BLOCK, taps, owner, text)


def codec_cases():
    """Convolutions and the mask codec."""
    config = CodecConfig(8, 5)
    params = random_like(Codec(config))
    square = lambda r: normal(r, 2, 3, 7, 9)  # noqa: E731
    words = lambda r: normal(r, 2, 4, 4, 5)  # noqa: E731
    masks = lambda r: r.uniform(-1, 1, (2, 64, 64)).astype(np.float32)  # noqa: E731
    for name, module, function, arguments, level, owner, sizes, exported in [
        ("relu", "layers", "relu", lambda r: {"x": normal(r, B, T, D)}, LEAF, None, None, True),
        ("conv", "layers", "conv", lambda r: {
            "x": square(r), "kernel": normal(r, 5, 3, 3, 3), "bias": normal(r, 5), "padding": 1}, LEAF, None, None, True),
        ("conv, stride", "layers", "conv", lambda r: {
            "x": square(r), "kernel": normal(r, 5, 3, 4, 4), "bias": normal(r, 5), "stride": 2, "padding": 1}, LEAF, None, None, True),
        ("conv_transpose", "layers", "conv_transpose", lambda r: {
            "x": square(r), "kernel": normal(r, 3, 5, 4, 4), "bias": normal(r, 5), "stride": 2, "padding": 1}, LEAF, None, None, True),
        ("segmentation.res_block", "segmentation", "res_block", lambda r: {
            "p": params["decoder"]["res"][1], "x": normal(r, 2, 8, 4, 4)}, BLOCK, "ResBlock", 8, True),
        ("segmentation.decoder", "segmentation", "decoder", lambda r: {"p": params["decoder"], "words": words(r)}, BLOCK, "Decoder", config, True),
        ("segmentation.decode", "segmentation", "decode", lambda r: {"p": params, "codes": r.integers(0, 128, (2, 16))}, BLOCK, "Codec.decode", config, True),
        ("segmentation.encoder", "segmentation", "encoder", lambda r: {"p": params["encoder"], "masks": masks(r)}, BLOCK, "Encoder", config, False),
    ]:  # fmt: skip
        yield Case(
            name, module, function, arguments, level, False, owner, sizes, exported=exported, runtime_float64=False
        )


def norm_cases():
    """Batch normalisation, which PaliGemma does not use."""

    def statistics(r):
        return {"scale": normal(r, D), "bias": normal(r, D), "mean": normal(r, D), "variance": normal(r, D) ** 2}

    yield Case("batch_norm", "layers", "batch_norm", lambda r: {"x": normal(r, 7, D), **statistics(r), "eps": 1e-2})
    yield Case(
        "batch_norm_training", "layers", "batch_norm_training",
        lambda r: {"x": normal(r, 7, D), **statistics(r), "eps": 1e-2, "momentum": 0.3}, exported=False,
    )  # fmt: skip


def contrastive_cases():
    """Both towers of pretraining, and its losses."""
    config = ContrastiveConfig(PG1.vision, TextConfig(vocab=31, length=7, width=15, depth=2, mlp=13, heads=3, eps=1e-2))
    params = random_like(Contrastive(config))
    pixels = lambda r: r.uniform(-1, 1, (B, 3, 23, 23)).astype(np.float32)  # noqa: E731

    def pair(r):
        unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(r, 5, D), normal(r, 5, D))]
        return {"image": unit[0], "text": unit[1], "log_temperature": np.array(2.3, np.float32)}

    for name, arguments, level, taps, owner in [
        ("normalize", lambda r: {"x": normal(r, B, D)}, LEAF, False, None),
        ("similarity", pair, LEAF, False, None),
        ("clip_loss", pair, LEAF, False, None),
        ("siglip_loss", lambda r: {**pair(r), "bias": np.array(-4.0, np.float32)}, LEAF, False, None),
        ("pool", lambda r: {
            "p": params["pool"], "config": config.vision, "x": normal(r, B, PG1.vision.patches, 15)}, BLOCK, True, "Pool"),
        ("embed_image", lambda r: {"p": params, "config": config, "pixel_values": pixels(r)}, BLOCK, True, "Contrastive.embed_image"),
        ("embed_text", lambda r: {"p": params, "config": config, "ids": r.integers(0, 31, (B, 7))}, BLOCK, True, "Contrastive.embed_text"),
    ]:  # fmt: skip
        yield Case(name, "contrastive", name, arguments, level, taps, owner, exported=False)


def random_like(module) -> dict:
    """Random weights for a module of the twin, as the nested dict that the reference takes."""
    rng = np.random.default_rng(7)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def draw(shape):
        fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[0] if len(shape) == 2 else 9
        return (rng.standard_normal(shape) * fan_in**-0.5).astype(np.float32)

    return unflatten({name: draw(shape) for name, shape in shapes.items()})


CASES = [*leaf_cases(), *block_cases(), *codec_cases(), *norm_cases(), *contrastive_cases()]


def with_dtype(case: Case, dtype) -> Case:
    """Fill in the dtype argument of functions that take one."""

    def arguments(rng):
        values = case.arguments(rng)
        return {key: dtype if key == "dtype" else value for key, value in values.items()}

    return replace(case, arguments=arguments)
