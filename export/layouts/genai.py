"""Files for onnxruntime-genai, which runs them in Python, C++, C# and Java.

It does not know PaliGemma. Its type "gemma3" is a vision model of three graphs whose loop fits; only that type's own
picture processor does not, so a program gives ids and pictures itself, as export/README.md shows.
"""

from numpy_ref.checkpoint import Checkpoint
from numpy_ref.config import PaliGemmaConfig

from ..model import graphs

NAMES = ("vision", "embedding", "model")
SUFFIXES = dict.fromkeys(("float32", "float16", "int8", "int4"), "")

embedding = graphs.embedding_model


def configuration(checkpoint: Checkpoint, config: PaliGemmaConfig) -> dict[str, dict]:
    """genai_config.json."""
    text, ends = config.text, [*config.ends]
    caches = {
        f"{kind}_{part}_names": f"{name}.%d.{part}"
        for kind, name in (("past", "past_key_values"), ("present", "present"))
        for part in ("key", "value")
    }
    past, present = ({key: caches[key] for key in caches if key.startswith(kind)} for kind in ("past", "present"))
    model = {
        "type": "gemma3",
        "vocab_size": text.vocab,
        "context_length": config.max_length,
        "bos_token_id": config.bos,
        "eos_token_id": ends or config.eos,
        "pad_token_id": config.pad,
        "image_token_id": config.image_token,
        "vision": {
            "filename": "vision.onnx",
            "inputs": {"pixel_values": "pixel_values"},
            "outputs": {"image_features": "image_features"},
        },
        "embedding": {
            "filename": "embedding.onnx",
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "decoder": {
            "filename": "model.onnx",
            "head_size": text.head_dim,
            "hidden_size": text.width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.depth,
            "num_key_value_heads": text.kv_heads,
            "inputs": {"inputs_embeds": "inputs_embeds", "attention_mask": "attention_mask", **past},
            "outputs": {"logits": "logits", **present},
        },
    }
    search = {"do_sample": False, "max_length": config.max_length, "past_present_share_buffer": False}
    return {"genai_config.json": {"model": model, "search": search}}
