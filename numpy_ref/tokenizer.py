"""Text <-> token ids: a SentencePiece model plus the location and segmentation tokens.

A prompt is tokenised in parts, as in big_vision: tok(prefix, bos) ++ tok("\\n") ++ tok(suffix).
Control tokens never come out of text: `<image>`, `<bos>` and the like in a prompt are spelled, piece by piece.
`<loc0000>` … `<loc1023>` and `<seg000>` … `<seg127>` are content (boxes and masks) and are one token each.
"""

import re
from pathlib import Path

import numpy as np

from .config import PaliGemmaConfig
from .errors import PaliGemmaError

LOCATIONS = [f"<loc{i:04d}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03d}>" for i in range(128)]
_CONTENT = re.compile(r"(<loc\d{4}>|<seg\d{3}>)")


class Tokenizer:
    """A SentencePiece processor and the ids of the tokens that stand outside it."""

    def __init__(self, processor, config: PaliGemmaConfig):
        self.config = config
        self.processor = processor
        size = processor.get_piece_size()
        inside = {processor.id_to_piece(i): i for i in range(size)}
        extra = LOCATIONS + SEGMENTS
        if extra[0] in inside:  # a tokenizer trained with them
            self.content = {piece: inside[piece] for piece in extra if piece in inside}
            self.size = size
        elif size + len(extra) <= min(config.image_token, config.text.vocab):  # Gemma's, extended behind its end
            self.content = {piece: size + i for i, piece in enumerate(extra)}
            self.size = size + len(extra)
        else:
            self.content, self.size = {}, size
        self.pieces = {token: piece for piece, token in self.content.items()}
        if self.size > config.text.vocab:
            raise PaliGemmaError(f"the tokenizer has {self.size} ids but the model only {config.text.vocab} embeddings")
        self.newline = self.encode("\n")

    @classmethod
    def load(cls, path, config: PaliGemmaConfig) -> "Tokenizer":
        """Read `tokenizer.model` of a checkpoint or bundle directory."""
        import sentencepiece

        file = Path(path) / "tokenizer.model"
        if not file.is_file():
            raise PaliGemmaError(f"{file}: no such file; text needs the checkpoint's SentencePiece tokenizer")
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(file.read_bytes())
        except (RuntimeError, OSError) as error:
            raise PaliGemmaError(f"{file}: not a SentencePiece model ({str(error).splitlines()[0]})") from None
        return cls(processor, config)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        ids: list[int] = []
        for part in _CONTENT.split(text):
            if part in self.content:
                ids.append(self.content[part])
            elif part:
                ids.extend(self.processor.encode(part))
        return ids

    def decode(self, ids) -> str:
        """Text of ids; control tokens (pad, bos, eos, image) leave no trace."""
        text, run = [], []
        for token in ids:
            token = int(token)
            if token in self.pieces:
                text += [self.processor.decode(run), self.pieces[token]]
                run = []
            elif token < self.processor.get_piece_size() and not self.processor.is_control(token):
                run.append(token)
        return "".join([*text, self.processor.decode(run)])

    def prompt(self, prefix: str) -> list[int]:
        """The ids that a row starts with: the image tokens, bos, the prefix, a newline."""
        image = [self.config.image_token] * self.config.vision.patches
        return [*image, self.config.bos, *self.encode(prefix), *self.newline]

    def known(self) -> np.ndarray:
        """Which rows of the vocabulary may be drawn: [V] bool."""
        return known_ids(self.config, self.size)


def known_ids(config: PaliGemmaConfig, size: int | None = None) -> np.ndarray:
    """Which rows of the vocabulary a tokenizer of `size` ids can spell, the image token aside: [V] bool.

    Without a tokenizer (None) every row counts except the image token and the random rows that follow it
    where a conversion padded the table behind it (transformers pads to a multiple of 64).
    """
    vocab, image = config.text.vocab, config.image_token
    if size is None:
        size = image if 0 < vocab - image <= 64 else vocab
    known = np.arange(vocab) < size
    if image < vocab:
        known[image] = False
    return known


class Stream:
    """Turns a growing list of ids into text as it comes, never showing half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a multi-byte character is still open."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._show(text)

    def close(self) -> str:
        """What remains at the end, an unfinished character as a replacement character."""
        return self._show(self.tokenizer.decode(self.ids))

    def _show(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new
