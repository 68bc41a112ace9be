"""The positional arguments of the commands that answer, [MODEL] IMAGE [IMAGE ...] PROMPT: which is which.

Files are asked for through os.path, which takes a prompt of any length and letters for a name that no file has.
"""

import os
from pathlib import Path

from ..checkpoint import kinds
from ..image import picture_suffixes

_DESCRIPTIONS = ("bundle.json", "config.json", "adapter_config.json")


def split(inputs: list[str]) -> tuple[str | None, list[str], str]:
    """At least two arguments -> the model (None if left out), the pictures, and the prompt, which is the last.

    The first of three or more is the model unless it is, or by its ending should be, a picture.
    """
    *images, prompt = inputs
    if len(images) > 1 and not _is_picture(images[0]):
        return images[0], images[1:], prompt
    return None, images, prompt


def mistake(model: str | None, images: list[str], prompt: str, kind: str) -> str:
    """What is in the wrong place, in a line; "" if nothing is. `kind` is what the command calls a model: BUNDLE."""
    order = f"the order is [{kind}] IMAGE [IMAGE ...] PROMPT"
    if _is_model(prompt):
        return f"{prompt}: a folder of a model in the place of the prompt; {order}"
    if Path(prompt).suffix.lower() in picture_suffixes() and os.path.isfile(prompt):
        return f"{prompt}: a picture in the place of the prompt; {order}"
    if found := [image for image in images if _is_model(image)]:
        return f"{found[0]}: a folder of a model in the place of a picture; {order}"
    words = [*images, prompt][model is None :]  # what cannot be but IMAGE aside
    for i, word in enumerate(words[:-1]):
        if not _is_picture(word) and not os.path.exists(word):
            whole = " ".join(words[i:])
            return f'{word}: no such picture; {order}, and a prompt of several words is quoted: "{whole}"'
    return ""


def _is_picture(name: str) -> bool:
    """Whether a name ends as a picture's does, or is a file's that is no part of a model."""
    return Path(name).suffix.lower() in picture_suffixes() or (os.path.isfile(name) and kinds.kind(name) is None)


def _is_model(name: str) -> bool:
    """Whether a name is a bundle's or a checkpoint's folder."""
    return any(os.path.isfile(os.path.join(name, file)) for file in _DESCRIPTIONS)
