"""What a path is that was given as a checkpoint or as a bundle: each mistake has a message of its own."""

import re
from pathlib import Path

from ..errors import PaliGemmaError, quote
from .adapter import is_adapter

BUNDLE, ADAPTER, CHECKPOINT = "bundle", "adapter", "checkpoint"
PART, GGUF, PICKLE, NPZ_FOLDER, TENSORS, GRAPH = "part", "gguf", "pickle", "folder of a npz", "tensors", "graph"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
_SUFFIXES = {
    ".npz": CHECKPOINT, ".gguf": GGUF, ".safetensors": TENSORS, ".onnx": GRAPH, ".bin": PICKLE, ".pt": PICKLE,
    ".pth": PICKLE, ".ckpt": PICKLE,
}  # fmt: skip
_PART = re.compile(r"(.*\.npz)\.part[-_.]?\w*")
#: What transformers calls a quantization method -> how it is spelt out.
_METHODS = {
    "bitsandbytes": "bitsandbytes", "gptq": "GPTQ", "awq": "AWQ", "fp8": "float8", "fbgemm_fp8": "float8",
    "hqq": "HQQ", "aqlm": "AQLM", "quanto": "Quanto", "torchao": "torchao", "compressed-tensors": "compressed-tensors",
}  # fmt: skip
FULL_PRECISION = "take the float checkpoint that it was made from"


def kind(path: str | Path) -> str | None:
    """One of the kinds above, by the names of files alone; None for what is none of them, or not there."""
    path = Path(path)
    if path.is_file():
        return PART if _PART.fullmatch(path.name) else _SUFFIXES.get(path.suffix.lower())
    if not path.is_dir():
        return None
    if (path / "bundle.json").exists():
        return BUNDLE
    if is_adapter(path):
        return ADAPTER
    if any((path / name).exists() for name in _WEIGHTS):
        return CHECKPOINT
    if any((path / name).exists() for name in _PICKLES):
        return PICKLE
    for suffix, found in [(".gguf", GGUF), (".npz", NPZ_FOLDER)]:
        if not (path / "config.json").exists() and any(path.glob(f"*{suffix}")):
            return found
    return CHECKPOINT if (path / "config.json").exists() else None


def refuse_others(path: str | Path) -> None:
    """Raise PaliGemmaError for what is no checkpoint but known: what it is, and what to do."""
    path = Path(path)
    part = _PART.fullmatch(path.name)
    joined = part[1] if part else ""
    messages = {
        BUNDLE: "a bundle, not a checkpoint: run-onnx answers with it; CHECKPOINT is what it was exported from",
        ADAPTER: f"an adapter, not a model: give its base as CHECKPOINT, and --adapter {path}",
        PART: f"one part of a .npz that was split: join them all (cat {joined}.part* > {joined}) and give that",
        GGUF: f"GGUF, weights for llama.cpp, mostly quantized: {FULL_PRECISION}, a Hugging Face directory or .npz",
        PICKLE: "weights as a pickle of PyTorch's, which could run anything and is not opened: load them with "
        "transformers, and save_pretrained writes safetensors",
        NPZ_FOLDER: "a folder; a big_vision checkpoint is the .npz in it",
        TENSORS: f"one file of a checkpoint: give its folder, {path.parent}",
        GRAPH: "one graph of a bundle, not a checkpoint: CHECKPOINT is what the bundle was exported from",
    }
    if message := messages.get(kind(path) or ""):
        raise PaliGemmaError(f"{path}: {message}")
    if path.is_file():
        raise PaliGemmaError(f"{path}: a file; a checkpoint is a Hugging Face directory, or a file that ends in .npz")


def refuse_quantized(path: str | Path, fields: object) -> None:
    """Raise PaliGemmaError if a config.json says that its weights are quantized, and how."""
    fields = fields if isinstance(fields, dict) else {}
    settings = fields.get("quantization_config") or fields.get("compression_config")
    if not settings:
        return
    settings = settings if isinstance(settings, dict) else {}
    method = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else None)
    name = _METHODS.get(method, quote(method)) if isinstance(method, str) else "by an unknown method"
    if method == "bitsandbytes":
        in_four = settings.get("load_in_4bit") or settings.get("_load_in_4bit")
        kind_of_four = settings.get("bnb_4bit_quant_type", "fp4")
        four = kind_of_four if kind_of_four in ("nf4", "fp4") else "4 bits"
        name += f", {four}" if in_four is True else ", int8"
    elif isinstance(bits := settings.get("bits"), int):
        name += f", {bits} bits"
    raise PaliGemmaError(
        f"{path}: the weights are quantized ({name}), and only float ones are read: {FULL_PRECISION}; "
        "export-onnx --precision int8 or int4 quantizes that"
    )
