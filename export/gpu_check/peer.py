"""Stage 6: transformers in bfloat16 on the same device, with the same random weights."""

import importlib
import importlib.util
import logging
import time
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from numpy_ref import checkpoint as checkpoints
from numpy_ref.checkpoint.blocks import bfloat16
from numpy_ref.checkpoint.hugging_face import to_hf
from numpy_ref.checkpoint.layouts import canonical
from numpy_ref.config import GemmaConfig
from numpy_ref.image import open_image, preprocess

from ..benchmark.peers import pytorch
from ..benchmark.peers.prompt import prompt
from . import models
from .stage import LABEL, Found, NotHere, Settings

LIMIT, PART_LIMIT = 120, 60
FIRST_TOKENS = 5


def parts(settings: Settings) -> list[str]:
    return ["generate", "forward loop"]


def run(part: str, settings: Settings, found: Found) -> None:
    if part.endswith("static cache") and not settings.on_device:
        raise NotHere("compiled on CUDA alone")
    model, build_s = opened(settings)
    found.add(build_s=build_s, attention=model.config._attn_implementation)
    answer = {"generate": generated, "forward loop": looped}.get(part, generated_static)(model, settings)
    answer(2)
    if part.endswith("static cache"):
        answer(settings.steps)  # compiled for this length
    firsts = [answer(1) for _ in range(FIRST_TOKENS)]
    found.add(first_token_ms=float(np.median([times[0] for times in firsts])))
    further = answer(1 + settings.steps)[1:]
    found.add(ms_per_token=float(np.median(further)), tokens_per_s=1000 / float(np.median(further)))
    torch = importlib.import_module("torch")
    if settings.on_device:
        found.add(peak_bytes=torch.cuda.max_memory_allocated())


def libraries(settings: Settings) -> tuple[ModuleType, ModuleType]:
    """torch and transformers. NotHere without either, or where the device is asked for and torch sees none."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise NotHere(f"{name} is not installed")
    torch = importlib.import_module("torch")
    if settings.on_device and not torch.cuda.is_available():
        raise NotHere("this torch has no CUDA device")
    library = importlib.import_module("transformers")
    library.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return torch, library


@cache
def opened(settings: Settings) -> tuple[Any, float]:
    """The model on the device with the weights that the bundles have, and the seconds that took."""
    torch, library = libraries(settings)
    started, kind = time.perf_counter(), torch.bfloat16 if settings.on_device else torch.float32
    device = settings.provider
    config = library.PaliGemmaConfig.from_dict(to_hf(settings.config))
    with torch.device(device):
        model = build(library, config, kind, settings.config.text)
    model.to(device).eval()
    arrays = random_by_name(settings, bfloat16() if settings.on_device else np.dtype(np.float32))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            array = arrays.get(canonical(name))
            if array is not None:
                bits = array.view(np.int16 if settings.on_device else np.float32)
                tensor.copy_(torch.from_numpy(bits).to(device).view(kind))  # turned there, not on the host
    if settings.on_device:
        torch.cuda.reset_peak_memory_stats()
    return model, round(time.perf_counter() - started, 1)


def build(library: ModuleType, config: Any, kind: Any, text: GemmaConfig) -> Any:
    """A model of random weights; eager where its decoder has no other attention."""
    create = library.PaliGemmaForConditionalGeneration._from_config
    return create(config, dtype=kind, attn_implementation=pytorch.attention(library, text))


def random_by_name(settings: Settings, dtype: np.dtype) -> dict:
    """The random weights by the names, and in the layout, of Hugging Face."""
    arrays = models.random_arrays(settings.config, dtype)
    parameters = checkpoints.parameters(settings.config)
    return {p.hf.name: p.hf.layout.write(arrays[p.path], p.hf.shape) for p in parameters}


def inputs(model: Any, settings: Settings) -> dict:
    """A picture from its file and a prompt, on the device."""
    torch = importlib.import_module("torch")
    ids = torch.tensor([prompt(settings.config)], device=settings.provider)
    pixels = preprocess(open_image(models.PICTURE), settings.config.vision.image_size)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.from_numpy(pixels).to(settings.provider, model.dtype),
    }  # fmt: skip


def generated(model: Any, settings: Settings, **options: object) -> Callable[[int], np.ndarray]:
    """`answer(count)` by the library's own `generate`: the milliseconds of each token."""
    torch = importlib.import_module("torch")

    def answer(count):
        times = [time.perf_counter()]

        def criterion(ids, scores, **settings):  # is asked after each token
            if ids.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            model.generate(
                **inputs(model, settings), do_sample=False, min_new_tokens=count, max_new_tokens=count,
                stopping_criteria=[criterion], **options,
            )  # fmt: skip
        return np.diff(times) * 1000

    return answer


def generated_static(model: Any, settings: Settings) -> Callable[[int], np.ndarray]:
    """The same with a static cache, which the library compiles for."""
    return generated(model, settings, cache_implementation="static")


def looped(model: Any, settings: Settings) -> Callable[[int], np.ndarray]:
    """`answer(count)` by plain calls of the model and argmax: the milliseconds of each token."""
    torch = importlib.import_module("torch")

    def answer(count):
        times = [time.perf_counter()]
        with torch.inference_mode():
            given = inputs(model, settings)
            out = model(**given, use_cache=True, logits_to_keep=1)
            for i in range(count):
                token = out.logits[:, -1:].argmax(-1)
                token.item()  # the wait
                times.append(time.perf_counter())
                if i + 1 < count:
                    out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        return np.diff(times) * 1000

    return answer


def lines(part: str, found: dict) -> list[str]:
    text = f"{part:<{LABEL}}first token {found['first_token_ms']:.2f} ms, {found['ms_per_token']:.3f} ms a token, "
    return [text + f"{found['tokens_per_s']:.1f} tokens/s; {found['attention']}, built in {found['build_s']} s"]
