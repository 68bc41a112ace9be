"""Examples to learn from: questions about drawn scenes, or the lines of a JSONL file.

Each is a map from a number to an example, the same for the same seed; there is one for every number.
"""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from numpy_ref import scenes, things
from numpy_ref.errors import PaliGemmaError, note, plural
from numpy_ref.files import opened
from numpy_ref.image import open_image, preprocess
from numpy_ref.scenes import questions
from numpy_ref.things import names
from numpy_ref.things import questions as thing_questions
from numpy_ref.tokenizer import prompt_warning

from ..model import segmentation
from .augment import view

if TYPE_CHECKING:
    from PIL import Image


class Scenes:
    """(pixel values [3, S, S], prompt ids, suffix ids with eos) of random questions about random scenes.

    A share `shaded` of the scenes is in shades (`scenes.random_scene`). From example `misnamed_from` on, a share
    `misnamed` of the names in captions and answers is wrong (`questions.misname`).
    """

    def __init__(
        self, tokenizer, codec: dict, size: int, seed: int, shares=questions.SHARES, shaded=0.0, misnamed=0.0,
        misnamed_from=0,
    ):  # fmt: skip
        self.tokenizer, self.size, self.seed, self.shares, self.shaded = tokenizer, size, seed, shares, shaded
        self.misnamed, self.misnamed_from = misnamed, misnamed_from
        self.masks = segmentation.Speller(codec)

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, index])
        question = questions.random_question(rng, self.masks, shares=self.shares, shaded=self.shaded)
        pixels, suffix = preprocess(question.scene.draw(self.size), self.size)[0], question.suffix
        if index >= self.misnamed_from and question.task in ("caption", "answer"):  # elsewhere names are only repeated
            suffix = questions.misname(rng, suffix, self.misnamed)
        ids = [*self.tokenizer.encode(suffix), self.tokenizer.config.eos]
        return pixels, self.tokenizer.prompt(question.prefix), ids


class Captions:
    """(pixel values [3, S, S], caption ids [L]) of random scenes, for contrastive learning."""

    def __init__(self, tokenizer, size: int, length: int, seed: int, shaded=0.0):
        self.tokenizer, self.size, self.length, self.seed, self.shaded = tokenizer, size, length, seed, shaded

    def __getitem__(self, index):
        scene = scenes.random_scene(np.random.default_rng([self.seed, index]), shaded=self.shaded)
        row = _row(self.tokenizer, questions.caption(scene), self.length)
        return preprocess(scene.draw(self.size), self.size)[0], row


