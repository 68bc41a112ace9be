"""Masks <-> sixteen segmentation tokens: the VQ-VAE of big_vision's `proj/paligemma/segmentation.py`.

A mask is seen inside its box, as [64, 64] values in [-1, 1]. The encoder makes 4 x 4 vectors of it, each is replaced
by the nearest of 128 code words, whose numbers are the tokens `<seg000>` … `<seg127>`; the decoder paints the mask
back. The weights are those of a file with the official names (`vae-oid.npz`); any channel counts will do.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..checkpoint import Checkpoint
from ..checkpoint.npz import map_npz
from ..checkpoint.tree import unflatten
from ..errors import PaliGemmaError
from ..files import within
from .layers import Array, Params, conv, conv_transpose, relu

#: The file beside a checkpoint's weights; big_vision's own is called by the second name.
FILES = ("vae.npz", "vae-oid.npz")
SIDE, CELLS, CODES = 64, 4, 128
_STAGES = 4  # each halves, or doubles, the side: 64 = 4 * 2 ** 4
_NET = ("conv_0", "conv_1", "conv_2")


def res_block(p: Params, x: Array) -> Array:
    """x + conv1(relu(conv3(relu(conv3(x))))): x [B, C, h, w] -> [B, C, h, w]."""
    hidden = relu(conv(x, **p["conv_0"], padding=1))
    hidden = relu(conv(hidden, **p["conv_1"], padding=1))
    return x + conv(hidden, **p["conv_2"])


def encoder(p: Params, masks: Array) -> Array:
    """Masks to vectors: masks [B, 64, 64] in [-1, 1] -> [B, 4, 4, E]."""
    x = masks[:, None]
    for stage in p["down"]:
        x = relu(conv(x, **stage, stride=2, padding=1))
    for block in p["res"]:
        x = res_block(block, x)
    return conv(x, **p["output"]).transpose(0, 2, 3, 1)


def decoder(p: Params, words: Array) -> Array:
    """Code words to masks: words [B, 4, 4, E] -> [B, 64, 64], positive inside."""
    x = relu(conv(words.transpose(0, 3, 1, 2), **p["input"]))
    for block in p["res"]:
        x = res_block(block, x)
    for stage in p["up"]:
        x = relu(conv_transpose(x, **stage, stride=2, padding=1))
    return conv(x, **p["output"])[:, 0]


def quantize(vectors: Array, codebook: Array) -> Array:
    """The number of the nearest code word: vectors [..., E], codebook [128, E] -> int64 [...]."""
    # |v - c|^2 without |v|^2, which is the same for every c.
    return ((codebook * codebook).sum(-1) - 2 * vectors @ codebook.T).argmin(-1)


def encode(p: Params, masks: Array) -> Array:
    """Masks to tokens: masks [B, 64, 64] in [-1, 1] -> [B, 16] in 0 … 127."""
    return quantize(encoder(p["encoder"], masks), p["codebook"]).reshape(len(masks), -1)


def decode(p: Params, codes: Array) -> Array:
    """Tokens to masks: codes [B, 16] in 0 … 127 -> [B, 64, 64]."""
    return decoder(p["decoder"], p["codebook"][codes].reshape(len(codes), CELLS, CELLS, -1))


# --- masks in a picture ------------------------------------------------------------------------------------


def crop(mask: Array, box: Sequence[float]) -> Array:
    """What the encoder sees of a picture's mask: mask [height, width] bool, box in fractions -> [64, 64] in [-1, 1].

    Corners are rounded to whole pixels, the half to the even one, and what lies between is resized in floating point
    with the antialiased bilinear filter, as big_vision makes its training data (`pp/proj/paligemma/segmentation.py`).
    A box that this leaves without a pixel is given one, where big_vision fails.
    """
    from PIL import Image

    height, width = mask.shape
    left, top = np.clip([round(box[0] * width), round(box[1] * height)], 0, [width - 1, height - 1])
    right, bottom = max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)
    picture = Image.fromarray(mask[top:bottom, left:right].astype(np.float32))
    return 2 * np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) - 1


def paste(mask: Array, box: Sequence[float], width: int, height: int) -> Array:
    """A decoded mask in its place: mask [64, 64], box in pixels (x1, y1, x2, y2) -> bool [height, width].

    Corners are cut off to whole pixels, the mask is resized bilinearly to what lies between and cut at zero, as
    big_vision's evaluator does (`evaluators/proj/paligemma/transfers/segmentation.py`). A box without a whole pixel,
    a flat or an inverted one, has an empty mask; there it counts as an overlap of zero.
    """
    from PIL import Image

    x1, y1, x2, y2 = (int(value) for value in box)
    if x2 <= x1 or y2 <= y1:
        return np.zeros((height, width), bool)
    resized = np.asarray(Image.fromarray(mask.astype(np.float32)).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR))
    canvas = np.zeros((height, width), bool)
    top, bottom, left, right = max(y1, 0), min(y2, height), max(x1, 0), min(x2, width)
    if top < bottom and left < right:  # what lies past the picture's edge is cut
        canvas[top:bottom, left:right] = resized[top - y1 : bottom - y1, left - x1 : right - x1] > 0
    return canvas


def spell(codes: Iterable[int]) -> str:
    """Sixteen numbers as tokens."""
    return "".join(f"<seg{code:03d}>" for code in codes)


def run_lengths(mask: Array) -> list[int]:
    """COCO's uncompressed run lengths: how many 0, then 1, then 0 … follow one another, column by column."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *edges.tolist(), mask.size]).tolist()


