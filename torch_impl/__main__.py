"""python -m torch_impl [CHECKPOINT] IMAGE [IMAGE ...] PROMPT: the PyTorch twin answers."""

import sys
from pathlib import Path

from numpy_ref import checkpoint, cli
from numpy_ref.api import PaliGemma
from numpy_ref.tokenizer import Tokenizer

from .load import TorchEngine

PROG = "python -m torch_impl"


def load(path: str | Path | None, adapter: str | Path | None = None) -> tuple[TorchEngine, Tokenizer]:
    """A checkpoint, or the shipped one, as engine and tokenizer."""
    loaded = checkpoint.load(path, adapter)
    return TorchEngine(loaded), Tokenizer.load(loaded.folder, loaded.config)


def main(argv=None):
    options = cli.parser(PROG, "CHECKPOINT", "Answer a prompt about a picture with the PyTorch twin.")
    cli.add_adapter_option(options)
    arguments = cli.parse(options, argv)
    cli.on_the_cpu(arguments, PROG)
    return cli.answer(arguments, lambda path: PaliGemma(*load(path, arguments.adapter)))


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
