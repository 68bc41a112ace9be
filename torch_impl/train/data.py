"""Examples to learn from: questions about drawn scenes, or the lines of a JSONL file.

Each is a map from a number to an example, the same for the same seed; there is one for every number.
"""

import json
from pathlib import Path

import numpy as np
import torch

from numpy_ref import scenes
from numpy_ref.errors import PaliGemmaError, note, plural
from numpy_ref.files import opened
from numpy_ref.image import open_image, preprocess
from numpy_ref.scenes import questions
from numpy_ref.tokenizer import prompt_warning

from ..model import segmentation


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
        pixels, suffix = preprocess(scenes.draw(question.scene, self.size), self.size)[0], question.suffix
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
        ids = self.tokenizer.encode(questions.caption(scene))[: self.length]
        row = np.full(self.length, self.tokenizer.config.pad, np.int64)
        row[: len(ids)] = ids
        return preprocess(scenes.draw(scene, self.size), self.size)[0], row


class JsonLines:
    """Lines {"image", "prefix", "suffix"} as Scenes gives them, shuffled anew each time round.

    The format of big_vision and Roboflow; pictures are named from the file's own folder, or by a whole path. Raises
    PaliGemmaError that names the line that is wrong.
    """

    def __init__(self, file, tokenizer, resize: str, seed: int):
        self.file, self.tokenizer, self.resize, self.seed = Path(file), tokenizer, resize, seed
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

    def __getitem__(self, index):
        turn, place = divmod(index, len(self.rows))
        if turn != self.turn:
            self.turn, self.order = turn, np.random.default_rng([self.seed, turn]).permutation(len(self.rows))
        where, path, prompt, suffix = self.rows[self.order[place]]
        try:
            picture = open_image(path)
        except PaliGemmaError as error:
            raise PaliGemmaError(f"{where}: {error}") from None
        return preprocess(picture, self.tokenizer.config.vision.image_size, resize=self.resize)[0], prompt, suffix

    def _parse(self, number, line):
        where = f"{self.file}, line {number}"
        try:
            row = json.loads(line)
            image, prefix, suffix = (row[key] for key in ("image", "prefix", "suffix"))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PaliGemmaError(f'{where}: not an object with "image", "prefix" and "suffix"') from None
        if not all(isinstance(value, str) for value in (image, prefix, suffix)) or not image:
            raise PaliGemmaError(f"{where}: image, prefix and suffix must be text")
        if not self.warned and (warning := prompt_warning(prefix)):
            note(f"{where}: warning: {warning} (said once)")
            self.warned = True
        path = self.file.parent / image
        try:
            found = path.is_file()
        except OSError:  # a name that no file can have, such as a picture's data itself
            found = False
        if not found:
            raise PaliGemmaError(f"{where}: no such picture {str(path)[:200]}")
        try:
            prompt, answer = self.tokenizer.prompt(prefix), [*self.tokenizer.encode(suffix), self.tokenizer.config.eos]
        except PaliGemmaError as error:
            raise PaliGemmaError(f"{where}: {error}") from None
        longest = self.tokenizer.config.max_length
        if len(prompt) + len(answer) > longest:
            raise PaliGemmaError(
                f"{where}: {plural(len(prompt) + len(answer), 'token')}, the model has room for {longest}"
            )
        return where, path, prompt, answer


def collate(examples, pad: int) -> dict[str, torch.Tensor]:
    """Right-padded rows. `weights` is 1 / (loss tokens of the row) where a token is predicted, else 0."""
    size = max(len(prompt) + len(suffix) for _, prompt, suffix in examples)
    ids = np.full((len(examples), size), pad, np.int64)
    weights = np.zeros((len(examples), size), np.float32)
    for row, weight, (_, prompt, suffix) in zip(ids, weights, examples, strict=True):
        row[: len(prompt) + len(suffix)] = [*prompt, *suffix]
        weight[len(prompt) : len(prompt) + len(suffix)] = 1 / len(suffix)
    return {
        "pixel_values": torch.from_numpy(np.stack([pixels for pixels, _, _ in examples])),
        "input_ids": torch.from_numpy(ids),
        "lengths": torch.tensor([len(prompt) + len(suffix) for _, prompt, suffix in examples]),
        "prefix_lengths": torch.tensor([len(prompt) for _, prompt, _ in examples]),
        "weights": torch.from_numpy(weights),
    }


def collate_pairs(examples) -> dict[str, torch.Tensor]:
    """Pictures and captions, stacked."""
    pixels, ids = zip(*examples, strict=True)
    return {"pixel_values": torch.from_numpy(np.stack(pixels)), "ids": torch.from_numpy(np.stack(ids))}
