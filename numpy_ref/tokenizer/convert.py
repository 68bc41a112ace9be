"""`tokenizer.model` -> `tokenizer.json` of the Hugging Face `tokenizers` library, for hosts without SentencePiece.

SentencePiece BPE merges the pair whose joined piece has the best score; the library goes by a list of merges. So the
merges are every way to split a piece into two pieces, in the order of the scores of what they make.
"""

import json

from ..config import PaliGemmaConfig
from . import Json, SentencePiece, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # the types of pieces, as sentencepiece_model.proto counts them
_SPACE = "▁"
#: What a file has to spell as its original does before it is believed.
_PROBES = (
    "caption en", "detect red star ; blue circle", " leading, trailing ", "two  spaces   three", "tab\tnew\n\nline",
    "naïve café ☕ 日本 ﬁ ① Ⅳ", "2026 1,234.5", "<loc0007><loc1023> <seg127>", "<unused> <br> <b>", "MiXeD caSe don't",
    "_under_▁score", "\u00a0\u3000\u200d",
)  # fmt: skip


def convert(tokenizer_model: bytes, config: PaliGemmaConfig) -> bytes | None:
    """The `tokenizer.json` of a SentencePiece model; None for one that the library cannot be made to follow.

    Such are models of another kind than Gemma's, BPE over unchanged text: unigram models, normalisers, a dummy prefix.
    Runs of more spaces than the longest such piece (31 in Gemma's) may be cut at other places.
    """
    theirs = Tokenizer(SentencePiece(tokenizer_model), config)
    contents = json.dumps(tokenizer_json(tokenizer_model, theirs.content, config.image_token), ensure_ascii=False)
    made = (contents + "\n").encode()
    ours = Tokenizer(Json(made), config)
    alike = ours.content == theirs.content and ours.newline == theirs.newline
    return made if alike and all(ours.encode(text) == theirs.encode(text) for text in _PROBES) else None


def tokenizer_json(tokenizer_model: bytes, content: dict[str, int], image_token: int) -> dict:
    """A SentencePiece BPE model as the contents of a `tokenizer.json`, with the location and segmentation tokens
    `content` {piece: id} and `<image>`, wherever their ids are."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer_model)  # type: ignore[attr-defined]
    vocab = {entry.piece: i for i, entry in enumerate(model.pieces)}
    unknown = next(entry.piece for entry in model.pieces if entry.type == _UNKNOWN)
    special = {entry.piece: vocab[entry.piece] for entry in model.pieces if entry.type in (_UNKNOWN, _CONTROL)}
    # Runs of spaces come about by merging; a text has no "▁" that a piece could be found by.
    whole = {e.piece: vocab[e.piece] for e in model.pieces if e.type == _USER_DEFINED and _SPACE not in e.piece}
    scores = {
        e.piece: e.score for e in model.pieces if e.type == _NORMAL or (e.type == _USER_DEFINED and _SPACE in e.piece)
    }
    merges = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], vocab[piece])):
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [list(split) for split in splits if split[0] in scores and split[1] in scores]
    added = {**special, **whole, **content, "<image>": image_token}
    special["<image>"] = image_token
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": piece in special}
            for piece, i in sorted(added.items(), key=lambda entry: entry[1])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