# --- files -------------------------------------------------------------------------------------------------


def names() -> dict[str, str]:
    """The path of each weight here -> its name in `vae-oid.npz`, which numbers the layers of a torch Sequential."""
    table = {"codebook": "_vq_vae._embedding"}
    for part, numbers in {
        "decoder": {"input": 0, "res.0": 2, "res.1": 3, **{f"up.{i}": 4 + 2 * i for i in range(_STAGES)}, "output": 12},
        "encoder": {**{f"down.{i}": 2 * i for i in range(_STAGES)}, "res.0": 8, "res.1": 9, "output": 10},
    }.items():
        for path, number in numbers.items():
            layers = (
                {f".{name}": f".net.{2 * i}" for i, name in enumerate(_NET)} if path.startswith("res") else {"": ""}
            )
            for ours, theirs in layers.items():
                for kind, foreign in (("kernel", "weight"), ("bias", "bias")):
                    table[f"{part}.{path}{ours}.{kind}"] = f"{part}.{number}{theirs}.{foreign}"
    return table


def load(file: str | Path) -> Params:
    """The weights of a `vae-oid.npz`, as a nested dict. Raises PaliGemmaError that names what is wrong."""
    file = Path(file)
    if not file.is_file():
        raise PaliGemmaError(f"{file}: no such file of mask weights")
    stored, table = map_npz(file), names()
    if missing := [name for name in table.values() if name not in stored]:
        raise PaliGemmaError(f"{file}: not the weights of a mask codec: missing {', '.join(sorted(missing))}")
    params = unflatten({path: stored[name] for path, name in table.items()})
    _check(file, params)
    return params


def find(folder: str | Path) -> Path | None:
    """The file of mask weights beside a checkpoint, None where there is none."""
    return next((file for name in FILES if (file := within(folder, name)).is_file()), None)


def decoder_of(checkpoint: Checkpoint) -> Callable[[Array], Array] | None:
    """`decode` with the weights beside a checkpoint, None where there are none."""
    file = find(checkpoint.folder)
    return partial(decode, load(file)) if file else None


def _check(file, params) -> None:
    """Run it once: shapes that do not fit each other, or do not make 64 x 64 masks, are the file's fault."""
    try:
        if len(params["codebook"]) != CODES:
            raise ValueError(f"{len(params['codebook'])} code words, not {CODES}")
        masks = decode(params, np.arange(CELLS * CELLS)[None])
        if masks.shape != (1, SIDE, SIDE) or not np.isfinite(masks).all():
            raise ValueError(f"it decodes to {list(masks.shape)}, not to finite values [1, {SIDE}, {SIDE}]")
        if encode(params, masks).shape != (1, CELLS * CELLS):
            raise ValueError("its encoder does not give 16 vectors")
    except (ValueError, IndexError) as error:
        raise PaliGemmaError(f"{file}: not the weights of a mask codec ({error})") from None
