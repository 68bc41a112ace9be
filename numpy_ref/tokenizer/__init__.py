"""Text <-> token ids: a SentencePiece model (or a tokenizer.json) plus the location and segmentation tokens.

A prompt is tokenised in parts, as in big_vision: tok(prefix, bos) ++ tok("\\n") ++ tok(suffix).
Control tokens never come out of text: `<image>`, `<bos>` and the like in a prompt are spelled, piece by piece.
`<loc0000>` … `<loc1023>` and `<seg000>` … `<seg127>` are content (boxes and masks) and are one token each; numbers
past those, such as `<loc1024>`, are text like any other.
"""

import codecs
import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..checkpoint.hugging_face import PADDING
from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError
from ..files import read_bytes, within

LOCATIONS = [f"<loc{i:04d}>" for i in range(1024)]
SEGMENTS = [f"<seg{i:03d}>" for i in range(128)]
_CONTROL = ["<image>", "<bos>", "<eos>", "<pad>", "<unk>"]
# The place behind the "<" of a control word. Text cut there holds none of them any more.
_INSIDE_CONTROL = re.compile("(?<=<)(?=(?:image|bos|eos|pad|unk)>)")
_MARKUP = re.compile(r"\s*(<image>|<bos>)")
_BYTE = re.compile("<0x([0-9A-F]{2})>")


def prompt_warning(prefix: str) -> str:
    """What is odd about a prompt, in a line; empty if nothing is.

    transformers asks for `<image>` in front of a prompt, so people write it, and `<bos>` behind it.
    """
    markup = _MARKUP.match(prefix)
    if not markup:
        return ""
    return (
        f"the prompt begins with {markup[1]}, which is read as text; leave it out: "
        "the picture's tokens and <bos> are put in front of every prompt"
    )


def read_contents(file: str | Path) -> bytes:
    """The bytes of a tokenizer's file; PaliGemmaError if it cannot be read, or is larger than any."""
    try:
        return read_bytes(file)
    except OSError as error:
        raise PaliGemmaError(f"{file}: cannot read the tokenizer ({error.strerror or error})") from None
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{file}: not a tokenizer ({error})") from None


class SentencePiece:
    """`tokenizer.model`, the form of Google's releases."""

    FILE = "tokenizer.model"

    def __init__(self, contents: bytes, source=FILE):
        import sentencepiece

        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(contents)
            self.size = self.processor.get_piece_size()
            self.processor.id_to_piece(list(range(self.size)))  # fails here, and not later, if one is not UTF-8
        except (RuntimeError, ValueError) as error:
            raise PaliGemmaError(f"{source}: not a SentencePiece model ({error})") from None
        self.encode, self.decode = self.processor.encode, self.processor.decode

    def find(self, piece: str) -> int | None:
        """The id of a piece, None if there is no such piece."""
        token = self.processor.piece_to_id(piece)
        return token if self.processor.id_to_piece(token) == piece else None

    def is_text(self, token: int) -> bool:
        """Whether an id stands for text, and not for control."""
        if not 0 <= token < self.size:
            return False
        return not (self.processor.is_control(token) or self.processor.is_unknown(token))

    def spelling(self, token: int) -> bytes:
        """What an id that stands for text adds to one."""
        return _bytes_of(self.processor.id_to_piece(token))


class Json:
    """`tokenizer.json`, the form of the Hugging Face `tokenizers` library."""

    FILE = "tokenizer.json"

    def __init__(self, contents: bytes, source=FILE):
        import tokenizers

        self.source = source
        with _errors_as_line(source):
            self.library = tokenizers.Tokenizer.from_buffer(contents.removeprefix(codecs.BOM_UTF8))
        # "<bos>" in a text is spelled, not obeyed. So is "<start_of_turn>", which tokenizer.model takes for text.
        self.library.encode_special_tokens = True
        vocab = self.library.get_vocab(with_added_tokens=True)
        added = self.library.get_added_tokens_decoder()
        control = {token for token, entry in added.items() if entry.special} | {vocab.get(word) for word in _CONTROL}
        self.text = {token: piece for piece, token in vocab.items() if token not in control}
        self.size = 1 + max(self.text, default=-1)
        self.find = vocab.get

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        with _errors_as_line(self.source):
            return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, each byte that is not UTF-8 a replacement character, as SentencePiece has it.

        The library's own decoder gives up a whole run of bytes for one that is wrong or still to come.
        """
        text = b"".join(_bytes_of(self.text[token]) for token in ids).decode("utf-8", "surrogateescape")
        return re.sub("[\udc80-\udcff]", "\N{REPLACEMENT CHARACTER}", text)

    def is_text(self, token: int) -> bool:
        """Whether an id stands for text, and not for control."""
        return token in self.text

    def spelling(self, token: int) -> bytes:
        """What an id that stands for text adds to one."""
        return _bytes_of(self.text[token])


@contextmanager
def _errors_as_line(source):
    """Turn what the `tokenizers` library raises into a line: bare Exception, and panics that are not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise PaliGemmaError(f"{source}: not a tokenizer ({error})") from None


