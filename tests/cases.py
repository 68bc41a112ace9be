"""The case table: every function of the model with arguments for it. Adding a function means adding a line."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from numpy_ref import layers

from .models import CONFIGS, random_params

LEAF, BLOCK, MODEL = "leaf", "block", "model"
EPS = np.finfo(np.float64).eps, np.finfo(np.float32).eps
# Largest error per tap in float64 and float32: four times the worst of 20 seeds over all engines, as
# `python -m tests.calibrate` measured it. In float64 leaf 2.9 eps (attend), block 22.4 eps (gemma.decoder); in
# float32 leaf 24.5 eps (rope_angles, whose powers of the base differ in the last bits), block 18.6 eps.
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
    }  # fmt: skip
    for name, arguments in masks.items():
        yield Case(name, "paligemma", name.split(",")[0], arguments)
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


CASES = [*leaf_cases(), *block_cases()]


def with_dtype(case: Case, dtype) -> Case:
    """Fill in the dtype argument of functions that take one."""

    def arguments(rng):
        values = case.arguments(rng)
        return {key: dtype if key == "dtype" else value for key, value in values.items()}

    return replace(case, arguments=arguments)
