"""What each token of an answer looked at: attention over the picture's patches, drawn over the picture.

The weights are read off the reference's taps, averaged over layers and heads. They say where information was fetched
from, not what was made of it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..config import PaliGemmaConfig
from ..model import paligemma
from ..model.layers import Params

if TYPE_CHECKING:
    from PIL import Image

TILE, COLUMNS, GAP = 192, 6, 8


def attention_over_picture(
    params: Params, config: PaliGemmaConfig, pixel_values: np.ndarray, prompt: Sequence[int], answer: Sequence[int]
) -> np.ndarray:
    """One map a token of the answer: pixel_values [1, 3, S, S], ids of prompt and answer -> [A, side, side].

    Position t predicts the token at t + 1, so the map of a token is the attention of the position before it. Each sums
    to the share of attention that the picture got, beside the text.
    """
    ids, maps = np.array([[*prompt, *answer]]), []
    rows = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))

    def tap(name, value):
        if name.startswith("text.blocks.") and name.endswith("attention.weights"):
            maps.append(value[0, :, rows, : config.vision.patches].mean(0))
        return value

    lengths, prefix = np.array([ids.shape[1]]), np.array([len(prompt)])
    paligemma.hidden_states(params, config, pixel_values, ids, lengths, prefix, tap)
    side = config.vision.image_size // config.vision.patch_size
    return np.mean(maps, axis=0).reshape(len(answer), side, side)


def draw(image: "Image.Image", maps: np.ndarray, words: Sequence[str]) -> "Image.Image":
    """A tile a token: the picture, lit where the token looked, and the token below."""
    from PIL import Image, ImageDraw, ImageFont

    font, columns = ImageFont.load_default(size=18), min(COLUMNS, len(words))
    rows = -(-len(words) // columns)
    step = TILE + GAP
    canvas = Image.new("RGB", (columns * step - GAP, rows * (step + 28) - GAP), "white")
    pen, picture = ImageDraw.Draw(canvas), image.convert("RGB").resize((TILE, TILE))
    for i, (heat, word) in enumerate(zip(maps, words, strict=True)):
        left, top = (i % columns) * step, (i // columns) * (step + 28)
        light = Image.fromarray((255 * heat / heat.max()).astype(np.uint8)).resize(
            (TILE, TILE), Image.Resampling.BICUBIC
        )
        canvas.paste(Image.composite(picture, picture.point(lambda value: value // 5), light), (left, top))
        pen.text((left + 4, top + TILE + 2), word, fill="black", font=font)
    return canvas
