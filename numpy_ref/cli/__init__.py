"""The command line that the three implementations share: an image and a prompt in, text out."""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from .. import detection
from ..errors import PaliGemmaError
from ..generate import Timings, answers, choose_capacity, generate
from ..image import open_image, preprocess
from ..model import segmentation
from ..model.sampling import Sampling
from ..tokenizer import Stream
from .options import Parser

DEFAULT_NEW_TOKENS = 64
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run(prog, main, argv=None) -> int:
    """Call `main(argv)`; bad input becomes one line on stderr and exit code 1."""
    try:
        return main(argv) or 0
    except PaliGemmaError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser(prog, model, description) -> Parser:
    """The options of `run-onnx`, `python -m numpy_ref` and `python -m torch_impl`."""
    options = Parser(prog=prog, description=description, usage=f"{prog} [{model}] IMAGE PROMPT [options]")
    options.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help=f"[{model}] IMAGE PROMPT; without {model} the model that ships is used; "
        "a PROMPT of @FILE is read from that file",
    )
    add_answer_options(options)
    options.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_argument("--draw", type=Path, metavar="OUT.png", help="draw boxes and masks over the picture")
    return options


def add_answer_options(options: Parser) -> None:
    """The options that say how to answer, one picture or many."""
    options.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="longest answer (64)")
    options.add_argument("--temperature", type=real(0, math.inf), default=0.0, metavar="T", help="0 is greedy (0)")
    options.add_argument("--top-p", type=real(0, 1), default=1.0, metavar="P", help="keep the head that sums to P (1)")
    options.add_argument("--top-k", type=whole(0), default=0, metavar="K", help="keep the K likeliest, 0 for all (0)")
    options.add_argument("--seed", type=whole(0), default=0, metavar="S", help="of the draws (0)")
    options.add_argument(
        "--boxes", choices=detection.CONVENTIONS, default="big_vision", help="what a location token counts (big_vision)"
    )
    options.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (auto)")


def add_adapter_option(options: argparse.ArgumentParser) -> None:
    """`--adapter`, of the commands that read a checkpoint."""
    options.add_argument(
        "--adapter", type=Path, metavar="DIR",
        help="a LoRA adapter as peft saves it, merged into CHECKPOINT, or into the base that it names",
    )  # fmt: skip


def on_the_cpu(arguments, prog) -> None:
    """Refuse `--provider cuda` where there is only the CPU."""
    if arguments.provider == "cuda":
        raise PaliGemmaError(f"--provider cuda: {prog} runs on the CPU; run-onnx can use a GPU")


def parse(options: Parser, argv=None) -> argparse.Namespace:
    """Parse, and split the positional arguments into `model` (None if left out), `image` and `prompt`."""
    arguments = options.parse_intermixed_args(argv)
    if len(arguments.inputs) not in (2, 3):
        options.error(f"expected IMAGE PROMPT, optionally a model before them; got {len(arguments.inputs)} arguments")
    *model, image, prompt = arguments.inputs
    arguments.model, arguments.image = (Path(model[0]) if model else None), Path(image)
    arguments.prompt = read_prompt(prompt)
    return arguments


