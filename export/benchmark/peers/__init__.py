"""What a bundle is timed beside. None of it is needed otherwise: libraries are imported where they are used, by name.

A peer that is not installed, cannot be made from a checkpoint, or fails, is reported in a line and the others go on.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import exporters, genai, llama, pytorch
from .prompt import Answer

TORCH = {"torch": "torch", "transformers": "transformers"}
NNCF = {**TORCH, "nncf": "nncf"}
ONNX = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True)
class Peer:
    """A library that answers: what it is, the packages that it takes, and how it is made and opened."""

    note: str
    packages: dict[str, str]  # what is imported -> what pip installs
    open: Callable[[Path, int], Answer]  # (folder, threads)
    make: Callable[[Path, Path], None] | None = None  # (new folder, checkpoint); without, it opens the checkpoint
    decoder_alone: bool = False
    memory: float = 1.0  # that making it takes, in sizes of the bfloat16 checkpoint

    def absent(self) -> str:
        """What to install; "" if nothing is missing."""
        names = [package for name, package in self.packages.items() if importlib.util.find_spec(name) is None]
        return f"not installed: pip install {' '.join(names)}" if names else ""


TRANSFORMERS = "transformers"
PEERS = {
    TRANSFORMERS: Peer(
        "PyTorch, SDPA; in the decoder of PaliGemma 2, for which it has no other, eager attention",
        TORCH, pytorch.transformers,
    ),
    "llama.cpp": Peer(
        "the decoder alone, Q4_0", {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}, llama.open_decoder, llama.write,
        decoder_alone=True,
    ),
    "ort-genai": Peer(
        "the decoder alone, int4, as onnxruntime-genai's builder writes it",
        {**TORCH, "onnxruntime_genai": "onnxruntime-genai", "onnx_ir": "onnx-ir"}, genai.open_decoder, genai.build,
        decoder_alone=True, memory=4,
    ),
    "exporter": Peer(
        "transformers' ONNX exporter, float32, run by ONNX Runtime; vision tower in PyTorch", {**TORCH, **ONNX},
        exporters.open_onnx, exporters.export_onnx, memory=5,
    ),
    "exporter-int4": Peer(
        "the same with NNCF's int4", {**NNCF, **ONNX}, exporters.open_onnx, exporters.export_onnx_int4, memory=7
    ),
    "openvino": Peer(
        "transformers' OpenVINO exporter with NNCF's int4; vision tower in PyTorch",
        {**NNCF, "openvino": "openvino"}, exporters.open_openvino, exporters.export_openvino, memory=4,
    ),
}  # fmt: skip
