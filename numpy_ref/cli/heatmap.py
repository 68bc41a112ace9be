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
WORDS, LEGEND = 28, 38  # pixels of a line of words, and of the legend below all tiles
DARKER = 5  # how many times darker a patch is that was not looked at
GREY = "#6b6964"


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
    """A tile a token: the picture, lit where the token looked, the token below, and what was the brightest of it.

    The legend below says what light means: each tile's own scale, from nothing to its brightest patch.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, small, columns = ImageFont.load_default(size=18), ImageFont.load_default(size=13), min(COLUMNS, len(words))
    rows = -(-len(words) // columns)
    step = TILE + GAP
    canvas = Image.new("RGB", (columns * step - GAP, rows * (step + WORDS) + LEGEND), "white")
    pen, picture = ImageDraw.Draw(canvas), image.convert("RGB").resize((TILE, TILE))
    for i, (heat, word) in enumerate(zip(maps, words, strict=True)):
        left, top = (i % columns) * step, (i // columns) * (step + WORDS)
        light = Image.fromarray((255 * heat / heat.max()).astype(np.uint8)).resize(
            (TILE, TILE), Image.Resampling.BICUBIC
        )
        canvas.paste(Image.composite(picture, picture.point(lambda value: value // DARKER), light), (left, top))
        pen.text((left + 4, top + TILE + 2), word, fill="black", font=font)
        share = f"{heat.max():.1%}"
        pen.text((left + TILE - 4 - pen.textlength(share, small), top + TILE + 6), share, fill=GREY, font=small)
    _legend(canvas, pen, rows * (step + WORDS), small)
    return canvas


def _legend(canvas, pen, top, font) -> None:
    """A bar from dark to light, and what its ends stand for."""
    width = TILE // 2
    for x in range(width):
        shade = round(255 * (1 / DARKER + (1 - 1 / DARKER) * x / width))
        pen.line([4 + x, top + 3, 4 + x, top + 15], fill=(shade, shade, shade))
    pen.rectangle([3, top + 2, 4 + width, top + 16], outline=GREY)
    text = "dark: not looked at; bright: the patch looked at most, with its share of all attention"
    first, rest = (text, "") if pen.textlength(text, font) < canvas.width - width - 20 else text.split("; ")
    pen.text((width + 14, top + 1), first, fill="black", font=font)
    pen.text((width + 14, top + 18), rest, fill="black", font=font)
