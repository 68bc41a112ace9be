"""What the reference computes on the way to an answer: a line for each intermediate value, as it comes.

    text.blocks.0.attention.query   [B=1, N=4, T=68, H=32]    float32  -2.31 … 2.06  gemma.attention  …/gemma.py:48

A line has the value's name, its shape with the project's axis letters, its dtype, its range, and the function that made
it, with file and line; `| less -S` keeps lines whole in a narrow window. Values are printed and dropped, so tracing
takes no more memory than answering. Prefill and the first decode step are traced in full; every later step repeats the
first, and prints only the token that was chosen.
"""

import math
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import detection
from ..answer import Answer
from ..engine import NumpyEngine, Pictures, pixels_of
from ..generate import generate
from ..image import open_image, preprocess
from ..model import paligemma, segmentation
from ..model.layers import Pair, upcast
from ..model.sampling import Sampling, sample
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

#: The axes of a value by the last word of its name, in the decoder; `numpy_ref/__init__.py` declares the letters.
AXES = {
    **dict.fromkeys(["patch_embed", "position_embedding", "projector"], ("B", "P", "D")),
    **dict.fromkeys(["embed", "embed_prefix", "blocks", "norm"], ("B", "T", "D")),
    **dict.fromkeys(["attention_norm", "attention", "post_attention_norm"], ("B", "T", "D")),
    **dict.fromkeys(["mlp_norm", "mlp", "post_mlp_norm"], ("B", "T", "D")),
    **dict.fromkeys(["query", "context"], ("B", "N", "T", "H")),
    **dict.fromkeys(["key", "value"], ("B", "K", "T", "H")),
    "scores": ("B", "K", "G*T", "S"),
    "weights": ("B", "N", "T", "S"),
    "logits": ("B", "V"),
}
#: In the vision tower the positions are patches, and each query head has a key head of its own.
_IN_VISION = {"T": "P", "S": "P", "K": "N", "G*T": "P"}
_ROOT = Path(__file__).parents[2]
_ROW = "{:<35} {:<27} {:<8} {:<20} {:<23} {}"


def axes(name: str, prefill: bool, pictures: int = 1) -> list[str]:
    """The axis letters of a tapped value: "text.blocks.0.attention.weights" -> ["B", "N", "T", "S"].

    Of several pictures the first axis of the vision tower is all of them: `2*B`.
    """
    words, times = [word for word in name.split(".") if not word.isdigit()], f"{pictures}*" * (pictures > 1)
    if prefill and name == "embed":
        return ["B", f"T-{times}P", "D"]  # the first positions are the pictures', and have no token to embed
    letters = [_IN_VISION.get(letter, letter) if words[0] == "vision" else letter for letter in AXES[words[-1]]]
    return [f"{times}{letters[0]}", *letters[1:]] if words[0] in ("vision", "projector") else letters


def shape_of(value: np.ndarray, letters: Sequence[str]) -> str:
    """[B=1, T=68, D=128]. An axis with the letter "" is the number alone."""
    sizes = zip(letters, value.shape, strict=True)
    return f"[{', '.join(f'{letter}={size}' if letter else str(size) for letter, size in sizes)}]"


def range_of(value: np.ndarray) -> str:
    """The least and the largest number: "-2.31 … 2.06". What is not finite is counted: "0 … 1, 3 NOT FINITE"."""
    value = upcast(value) if value.dtype.kind not in "iub" else value.astype(int)
    least, most = value.min(), value.max()  # a NaN anywhere is both
    if np.isfinite([least, most]).all():
        return f"{least:.4g} … {most:.4g}"
    finite = value[np.isfinite(value)]
    among = f"{finite.min():.4g} … {finite.max():.4g}, " if finite.size else ""
    return f"{among}{value.size - finite.size} NOT FINITE"


def origin(code: CodeType, line: int | None = None) -> tuple[str, str]:
    """The name of a function and where it is: ("gemma.attention", "numpy_ref/model/gemma.py:48")."""
    file = Path(code.co_filename)
    module = file.parent.name if file.stem == "__init__" else file.stem
    name = code.co_qualname if "." in code.co_qualname else f"{module}.{code.co_qualname}"
    return name, f"{file.relative_to(_ROOT).as_posix()}:{line or code.co_firstlineno}"


