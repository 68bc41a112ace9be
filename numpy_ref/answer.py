"""From pictures and a prompt to an answer, by any engine: text, boxes, masks and how long it took.

Every command answers through `answer`, or through its three steps, where many questions share a batch: `fit` makes ids
of a prompt, `ask` joins them to a picture or several, and `answer_all` answers what was asked. Boxes and masks are in
pixels of the first picture. A picture that is asked about several times goes through the vision tower once.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import detection
from .detection import Box
from .engine import Engine, Features, MaskDecoder, Pictures
from .errors import PaliGemmaError
from .generate import Timings, answers, choose_capacity, generate
from .grammar import Grammar
from .model import segmentation
from .model.sampling import Sampling
from .search import Search
from .tokenizer import Stream, Tokenizer, beginnings

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_NEW_TOKENS = 64
#: What a prompt is about: a Pillow image, or a Picture, which an engine looked at; or a list of them.
Shown: TypeAlias = "Image.Image | Picture | Sequence[Image.Image | Picture]"


@dataclass(eq=False)
class Picture:
    """A picture as an engine takes it.

    `features` are there from the first batch on in which it is `shared` by several questions, or marked so.
    """

    pixel_values: np.ndarray  # [1, 3, S, S]
    width: int  # in pixels, as it was before it was resized
    height: int
    shared: bool = False
    features: Features | None = None


class Album:
    """The pictures that were asked about last, for questions that come about one of them again.

    From the first that does on, all are marked as shared. `limit` is about how many bytes they may take.
    """

    def __init__(self, engine: Engine, limit: int = 2**28):
        vision, width = engine.config.vision, engine.config.text.width
        self.most = max(2, limit // (4 * (3 * vision.image_size**2 + vision.patches * width)))
        self.pictures: OrderedDict[Hashable, Picture] = OrderedDict()
        self.shared = False

    def get(self, key: Hashable, make: Callable[[], Picture]) -> Picture:
        """The picture of a key, made if it is not among the last."""
        if key in self.pictures:
            self.shared = True
        else:
            self.pictures[key] = make()
        self.pictures.move_to_end(key)
        if len(self.pictures) > self.most:
            self.pictures.popitem(last=False)
        self.pictures[key].shared |= self.shared
        return self.pictures[key]


@dataclass(frozen=True)
class Question:
    """A prompt about N pictures, as an engine takes it."""

    prompt: list[int]  # ids
    new_tokens: int  # at most, of the answer
    pictures: list[Picture]


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
    spreads: list[float] = field(default_factory=list)  # `sampling.location_spread` of each, where it is a location
    candidates: list[tuple[str, float]] = field(default_factory=list)  # of a search: texts, with log-probabilities

    @cached_property
    def boxes(self) -> list[Box]:
        """The boxes in the text, in pixels of the picture, with scores if there are log-probabilities."""
        logprobs = list(zip(self.begins, self.logprobs, strict=True)) if self.logprobs else []
        spreads = dict(zip(self.begins, self.spreads, strict=True)) if self.spreads else {}
        return detection.parse(self.text, self.width, self.height, self.convention, logprobs, spreads)

    @cached_property
    def masks(self) -> list[np.ndarray | None]:
        """The mask of each box in the picture, bool [height, width]; None for a box without codes, or without a codec.

        They are painted when first asked for.
        """
        return [paint(self.decode_masks, box, self.width, self.height) for box in self.boxes]

    def as_json(self, masks: bool = False) -> dict:
        """Text, tokens, log-probabilities and candidates if there are any, boxes, masks if wanted, as plain values."""
        plain: dict[str, Any] = {"text": self.text, "tokens": self.tokens}
        if self.logprobs is not None:
            plain["logprobs"] = [round(each, 6) for each in self.logprobs]
        if self.candidates:
            plain["candidates"] = [{"text": text, "logprob": round(logprob, 6)} for text, logprob in self.candidates]
        plain["boxes"] = [box.as_json() for box in self.boxes]
        if masks:
            pairs = zip(plain["boxes"], self.masks, strict=True)
            plain["masks"] = [{**box, **_run_lengths(mask)} for box, mask in pairs if "codes" in box]
        return plain


def _run_lengths(mask) -> dict:
    """A mask as COCO's uncompressed run lengths; nothing where it could not be painted."""
    return {} if mask is None else {"size": list(mask.shape), "counts": segmentation.run_lengths(mask)}


def paint(decode_masks: MaskDecoder | None, box: Box, width: int, height: int) -> np.ndarray | None:
    """The mask of a box in the picture, bool [height, width]; None without codes, or without a codec."""
    if decode_masks is None or not box.codes:
        return None
    return segmentation.paste(decode_masks(np.array([box.codes]))[0], box.corners, width, height)


def pictures_of(image: "Shown") -> "list[Image.Image | Picture]":
    """A picture, or the list or tuple of them that stands for it, as a list. Raises PaliGemmaError if it is empty."""
    pictures: list[Image.Image | Picture] = list(image) if isinstance(image, Sequence) else [image]
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


