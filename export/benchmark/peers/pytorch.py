"""Hugging Face transformers in PyTorch: the whole model, with the fastest attention it has on a CPU."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy_ref.checkpoint import SHIPPED, load_config
from numpy_ref.config import GemmaConfig
from numpy_ref.image import open_image, preprocess

from .prompt import Answer, prompt


def attention(library: ModuleType, config: GemmaConfig) -> str | dict[str, str]:
    """What transformers attends with: SDPA, but for a Gemma 2 decoder, where it has no other than eager.

    The soft cap comes between the products that SDPA computes at once.
    """
    decoder = library.Gemma2PreTrainedModel if config.post_norms else library.GemmaPreTrainedModel
    return "sdpa" if decoder._supports_sdpa else {"text_config": "eager", "vision_config": "sdpa"}


def load(folder: Path, dtype: str) -> Any:
    """A checkpoint as transformers' PaliGemma, in bfloat16 or float32."""
    torch, library = (importlib.import_module(name) for name in ("torch", "transformers"))
    library.utils.logging.disable_progress_bar()
    model = library.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention(library, load_config(folder).text)
    )
    return model.eval()


def asker(folder: Path, dtype: Any) -> Callable[[], dict]:
    """A function that reads the example picture and gives what transformers is asked: it, and the prompt's ids."""
    torch, config = importlib.import_module("torch"), load_config(folder)
    ids = torch.tensor([prompt(config)])

    def asked():
        picture = preprocess(open_image(SHIPPED / "example.png"), config.vision.image_size)
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
            "pixel_values": torch.from_numpy(picture).to(dtype),
        }  # fmt: skip

    return asked


def transformers(folder: Path, threads: int, dtype: str = "bfloat16") -> Answer:
    """Its `generate`, with its own cache, on a checkpoint."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    model = load(folder, dtype)
    asked = asker(folder, model.dtype)

    @torch.inference_mode()
    def answer(count, first):
        given = asked()
        prompted = given["input_ids"].shape[1]

        def criterion(ids, scores, **settings):  # is asked after each token whether to stop
            if ids.shape[1] == prompted + 1:
                first()
            return torch.zeros(len(ids), dtype=torch.bool)

        tokens = model.generate(
            **given, do_sample=False, min_new_tokens=count, max_new_tokens=count, stopping_criteria=[criterion]
        )
        return tokens[0, prompted:].tolist()

    return answer