def answer(arguments, load, look=None, quiet=False) -> int:
    """Load an engine and its tokenizer with `load(model path or None)`, generate, and print unless `quiet`.

    `look(engine, tokenizer, image, pixel_values, prompt ids, answer ids)` is called with what was answered.
    """
    streamed = not (arguments.json or quiet)
    image = open_image(arguments.image)  # before the model: the cheaper mistake first
    started = time.perf_counter()
    engine, tokenizer = load(arguments.model)
    load_s = time.perf_counter() - started

    config = engine.config
    prompt = tokenizer.prompt(arguments.prompt)
    new_tokens, capacity = budget(engine, prompt, arguments.max_new_tokens)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    timings, stream, tokens = Timings(), Stream(tokenizer), []
    if hasattr(engine, "preprocess"):
        pixel_values = engine.preprocess(image)
    else:
        pixel_values = preprocess(image, config.vision.image_size, resize=engine.resize)
    for token in generate(engine, pixel_values, [prompt], tokenizer.known(), new_tokens, sampling, capacity, timings):
        tokens.append(token)
        if streamed and token[0] != config.eos:
            print(printable(stream.push(int(token[0]))), end="", flush=True)
    if streamed:
        print(printable(stream.close()))

    ids = answers(tokens, config.eos)[0]
    text = tokenizer.decode(ids)
    boxes = detection.parse(text, image.width, image.height, arguments.boxes)
    shown = arguments.draw or arguments.json
    masks = paint(engine.masks, boxes, image.width, image.height) if shown else []
    if arguments.draw:
        write_drawing(arguments.draw, detection.draw(image, boxes, caption(arguments.prompt, text, boxes), masks))
    if look:
        look(engine, tokenizer, image, pixel_values, prompt, ids)
    if arguments.json:
        times = {
            "load_s": round(load_s, 4),
            "prefill_s": round(timings.prefill_s, 4),
            "decode_tokens_per_s": round(timings.decode_tokens_per_s, 2),
        }
        found = [box.as_json() for box in boxes]
        outlined = [{**box, **_run_lengths(mask)} for box, mask in zip(found, masks, strict=True) if "codes" in box]
        print(json.dumps({"text": text, "tokens": ids, "boxes": found, "masks": outlined, "timings": times}))
    return 0


def printable(text: str) -> str:
    """A model's text without what a terminal would obey: line breaks and tabs stay, other controls do not."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def paint(decode, boxes, width, height) -> list:
    """The mask of each box in the picture, bool [height, width]; None for a box without codes, or without a codec.

    `decode` is an engine's `masks`: codes [B, 16] -> [B, 64, 64], or None.
    """

    def place(box):
        return segmentation.paste(decode(np.array([box.codes]))[0], box.corners, width, height)

    return [place(box) if decode and box.codes else None for box in boxes]


def _run_lengths(mask) -> dict:
    """A mask as COCO's uncompressed run lengths; nothing where it could not be painted."""
    return {} if mask is None else {"size": list(mask.shape), "counts": segmentation.run_lengths(mask)}


def read_prompt(prompt: str) -> str:
    """A PROMPT as it was given, or the contents of @FILE. Raises PaliGemmaError if there is nothing in it."""
    source = "the prompt"
    if prompt.startswith("@"):
        source = prompt[1:]
        try:
            prompt = Path(source).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise PaliGemmaError(f"{source}: cannot read the prompt ({error})") from None
    if not prompt.strip():
        raise PaliGemmaError(f'{source} is empty; ask something, for example "caption en"')
    return prompt


def budget(engine, prompt, max_new_tokens):
    """How many tokens to generate for a prompt of ids, and the cache slots that takes.

    Raises PaliGemmaError if the prompt, or what was asked for, does not fit.
    """
    lengths = np.array([len(prompt)])
    limit = getattr(engine, "max_length", engine.config.max_length)
    if max_new_tokens is None:
        choose_capacity(engine.config, lengths, 1, limit)  # the prompt itself must fit
        max_new_tokens = min(DEFAULT_NEW_TOKENS, limit - len(prompt) + 1)
    return max_new_tokens, choose_capacity(engine.config, lengths, max_new_tokens, limit)


def caption(prompt, text, boxes) -> str:
    """What is written below a drawing: the prompt, and the answer unless the boxes show it."""
    return f"{prompt}: {len(boxes)} found" if boxes else f"{prompt}: {text}"


def write_drawing(path: Path, drawing) -> None:
    """Save a picture where it is wanted, whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=path.suffix or ".png", delete=False) as file:
            temporary = Path(file.name)
        try:
            drawing.save(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise PaliGemmaError(f"{path}: cannot write the drawing ({error})") from None


def whole(least):
    def parse(text):
        value = int(text)
        if value < least:
            raise ValueError
        return value

    parse.__name__ = f"whole number from {least}"
    return parse


def real(least, most):
    def parse(text):
        value = float(text)
        if not (least <= value <= most and math.isfinite(value)):
            raise ValueError
        return value

    parse.__name__ = f"number from {least}" + (f" to {most}" if math.isfinite(most) else "")
    return parse
