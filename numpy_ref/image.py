"""Pictures -> pixel values, as transformers' PaliGemma processor prepares them.

Decode to RGB, resize to a square (the aspect ratio is not kept) with Pillow's bicubic filter, which rounds to
bytes, then (x / 255 - 0.5) / 0.5.
"""

from pathlib import Path

import numpy as np

from .errors import PaliGemmaError


def open_image(path):
    """A picture file as an RGB Pillow image; PaliGemmaError if it is absent, broken or not a picture."""
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise PaliGemmaError(f"{path}: no such picture")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise PaliGemmaError(f"{path}: not a picture that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PaliGemmaError(f"{path}: the picture is broken ({error})") from None


def preprocess(image, size: int, dtype=np.float32) -> np.ndarray:
    """A Pillow image -> pixel values [1, 3, S, S] in [-1, 1]."""
    from PIL import Image

    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return scale(np.asarray(resized), dtype)


def scale(pixels: np.ndarray, dtype=np.float32) -> np.ndarray:
    """Bytes [S, S, 3] -> [1, 3, S, S] in [-1, 1]."""
    return ((pixels.astype(dtype) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]
