"""A model to ask: pictures and prompts in, answers out, by any engine.

`export.PaliGemma.load("bundle")` opens one; `PaliGemma(engine, tokenizer)` is the same over the reference or the twin.
The commands answer through it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypedDict, Union, Unpack, cast

import numpy as np

from . import answer as answering
from .answer import Album, Answer, Picture, Question
from .detection import CONVENTIONS
from .engine import Engine
from .errors import PaliGemmaError
from .grammar import GRAMMARS, Grammar
from .image import open_image, to_rgb
from .model.sampling import COLDEST, Sampling
from .search import search_of
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from PIL import Image

BATCH = 8  # questions that are answered at once
#: A file, a Pillow image, or an array of bytes [H, W, 3].
PictureLike = Union[str, os.PathLike, "Image.Image", np.ndarray]
#: What a prompt is about: a picture, or several.
Pictures = PictureLike | Sequence[PictureLike]


class Options(TypedDict, total=False):
    """How to answer; what is left out is as in `run-onnx`."""

    max_new_tokens: int | None  # of an answer; None for 64, or what room there is
    temperature: float  # 0 is greedy
    top_p: float  # keep the likeliest that sum to it
    top_k: int  # keep so many of the likeliest, 0 for all
    seed: int  # of the draws
    boxes: str  # one of detection.CONVENTIONS
    constrain: str | None  # one of grammar.HELP: nothing else is drawn
    start: str  # what the answer begins with
    lookup: bool  # guess words that come again, which changes the time alone
    beams: int | None  # follow so many of the likeliest answers (search.beam_search)
    best_of: int | None  # draw so many, and take the likeliest (search.best_of)


class PaliGemma:
    """A model with its tokenizer. Threads may share one.

    Options of every method that answers are those of `Options`. Raises PaliGemmaError if a picture cannot be read, or a
    prompt does not fit.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, transparency: str = "white"):
        self.engine, self.tokenizer, self.transparency = engine, tokenizer, transparency
        self._grammar = lru_cache(GRAMMARS)(partial(Grammar, tokenizer=tokenizer))

    def answer(
        self,
        picture: Pictures,
        prompt: str,
        *,
        stream: Callable[[str], None] | bool | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Answer a prompt about a picture, or about a list of them; boxes are in pixels of the first.

        `stream` is called with each piece of the text as it comes; True prints them.
        """
        return self._answer_one(self._look(picture), prompt, stream, options)

    def answer_all(
        self, questions: Iterable[tuple[Pictures, str]], *, batch_size: int = BATCH, **options: Unpack[Options]
    ) -> list[Answer]:
        """Answer (picture, prompt) pairs, so many at once; each as if it were asked alone.

        A file or an object that is named again, not too long after, is looked at once.
        """
        album, waiting, found = Album(self.engine), iter(questions), []
        while batch := list(islice(waiting, batch_size)):
            asked = [(self._look(picture, album), prompt) for picture, prompt in batch]
            found += self._answer_batch(asked, options)
        return found

    def score(self, picture: Pictures, prompt: str, answer: str) -> tuple[list[int], list[float]]:
        """The ids of a given answer, what ends it the last, and the log-probability of each."""
        return answering.score(self.engine, self.tokenizer, self._look(picture), prompt, answer)

    def picture(self, picture: Pictures) -> "AboutPicture":
        """A picture, or a list of them, to be asked about several times: the vision tower runs once."""
        return AboutPicture(self, picture)

    def _look(self, picture: Pictures, album: Album | None = None) -> list[Picture]:
        if album is None:
            return [self._open(each) for each in _listed(picture)]
        return [album.get(_key(each), partial(self._open, each)) for each in _listed(picture)]

    def _open(self, picture: PictureLike) -> Picture:
        return answering.look(self.engine, as_image(picture, self.transparency))

    def _answer_one(self, pictures, prompt, stream, options) -> Answer:
        on_text = _print if stream is True else stream or None
        return answering.answer(
            self.engine, self.tokenizer, pictures, prompt, max_new_tokens=options.get("max_new_tokens"),
            on_text=on_text, start=options.get("start", ""), **self._how(options),
        )  # fmt: skip

    def _answer_batch(self, asked, options) -> list[Answer]:
        """(pictures, prompt) pairs -> answers; those with equally many pictures go through the model together."""
        how, most = self._how(options), options.get("max_new_tokens")
        questions = [
            Question(*answering.fit(self.engine, self.tokenizer, prompt, most, len(pictures)), pictures)
            for pictures, prompt in asked
        ]
        how["start"] = self.tokenizer.encode(options.get("start", ""))
        found: dict[int, Iterator[Answer]] = {}
        for count in {len(each.pictures) for each in questions}:
            same = [each for each in questions if len(each.pictures) == count]
            seeds = [how["sampling"].seed] * len(same)
            found[count] = iter(answering.answer_all(self.engine, self.tokenizer, same, **how, seeds=seeds))
        return [next(found[len(each.pictures)]) for each in questions]

    def _how(self, options) -> dict:
        """Options as the functions of `answer` take them. Raises PaliGemmaError where one has no such value."""
        constrain = options.get("constrain")
        return _checked(options) | {
            "grammar": self._grammar(constrain) if constrain else None, "lookup": options.get("lookup", False),
        }  # fmt: skip


class AboutPicture:
    """A picture, or several, that a model has before it. Threads may share one."""

    def __init__(self, model: PaliGemma, picture: Pictures):
        self._model, self._pictures, self._lock = model, model._look(picture), Lock()
        for each in self._pictures:
            each.shared = True

    def answer(
        self, prompt: str, *, stream: Callable[[str], None] | bool | None = None, **options: Unpack[Options]
    ) -> Answer:
        """Answer a prompt, as `PaliGemma.answer`."""
        return self._model._answer_one(self._encoded(), prompt, stream, options)

    def answer_all(
        self, prompts: Iterable[str], *, batch_size: int = BATCH, **options: Unpack[Options]
    ) -> list[Answer]:
        """Answer prompts, so many at once; each as if it were asked alone."""
        waiting, found = iter(prompts), []
        while batch := list(islice(waiting, batch_size)):
            found += self._model._answer_batch([(self._encoded(), prompt) for prompt in batch], options)
        return found

    def score(self, prompt: str, answer: str) -> tuple[list[int], list[float]]:
        """The ids of a given answer and their log-probabilities, as `PaliGemma.score`."""
        return answering.score(self._model.engine, self._model.tokenizer, self._encoded(), prompt, answer)

    def _encoded(self) -> list[Picture]:
        with self._lock:  # one thread, once
            answering.together(self._model.engine, self._pictures)
        return self._pictures


def as_image(picture: PictureLike, transparency: str = "white") -> "Image.Image":
    """A file, a Pillow image, or an array of bytes [H, W] or [H, W, 3 or 4] -> an RGB image.

    Raises PaliGemmaError if it cannot be read as a picture.
    """
    from PIL import Image

    if isinstance(picture, str | os.PathLike):
        return open_image(Path(picture), transparency)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not picture.size or not _is_picture(picture.shape):
            shape = f"{picture.dtype} {list(picture.shape)}"
            raise PaliGemmaError(f"an array of {shape} is no picture; give uint8 [height, width, 3]")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        kind = type(picture).__name__
        raise PaliGemmaError(f"a {kind} is no picture; give a file, a Pillow image or an array of bytes")
    return to_rgb(picture, transparency)


def _is_picture(shape) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))


def _listed(picture: Pictures) -> list[PictureLike]:
    if not isinstance(picture, list | tuple):
        return [cast(PictureLike, picture)]
    if not picture:
        raise PaliGemmaError("a list of no pictures; a prompt needs at least one")
    return list(picture)


def _key(picture: PictureLike):
    """What is the same for the same picture: a name is one, and so is an object that somebody holds."""
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else _Same(picture)


class _Same:
    """An object by identity, kept alive so that no other takes its place."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return id(self.value)

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value


def _checked(options: Options) -> dict:
    """Sampling, boxes and search. Raises PaliGemmaError where an option has no such value."""
    if unknown := options.keys() - Options.__annotations__.keys():
        names = ", ".join(Options.__annotations__)
        raise TypeError(f"there is no option {', '.join(sorted(unknown))}; there are {names}")
    temperature, top_p = options.get("temperature", 0.0), options.get("top_p", 1.0)
    sampling = Sampling(temperature, options.get("top_k", 0), top_p, options.get("seed", 0))
    boxes, most = options.get("boxes", "big_vision"), options.get("max_new_tokens")
    for right, name, value, what in (
        (0 <= temperature <= 1 / COLDEST and (not temperature or temperature >= COLDEST), "temperature", temperature,
         f"0, or a number from {COLDEST:g} to {1 / COLDEST:g}"),
        (0 <= top_p <= 1, "top_p", top_p, "a number from 0 to 1"),
        (sampling.top_k >= 0, "top_k", sampling.top_k, "a whole number from 0"),
        (sampling.seed >= 0, "seed", sampling.seed, "a whole number from 0"),
        (most is None or most >= 1, "max_new_tokens", most, "a whole number from 1, or None"),
        (boxes in CONVENTIONS, "boxes", boxes, f"one of {', '.join(CONVENTIONS)}"),
    ):  # fmt: skip
        if not right:
            raise PaliGemmaError(f"{name} is {value!r}, and has to be {what}")
    return {"sampling": sampling, "boxes": boxes, "search": search_of(options)}


def _print(text: str) -> None:
    print(text, end="", flush=True)
