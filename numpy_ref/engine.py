"""What answers: the contract of every engine, and the reference as one.

`generate` drives any engine; the others are `torch_impl.load.ModuleEngine` and the sessions of `export.session`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .checkpoint import Checkpoint, flatten
from .checkpoint.adapter import in_memory
from .checkpoint.blocks import all_finite, check_finite
from .config import PaliGemmaConfig
from .errors import PaliGemmaError, plural
from .image import preprocess
from .model import paligemma, segmentation
from .model.layers import Pair
from .model.sampling import Sampling, likeliest, location_spread, log_probability, sample

if TYPE_CHECKING:
    from PIL import Image

#: What overflows in the reference is found in its logits; NumPy's own warnings would come beside it.
_quietly = np.errstate(over="ignore", invalid="ignore")

#: Mask codes [B, 16] -> [B, 64, 64], positive inside.
MaskDecoder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Features:
    """What `Engine.encode` made of one picture: `Engine.prefill` takes it in place of the pixels, as often as wanted.

    `pixel_values` [3, S, S] is the picture. `value` [P, D] is the engine's own, and lies where it likes; None where an
    engine cannot take a picture without its prompt.
    """

    pixel_values: np.ndarray
    value: Any = None


#: Of a batch, the N pictures of each row behind each other: pixel values [B*N, 3, S, S], or B*N features.
Pictures = np.ndarray | Sequence[Features]


def pixels_of(pictures: Pictures) -> np.ndarray:
    """Pixel values [B*N, 3, S, S] of pictures that may be there as features."""
    return pictures if isinstance(pictures, np.ndarray) else np.stack([each.pixel_values for each in pictures])


class Engine(ABC):
    """A model with its weights: `encode`, `prefill`, `decode` and `extend`, and what else a caller must know.

    `resize` is how its pictures are resized, one of `image.RESIZES`; `masks` decodes mask codes and is None where no
    mask codec came with the weights; `max_length` is how many positions it has for a prompt and its answer. The cache
    is the engine's own affair: a caller hands back the one that it was given.
    """

    name: ClassVar[str]
    extends_at_once: bool = False  # whether `extend` is quicker than as many decodes

    def __init__(
        self,
        config: PaliGemmaConfig,
        resize: str = "bicubic",
        masks: MaskDecoder | None = None,
        max_length: int | None = None,
    ):
        self.config, self.resize, self.masks = config, resize, masks
        self.max_length = max_length or config.max_length

    def encode(self, pixel_values: np.ndarray) -> list[Features]:
        """Run pictures through the vision tower alone: pixel_values [M, 3, S, S] -> features of each."""
        return [Features(each) for each in pixel_values]

    @abstractmethod
    def prefill(self, pictures: Pictures, input_ids: np.ndarray, lengths: np.ndarray, capacity: int) -> tuple[Any, Any]:
        """Read the prompts; input_ids [B, T], lengths [B] -> logits [B, V] and a cache.

        `pictures` are pixel values [B*N, 3, S, S], or what `encode` gave for as many pictures, in any order and any of
        them several times. A row has N pictures, which follow each other. `capacity` is for how many positions a row
        the cache has slots.
        The logits are those of each row's last token. Raises PaliGemmaError if the prompts take more slots than that,
        or do not go with the pictures.
        """

    @abstractmethod
    def decode(self, input_ids: np.ndarray, lengths: np.ndarray, cache: Any) -> tuple[Any, Any]:
        """One more token a row: input_ids [B, 1] at position lengths [B] -> logits [B, V] and the cache.

        Raises PaliGemmaError if the cache is full.
        """

    def extend(self, input_ids: np.ndarray, lengths: np.ndarray, cache: Any) -> tuple[Any, Any]:
        """Several known tokens a row: input_ids [B, T] from position lengths [B] on -> logits [B, T, V] and the cache.

        What is written behind the tokens that turn out to be right is overwritten by those that come in their place.
        An engine that has nothing quicker decodes them one by one. Raises PaliGemmaError if the cache is too small.
        """
        steps = []
        for i in range(input_ids.shape[1]):
            logits, cache = self.decode(input_ids[:, i : i + 1], (lengths + i).astype(lengths.dtype), cache)
            steps.append(np.array(logits))
        return np.stack(steps, 1), cache

    @abstractmethod
    def reorder(self, cache: Any, rows: np.ndarray) -> Any:
        """A cache whose row r is what row rows[r] was: rows int64 [R], in any order, some often and others never.

        The cache that it was made from must not be used any more.
        """

    def repeat(self, logits: Any, cache: Any, copies: int) -> tuple[Any, Any]:
        """Each row so many times in a row: logits [B, V] and their cache -> logits [B*copies, V] and a cache."""
        return logits.repeat(copies, 0), self.reorder(cache, np.arange(len(logits)).repeat(copies))

    def preprocess(self, image: "Image.Image") -> np.ndarray:
        """A Pillow image of any size -> pixel values [1, 3, S, S]."""
        return preprocess(image, self.config.vision.image_size, resize=self.resize)

    def draw(
        self, logits: Any, known: np.ndarray, sampling: Sampling, uniform: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw a token a row as `sampling.sample` does: logits [B, V], known [V], uniform [B] -> int64 [B].

        Beside it the token's log-probability, float32 [B], as `sampling.log_probability` has it; None where an engine
        cannot say. Logits [B, T, V] are those of B * T rows, as `extend` gives them. With known [B, V] each row has ids
        of its own that may be drawn, fewer than the tokenizer's.
        """
        logits = logits.reshape(-1, logits.shape[-1])
        token = sample(logits, known, sampling.temperature, sampling.top_k, sampling.top_p, uniform)
        return token, log_probability(logits, token)

    def log_probability(self, logits: Any, token: np.ndarray) -> np.ndarray:
        """The log-probability of given tokens: logits as for `draw`, token [B] -> float32 [B]."""
        return log_probability(logits.reshape(-1, logits.shape[-1]), token)

    def sample(
        self, logits: Any, known: np.ndarray, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        uniform: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The tokens alone of `draw`, by the arguments of `sampling.sample`: int64 [B]."""
        return self.draw(logits, known, Sampling(temperature, top_k, top_p), uniform)[0]

    def likeliest(
        self, logits: Any, among: np.ndarray, count: int, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `sampling.likeliest`, of logits [B, V]: ids [B, count], their log-probabilities, and those of the ends."""
        return likeliest(logits, among, count, ends)

    def location_spread(self, logits: Any, locations: np.ndarray) -> np.ndarray:
        """As `sampling.location_spread`: logits as for `draw`, ids of the location tokens [L] -> float32 [B]."""
        return location_spread(logits.reshape(-1, logits.shape[-1]), locations)

    def first_not_finite(
        self, pixel_values: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray, prefix_lengths: np.ndarray
    ) -> str | None:
        """The first tap of one pass over prompts and answers that is not finite; None if all are, or without taps."""
        return None


class FirstNotFinite:
    """A tap that keeps the first name that comes with a NaN or an infinity."""

    def __init__(self, finite=all_finite):
        self.finite, self.name = finite, None

    def __call__(self, name, value):
        if self.name is None and not self.finite(value):
            self.name = name
        return value


def check_room(needed: int, capacity: int) -> None:
    """Raise PaliGemmaError unless a cache of `capacity` slots holds `needed` positions."""
    if needed > capacity:
        raise PaliGemmaError(f"a cache of {plural(capacity, 'slot')} is too small for {plural(needed, 'position')}")


def pictures_per_prompt(config: PaliGemmaConfig, images: Pictures, input_ids: np.ndarray) -> int:
    """How many pictures each prompt has: B*N pictures, input_ids [B, T] -> N.

    Raises PaliGemmaError if they cannot have equally many, or if the ids have places for another number of pictures.
    Places that are held by other ids than the image token are taken as they are.
    """
    pictures, prompts = len(images), len(input_ids)
    if not pictures or pictures % prompts:
        given = f"{plural(pictures, 'picture')} for {plural(prompts, 'prompt')}"
        raise PaliGemmaError(f"{given}: every prompt of a batch needs equally many, at least one")
    needed = pictures // prompts * config.vision.patches
    held = np.cumprod(input_ids == config.image_token, axis=1).sum(1)  # image tokens that a row begins with
    odd = np.flatnonzero((held != needed) & (held != 0) | (input_ids.shape[1] < needed))
    if odd.size:
        found = f"a prompt begins with {plural(held[odd[0]], 'image token')}"
        raise PaliGemmaError(f"{found}, but {plural(pictures // prompts, 'picture')} a prompt take {needed}")
    return pictures // prompts


class NumpyEngine(Engine):
    """The reference as an engine. Raises PaliGemmaError that names a weight with a NaN or an infinity."""

    name = "numpy"
    extends_at_once = True

    def __init__(self, checkpoint: Checkpoint):
        self.params = in_memory(checkpoint.params)
        for path, array in flatten(self.params).items():
            check_finite(path, array)
        super().__init__(checkpoint.config, checkpoint.resize, segmentation.decoder_of(checkpoint))

    @_quietly
    def encode(self, pixel_values: np.ndarray) -> list[Features]:
        values = paligemma.encode_image(self.params, self.config, pixel_values)
        return list(map(Features, pixel_values, values))

    @_quietly
    def prefill(
        self, pictures: Pictures, input_ids: np.ndarray, lengths: np.ndarray, capacity: int
    ) -> tuple[np.ndarray, list[Pair]]:
        check_room(input_ids.shape[1], capacity)
        pictures_per_prompt(self.config, pictures, input_ids)
        images = pictures if isinstance(pictures, np.ndarray) else np.stack([each.value for each in pictures])
        return paligemma.prefill(self.params, self.config, images, input_ids, lengths, capacity)

    @_quietly
    def decode(self, input_ids: np.ndarray, lengths: np.ndarray, cache: list[Pair]) -> tuple[np.ndarray, list[Pair]]:
        check_room(lengths.max() + 1, cache[0][0].shape[2])
        return paligemma.decode(self.params, self.config, input_ids, lengths, cache)

    def reorder(self, cache: list[Pair], rows: np.ndarray) -> list[Pair]:
        return [(key[rows], value[rows]) for key, value in cache]

    @_quietly
    def extend(self, input_ids: np.ndarray, lengths: np.ndarray, cache: list[Pair]) -> tuple[np.ndarray, list[Pair]]:
        check_room(lengths.max() + input_ids.shape[1], cache[0][0].shape[2])
        return paligemma.extend(self.params, self.config, input_ids, lengths, cache)

    @_quietly
    def first_not_finite(
        self, pixel_values: np.ndarray, input_ids: np.ndarray, lengths: np.ndarray, prefix_lengths: np.ndarray
    ) -> str | None:
        tap = FirstNotFinite()
        paligemma.forward(self.params, self.config, pixel_values, input_ids, lengths, prefix_lengths, tap)
        return tap.name
