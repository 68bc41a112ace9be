"""onnxruntime-genai: the decoder alone, as its own builder exports it."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np

from numpy_ref.checkpoint import SHIPPED, load_config

from ...measure import module, watch
from . import pytorch
from .prompt import Answer, text_prompt


def build(folder: Path, checkpoint: Path) -> None:
    """A checkpoint's decoder as the Gemma builder exports it: int4, with what it does by itself."""
    library = importlib.import_module("transformers")
    torch, whole = importlib.import_module("torch"), pytorch.load(checkpoint, "bfloat16")
    version = 2 if load_config(checkpoint).text.post_norms else ""
    with torch.device("meta"):
        decoder = getattr(library, f"Gemma{version}ForCausalLM")(whole.config.text_config)
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
    shutil.copy(checkpoint / "config.json", folder)


def open_decoder(folder: Path, threads: int) -> Answer:
    """The decoder of a folder that `build` made."""
    library = importlib.import_module("onnxruntime_genai")
    settings = library.Config(str(folder))
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    config, model = load_config(folder), library.Model(settings)
    ids, window = text_prompt(config), config.text.window(0) or 0

    def answer(count, first):
        parameters = library.GeneratorParams(model)
        length = len(ids) + count
        # Its cache is to have as many places as a window.
        parameters.set_search_options(max_length=max(length, window), min_length=length, do_sample=False)
        generator = library.Generator(model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        for i in range(count):
            generator.generate_next_token()
            if i == 0:
                first()
        return generator.get_sequence(0)[len(ids) :].tolist()

    return answer
