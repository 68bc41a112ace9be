"""Files for transformers.js, as `PaliGemmaForConditionalGeneration` and its processor look for them.

The picture is resized in onnx/vision_encoder.onnx, since the client's own resizing differs from Pillow's by up to 200
steps of 255; so its processor is told to leave pictures as they are.
"""

from collections.abc import Sequence

from numpy_ref.checkpoint import Checkpoint
from numpy_ref.checkpoint.hugging_face import resize_to_hf, to_hf
from numpy_ref.config import PaliGemmaConfig

from ..model import graphs

NAMES = ("onnx/vision_encoder", "onnx/embed_tokens", "onnx/decoder_model_merged")
#: What follows the names of a precision's files, and what the client calls the precision.
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized", "int4": "_q4"}
DTYPES = {"float32": "fp32", "float16": "fp16", "int8": "q8", "int4": "q4"}
CLIENT = "transformers.js_config"  # the entry of config.json that is the client's

embedding = graphs.embed_tokens_model


def configuration(checkpoint: Checkpoint, config: PaliGemmaConfig) -> dict[str, dict]:
    """The JSON files beside the graphs."""
    untouched = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    ends = {"eos_token_id": [*config.ends]} if config.ends else {}
    return {
        "config.json": to_hf(config),
        "generation_config.json": {"bos_token_id": config.bos, "pad_token_id": config.pad, **ends},
        "preprocessor_config.json": resize_to_hf(checkpoint.resize, config.vision) | untouched,
    }


def of_client(precisions: Sequence[str]) -> dict:
    """The client's entry of config.json, for what the folder has, in the order in which it was exported.

    It says which precision is taken unless another is asked for, the first, and which graphs have weights in a file of
    their own.
    """
    names = [name.removeprefix("onnx/") for name in NAMES]
    external = {f"{name}{SUFFIXES[precision]}.onnx": 1 for precision in precisions for name in names}
    return {"dtype": DTYPES[precisions[0]], "use_external_data_format": external}
