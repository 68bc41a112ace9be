"""Files that drawings are written to."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PaliGemmaError
from ..files import replaced_file
from ..image import FORMATS

if TYPE_CHECKING:
    from PIL import Image


def suffixes() -> set[str]:
    """The endings of files that a drawing can be written to."""
    from PIL import Image

    known = Image.registered_extensions()  # and with them what Pillow can write
    return {suffix for suffix, kind in known.items() if kind in FORMATS and kind in Image.SAVE}


def check_drawing(path: Path, pictures: Sequence[Path] = ()) -> None:
    """Raise PaliGemmaError unless a drawing can be written there: what is to be known before a model runs.

    A path without an ending is written as PNG. One of the `pictures` that are asked about is not overwritten.
    """
    if path.is_file() and any(picture.is_file() and path.samefile(picture) for picture in pictures):
        raise PaliGemmaError(f"{path}: this is the picture itself; name another file for the drawing")
    if path.suffix and path.suffix.lower() not in suffixes():
        kinds = ", ".join(FORMATS)
        raise PaliGemmaError(f"{path}: drawings are written as {kinds}; give the name such an ending, .png for example")
    if path.is_dir():
        raise PaliGemmaError(f"{path}: cannot write the drawing, this is a folder; name a file in it")
    if os.path.lexists(path) and not path.is_file():
        raise PaliGemmaError(f"{path}: cannot write the drawing, it is a pipe, socket, device or dead link")
    if not path.parent.is_dir():
        raise PaliGemmaError(f"{path}: cannot write the drawing, there is no folder {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _not_written(path, error) from None


def write_drawing(path: Path, drawing: "Image.Image") -> None:
    """Save a picture where it is wanted, whole or not at all; what a killed process left beside it goes."""
    check_drawing(path)
    try:
        with replaced_file(path) as temporary:
            drawing.save(temporary, None if path.suffix else "PNG")
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from None


def _not_written(path, error) -> PaliGemmaError:
    # str(OSError) would name the temporary file.
    return PaliGemmaError(f"{path}: cannot write the drawing ({getattr(error, 'strerror', None) or error})")
