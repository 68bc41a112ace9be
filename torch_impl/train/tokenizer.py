"""Train the small model's own tokenizer, set up as Gemma's is, and write what transformers needs beside it.

SentencePiece BPE with byte fallback and no dummy prefix; control tokens 0-3; then "\\n", the location and the
segmentation tokens as pieces of their own. `<image>` is no piece: its id is the first one past the vocabulary.
"""

import io
import json
from collections.abc import Callable, Iterable

import numpy as np
import sentencepiece

from numpy_ref.checkpoint.hugging_face import resize_to_hf
from numpy_ref.config import SiglipConfig
from numpy_ref.scenes import questions
from numpy_ref.tokenizer import LOCATIONS, SEGMENTS, SentencePiece
from numpy_ref.tokenizer.convert import tokenizer_json

VOCAB = 1600
WORDS = "what where which who is are the a an in of on and it there this picture image segment describe person cat dog"


def train_tokenizer(seed: int, size: int = VOCAB, text: Callable[[int], Iterable[str]] | None = None) -> bytes:
    """The serialised SentencePiece model; the same bytes for the same seed.

    `text(seed)` gives the lines that its pieces are found in, those of the drawn shapes if left out.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((text or _text)(seed)), model_writer=model, model_type="bpe", vocab_size=size,
        byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        normalization_rule_name="identity", character_coverage=1.0, num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        unk_piece="<unk>", user_defined_symbols=["\n", *LOCATIONS, *SEGMENTS],
    )  # fmt: skip
    return model.getvalue()


def _text(seed):
    rng = np.random.default_rng(seed)
    for _ in range(3000):
        for task in questions.TASKS:
            question = questions.random_question(rng, lambda mask, box: "", task)
            yield question.prefix
            if task in ("caption", "answer"):  # the others answer in location tokens and words of the prefix
                yield question.suffix
    for _ in range(30):
        yield WORDS


def foreign_files(tokenizer_model: bytes, vision: SiglipConfig) -> dict[str, bytes]:
    """The files by which transformers' AutoProcessor loads the same tokenizer and preprocessing."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = {
        "tokenizer_class": "GemmaTokenizer", **special, "add_bos_token": True, "add_eos_token": False,
        "extra_special_tokens": {"image_token": "<image>"}, "processor_class": "PaliGemmaProcessor",
    }  # fmt: skip
    contents = {
        "tokenizer.json": tokenizer_json(tokenizer_model, {}, SentencePiece(tokenizer_model).size),
        "tokenizer_config.json": tokenizer,
        "preprocessor_config.json": resize_to_hf("bicubic", vision),
    }
    return {name: (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode() for name, value in contents.items()}
