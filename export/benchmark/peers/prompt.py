"""What every side is asked: the same picture, and the same ids."""

from collections.abc import Callable

from numpy_ref.config import PaliGemmaConfig

PROMPT_TOKENS = 7  # bos, a prefix of five, the newline
#: `answer(count, first)` gives `count` tokens to a prompt, and calls `first` once, as the first of them is there.
Answer = Callable[[int, Callable[[], object]], list[int]]


def prompt(config: PaliGemmaConfig) -> list[int]:
    """The ids of a picture and a short prompt."""
    return [config.image_token] * config.vision.patches + prefix(config)


def prefix(config: PaliGemmaConfig) -> list[int]:
    """The ids behind the picture."""
    return [config.bos, *range(10, 10 + PROMPT_TOKENS - 1)]


def text_prompt(config: PaliGemmaConfig) -> list[int]:
    """As many ids for a decoder alone, which knows no image token: a text of the same length."""
    return [10 + i % 100 for i in range(config.vision.patches)] + prefix(config)
