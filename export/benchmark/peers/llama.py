"""llama.cpp, through llama-cpp-python: the decoder alone, in its Q4_0."""

import ctypes
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from numpy_ref import checkpoint as checkpoints
from numpy_ref.checkpoint.tree import flatten
from numpy_ref.config import GemmaConfig
from numpy_ref.errors import PaliGemmaError

from .prompt import Answer, text_prompt

FILE = "decoder.gguf"
ROOM = 512  # positions for an answer
ROWS = 4096  # of a kernel that are quantized at once


def open_decoder(folder: Path, threads: int) -> Answer:
    """The decoder of a folder that `write` made."""
    library, file = importlib.import_module("llama_cpp"), folder / FILE
    library.llama_log_set(_quiet(library), ctypes.c_void_p(0))
    model = library.llama_model_load_from_file(os.fsencode(file), library.llama_model_default_params())
    if not model:
        raise PaliGemmaError(f"{file}: llama.cpp cannot load it")
    ids, settings = text_prompt(checkpoints.load_config(folder)), library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = -(-len(ids) // 256) * 256 + ROOM
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
        tokens = [feed(ids)]
        first()
        while len(tokens) < count:
            tokens.append(feed(tokens[-1:]))
        return tokens

    return answer


def _quiet(library):
    quiet = library.llama_log_callback(lambda level, text, data: None)
    _KEPT.append(quiet)  # C holds no reference
    return quiet


_KEPT: list = []


def write(folder: Path, checkpoint: Path) -> None:
    """A checkpoint's decoder as a GGUF file with kernels and table in Q4_0, beside its configuration."""
    gguf, loaded = importlib.import_module("gguf"), checkpoints.load(checkpoint)
    folder.mkdir()
    shutil.copy(checkpoint / "config.json", folder)
    config = loaded.config.text
    writer = gguf.GGUFWriter(folder / FILE, "gemma2" if config.post_norms else "gemma")
    _describe(writer, config, loaded.config.max_length)
    kind = gguf.GGMLQuantizationType.Q4_0
    for name, values in _tensors(gguf, loaded):
        if values.ndim == 1:
            writer.add_tensor(name, values.astype(np.float32) + 1)  # it multiplies by its norms, we by 1 + scale
        else:
            blocks = [
                gguf.quants.quantize(rows.astype(np.float32), kind)
                for rows in np.split(values, range(ROWS, len(values), ROWS))
            ]
            writer.add_tensor(name, np.concatenate(blocks), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: GemmaConfig, max_length: int) -> None:
    writer.add_context_length(max_length)
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
    if config.attn_softcap and config.final_softcap:
        writer.add_attn_logit_softcapping(config.attn_softcap)
        writer.add_final_logit_softcapping(config.final_softcap)
    if config.window(0):
        writer.add_sliding_window(config.window(0))


def _tensors(gguf: ModuleType, loaded: checkpoints.Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """The decoder's weights as Hugging Face lays them out, by the names that llama.cpp has for them."""
    text, weights = loaded.config.text, flatten(loaded.params)
    kind = gguf.MODEL_ARCH.GEMMA2 if text.post_norms else gguf.MODEL_ARCH.GEMMA
    names = gguf.get_tensor_name_map(kind, text.depth)
    for parameter in checkpoints.parameters(loaded.config):
        theirs = parameter.hf.name.replace("language_model.", "model.")
        if parameter.path.startswith("text."):
            name = names.get_name(theirs, try_suffixes=(".weight",))
            yield name, parameter.hf.layout.write(weights[parameter.path], parameter.hf.shape)