def caller() -> tuple[str, str]:
    """The origin of a tapped value: the function on the stack that called the tap, `scoped` left out."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_qualname.startswith("scoped."):
        frame = frame.f_back
    return origin(frame.f_code, frame.f_lineno)


def block_of(name: str) -> str:
    """What a value is listed under: its block ("text.blocks.0"), else its tower ("vision", "text"), else "joint"."""
    words = name.split(".")
    return ".".join(words[: 3 if "blocks" in words else 1]) if len(words) > 1 else "joint"


class TracedEngine(NumpyEngine):
    """The reference as an engine that prints what it computes; `write(line)` takes the lines."""

    def __init__(self, checkpoint, tokenizer, write=print):
        super().__init__(checkpoint)
        self.tokenizer, self.write, self.steps, self.pictures = tokenizer, write, 0, 0

    def preprocess(self, image: "Image.Image") -> np.ndarray:
        """A Pillow image -> pixel values [1, 3, S, S]."""
        self.pictures += 1
        if self.pictures == 1:
            self.write(_ROW.format("name", "shape", "dtype", "least … largest", "made by", "in"))
        self.heading("picture" if self.pictures == 1 else f"picture {self.pictures}")
        self.row("image", np.asarray(image), ["", "", ""], origin(open_image.__code__))
        pixel_values = preprocess(image, self.config.vision.image_size, resize=self.resize)
        self.row("pixel_values", pixel_values, ["B", "", "S", "S"], origin(preprocess.__code__))
        return pixel_values

    def prefill(
        self, pictures: Pictures, input_ids: np.ndarray, lengths: np.ndarray, capacity: int
    ) -> tuple[np.ndarray, list[Pair]]:
        """As the reference's."""
        self.heading(f"prompt: {self.spell(input_ids[0])}")
        self.row("input_ids", input_ids, ["B", "T"], origin(Tokenizer.prompt.__code__))
        logits, cache = self.traced("prefill", paligemma.prefill, pixels_of(pictures), input_ids, lengths, capacity)
        self.heading(f"prefill: the cache, a key and a value for each of {len(cache)} layers")
        for name, array in zip(("cache.0.key", "cache.0.value"), cache[0], strict=True):
            self.row(name, array, ["B", "K", "C", "H"], origin(paligemma.pad_cache.__code__))
        return logits, cache

    def decode(self, input_ids: np.ndarray, lengths: np.ndarray, cache: list[Pair]) -> tuple[np.ndarray, list[Pair]]:
        """As the reference's; only the first step is printed."""
        self.steps += 1
        if self.steps == 1:
            self.heading("decode 1: the token that was chosen, and its position")
            self.row("input_ids", input_ids, ["B", "T"], origin(generate.__code__))
            self.row("lengths", lengths, ["B"], origin(generate.__code__))
            return self.traced("decode 1", paligemma.decode, input_ids, lengths, cache)
        if self.steps == 2:
            self.heading("decode 2 and on: as decode 1; printed are the tokens")
        return super().decode(input_ids, lengths, cache)

    def draw(
        self, logits: np.ndarray, known: np.ndarray, sampling: Sampling, uniform: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """As the reference's. Printed beside a token: its text, and its share of the softmax of the logits."""
        token, logprob = super().draw(logits, known, sampling, uniform)
        if self.steps < 2:
            self.heading(f"token {self.steps + 1}: id, text, probability (before temperature, top-k and top-p)")
        probability = float(np.exp(logprob[0])) if logprob is not None else math.nan
        chosen = f"{token[0]} {self.spell(token)} {probability:.4f}"
        self.write(
            _ROW.format(f"token.{self.steps + 1}", shape_of(token, ["B"]), str(token.dtype), chosen,
                        *origin(sample.__code__))
        )  # fmt: skip
        return token, logprob

    def print_answer(self, answer: Answer) -> None:
        """Print an answer's text, its boxes in pixels of the picture, and its masks."""
        self.heading("answer")
        self.write(repr(answer.text))
        for box, painted in zip(answer.boxes, answer.masks, strict=True):
            self.heading(f"box: {box.label!r}")
            self.row("corners", np.array(box.corners), [""], origin(detection.parse.__code__))
            if box.codes:
                codes = np.array([box.codes])
                self.row("codes", codes, ["B", ""], origin(detection.parse.__code__))
                if painted is not None and self.masks:
                    self.row("mask", self.masks(codes), ["B", "", ""], origin(segmentation.decode.__code__))
                    self.row("painted", painted, ["", ""], origin(segmentation.paste.__code__))

    def traced(self, stage: str, function: Callable, *arguments: Any) -> tuple[np.ndarray, list[Pair]]:
        """`paligemma.prefill` or `.decode`, with a heading where another block begins and a row for each value."""
        block = None

        def tap(name, value):
            nonlocal block
            if block_of(name) != block:
                block = block_of(name)
                self.heading(f"{stage}: {block}")
            self.row(name, value, axes(name, stage == "prefill", self.pictures), caller())
            return value

        with np.errstate(over="ignore", invalid="ignore"):  # it is in the ranges
            return function(self.params, self.config, *arguments, tap)

    def heading(self, text: str) -> None:
        """An empty line, then what the next rows belong to."""
        self.write(f"\n# {text}")

    def row(self, name: str, value: np.ndarray, letters: Sequence[str], made_by: tuple[str, str]) -> None:
        """One value."""
        self.write(_ROW.format(name, shape_of(value, letters), str(value.dtype), range_of(value), *made_by))

    def spell(self, ids: np.ndarray) -> str:
        """Ids as text, one by one: "64 x <image>, <bos>, 'caption', ' en', '\\n'"."""
        config = self.config
        control = {config.image_token: "<image>", config.bos: "<bos>", config.eos: "<eos>", config.pad: "<pad>"}
        pieces = [control.get(token) or repr(self.tokenizer.decode([token])) for token in ids.tolist()]
        runs = [(piece, len(list(run))) for piece, run in groupby(pieces)]
        return ", ".join(f"{count} x {piece}" if count > 1 else piece for piece, count in runs)
