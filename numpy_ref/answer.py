"""From pictures and a prompt to an answer, by any engine: text, boxes, masks and how long it took.

Every command answers through `answer`, or through its three steps, where many questions share a batch: `fit` makes ids
of a prompt, `ask` joins them to a picture or several, and `answer_all` answers what was asked. Boxes and masks are in
pixels of the first picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from . import detection
from .detection import Box
from .engine import Engine, MaskDecoder
from .errors import PaliGemmaError
from .generate import Timings, answers, choose_capacity, generate
from .grammar import Grammar
from .model import segmentation
from .model.sampling import Sampling
from .tokenizer import Stream, Tokenizer, beginnings

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A prompt about N pictures, as an engine takes it."""

    prompt: list[int]  # ids
    new_tokens: int  # at most, of the answer
    pixel_values: np.ndarray  # [N, 3, S, S]
    width: int  # of the first picture, in pixels
    height: int


@dataclass(frozen=True)
class Answer:
    """What an engine said about pictures of which the first has `width` x `height` pixels.

    `dataclasses.replace(answer, width=..., height=...)` is the same answer about the picture in another size.
    """

    text: str
    tokens: list[int]  # without the one that ended it
    width: int
    height: int
    convention: str = "big_vision"  # one of detection.CONVENTIONS
    decode_masks: MaskDecoder | None = field(default=None, repr=False)
    timings: Timings = field(default_factory=Timings)  # of the batch that it was answered in
    logprobs: list[float] | None = None  # of each of `tokens`; None where the engine does not say
    begins: list[int] = field(default_factory=list)  # where in the text each of `tokens` does

    @cached_property
    def boxes(self) -> list[Box]:
        """The boxes in the text, in pixels of the picture, with scores if there are log-probabilities."""
        logprobs = list(zip(self.begins, self.logprobs, strict=True)) if self.logprobs else []
        return detection.parse(self.text, self.width, self.height, self.convention, logprobs)

    @cached_property
    def masks(self) -> list[np.ndarray | None]:
        """The mask of each box in the picture, bool [height, width]; None for a box without codes, or without a codec.

        They are painted when first asked for.
        """
        return [paint(self.decode_masks, box, self.width, self.height) for box in self.boxes]

    def as_json(self) -> dict:
        """Text, tokens, their log-probabilities if there are any, and boxes as plain values."""
        logprobs = {} if self.logprobs is None else {"logprobs": [round(each, 6) for each in self.logprobs]}
        return {"text": self.text, "tokens": self.tokens, **logprobs, "boxes": [box.as_json() for box in self.boxes]}


def paint(decode_masks: MaskDecoder | None, box: Box, width: int, height: int) -> np.ndarray | None:
    """The mask of a box in the picture, bool [height, width]; None without codes, or without a codec."""
    if decode_masks is None or not box.codes:
        return None
    return segmentation.paste(decode_masks(np.array([box.codes]))[0], box.corners, width, height)


def pictures_of(image: "Image.Image | list[Image.Image]") -> "list[Image.Image]":
    """A picture, or the list or tuple of them that stands for it, as a list. Raises PaliGemmaError if it is empty."""
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    if not pictures:
        raise PaliGemmaError("a list of no pictures; a prompt needs at least one")
    return pictures


def fit(
    engine: Engine, tokenizer: Tokenizer, prompt: str, max_new_tokens: int | None = None, pictures: int = 1
) -> tuple[list[int], int]:
    """The ids of a prompt about so many pictures, and how many tokens its answer may have.

    Those are as many as asked for; else DEFAULT_NEW_TOKENS, or what the prompt leaves of the engine's positions.
    Raises PaliGemmaError if the prompt, or what was asked for, does not fit.
    """
    if pictures > 1 and pictures * engine.config.vision.patches > engine.max_length:
        taken = f"{pictures} pictures take {pictures * engine.config.vision.patches} positions"
        raise PaliGemmaError(f"{taken}, more than the {engine.max_length} that there are; give fewer")
    ids = tokenizer.prompt(prompt, pictures)
    if max_new_tokens is None:
        room = engine.max_length - len(ids) + 1  # the last token takes no position
        max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room))
    choose_capacity(engine, np.array([len(ids)]), max_new_tokens, pictures)
    return ids, max_new_tokens