@dataclass(frozen=True)
class Course:
    """How the scenes of things change in the course of a stage of training.

    The most things in a scene grow from one to `things.MOST` over the first `growing` examples. A share `shaded` of the
    scenes has paints in shades; from example `misnamed_from` on a share `misnamed` of the colors and shapes in captions
    and answers is wrong (`questions.misname`).
    """

    shares: tuple[float, ...] = thing_questions.SHARES
    shaded: float = 0.6
    growing: int = 0
    misnamed: float = 0.0
    misnamed_from: int = 0

    def most(self, index: int) -> int:
        """The most things in the scene of an example."""
        return min(things.MOST, 1 + index * things.MOST // self.growing) if self.growing else things.MOST


class Things:
    """(pixel values [3, S, S], prompt ids, suffix ids with eos) of random questions about scenes of things."""

    def __init__(self, tokenizer, codec: dict, size: int, seed: int, course: Course = Course()):
        self.tokenizer, self.size, self.seed, self.course = tokenizer, size, seed, course
        self.masks = segmentation.Speller(codec)

    def __getitem__(self, index):
        rng, course = np.random.default_rng([self.seed, index]), self.course
        question = thing_questions.random_question(
            rng, self.masks, shares=course.shares, shaded=course.shaded, most=course.most(index)
        )
        suffix = question.suffix
        if index >= course.misnamed_from and question.task in ("caption", "answer"):  # others only repeat names
            suffix = thing_questions.misname(rng, suffix, course.misnamed)
        pixels = preprocess(question.scene.draw(self.size), self.size)[0]
        ids = [*self.tokenizer.encode(suffix), self.tokenizer.config.eos]
        return pixels, self.tokenizer.prompt(question.prefix), ids


class ThingCaptions:
    """(pixel values [3, S, S], caption ids [L]) of scenes of things, for contrastive learning.

    In the captions what a word says comes behind, and a share `SPELLED` of the scenes has one, so that the tower
    learns to read.
    """

    SPELLED = 0.25

    def __init__(self, tokenizer, size: int, length: int, seed: int, course: Course = Course()):
        self.tokenizer, self.size, self.length, self.seed, self.course = tokenizer, size, length, seed, course

    def __getitem__(self, index):
        rng, course = np.random.default_rng([self.seed, index]), self.course
        word = True if rng.random() < self.SPELLED else None
        scene = things.random_scene(rng, course.most(index), shaded=course.shaded, word=word)
        text = "".join(f" {thing.text}" for thing in scene.things if thing.text)
        row = _row(self.tokenizer, names.caption(scene) + text, self.length)
        return preprocess(scene.draw(self.size), self.size)[0], row


def _row(tokenizer, text: str, length: int) -> np.ndarray:
    """The ids of a text, cut or filled up with pad to a length."""
    ids = tokenizer.encode(text)[:length]
    row = np.full(length, tokenizer.config.pad, np.int64)
    row[: len(ids)] = ids
    return row


@dataclass(frozen=True)
class Line:
    """A line of a JSONL file: where it stands, its pictures, prefix and suffix, and the ids of both."""

    where: str
    paths: tuple[Path, ...]
    prefix: str
    suffix: str
    prompt: list[int]
    answer: list[int]  # with eos

    def pictures(self) -> "list[Image.Image]":
        """Its pictures. Raises PaliGemmaError that names the line of one that cannot be read."""
        try:
            return [open_image(path) for path in self.paths]
        except PaliGemmaError as error:
            raise PaliGemmaError(f"{self.where}: {error}") from None

    def pixels(self, size: int, resize: str) -> np.ndarray:
        """Its pictures as pixel values [N, 3, S, S]."""
        return np.concatenate([preprocess(picture, size, resize=resize) for picture in self.pictures()])


class JsonLines:
    """Lines {"image", "prefix", "suffix"} as Scenes gives them, shuffled anew each time round.

    The format of big_vision and Roboflow; pictures are named from the file's own folder, or by a whole path. Where
    "image" is a list, pixel values are [N, 3, S, S]; every line of a file has equally many, so that any may share a
    batch. `augment` names the kinds of views that each turn shows anew (augment.KINDS). Raises PaliGemmaError that
    names the line that is wrong.
    """

    def __init__(self, file, tokenizer, resize: str, seed: int, augment: Sequence[str] = ()):
        self.file, self.tokenizer, self.resize, self.seed = Path(file), tokenizer, resize, seed
        self.kinds = augment
        self.turn, self.order = -1, np.arange(0)  # the order of the turn that was asked for last
        try:
            with opened(self.file) as stream:
                lines = stream.read().decode("utf-8-sig").split("\n")  # splitlines() would cut inside strings
        except (OSError, UnicodeDecodeError) as error:
            raise PaliGemmaError(f"{file}: cannot read it ({error})") from None
        self.warned = False
        self.rows = [self._parse(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.rows:
            raise PaliGemmaError(f"{file}: no examples in it")
        self._check_counts()

    def __getitem__(self, index):
        turn, place = divmod(index, len(self.rows))
        if turn != self.turn:
            self.turn, self.order = turn, np.random.default_rng([self.seed, turn]).permutation(len(self.rows))
        line = self.rows[self.order[place]]
        if self.kinds and len(line.paths) == 1:
            return self._view(line, np.random.default_rng([self.seed, index, 1]))
        pixels = line.pixels(self.tokenizer.config.vision.image_size, self.resize)
        return pixels if len(line.paths) > 1 else pixels[0], line.prompt, line.answer

    def _view(self, line, rng):
        """A line as `__getitem__` gives it, of a random view of its picture."""
        (picture,) = line.pictures()
        vision = self.tokenizer.config.vision
        side = vision.image_size // vision.patch_size
        picture, suffix = view(picture, line.suffix, self.kinds, side, rng)
        pixels = preprocess(picture, vision.image_size, resize=self.resize)[0]
        return pixels, line.prompt, [*self.tokenizer.encode(suffix), self.tokenizer.config.eos]

    def split(self, share: float) -> "tuple[JsonLines, JsonLines]":
        """Two files' worth of lines: to train on, and a share of the pictures to validate on.

        Lines about the same pictures stay together, and which they are depends on the seed alone. Raises
        PaliGemmaError if there are too few pictures for both.
        """
        pictures = list(dict.fromkeys(line.paths for line in self.rows))
        count = max(1, round(share * len(pictures)))
        if count >= len(pictures):
            raise PaliGemmaError(f"{self.file}: {plural(len(pictures), 'picture')}, too few to keep {share:g} of them")
        chosen = np.random.default_rng([self.seed, 1_000_003]).permutation(len(pictures))[:count]
        kept = {pictures[i] for i in chosen}
        train, validation = copy.copy(self), copy.copy(self)
        train.rows = [line for line in self.rows if line.paths not in kept]
        validation.rows = [line for line in self.rows if line.paths in kept]
        validation.kinds = ()
        return train, validation

    def _parse(self, number, line):
        where = f"{self.file}, line {number}"
        try:
            row = json.loads(line)
            image, prefix, suffix = (row[key] for key in ("image", "prefix", "suffix"))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PaliGemmaError(f'{where}: not an object with "image", "prefix" and "suffix"') from None
        images = image if isinstance(image, list) and image else [image]
        if not all(isinstance(value, str) for value in (*images, prefix, suffix)) or not all(images):
            raise PaliGemmaError(f"{where}: image, prefix and suffix must be text; image may be a list of several")
        if not self.warned and (warning := prompt_warning(prefix)):
            note(f"{where}: warning: {warning} (said once)")
            self.warned = True
        paths = [self.file.parent / image for image in images]
        for path in paths:
            if not os.path.isfile(path):  # which takes a name that no file can have, such as a picture's data itself
                raise PaliGemmaError(f"{where}: no such picture {str(path)[:200]}")
        try:
            prompt = self.tokenizer.prompt(prefix, len(paths))
            answer = [*self.tokenizer.encode(suffix), self.tokenizer.config.eos]
        except PaliGemmaError as error:
            raise PaliGemmaError(f"{where}: {error}") from None
        longest = self.tokenizer.config.max_length
        if len(prompt) + len(answer) > longest:
            raise PaliGemmaError(
                f"{where}: {plural(len(prompt) + len(answer), 'token')}, the model has room for {longest}"
            )
        return Line(where, tuple(paths), prefix, suffix, prompt, answer)

    def _check_counts(self):
        """Raise PaliGemmaError that names the first line with more or fewer pictures than the first has."""
        first = self.rows[0]
        for line in self.rows:
            if len(line.paths) != len(first.paths):
                expected = f"{first.where.rpartition(', ')[2]} has {len(first.paths)}"
                raise PaliGemmaError(
                    f"{line.where}: {plural(len(line.paths), 'picture')}, but {expected}; "
                    "train on lines of equally many"
                )


def collate(examples: Sequence[tuple[np.ndarray, list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded rows. `weights` is 1 / (loss tokens of the row) where a token is predicted, else 0.

    Pixel values are [3, S, S] in each example, or [N, 3, S, S] in each -> [B, 3, S, S], or [B*N, 3, S, S].
    """
    pixels = np.stack([pixels for pixels, _, _ in examples])
    size = max(len(prompt) + len(suffix) for _, prompt, suffix in examples)
    ids = np.full((len(examples), size), pad, np.int64)
    weights = np.zeros((len(examples), size), np.float32)
    for row, weight, (_, prompt, suffix) in zip(ids, weights, examples, strict=True):
        row[: len(prompt) + len(suffix)] = [*prompt, *suffix]
        weight[len(prompt) : len(prompt) + len(suffix)] = 1 / len(suffix)
    return {
        "pixel_values": torch.from_numpy(pixels.reshape(-1, *pixels.shape[-3:])),
        "input_ids": torch.from_numpy(ids),
        "lengths": torch.tensor([len(prompt) + len(suffix) for _, prompt, suffix in examples]),
        "prefix_lengths": torch.tensor([len(prompt) for _, prompt, _ in examples]),
        "weights": torch.from_numpy(weights),
    }


def collate_pairs(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Pictures and captions, stacked."""
    pixels, ids = zip(*examples, strict=True)
    return {"pixel_values": torch.from_numpy(np.stack(pixels)), "ids": torch.from_numpy(np.stack(ids))}
