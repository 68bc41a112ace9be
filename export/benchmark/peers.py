"""What the benchmark runs beside a bundle: each gives `answer(count, first)`, from a prompt to `count` tokens.

`first` is called once, as the first of them is there.
The libraries are named, not imported: nothing else of this package needs them.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from numpy_ref.checkpoint import SHIPPED, load_config
from numpy_ref.config import GemmaConfig, PaliGemmaConfig
from numpy_ref.errors import PaliGemmaError
from numpy_ref.image import open_image, preprocess

from ..measure import module, watch

PROMPT_TOKENS = 7  # bos, a prefix of five, the newline
BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: a float16 scale, then 32 weights of four bits
SCALE = 0.004  # of the random weights: their largest is 8 times that
Answer = Callable[[int, Callable[[], object]], object]  # `answer(count, first)`


def prompt(config: PaliGemmaConfig) -> list[int]:
    """The ids of a picture and a short prompt."""
    return [config.image_token] * config.vision.patches + [config.bos, *range(10, 10 + PROMPT_TOKENS - 1)]


def attention(library: ModuleType, config: GemmaConfig) -> str | dict[str, str]:
    """What transformers attends with: SDPA, but for a Gemma 2 decoder, where it has no other than eager.

    The soft cap comes between the products that SDPA computes at once.
    """
    decoder = library.Gemma2PreTrainedModel if config.post_norms else library.GemmaPreTrainedModel
    return "sdpa" if decoder._supports_sdpa else {"text_config": "eager", "vision_config": "sdpa"}


def load_transformers(folder: Path, dtype: str) -> Any:
    """A checkpoint as transformers' PaliGemma, in bfloat16 or float32, with the fastest attention it has on a CPU."""
    torch, library = (importlib.import_module(name) for name in ("torch", "transformers"))
    model = library.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention(library, load_config(folder).text)
    )
    return model.eval()


def transformers(dtype: str, folder: Path, threads: int) -> tuple[Answer, dict]:
    """Hugging Face transformers with its own cache, on a checkpoint."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    model = load_transformers(folder, dtype)
    config, ids = load_config(folder), torch.tensor([prompt(load_config(folder))])

    @torch.inference_mode()
    def answer(count, first):
        def criterion(ids, scores, **settings):  # is asked after each token whether to stop
            if ids.shape[1] == prompted + 1:
                first()
            return torch.zeros(len(ids), dtype=torch.bool)

        prompted = ids.shape[1]
        picture = preprocess(open_image(SHIPPED / "example.png"), config.vision.image_size)
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids),
            pixel_values=torch.from_numpy(picture).to(model.dtype), do_sample=False, min_new_tokens=count,
            max_new_tokens=count, stopping_criteria=[criterion],
        )  # fmt: skip

    return answer, {}


@dataclass(frozen=True)
class Decoder:
    """A library that runs the decoder alone: what it imports, what it is given, and how that is opened."""

    imports: tuple[str, ...]
    make: Callable  # (path, checkpoint's folder) -> None
    open: Callable  # (path, threads) -> answer, what else it can be asked (nothing)
    note: str

    def takes(self, config: GemmaConfig) -> bool:
        """Whether it is installed, and the decoder of a config is the one that is made here: Gemma's first."""
        return not config.post_norms and all(importlib.util.find_spec(name) for name in self.imports)


def llama_cpp(file: Path, threads: int) -> tuple[Answer, dict]:
    """llama.cpp on the decoder alone, with as many positions before the answer as a picture and a prompt take."""
    library = importlib.import_module("llama_cpp")
    library.llama_log_set(_quiet(library), ctypes.c_void_p(0))
    model = library.llama_model_load_from_file(os.fsencode(file), library.llama_model_default_params())
    if not model:
        raise PaliGemmaError(f"{file}: llama.cpp cannot load it")
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = threads
    context = library.llama_init_from_model(model, settings)

    def feed(ids):
        tokens = (library.llama_token * len(ids))(*ids)
        if library.llama_decode(context, library.llama_batch_get_one(tokens, len(ids))):
            raise PaliGemmaError(f"{file}: llama.cpp could not decode")
        vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        return int(np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (vocab,)).argmax())

    def answer(count, first):
        library.llama_memory_clear(library.llama_get_memory(context), True)
        token = feed(_ids())
        first()
        for _ in range(count - 1):
            token = feed([token])

    return answer, {}


