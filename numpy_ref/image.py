"""Pictures -> pixel values.

Decode to RGB, resize to a square (the aspect ratio is not kept), then (x / 255 - 0.5) / 0.5. How to resize is a
named setting, since the projects differ: transformers takes the bicubic filter, big_vision the bilinear one.
"""

import os
import re
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from .errors import PaliGemmaError
from .files import opened

if TYPE_CHECKING:
    from PIL import Image

#: What is opened, by Pillow's names. It knows many more, some of which start other programs or are seldom looked after.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
#: What stands behind transparent pixels: white, as in transformers from 5.21 on, or the colours that the file happens
#: to have there ("drop" the alpha channel), as in big_vision and in transformers before.
TRANSPARENCIES = ("white", "drop")
MAX_SIDE = 2**16  # pixels; a picture a pixel high can be short of Pillow's limit and still no picture
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_WARNINGS_LOCK = threading.Lock()  # what is done with warnings holds for all threads


def open_image(path: str | Path, transparency: str = "white") -> "Image.Image":
    """A picture file as an upright RGB Pillow image; `transparency` is one of TRANSPARENCIES.

    Raises PaliGemmaError if it is absent, broken, not a picture, or of numbers that have no fixed range. A file that
    unfolds to more pixels than Pillow's limit (about 89 million) is refused before it is decoded.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise PaliGemmaError(f"{path}: a folder, not a picture; run-onnx-batch --input answers about all in a folder")
    if re.match(r"https?:/", str(path)):
        address = re.sub(r"^(https?:)/+", r"\1//", str(path))  # of which Path leaves one slash
        raise PaliGemmaError(f"{address}: pictures are not fetched from the net; download it first")
    try:
        with opened(path) as stream:
            return decode_image(stream, path, transparency)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last has a name with a NUL
        raise PaliGemmaError(f"{path}: no such picture") from None
    except OSError as error:
        raise PaliGemmaError(f"{path}: the picture cannot be read ({error.strerror or error})") from None


def decode_image(file: BinaryIO, name: object, transparency: str = "white") -> "Image.Image":
    """An open binary file as `open_image` gives it; PaliGemmaError that begins with `name`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    formats = known_formats()
    try:
        with _WARNINGS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oddities in its notes; what is drawn counts
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                _check(image)
                return to_rgb(ImageOps.exif_transpose(image), transparency)
    except PaliGemmaError as error:
        raise PaliGemmaError(f"{name}: {error}") from None
    except UnidentifiedImageError:
        if _is_heif(file):
            raise PaliGemmaError(
                f"{name}: a HEIC picture, which takes pillow-heif (the extra `heic`): pip install pillow-heif, or save "
                "it as JPEG"
            ) from None
        raise PaliGemmaError(f"{name}: not a picture of a known format ({', '.join(formats)})") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise PaliGemmaError(
            f"{name}: the picture has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller first"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged bytes
        raise PaliGemmaError(f"{name}: the picture is broken ({error})") from None


def known_formats() -> tuple[str, ...]:
    """FORMATS, and HEIC where pillow-heif is installed, which then reads it for Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def picture_suffixes() -> set[str]:
    """The endings of files of the formats that are read, in lower case."""
    from PIL import Image

    formats = known_formats()
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}


def _is_heif(file) -> bool:
    """Whether a file begins as HEIC ones do."""
    try:
        file.seek(0)
        start = file.read(12)
    except OSError:
        return False
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def _check(image) -> None:
    """Raise PaliGemmaError if an opened picture is too long, or has numbers of which nobody can say what is white.

    32-bit whole numbers are taken for 16-bit ones, but not where 255 is the largest: then they may as well be 8-bit.
    """
    if max(image.size) > MAX_SIDE:
        raise PaliGemmaError(f"{image.width} by {image.height} pixels; a side may have {MAX_SIDE}")
    wide = image.mode == "I" and image.format == "TIFF" and image.getextrema()[1] < 256
    if image.mode == "F" or wide:
        kind = "32-bit whole numbers below 256" if wide else "floating-point numbers"
        raise PaliGemmaError(f"its pixels are {kind}, which have no fixed range; save it with 8 or 16 bits a channel")


def to_rgb(image: "Image.Image", transparency: str = "white") -> "Image.Image":
    """Any Pillow image as RGB; `transparency` is one of TRANSPARENCIES.

    Sixteen bits are scaled to eight, where Pillow itself would cut them off to white. Raises PaliGemmaError for
    floating-point pixels.
    """
    from PIL import Image

    if image.mode == "F":
        raise PaliGemmaError("pixels are floating-point numbers, which have no fixed range; give 8 or 16 bits")
    if image.mode.startswith("I"):
        deep = np.clip(np.asarray(image, np.int32), 0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))  # rounded: 257 is odd, so no value is halfway
    if transparency == "white" and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(
    image: "Image.Image", size: int, dtype: DTypeLike = np.float32, resize: str = "bicubic", transparency: str = "white"
) -> np.ndarray:
    """A Pillow image -> pixel values [1, 3, S, S] in [-1, 1]; `resize` is one of RESIZES, the other as in `to_rgb`."""
    return scale(RESIZES[resize](to_rgb(image, transparency), size), dtype)


def resize_bicubic(image: "Image.Image", size: int) -> np.ndarray:
    """Bytes [S, S, 3], as transformers resizes: antialiased cubic, rounded to bytes."""
    from PIL import Image

    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_bilinear(image: "Image.Image", size: int) -> np.ndarray:
    """Bytes [S, S, 3], as big_vision resizes: antialiased linear in floating point, cut off to bytes.

    big_vision calls TensorFlow's resize with antialias=True and casts to uint8 (`pp/ops_image.py`). Pillow's filter
    in its floating-point mode is the same triangle; that the two agree to the last bit was not measured.
    """
    from PIL import Image

    channels = [
        np.asarray(channel.convert("F").resize((size, size), Image.Resampling.BILINEAR)) for channel in image.split()
    ]
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


#: The two preprocessings by name. Transformers' is the default; a big_vision checkpoint brings its own.
RESIZES = {"bicubic": resize_bicubic, "bilinear": resize_bilinear}


def scale(pixels: np.ndarray, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Bytes [S, S, 3] -> [1, 3, S, S] in [-1, 1]."""
    return ((pixels.astype(dtype) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]
