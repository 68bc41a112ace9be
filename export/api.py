"""`from export import PaliGemma`: a bundle, opened and asked in Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from numpy_ref import api

from .session import load


class PaliGemma(api.PaliGemma):
    """A bundle as a model to ask: `PaliGemma.load("bundle").answer("cat.png", "detect cat")`."""

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        provider: str = "auto",
        threads: int = 0,
        *,
        host_graphs: bool = False,
        provider_options: Mapping[str, object] | None = None,
        in_halves: bool = False,
        transparency: str = "white",
    ) -> Self:
        """Open a bundle: its folder, its id on the Hugging Face Hub, or None for the model that ships.

        `provider` is "auto", "cpu" or "cuda"; `threads` is for the CPU, 0 for all cores. `in_halves` is for those who
        ask several prompts about each picture: see `Session`. `transparency` is one of image.TRANSPARENCIES. Raises
        PaliGemmaError if the bundle is damaged, or the provider cannot run it.
        """
        engine, tokenizer = load(bundle, provider, threads, host_graphs, provider_options, in_halves)
        return cls(engine, tokenizer, transparency)
