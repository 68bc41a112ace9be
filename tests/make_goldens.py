"""python -m tests.make_goldens: build small random PaliGemmas with transformers and record what they answer.

The checkpoints and the answers are committed, so that the reference is held against an outside witness also
where transformers is not installed. Norm epsilons are large, so that a wrong one shows.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from numpy_ref.cli import Parser

GOLDEN = Path(__file__).parent / "golden"
PREFIXES = ([2, 31, 37, 41, 108], [2, 43, 108])
NEW_TOKENS = 9


def build(kind: str, vocab: int = 211, seed: int = 0, image_size: int = 21, text=None, pooling=False, **changes):
    """A transformers PaliGemma with random weights; kind is "gemma" or "gemma2".

    `pooling` leaves SigLIP's unused pooling head in, as transformers does unless it is told not to.
    """
    from transformers import (
        Gemma2Config,
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=15, intermediate_size=19, num_hidden_layers=2, num_attention_heads=3, image_size=image_size,
        patch_size=7, layer_norm_eps=1e-2, vision_use_head=pooling,
    )  # fmt: skip
    common = {
        "vocab_size": vocab, "hidden_size": 42, "intermediate_size": 29, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-2, **(text or {}),
    }  # fmt: skip
    if kind == "gemma":
        text = GemmaConfig(**common)
    else:
        text = Gemma2Config(**{"query_pre_attn_scalar": 13, "sliding_window": 5, **common})
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=vocab - 4, projection_dim=42, hidden_size=42,
        **changes,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Small embeddings, so that the answer depends on what the layers do and not on the last token alone.
            scale = 0.1 if "embed_tokens" in name else 1.5
            parameter.normal_(std=0.3 if parameter.dim() == 1 else scale / parameter.shape[-1] ** 0.5)
    # None of these tests is about stopping.
    model.generation_config.eos_token_id = None
    return model


def pixels(config, rows, seed=3) -> np.ndarray:
    size = config.vision_config.image_size
    return np.random.default_rng(seed).uniform(-1, 1, (rows, 3, size, size)).astype(np.float32)


def row_ids(config, prefix) -> list[int]:
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    return [config.image_token_index] * patches + prefix


@torch.inference_mode()
def answer(model, pixel_values, ids, new_tokens):
    """transformers' logits after the prompt [V] and its greedy tokens, for one row."""
    ids = torch.tensor([ids])
    arguments = {
        "input_ids": ids, "pixel_values": torch.from_numpy(pixel_values)[None],
        "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
    }  # fmt: skip
    logits = model(**arguments).logits[0, -1].float().numpy()
    tokens = model.generate(**arguments, max_new_tokens=new_tokens, do_sample=False)
    return logits, tokens[0, ids.shape[1] :].tolist()


def main(argv=None):
    Parser(prog="python -m tests.make_goldens", description=__doc__.partition(": ")[2]).parse_args(argv)
    from transformers import PaliGemmaForConditionalGeneration

    for kind, name in [("gemma", "paligemma1"), ("gemma2", "paligemma2")]:
        folder = GOLDEN / name
        shutil.rmtree(folder, ignore_errors=True)
        # Caps that bite on values of this size.
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5} if kind == "gemma2" else {}
        build(kind, text=caps).save_pretrained(folder)
        model = PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
        model.generation_config.eos_token_id = None
        pixel_values = pixels(model.config, len(PREFIXES))
        results = [
            answer(model, image, row_ids(model.config, prefix), NEW_TOKENS)
            for image, prefix in zip(pixel_values, PREFIXES, strict=True)
        ]
        save_file(
            {
                "pixel_values": pixel_values,
                "logits": np.stack([logits for logits, _ in results]),
                "tokens": np.array([tokens for _, tokens in results]),
            },
            folder / "golden.safetensors",
        )


if __name__ == "__main__":
    main()
