"""Pascal VOC: a folder with Annotations (XML), JPEGImages and, for masks, SegmentationObject (PNG)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from ..errors import PaliGemmaError, quote
from ..files import read_bytes, within
from ..image import open_image
from .rows import Annotated, Problem, Thing, box_of, inside, label_of, side_of

ANNOTATIONS, PICTURES, MASKS = "Annotations", "JPEGImages", "SegmentationObject"
MAX_XML = 2**22  # bytes of a file; the largest of VOC 2012 has a thousandth


def read(folder: Path, images: Path | None, problem: Problem) -> tuple[list[str], Iterator[Annotated]]:
    """The labels of a folder, and its pictures, which lie in `images` (JPEGImages)."""
    pictures, labels = [], {}
    for file in sorted((folder / ANNOTATIONS).glob("*.xml")):
        try:
            picture = _picture(folder, file, images or folder / PICTURES, problem)
        except PaliGemmaError as error:
            problem(f"{file.name}: {error}")
        else:
            pictures.append(picture)
            labels |= dict.fromkeys(thing.label for thing in picture.things)
    return list(labels), iter(pictures)


def parse(contents: bytes) -> Element:
    """The root of an XML document. Raises PaliGemmaError if it is none, or declares a document type.

    VOC's files declare none; what one could declare are entities that unfold to gigabytes, or name other files.
    """
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, _refuse
    try:
        parser.Parse(contents, True)
        return builder.close()
    except (expat.ExpatError, AssertionError) as error:
        raise PaliGemmaError(f"not XML ({error})") from None


def _refuse(*_):
    raise PaliGemmaError("it declares a document type, which VOC's files do not; it is not read")


def _picture(folder, file, images, problem) -> Annotated:
    try:
        root = parse(read_bytes(file, MAX_XML))
    except OSError as error:
        raise PaliGemmaError(f"cannot read it ({error.strerror})") from None
    image = inside(images, root.findtext("filename") or f"{file.stem}.jpg")
    size = [side_of(_whole(root.findtext(f"size/{name}"))) for name in ("width", "height")]
    things = []
    for number, found in enumerate(root.iter("object"), 1):
        try:
            things.append(_thing(found, size, partial(_mask, folder, file.stem, number, size)))
        except PaliGemmaError as error:
            problem(f"{file.name}, object {number}: {error}")
    return Annotated(file.name, image, things)


def _thing(found, size, mask) -> Thing:
    label = label_of(found.findtext("name"))
    x1, y1, x2, y2 = (_number(found.findtext(f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax"))
    if x1 is not None and y1 is not None:
        x1, y1 = x1 - 1, y1 - 1  # pixels are counted from one, and the last is inside
    return Thing(label, box_of((x1, y1, x2, y2), *size), mask)


def _mask(folder, stem, number, size) -> np.ndarray:
    """The pixels that have the number of an object, by its place in the XML."""
    from PIL import Image

    file = within(folder / MASKS, f"{stem}.png")
    if not file.is_file():
        raise PaliGemmaError(f"no {MASKS}/{file.name}")
    open_image(file)  # which says in one line what is wrong with it
    with Image.open(file, formats=("PNG",)) as image:
        numbers = np.asarray(image)
    if image.mode not in ("P", "L") or numbers.shape != (size[1], size[0]):
        raise PaliGemmaError(f"{MASKS}/{file.name} is not a picture of numbers, {size[0]} by {size[1]}")
    if not (mask := numbers == number).any():
        raise PaliGemmaError(f"{MASKS}/{file.name} has no pixel of object {number}")
    return mask


def _number(text) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _whole(text) -> object:
    number = _number(text)
    return int(number) if number is not None and abs(number) < 1e9 and number == int(number) else quote(text)
