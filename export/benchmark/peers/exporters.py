"""transformers' own exporters (since 5.24), which trace the PyTorch model: to ONNX, and to OpenVINO.

They export the decoder, its head and a step, not the vision tower: what comes before the decoder stays in PyTorch, in
bfloat16. NNCF turns weights into four bits, and those of table and head into eight, as it does by itself.
"""

import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy_ref.checkpoint import load_config

from . import pytorch
from .prompt import Answer

FRONT = "front.safetensors"  # what stays in PyTorch: all but the decoder's layers
GROUP = 128  # weights in a row that share a scale


def export_onnx(folder: Path, checkpoint: Path) -> None:
    """float32 graphs for ONNX Runtime."""
    _export("Onnx", folder, checkpoint)


def export_onnx_int4(folder: Path, checkpoint: Path) -> None:
    """The same with weights of four bits."""
    _export("Onnx", folder, checkpoint, _int4("NNCFOnnxQuantizer"))


def export_openvino(folder: Path, checkpoint: Path) -> None:
    """OpenVINO's model with weights of four bits; its step keeps the cache in place."""
    _export("OpenVINO", folder, checkpoint, _int4("NNCFOpenVINOQuantizer"))


def _int4(quantizer: str) -> Any:
    library, nncf = (importlib.import_module(name) for name in ("transformers.exporters", "nncf"))
    mode = nncf.CompressWeightsMode.INT4_SYM
    return getattr(library, quantizer)(library.NNCFWeightCompressionConfig(mode=mode, group_size=GROUP))


def _export(kind: str, folder: Path, checkpoint: Path, quantizer: Any = None) -> None:
    """Everything that an answer takes, in a new folder.

    From float32: of a model in bfloat16 the OpenVINO exporter of 5.24 writes a tied head of zeros.
    """
    torch, library = (importlib.import_module(name) for name in ("torch", "transformers.exporters"))
    model = pytorch.load(checkpoint, "float32")
    settings: dict[str, Any] = {"dynamic": True, "quantizer": quantizer}  # its cache grows with each token
    if kind == "Onnx" and load_config(checkpoint).text.post_norms:
        settings["ort_fusions"] = "cpu"  # PaliGemma 1 is wrong with them (tests/test_peer_exporter.py)
    asked = pytorch.asker(checkpoint, model.dtype)()
    with torch.inference_mode():
        exporter, config = getattr(library, f"{kind}Exporter")(), getattr(library, f"{kind}Config")(**settings)
        exporter.export_for_generation(model, asked, config).save_pretrained(folder)
    model.model.language_model.layers = torch.nn.ModuleList()
    front = model.model.to(torch.bfloat16).state_dict()
    importlib.import_module("safetensors.torch").save_file(front, folder / FRONT)
    shutil.copy(checkpoint / "config.json", folder)


def open_onnx(folder: Path, threads: int) -> Answer:
    """What `export_onnx` or `export_onnx_int4` wrote, in ONNX Runtime."""
    options = importlib.import_module("onnxruntime").SessionOptions()
    options.intra_op_num_threads = threads
    runners = _runners(folder, session_options=options, providers=["CPUExecutionProvider"])

    def stepper(cache):
        def step(**given):
            nonlocal cache
            found = runners["decode"](cache=cache, **given)
            cache = found.cache
            return found.logits

        return step

    return _answering(folder, threads, runners, stepper)


def open_openvino(folder: Path, threads: int) -> Answer:
    """What `export_openvino` wrote, in OpenVINO on the CPU with its own settings (a cache in eight bits, say)."""
    runners = _runners(folder, device="cpu", config={"INFERENCE_NUM_THREADS": threads})
    torch, openvino = (importlib.import_module(name) for name in ("torch", "openvino"))
    feed = importlib.import_module("transformers.exporters.utils").openvino_feed
    decode = runners["decode"]

    def stepper(cache):
        """A step from the cache on: the model has variables for it, and knows no outputs of it."""
        for variable in decode.request.query_state():
            layer, kind = re.findall(r"layers\.(\d+)\.(keys|values)", variable.name)[0]
            variable.state = openvino.Tensor(getattr(cache.layers[int(layer)], kind).float().numpy())

        def step(**given):
            return torch.from_numpy(decode.request.infer(feed(decode.compiled_model, given))["logits"])

        return step

    return _answering(folder, threads, runners, stepper)


def _runners(folder: Path, **options: Any) -> dict[str, Any]:
    return importlib.import_module("transformers.exporters").ExportedModel.from_pretrained(folder, **options).runners


def _answering(folder: Path, threads: int, runners: dict[str, Any], stepper: Callable) -> Answer:
    """An answer by the front in PyTorch, the exported decoder and its head, and what `stepper` makes of a cache."""
    torch, library = (importlib.import_module(name) for name in ("torch", "transformers"))
    torch.set_num_threads(threads)
    front = _front(torch, library, folder)
    front.language_model.forward = lambda **given: runners["language_model"](**_in_float(torch, given))
    asked, whole = pytorch.asker(folder, torch.bfloat16), library.AutoConfig.from_pretrained(folder).get_text_config()

    @torch.inference_mode()
    def answer(count, first):
        given = asked()
        hidden = front(**given, cache=library.DynamicCache(config=whole), use_cache=True)
        logits = runners["lm_head"](input=hidden.last_hidden_state[:, -1:])
        tokens = [logits[:, -1:].argmax(-1)]
        first()
        step = stepper(hidden.cache)
        for position in range(given["input_ids"].shape[1], given["input_ids"].shape[1] + count - 1):
            asked_now = {"position_ids": torch.tensor([[1 + position]]), "token_type_ids": torch.zeros_like(tokens[-1])}
            tokens.append(step(input_ids=tokens[-1], **asked_now)[:, -1:].argmax(-1))
        return [token.item() for token in tokens]

    return answer


def _front(torch: ModuleType, library: ModuleType, folder: Path) -> Any:
    """What `_export` left in PyTorch: the vision tower, the projector, the table and the norm, around no layers."""
    config = library.AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = 0, []
    attention = pytorch.attention(library, load_config(folder).text)
    front = library.AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    front.load_state_dict(importlib.import_module("safetensors.torch").load_file(folder / FRONT))
    return front.eval()


def _in_float(torch: ModuleType, given: Any) -> Any:
    """The same with float32 where there is bfloat16, in dicts too."""
    if isinstance(given, dict):
        return {name: _in_float(torch, value) for name, value in given.items()}
    return given.float() if isinstance(given, torch.Tensor) and given.is_floating_point() else given
