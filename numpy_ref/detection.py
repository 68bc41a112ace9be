"""Boxes and mask codes in an answer, and drawing them.

`detect` answers with four location tokens and a label for each object, objects separated by " ; ":
<locYMIN><locXMIN><locYMAX><locXMAX> label. `segment` puts sixteen <seg...> codes between box and label.
"""

import re
from dataclasses import asdict, dataclass

#: How a location token is turned back into a fraction of the side. big_vision's evaluators divide by 1023,
#: which inverts its encoder; the Hugging Face demo and many tools divide by 1024. The difference is 0.1 %.
CONVENTIONS = {"big_vision": 1023, "huggingface": 1024}

# Nothing is given back once it is matched (`*+`): an answer full of spaces would be tried in a million ways.
_OBJECT = re.compile(
    r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>"
    r"\s*+((?:<seg(?:0\d\d|1[01]\d|12[0-7])>){16})?+([^;<>]*+)(?=[;<]|\Z)"
)


@dataclass(frozen=True)
class Box:
    """An object found: its label, its corners in pixels of the picture, its 16 mask codes if any."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    codes: tuple[int, ...] = ()

    @property
    def corners(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2

    def as_json(self) -> dict:
        fields = asdict(self)
        return fields if self.codes else {key: value for key, value in fields.items() if key != "codes"}


def parse(text: str, width: int, height: int, convention: str = "big_vision") -> list[Box]:
    """The boxes of an answer, in pixels of a width x height picture. Empty or inverted boxes are dropped."""
    steps = CONVENTIONS[convention]
    boxes = []
    for match in _OBJECT.finditer(text):
        y1, x1, y2, x2 = (int(match.group(i)) for i in range(1, 5))
        if y2 <= y1 or x2 <= x1 or max(y2, x2) > 1023:
            continue
        codes = tuple(int(code) for code in re.findall(r"<seg(\d{3})>", match.group(5) or ""))
        boxes.append(
            Box(
                " ".join(match.group(6).split()),
                x1 * width / steps,
                y1 * height / steps,
                x2 * width / steps,
                y2 * height / steps,
                codes,
            )
        )
    return boxes


def encode(x1: float, y1: float, x2: float, y2: float) -> str:
    """A box in fractions of the sides -> its four location tokens (big_vision `segmentation.py`)."""
    return "".join(f"<loc{min(max(round(value * 1023), 0), 1023):04d}>" for value in (y1, x1, y2, x2))


def intersection_over_union(a: Box, b: Box) -> float:
    """Area of overlap over area of union, in [0, 1]."""
    across = max(0.0, min(a.x2, b.x2) - max(a.x1, b.x1))
    down = max(0.0, min(a.y2, b.y2) - max(a.y1, b.y1))
    areas = [(box.x2 - box.x1) * (box.y2 - box.y1) for box in (a, b)]
    union = sum(areas) - across * down
    return across * down / union if union else 0.0


_COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080"]


def draw(image, boxes: list[Box], caption: str = "", masks=()):
    """A copy of the picture, at least 448 pixels wide, with masks, boxes and labels, the caption written below.

    `masks` are bool [height, width] of the picture's size, one a box or None where a box has none.
    """
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(1, -(-448 // image.width))
    canvas = image.convert("RGB").resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    for i, mask in enumerate(masks):
        if mask is not None:
            cover = Image.fromarray(mask.astype("uint8") * 150).resize(canvas.size, Image.Resampling.NEAREST)
            canvas.paste(_COLORS[i % len(_COLORS)], (0, 0), cover)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=18)
    for i, box in enumerate(boxes):
        color = _COLORS[i % len(_COLORS)]
        corners = [corner * zoom for corner in box.corners]
        pen.rectangle(corners, outline=color, width=3)
        # The label sits above its box, or inside it where there is no room; never past the right edge.
        width = pen.textlength(box.label, font) + 8
        left, top = max(0, min(corners[0], canvas.width - width)), corners[1] - 22 if corners[1] >= 22 else corners[1]
        pen.rectangle([left, top, left + width, top + 22], fill=color)
        pen.text((left + 4, top), box.label, fill="white", font=font)
    return _with_caption(canvas, caption, font) if caption else canvas


def _with_caption(canvas, caption, font):
    from PIL import Image, ImageDraw

    lines = _wrap(caption, font, canvas.width - 16)
    framed = Image.new("RGB", (canvas.width, canvas.height + 24 * len(lines) + 12), "white")
    framed.paste(canvas)
    pen = ImageDraw.Draw(framed)
    for i, line in enumerate(lines):
        pen.text((8, canvas.height + 6 + 24 * i), line, fill="black", font=font)
    return framed


def _wrap(text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