def look(engine: Engine, image: "Image.Image") -> Picture:
    """A Pillow image as the engine takes it."""
    return Picture(engine.preprocess(image), image.width, image.height)


def ask(engine: Engine, image: "Shown", prompt: list[int], new_tokens: int) -> Question:
    """A Pillow image, or a list of them, and what `fit` gave for so many -> a question."""
    pictures = [each if isinstance(each, Picture) else look(engine, each) for each in pictures_of(image)]
    return Question(prompt, new_tokens, pictures)


def together(engine: Engine, pictures: Sequence[Picture]) -> Pictures:
    """Pictures as `Engine.prefill` takes them: features, if any are shared or there twice; those that lack are made."""
    distinct = list(dict.fromkeys(pictures))
    if len(distinct) == len(pictures) and not any(each.shared for each in pictures):
        return np.concatenate([each.pixel_values for each in pictures])
    if new := [each for each in distinct if each.features is None]:
        made = engine.encode(np.concatenate([each.pixel_values for each in new]))
        for picture, features in zip(new, made, strict=True):
            picture.features = features
    return [each.features for each in pictures if each.features]


def answer(
    engine: Engine,
    tokenizer: Tokenizer,
    image: Shown,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    boxes: str = "big_vision",
    on_text: Callable[[str], None] | None = None,
    grammar: Grammar | None = None,
    start: str = "",
    lookup: bool = False,
    search: Search | None = None,
) -> Answer:
    """Answer a prompt about a Pillow image, or about a list of them; boxes and masks are in pixels of the first.

    `on_text` is called with each piece of the text as it comes. `sampling` is greedy if left out, `boxes` one of
    detection.CONVENTIONS; of a `grammar` only what it allows is drawn. The text begins with `start`; with `lookup`
    labels and words that come again are guessed, which changes the time alone. Raises PaliGemmaError if the prompt
    does not fit, if the grammar has no such answer, or if the logits are not finite.

    A `search` takes the place of `sampling`, and of the last three; what it finds comes in one piece.
    """
    answer_questions = partial(
        answer_all, engine, tokenizer, sampling=sampling, boxes=boxes, grammar=grammar, start=tokenizer.encode(start),
        lookup=lookup, search=search,
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
    on_text(answered.text if search else stream.close())
    return answered


def score(engine: Engine, tokenizer: Tokenizer, image: Shown, prompt: str, text: str) -> tuple[list[int], list[float]]:
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
        engine, together(engine, question.pictures), [question.prompt], tokenizer.known(), len(ids), logprobs=found,
        start=ids,
    )  # fmt: skip
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
    search: Search | None = None,
) -> list[Answer]:
    """Answer questions in one batch; `seeds` as in `generate`, `on_tokens` is called with each step's tokens [B].

    `grammar` and `start` are for all of them, and so is whether tokens are guessed by `generate.look_up`.
    All have equally many pictures: those of another number go into a batch of their own. A `search`, such as
    `partial(beam_search, beams=4)`, takes the place of `sampling` and of what stands behind `boxes`.
    """
    pictures = together(engine, [picture for question in questions for picture in question.pictures])
    prompts = [question.prompt for question in questions]
    new_tokens = np.array([question.new_tokens for question in questions])
    known, locations, timings = tokenizer.known(), tokenizer.locations(), Timings()

    def answered(question, ids, logprobs, spreads, candidates=()):
        return Answer(
            tokenizer.decode(ids), ids, question.pictures[0].width, question.pictures[0].height, boxes, engine.masks,
            timings, logprobs, beginnings(tokenizer, ids), spreads,
            [(tokenizer.decode(each.tokens), each.logprob) for each in candidates],
        )  # fmt: skip

    if search is not None:
        found = search(engine, pictures, prompts, known, new_tokens, timings, locations)
        return [
            answered(question, list(best.tokens), list(best.logprobs), list(best.spreads), [best, *others])
            for question, (best, *others) in zip(questions, found, strict=True)
        ]
    steps, drawn, spread = [], [], []
    for tokens in generate(
        engine, pictures, prompts, known, new_tokens, sampling, timings, seeds, drawn, grammar, start,
        tokenizer.pieces if lookup or grammar else None, spread, locations,
    ):  # fmt: skip
        steps.append(tokens)
        if on_tokens:
            on_tokens(tokens)
    rows = [ids[:most] for ids, most in zip(answers(steps, engine.config.ends), new_tokens, strict=True)]
    logprobs = None if drawn[0] is None else np.stack(drawn, axis=1)  # [B, steps]
    spreads = np.stack(spread, axis=1)
    return [
        answered(
            question, ids, None if logprobs is None else logprobs[row, : len(ids)].tolist(),
            spreads[row, : len(ids)].tolist(),
        )
        for row, (ids, question) in enumerate(zip(rows, questions, strict=True))
    ]  # fmt: skip
