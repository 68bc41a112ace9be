"""Boxes and mask codes in an answer, and drawing them.

`detect` answers with four location tokens and a label for each object, objects separated by " ; ":
<locYMIN><locXMIN><locYMAX><locXMAX> label. `segment` puts sixteen <seg...> codes between box and label.

How an answer is read, here and in `export/hosts/common/detection.mjs` (`tests/detections.json` has the cases):

- Four location tokens in a row are a box, whatever their values: none is left out. A flat box has x1 == x2 or
  y1 == y2, an inverted one x1 > x2 or y1 > y2; they have no area, and an empty mask.
- Sixteen codes or more right behind a box are its mask, by the first sixteen; fewer are none.
- Location tokens and codes that are left over behind a box are skipped.
- The label is what follows, of any characters, up to " ; ", the next location token or code, or the end. Of two boxes
  in a row the first has an empty label.

A box has a score where the log-probabilities of the answer's tokens are given: exp of the mean over its four location
tokens and those of its label. Its mask has one of its own, from its sixteen codes. A token belongs to the part of the
text that it begins in. The mean, and not the sum: so a label of three tokens does not make a box less sure than one of
a single token, and sixteen codes do not come out near zero. A score is in (0, 1]; it is how sure the model is of a
token of the box, not a calibrated probability that the box is right.

Where the spread of the distribution over location tokens is given (`sampling.location_spread`), a box has an
uncertainty as well: the standard deviation of each side in pixels, spread / steps x width or height of the picture. It
is large where the model hesitates between two things far apart: then it says that another may be meant.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

#: How a location token is turned back into a fraction of the side. big_vision's evaluators divide by 1023,
#: which inverts its encoder; the Hugging Face demo and many tools divide by 1024. The difference is 0.1 %.
CONVENTIONS = {"big_vision": 1023, "huggingface": 1024}
CODES = 16  # of a mask

# Tokens that there are, `<loc0000>` to `<loc1023>` and `<seg000>` to `<seg127>`; `<loc1024>` is text. Blanks and
# digits are spelled out because Python and JavaScript differ in what \s and \d take in.
_LOCATION = "<loc(?:0[0-9]{3}|10[01][0-9]|102[0-3])>"
_CODE = "<seg(?:0[0-9]{2}|1[01][0-9]|12[0-7])>"
_BLANK = "[ \t-\r]"
_WORD = re.compile("[^ \t-\r]+")
_BOX = f"(?:{_LOCATION}){{4}}"
_OBJECT = re.compile(f"({_BOX}){_BLANK}*((?:{_CODE})*)(?:{_BLANK}*(?!{_BOX})(?:{_LOCATION}|{_CODE}))*")
_LABEL_END = re.compile(rf"{_BLANK};(?={_BLANK}|\Z)|;(?={_BLANK}*{_LOCATION})|{_LOCATION}|{_CODE}")


@dataclass(frozen=True)
class Box:
    """An object found: its label, its corners in pixels of the picture, its 16 mask codes if any.

    `score`, and that of its mask if it has one, are None where the tokens' log-probabilities are not known, and
    `uncertainty`, of x1, y1, x2 and y2 in pixels, where the spreads are not.
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    codes: tuple[int, ...] = ()
    score: float | None = None
    mask_score: float | None = None
    uncertainty: tuple[float, float, float, float] | None = None

    @property
    def corners(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2

    def as_json(self) -> dict:
        """As plain values, without what it does not have."""
        return {name: value for name, value in asdict(self).items() if value not in ((), None)}


def parse(
    text: str,
    width: int,
    height: int,
    convention: str = "big_vision",
    logprobs: Sequence[tuple[int, float]] = (),
    spreads: Mapping[int, float] | None = None,
) -> list[Box]:
    """The boxes of an answer, in pixels of a width x height picture; every four location tokens are one.

    They have scores if `logprobs` are given: where in the text each of its tokens begins, and its log-probability; and
    uncertainties if `spreads` are: {where a location token begins: the spread of its distribution, in location tokens}.
    """
    steps = CONVENTIONS[convention]
    boxes = []
    for match in _OBJECT.finditer(text):
        y1, x1, y2, x2 = (int(number) / steps for number in re.findall("[0-9]+", match[1]))
        places = range(match.start(), match.start() + len(match[1]), len("<loc0000>"))  # where its four tokens begin
        codes = [int(number) for number in re.findall("[0-9]+", match[2])][:CODES]
        end = _LABEL_END.search(text, match.end())
        # With the blank before it, which belongs to the token of its first word.
        label = match.start() + len(match[0].rstrip()), end.start() if end else len(text)
        words = _WORD.findall(text[slice(*label)])
        has_mask = len(codes) == CODES
        mask = match.start(2), match.start(2) + CODES * len("<seg000>")
        boxes.append(
            Box(
                " ".join(words),
                x1 * width,
                y1 * height,
                x2 * width,
                y2 * height,
                tuple(codes) if has_mask else (),
                score(logprobs, match.span(1), *([label] if words else [])),
                score(logprobs, mask) if has_mask else None,
                uncertainty([(spreads or {}).get(place) for place in places], width / steps, height / steps),
            )
        )
    return boxes


def score(logprobs: Sequence[tuple[int, float]], *spans: tuple[int, int]) -> float | None:
    """exp of the mean log-probability of the tokens that begin inside of the spans; None without any.

    `logprobs` are as `parse` takes them.
    """
    found = [logprob for begin, logprob in logprobs if any(first <= begin < end for first, end in spans)]
    return math.exp(math.fsum(found) / len(found)) if found else None


def uncertainty(
    spreads: Sequence[float | None], across: float, down: float
) -> tuple[float, float, float, float] | None:
    """Spreads of a box's location tokens as they stand in the text -> pixels, of x1, y1, x2, y2.

    `across` and `down` are the pixels of one location. None unless all four are known.
    """
    y1, x1, y2, x2 = (math.nan if spread is None else spread for spread in spreads)
    found = x1 * across, y1 * down, x2 * across, y2 * down
    return None if any(map(math.isnan, found)) else found


def encode(x1: float, y1: float, x2: float, y2: float) -> str:
    """A box in fractions of the sides -> its four location tokens (big_vision `segmentation.py`)."""
    return "".join(f"<loc{min(max(round(value * 1023), 0), 1023):04d}>" for value in (y1, x1, y2, x2))


def intersection_over_union(a: Box, b: Box) -> float:
    """Area of overlap over area of union, in [0, 1]."""
    across = max(0.0, min(a.x2, b.x2) - max(a.x1, b.x1))
    down = max(0.0, min(a.y2, b.y2) - max(a.y1, b.y1))
    areas = [max(0.0, box.x2 - box.x1) * max(0.0, box.y2 - box.y1) for box in (a, b)]
    union = sum(areas) - across * down
    return across * down / union if union else 0.0


LEAST_WIDTH, TALLEST = 448, 2048  # pixels of a drawing that was enlarged
#: Bright, so that they show on dark grounds; on light ones their dark edges do. No color twice in six boxes.
COLORS = ("#ff4fa3", "#38d9f5", "#ffd43b", "#b197fc", "#69db7c", "#ff922b")
EDGE, LINE = "#16171a", 3
HATCH, HATCHED = 12, 0.55  # pixels from one line of a mask's hatching to the next, and how strong the lines are
GREY, RIGHT, WRONG = "#6b6964", "#1a7f37", "#c01c28"
ROW = 24  # pixels of a line of text


def zoom_of(width: int, height: int) -> int:
    """How often a picture is enlarged to be drawn on: to LEAST_WIDTH, but not beyond TALLEST."""
    return max(1, min(-(-LEAST_WIDTH // width), TALLEST // height))


def draw(
    image: "Image.Image",
    boxes: list[Box],
    prompt: str = "",
    answer: str = "",
    masks: Sequence[np.ndarray | None] = (),
    right: bool | None = None,
    wanted: str = "",
) -> "Image.Image":
    """A copy of the picture with masks, boxes and labels; below it the prompt, and under that the answer.

    It is enlarged as `zoom_of` says, on white where that leaves it narrower than LEAST_WIDTH. `masks` are bool
    [height, width] of the picture's size, one a box or None where a box has none: they get a contour and thin lines, so
    that what is below keeps its colors. Where it is known if the answer is `right`, a tick or a cross says so, and
    after a cross what was `wanted`.
    """
    from PIL import Image, ImageDraw, ImageFont

    zoom = zoom_of(image.width, image.height)
    size = image.width * zoom, image.height * zoom
    canvas = Image.new("RGB", (max(size[0], LEAST_WIDTH), size[1]), "white")
    canvas.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST))
    for i, mask in enumerate(masks):
        if mask is not None:
            _hatch(canvas, mask, size, COLORS[i % len(COLORS)])
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    for i, box in enumerate(boxes):
        color = COLORS[i % len(COLORS)]
        corners = [zoom * side for order in (min, max) for side in (order(box.x1, box.x2), order(box.y1, box.y2))]
        pen.rectangle([corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1], outline=EDGE, width=LINE + 2)
        pen.rectangle(corners, outline=color, width=LINE)
        # The label sits above its box, or inside it where there is no room; never past the right edge.
        label = box.label if box.score is None else f"{box.label} {box.score:.2f}".strip()
        width = pen.textlength(label, font) + 10
        left, top = max(0, min(corners[0] - 1, canvas.width - width)), corners[1]
        top = top - ROW if top >= ROW else top
        pen.rectangle([left, top, left + width, top + ROW - 1], fill=EDGE)
        pen.text((left + 5, top + 1), label, fill=color, font=font)
    return _with_caption(canvas, prompt, answer, right, wanted, font) if prompt or answer else canvas


def _hatch(canvas, mask, size, color) -> None:
    """Draw a mask's contour, with a dark edge, and diagonal lines within."""
    from PIL import Image, ImageFilter

    inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    padded = Image.new("L", (size[0] + 8, size[1] + 8))
    padded.paste(inside, (4, 4))
    whole = (4, 4, size[0] + 4, size[1] + 4)
    grown, shrunk = (padded.filter(kind(5)).crop(whole) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    edge = padded.filter(ImageFilter.MaxFilter(7)).crop(whole)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    lines = ((x + y) % HATCH < 2) & (np.asarray(inside) > 0)
    canvas.paste(color, (0, 0), Image.fromarray((lines * round(255 * HATCHED)).astype(np.uint8)))
    for tone, outer, inner in ((EDGE, edge, grown), (color, grown, shrunk)):
        band = (np.asarray(outer) > 0) & (np.asarray(inner) == 0)
        canvas.paste(tone, (0, 0), Image.fromarray(band.astype(np.uint8) * 255))


def _with_caption(canvas, prompt, answer, right, wanted, font):
    from PIL import Image, ImageDraw

    room = canvas.width - 16
    rows = [(line, GREY) for line in _wrap(prompt, font, room)]
    indent = 0 if right is None else ROW
    rows += [(line, "black") for line in _wrap(answer, font, room - indent) if answer]
    if right is False and wanted:
        rows += [(line, WRONG) for line in _wrap(f"right: {wanted}", font, room - indent)]
    framed = Image.new("RGB", (canvas.width, canvas.height + ROW * len(rows) + 12), "white")
    framed.paste(canvas)
    pen, top = ImageDraw.Draw(framed), canvas.height + 6
    for i, (line, color) in enumerate(rows):
        pen.text((8 + (0 if color == GREY else indent), top + ROW * i), line, fill=color, font=font)
    if right is not None:
        _mark(pen, right, top + ROW * sum(color == GREY for _, color in rows))
    return framed


def _mark(pen, right, top) -> None:
    """A tick or a cross before the answer."""
    strokes = (
        [(9, top + 12, 14, top + 17, 24, top + 5)]
        if right
        else [(10, top + 5, 22, top + 17), (22, top + 5, 10, top + 17)]
    )
    for stroke in strokes:
        pen.line(stroke, fill=RIGHT if right else WRONG, width=3, joint="curve")


def _wrap(text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