def ask(engine: Engine, image: "Image.Image | list[Image.Image]", prompt: list[int], new_tokens: int) -> Question:
    """A Pillow image, or a list of them, and what `fit` gave for so many -> a question."""
    first, *more = pictures_of(image)
    pixel_values = np.concatenate([engine.preprocess(picture) for picture in (first, *more)])
    return Question(prompt, new_tokens, pixel_values, first.width, first.height)


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    image: "Image.Image | list[Image.Image]",
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    boxes: str = "big_vision",
    on_text: Callable[[str], None] | None = None,
    constrain: str | None = None,
    start: str = "",
    lookup: bool = False,
) -> Answer:
    """Answer a prompt about a Pillow image, or about a list of them; boxes and masks are in pixels of the first.

    `on_text` is called with each piece of the text as it comes. `sampling` is greedy if left out, `boxes` one of
    detection.CONVENTIONS, `constrain` one of the grammars of grammar.HELP. The text begins with `start`; with `lookup`
    labels and words that come again are guessed, which changes the time alone. Raises PaliGemmaError if the prompt
    does not fit, if there is no such grammar or no such answer in it, or if the logits are not finite.
    """
    found = Grammar(constrain, tokenizer) if constrain else None
    answer_questions = partial(
        answer_all, engine, tokenizer, sampling=sampling, boxes=boxes, grammar=found, start=tokenizer.encode(start),
        lookup=lookup,
    )  # fmt: skip
    pictures = pictures_of(image)
    question = ask(engine, pictures, *fit(engine, tokenizer, prompt, max_new_tokens, len(pictures)))
    if on_text is None:
        return answer_questions([question])[0]
    stream = Stream(tokenizer)

    def show(tokens):
        if tokens[0] not in engine.config.ends:
            on_text(stream.push(int(tokens[0])))

    (answered,) = answer_questions([question], on_tokens=show)
    on_text(stream.close())
    return answered


def score(
    engine: Engine, tokenizer: Tokenizer, image: "Image.Image | list[Image.Image]", prompt: str, text: str
) -> tuple[list[int], list[float]]:
    """A given answer's ids, and the log-probability of each, in one pass behind the prompt.

    What ends an answer is the last of them (of a model that has such a token): their sum is the log-probability that
    the model, asked so, gives this text, cut as the tokenizer cuts it, and nothing more. Raises PaliGemmaError if it
    does not fit, or if the logits are not finite.
    """
    ids = [*tokenizer.encode(text), *engine.config.ends[:1]]
    if not ids:
        raise PaliGemmaError("there is nothing to score: an answer without tokens, of a model that ends none")
    pictures, found = pictures_of(image), []
    question = ask(engine, pictures, *fit(engine, tokenizer, prompt, len(ids), len(pictures)))
    drawn = generate(
        engine, question.pixel_values, [question.prompt], tokenizer.known(), len(ids), logprobs=found, start=ids
    )
    tokens = [int(token[0]) for token in drawn]
    return tokens, [float(each[0]) for each in found]


def answer_all(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    sampling: Sampling | None = None,
    boxes: str = "big_vision",
    seeds: Sequence | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
    grammar: Grammar | None = None,
    start: Sequence[int] = (),
    lookup: bool = False,
) -> list[Answer]:
    """Answer questions in one batch; `seeds` as in `generate`, `on_tokens` is called with each step's tokens [B].

    `grammar` and `start` are for all of them, and so is whether tokens are guessed by `generate.look_up`.
    All have equally many pictures: those of another number go into a batch of their own.
    """
    pixel_values = np.concatenate([question.pixel_values for question in questions])
    prompts = [question.prompt for question in questions]
    new_tokens = np.array([question.new_tokens for question in questions])
    timings, steps, drawn = Timings(), [], []
    for tokens in generate(
        engine, pixel_values, prompts, tokenizer.known(), new_tokens, sampling, timings, seeds, drawn, grammar, start,
        tokenizer.pieces if lookup else None,
    ):  # fmt: skip
        steps.append(tokens)
        if on_tokens:
            on_tokens(tokens)
    rows = [ids[:most] for ids, most in zip(answers(steps, engine.config.ends), new_tokens, strict=True)]
    logprobs = None if drawn[0] is None else np.stack(drawn, axis=1)  # [B, steps]
    return [
        Answer(
            tokenizer.decode(ids),
            ids,
            question.width,
            question.height,
            boxes,
            engine.masks,
            timings,
            logprobs=None if logprobs is None else logprobs[row, : len(ids)].tolist(),
            begins=beginnings(tokenizer, ids),
        )
        for row, (ids, question) in enumerate(zip(rows, questions, strict=True))
    ]
