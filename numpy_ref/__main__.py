"""python -m numpy_ref [CHECKPOINT] IMAGE PROMPT: the reference answers."""

import sys
from pathlib import Path

from . import checkpoint, cli
from .cli import heatmap
from .generate import NumpyEngine
from .tokenizer import Tokenizer

PROG = "python -m numpy_ref"


def load(path):
    """A checkpoint, or the shipped one, as engine and tokenizer."""
    loaded = checkpoint.load(path or checkpoint.SHIPPED)
    return NumpyEngine(loaded), Tokenizer.load(loaded.folder, loaded.config)


def main(argv=None):
    options = cli.parser(PROG, "CHECKPOINT", "Answer a prompt about a picture with the NumPy reference.")
    options.add_argument("--heatmap", type=Path, metavar="OUT.png", help="draw what each token of the answer looked at")
    arguments = cli.parse(options, argv)
    cli.on_the_cpu(arguments, PROG)

    def draw_attention(engine, tokenizer, image, pixel_values, prompt, answer):
        if answer:  # an empty one looked at nothing
            maps = heatmap.attention_over_picture(engine.params, engine.config, pixel_values, prompt, answer)
            words = [tokenizer.decode([token]).strip() or "·" for token in answer]
            cli.write_drawing(arguments.heatmap, heatmap.draw(image, maps, words))

    return cli.answer(arguments, load, draw_attention if arguments.heatmap else None)


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
