"""The positional arguments of the commands that answer, [MODEL] IMAGE [IMAGE ...] PROMPT [PROMPT ...]: which is which.

Files are asked for through os.path, which takes a prompt of any length and letters for a name that no file has.
"""

import os
from itertools import pairwise
from pathlib import Path

from ..checkpoint import kinds
from ..image import picture_suffixes

_DESCRIPTIONS = ("bundle.json", "config.json", "adapter_config.json")


def split(inputs: list[str], and_more: bool = False) -> tuple[str | None, list[str], list[str]]:
    """At least two arguments -> the model (None if left out), the pictures, and the prompts.

    The first of three or more is the model unless it is, or by its ending should be, a picture. The last is a prompt,
    unless prompts come from elsewhere too (`and_more`; then one argument is enough). Of those between, what comes
    behind the last picture is a prompt: behind the last that is there, or by its ending should be. Where none is, all
    are pictures.
    """
    words = [*inputs, ""] if and_more else inputs
    has_model = len(words) > 2 and not _is_picture(words[0])
    rest = words[has_model:]
    named = [i for i, word in enumerate(rest[:-1]) if _is_picture(word) or os.path.exists(word)]
    pictures = named[-1] + 1 if named else len(rest) - 1
    prompts = rest[pictures:-1] if and_more else rest[pictures:]
    return words[0] if has_model else None, rest[:pictures], prompts


def mistake(model: str | None, images: list[str], prompts: list[str], kind: str) -> str:
    """What is in the wrong place, in a line; "" if nothing is. `kind` is what the command calls a model: BUNDLE."""
    order = f"the order is [{kind}] IMAGE [IMAGE ...] PROMPT"
    for prompt in prompts[-1:]:
        if _is_model(prompt):
            return f"{prompt}: a folder of a model in the place of the prompt; {order}"
        if Path(prompt).suffix.lower() in picture_suffixes() and os.path.isfile(prompt):
            return f"{prompt}: a picture in the place of the prompt; {order}"
    if found := [image for image in images if _is_model(image)]:
        return f"{found[0]}: a folder of a model in the place of a picture; {order}"
    words = [*images, *prompts]
    first = model is None  # which cannot be but IMAGE
    strange = [i for i in range(first, len(images)) if not _is_picture(images[i]) and not os.path.exists(images[i])]
    strange += [len(images) + i for i, pair in enumerate(pairwise(prompts)) if all(map(_is_word, pair))]
    if strange and strange[0] < len(words) - 1:
        whole = " ".join(words[strange[0] :])
        return f'{words[strange[0]]}: no such picture; {order}, and a prompt of several words is quoted: "{whole}"'
    return ""


def _is_word(prompt: str) -> bool:
    """Whether a prompt is a single word: two in a row are one that somebody forgot to quote."""
    return len(prompt.split()) < 2 and not prompt.startswith("@")


def _is_picture(name: str) -> bool:
    """Whether a name ends as a picture's does, or is a file's that is no part of a model."""
    return Path(name).suffix.lower() in picture_suffixes() or (os.path.isfile(name) and kinds.kind(name) is None)


def _is_model(name: str) -> bool:
    """Whether a name is a bundle's or a checkpoint's folder."""
    return any(os.path.isfile(os.path.join(name, file)) for file in _DESCRIPTIONS)
