"""Tiny random models whose dimensions are distinct primes (or small multiples, where heads must divide)."""

from dataclasses import replace

import numpy as np

from numpy_ref import checkpoint
from numpy_ref.config import GemmaConfig, PaliGemmaConfig, SiglipConfig

VISION = SiglipConfig(image_size=23, patch_size=7, width=15, depth=2, mlp=19, heads=3)
GEMMA1 = GemmaConfig(
    vocab=53, width=42, depth=3, mlp=29, heads=6, kv_heads=2, head_dim=10, query_scalar=10.0, rope_base=37.0
)
GEMMA2 = replace(
    GEMMA1, query_scalar=13.0, attn_softcap=5.0, final_softcap=3.0, post_norms=True, windows=(4, None, 4), tied=False
)
#: The two generations of the model, small.
CONFIGS = {
    "paligemma1": PaliGemmaConfig(vision=VISION, text=GEMMA1, image_token=52, max_length=97),
    "paligemma2": PaliGemmaConfig(vision=VISION, text=GEMMA2, image_token=52, max_length=97),
}


def with_heads(name, **changes):
    """A small model whose heads have a size that the fused operators take in every precision."""
    config = CONFIGS[name]
    return replace(config, text=replace(config.text, head_dim=16, query_scalar=24.0, **changes))


def random_params(config, seed=0, dtype=np.float64) -> dict:
    """Weights of a scale that keeps activations near one, exactly representable in float32."""
    rng = np.random.default_rng(seed)
    flat = {
        parameter.path: scale_of(parameter.shape) * rng.standard_normal(parameter.shape, np.float32)
        for parameter in checkpoint.parameters(config)
    }
    return checkpoint.unflatten({path: array.astype(dtype) for path, array in flat.items()})


def scale_of(shape) -> np.float32:
    return np.float32(0.3 if len(shape) == 1 else shape[0] ** -0.5)


def random_batch(config, prefix_sizes=(3, 7, 5), seed=1, pictures=1):
    """Pictures, so many a prompt, and right-padded prompts: pixel_values (float32), input_ids, lengths."""
    rng = np.random.default_rng(seed)
    patches, size = pictures * config.vision.patches, config.vision.image_size
    input_ids = np.zeros((len(prefix_sizes), patches + max(prefix_sizes)), np.int64)
    input_ids[:, :patches] = config.image_token
    for row, length in zip(input_ids, prefix_sizes, strict=True):
        row[patches : patches + length] = rng.integers(3, config.text.vocab - 1, length)
    lengths = np.array(prefix_sizes, np.int32) + patches
    pixel_values = rng.uniform(-1, 1, (len(prefix_sizes) * pictures, 3, size, size)).astype(np.float32)
    return pixel_values, input_ids, lengths.astype(np.int32)
