"""python -m numpy_ref [CHECKPOINT] IMAGE [IMAGE ...] PROMPT: the reference answers."""

import sys
from pathlib import Path

from . import checkpoint, cli
from .api import PaliGemma
from .cli import heatmap
from .cli.trace import TracedEngine
from .engine import NumpyEngine
from .errors import PaliGemmaError
from .image import preprocess
from .tokenizer import Tokenizer

PROG = "python -m numpy_ref"


def load(
    path: str | Path | None, traced: bool = False, adapter: str | Path | None = None
) -> tuple[NumpyEngine, Tokenizer]:
    """A checkpoint, or the shipped one, perhaps with an adapter, as engine and tokenizer."""
    loaded = checkpoint.load(path, adapter)
    tokenizer = Tokenizer.load(loaded.folder, loaded.config)
    return TracedEngine(loaded, tokenizer) if traced else NumpyEngine(loaded), tokenizer


def main(argv=None):
    options = cli.parser(PROG, "CHECKPOINT", "Answer a prompt about a picture with the NumPy reference.")
    cli.add_adapter_option(options)
    options.add_argument("--heatmap", type=Path, metavar="OUT.png", help="draw what each token of the answer looked at")
    options.add_argument("--trace", action="store_true", help="print each intermediate value, and what made it")
    arguments = cli.parse(options, argv)
    cli.on_the_cpu(arguments, PROG)
    if arguments.trace and arguments.json:
        raise PaliGemmaError("--trace prints lines to read and --json one object; leave one of them out")
    if arguments.trace and (arguments.beams or arguments.best_of):
        raise PaliGemmaError("--trace follows one answer, and --beams and --best-of compare several; leave one out")
    if arguments.heatmap and len(arguments.images) > 1:
        raise PaliGemmaError("--heatmap draws over one picture; give one, or leave --heatmap out")

    def look(model, pictures, answer):
        engine, tokenizer = model.engine, model.tokenizer
        if arguments.trace:
            engine.print_answer(answer)
        if arguments.heatmap and answer.tokens:  # an empty one looked at nothing
            (image,) = pictures
            pixel_values = preprocess(image, engine.config.vision.image_size, resize=engine.resize)
            prompt = tokenizer.prompt(arguments.prompts[0])
            maps = heatmap.attention_over_picture(engine.params, engine.config, pixel_values, prompt, answer.tokens)
            words = [tokenizer.decode([token]).strip() or "·" for token in answer.tokens]
            cli.write_drawing(arguments.heatmap, heatmap.draw(image, maps, words))

    def open_model(path):
        return PaliGemma(*load(path, arguments.trace, arguments.adapter))

    return cli.answer(arguments, open_model, look, quiet=arguments.trace)


if __name__ == "__main__":
    sys.exit(cli.run(PROG, main))