def _bytes_of(piece: str) -> bytes:
    """What a piece spells: one byte, or text in which "▁" stands for a space."""
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()


class Tokenizer:
    """A tokenizer file, and the location and segmentation tokens that may stand behind its end."""

    def __init__(self, backend: SentencePiece | Json, config: PaliGemmaConfig):
        self.config, self.backend, self.size = config, backend, backend.size
        extra = LOCATIONS + SEGMENTS
        self.content = {piece: token for piece in extra if (token := backend.find(piece)) is not None}
        if not self.content and self.size + len(extra) <= min(config.image_token, config.text.vocab):
            # Gemma's own file, which ends before them.
            self.content = {piece: self.size + i for i, piece in enumerate(extra)}
            self.size += len(extra)
        self.pieces = {token: piece for piece, token in self.content.items()}
        self.content_pattern = re.compile(f"({'|'.join(self.content)})") if self.content else None
        self.size = max(self.size, 1 + max(self.pieces, default=-1))
        self.control = {config.image_token, config.bos, config.eos, config.pad, *config.ends}
        self.obeys_text = any(backend.encode(word) == [backend.find(word)] for word in _CONTROL)
        if self.size > config.text.vocab:
            raise PaliGemmaError(f"the tokenizer has {self.size} ids but the model only {config.text.vocab} embeddings")
        self.newline = self.encode("\n")

    @classmethod
    def load(cls, path: str | Path, config: PaliGemmaConfig) -> "Tokenizer":
        """Read `tokenizer.model`, or `tokenizer.json` where there is none, of a checkpoint or bundle directory."""
        for backend in (SentencePiece, Json):
            file = within(path, backend.FILE)
            if file.is_file():
                return cls(backend(read_contents(file), file), config)
        raise PaliGemmaError(f"{path}: neither tokenizer.model nor tokenizer.json; text needs one of them")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos. Raises PaliGemmaError if it is not Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PaliGemmaError(f"the text {text!r} is not valid Unicode; pass it as UTF-8") from None
        ids: list[int] = []
        for part in self.content_pattern.split(text) if self.content_pattern else [text]:
            if part in self.content:
                ids.append(self.content[part])
            elif part:
                ids.extend(self._encode_words(part))
        return ids

    def _encode_words(self, text):
        # A file may declare a control word as ordinary text; then it has to be cut before it is seen.
        parts = _INSIDE_CONTROL.split(text) if self.obeys_text else [text]
        return [token for part in parts for token in self.backend.encode(part)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens (pad, bos, eos, image) leave no trace."""
        text, run = [], []
        for token in map(int, ids):
            if token in self.pieces:
                text += [self.backend.decode(run), self.pieces[token]]
                run = []
            elif token not in self.control and self.backend.is_text(token):
                run.append(token)
        return "".join([*text, self.backend.decode(run)])

    def spellings(self) -> list[bytes]:
        """What each id adds to a text; nothing for control tokens."""
        found = []
        for token in range(self.size):
            if token in self.pieces:
                found.append(self.pieces[token].encode())
            elif token not in self.control and self.backend.is_text(token):
                found.append(self.backend.spelling(token))
            else:
                found.append(b"")
        return found

    def prompt(self, prefix: str, pictures: int = 1) -> list[int]:
        """The ids that a row starts with: the image tokens of all its pictures, bos, the prefix, a newline."""
        images = [self.config.image_token] * (pictures * self.config.vision.patches)
        return [*images, self.config.bos, *self.encode(prefix), *self.newline]

    def locations(self) -> np.ndarray | None:
        """The ids of the location tokens, in rising order of place: int64 [1024]; None if it has not all of them."""
        found = [self.content.get(piece) for piece in LOCATIONS]
        return None if None in found else np.array(found)

    def known(self) -> np.ndarray:
        """Which rows of the vocabulary may be drawn: [V] bool."""
        return known_ids(self.config, self.size)


def known_ids(config: PaliGemmaConfig, size: int | None = None) -> np.ndarray:
    """Which rows of the vocabulary a tokenizer of `size` ids can spell, the image token aside: [V] bool.

    Without a tokenizer (None) every row counts except the image token and the random rows that follow it
    where a conversion padded the table behind it (to a multiple of 64 in the releases).
    """
    vocab, image = config.text.vocab, config.image_token
    if size is None:
        size = image if 0 < vocab - image <= PADDING else vocab
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


def beginnings(tokenizer: Tokenizer, ids: Iterable[int]) -> list[int]:
    """Where in the text of ids each of them begins; tokens that share a character begin where it does."""
    ids = list(ids)
    text, whole, found = tokenizer.decode(ids), 0, []
    for i in range(len(ids)):
        before = tokenizer.decode(ids[:i])
        if text.startswith(before):  # or half a character ends it, which the next tokens complete
            whole = len(before)
        found.append(whole)
    return found