def _quiet(library):
    quiet = library.llama_log_callback(lambda level, text, data: None)
    _KEPT.append(quiet)  # C holds no reference
    return quiet


_KEPT: list = []


def _ids() -> list[int]:
    """As many ids as the positions that a picture of 224 pixels and a prompt take."""
    return [10 + i % 100 for i in range(256 + PROMPT_TOKENS)]


def write_gguf(file: Path, checkpoint: Path) -> None:
    """A Gemma decoder of a checkpoint's sizes with random Q4_0 weights, as llama.cpp reads it."""
    gguf, rng, config = importlib.import_module("gguf"), np.random.default_rng(0), load_config(checkpoint).text
    writer = gguf.GGUFWriter(file, "gemma")
    writer.add_context_length(8192)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_vocab_size(config.vocab)
    writer.add_tokenizer_model("no_vocab")

    def kernel(name, inputs, outputs):
        blocks = rng.integers(0, 256, (outputs, inputs // BLOCK, BLOCK_BYTES), np.uint8)
        blocks[..., :2] = np.array([SCALE], np.float16).view(np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(outputs, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(config.width, np.float32))

    kernel("token_embd", config.width, config.vocab)
    norm("output_norm")
    for i in range(config.depth):
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        norm(f"blk.{i}.attn_norm")
        norm(f"blk.{i}.ffn_norm")
        kernel(f"blk.{i}.attn_q", config.width, queries)
        kernel(f"blk.{i}.attn_k", config.width, keys)
        kernel(f"blk.{i}.attn_v", config.width, keys)
        kernel(f"blk.{i}.attn_output", queries, config.width)
        kernel(f"blk.{i}.ffn_gate", config.width, config.mlp)
        kernel(f"blk.{i}.ffn_up", config.width, config.mlp)
        kernel(f"blk.{i}.ffn_down", config.mlp, config.width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_genai(folder: Path, checkpoint: Path) -> None:
    """A checkpoint's decoder as onnxruntime-genai's own Gemma builder exports it: int4, with what it does by itself."""
    torch, library = (importlib.import_module(name) for name in ("torch", "transformers"))
    library.utils.logging.disable_progress_bar()
    whole = library.PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    with torch.device("meta"):
        decoder = library.GemmaForCausalLM(whole.config.text_config)
    decoder.model, decoder.lm_head = whole.model.language_model, whole.lm_head
    source = folder.with_suffix(".gemma")
    decoder.save_pretrained(source)
    shutil.copy(SHIPPED / "tokenizer.json", source)  # it asks for one
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    del whole, decoder
    cached = folder.with_suffix(".cache")
    options = ["-i", source, "-o", folder, "-p", "int4", "-e", "cpu", "-c", cached]
    # By default it would compute the logits of every position of the prompt.
    watch(module("onnxruntime_genai.models.builder", *options, "--extra_options", "prune_lm_head=true"))
    for finished in (source, cached):
        shutil.rmtree(finished, ignore_errors=True)


def genai(folder: Path, threads: int) -> tuple[Answer, dict]:
    """onnxruntime-genai on the decoder alone."""
    library = importlib.import_module("onnxruntime_genai")
    settings = library.Config(str(folder))
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model, ids = library.Model(settings), _ids()

    def answer(count, first):
        parameters = library.GeneratorParams(model)
        length = len(ids) + count
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = library.Generator(model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        for i in range(count):
            generator.generate_next_token()
            if i == 0:
                first()

    return answer, {}


#: By the name in the table.
DECODERS = {
    "llama.cpp": Decoder(("llama_cpp", "gguf"), write_gguf, llama_cpp, "Q4_0"),
    "ort-genai": Decoder(
        ("onnxruntime_genai", "torch", "transformers"), build_genai, genai, "onnxruntime-genai's Gemma builder, int4"
    ),
}
