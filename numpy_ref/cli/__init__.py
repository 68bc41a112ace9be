"""The command line that the three implementations share: pictures and a prompt in, text out."""

import argparse
import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

from .. import checkpoint, detection, grammar, interrupts, knows
from ..answer import Answer
from ..api import BATCH, Options, PaliGemma
from ..checkpoint import hub
from ..errors import PaliGemmaError, explained, note, one_line, plural
from ..image import TRANSPARENCIES, open_image
from ..search import MOST, search_of
from ..tokenizer import prompt_warning
from . import inputs, streams
from .drawing import check_drawing, write_drawing
from .options import Parser, real, temperature, whole
from .prompt import HELP as PROMPT_HELP
from .prompt import read_prompt, read_prompts, warn_of_prompt
from .show import Piecewise, one_of_several

if TYPE_CHECKING:
    from PIL import Image


def run(prog: str, main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)`, the whole of a program; its exit code.

    The one place that decides how a command fails: in one line on stderr of at most 2,000 letters, and with exit code
    1. Ctrl-C ends it without a word, with 130; a reader of its output who has seen enough, with 0.
    """
    streams.prepare()
    interrupts.raise_again()
    hook, sys.unraisablehook = sys.unraisablehook, _not_lost(sys.unraisablehook)
    try:
        return _ended(main, argv)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        streams.close_broken()
        return 0
    except Exception as error:
        if interrupts.caused(error):
            return _interrupted()
        reason = explained(error)
        if streams.is_refusal(error):
            reason = PaliGemmaError(f"standard output cannot be written ({getattr(error, 'strerror', error)})")
        elif sys.flags.dev_mode and not isinstance(error, PaliGemmaError):
            raise
        streams.print_error(f"{prog}: error: {reason}")
        return 1
    finally:
        streams.close_broken()
        sys.unraisablehook = hook


def _ended(main, argv) -> int:
    """Call `main(argv)`, and see that what it printed is written."""
    try:
        code = main(argv) or 0
    except SystemExit:  # argparse's, after --help for one
        streams.flush()
        raise
    streams.flush()
    return code


def _interrupted() -> int:
    interrupts.end_process()  # a second Ctrl-C, while threads come to an end, needs no words either
    return 130


def _not_lost(hook):
    """A hook for exceptions that Python cannot raise where they arise: an interrupt among them comes again."""

    def raised_again(unraisable):
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        else:
            hook(unraisable)

    return raised_again


def parser(prog: str, model: str, description: str) -> Parser:
    """The options of `run-onnx`, `python -m numpy_ref` and `python -m torch_impl`."""
    usage = f"{prog} [{model}] IMAGE [IMAGE ...] PROMPT [PROMPT ...] [options]"
    options = Parser(prog=prog, description=description, usage=usage)
    options.add_argument(
        "inputs", nargs="*", metavar="INPUT",
        help=f"[{model}] IMAGE [IMAGE ...] PROMPT [PROMPT ...]; without {model} the model that ships is used; several "
        "pictures are for a model that was trained on as many, and boxes and masks are in the first; several prompts "
        f"are each asked about them, and answered a line each; {PROMPT_HELP}",
    )  # fmt: skip
    options.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one a line")
    options.set_defaults(model_kind=model)
    add_answer_options(options)
    options.add_argument(
        "--constrain", metavar="GRAMMAR", help=f"draw only what makes an answer of this kind: {grammar.HELP}"
    )
    options.add_argument("--start", default="", metavar="TEXT", help="what the answer begins with; the model goes on")
    options.add_argument(
        "--lookup", action="store_true", help="guess words that come again, and check several at once: the same answer"
    )
    options.add_argument(
        "--score", metavar="ANSWER", help="print the log-probability of this answer, its end included, and draw none"
    )
    options.add_argument(
        "--beams", type=whole(2, MOST), metavar="N", help="beam search: follow the N likeliest answers"
    )
    options.add_argument(
        "--best-of", type=whole(2, MOST), metavar="N", help="draw N answers, by --temperature, and take the likeliest"
    )
    options.add_argument("--json", action="store_true", help="print a JSON object a prompt, one a line")
    options.add_argument(
        "--draw", type=Path, metavar="OUT.png", help="draw the boxes and masks of one prompt over the first picture"
    )
    return options


def add_answer_options(options: Parser) -> None:
    """The options that say how to answer, one picture or many."""
    options.add_argument("--max-new-tokens", type=whole(1), metavar="N", help="longest answer (64)")
    options.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="0 is greedy (0)")
    options.add_argument(
        "--top-p", type=real(0, 1), default=1.0, metavar="P", help="keep the likeliest that sum to P (1)"
    )
    options.add_argument("--top-k", type=whole(0), default=0, metavar="K", help="keep the K likeliest, 0 for all (0)")
    options.add_argument("--seed", type=whole(0), default=0, metavar="S", help="of the draws (0)")
    options.add_argument(
        "--boxes", choices=detection.CONVENTIONS, default="big_vision", help="what a location token counts (big_vision)"
    )
    options.add_argument(
        "--transparency", choices=TRANSPARENCIES, default="white",
        help="what stands behind transparent pixels: white, or the colors that the file has there (white)",
    )  # fmt: skip
    options.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (auto)")


def add_adapter_option(options: argparse.ArgumentParser) -> None:
    """`--adapter`, of the commands that read a checkpoint."""
    options.add_argument(
        "--adapter", type=Path, metavar="DIR",
        help="a LoRA adapter as peft saves it, merged into CHECKPOINT, or into the base that it names",
    )  # fmt: skip


def on_the_cpu(arguments: Namespace, prog: str) -> None:
    """Refuse `--provider cuda` where there is only the CPU."""
    if arguments.provider == "cuda":
        raise PaliGemmaError(f"--provider cuda: {prog} runs on the CPU; run-onnx can use a GPU")


def parse(options: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, and split the positional arguments into `model` (None if left out), `images` and `prompts`.

    Exits with 2 if one is in the wrong place. Raises PaliGemmaError if a prompt is empty, if a drawing cannot be
    written where it is wanted, or if it would be of several prompts.
    """
    arguments = options.parse_intermixed_args(argv)
    more = arguments.prompts is not None
    if len(arguments.inputs) < 2 - more:
        given = plural(len(arguments.inputs), "argument")
        options.error(f"expected IMAGE PROMPT, optionally a model before them; got {given}")
    model, images, prompts = inputs.split(arguments.inputs, more)
    if wrong := inputs.mistake(model, images, prompts, arguments.model_kind):
        options.exit(2, f"{options.prog}: error: {one_line(wrong)}\n")
    arguments.model, arguments.images = Path(model) if model else None, [Path(image) for image in images]
    arguments.prompts = [*map(read_prompt, prompts), *(read_prompts(arguments.prompts) if more else [])]
    if arguments.constrain is not None:
        grammar.expression(arguments.constrain)  # here already, before a model is loaded
    if arguments.score is not None:
        for name in ("constrain", "start", "lookup", "draw", "beams", "best_of"):
            if getattr(arguments, name):
                given = _option(name)
                raise PaliGemmaError(f"--score draws no answer, so {given} has nothing to do; leave one of them out")
    search_of(vars(arguments), _option)  # here already as well
    for option in ("draw", "heatmap", "trace"):
        if not (value := getattr(arguments, option, None)):
            continue
        if len(arguments.prompts) > 1:
            raise PaliGemmaError(f"--{option} is of one answer; give one prompt, or leave --{option} out")
        if isinstance(value, Path):
            check_drawing(value, arguments.images)
    any(warn_of_prompt(options.prog, prompt) for prompt in arguments.prompts)  # of the first that is odd
    return arguments


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def answer(
    arguments: Namespace,
    load: Callable[[Path | None], PaliGemma],
    look: Callable | None = None,
    quiet: bool = False,
) -> int:
    """Load a model with `load(model path or None)`, answer, and print unless `quiet`.

    `look(model, pictures, answer)` is called with what was answered to a single prompt.
    """
    # Before the model: the cheaper mistake first.
    pictures = [open_image(image, arguments.transparency) for image in arguments.images]
    started = time.perf_counter()
    model = load(arguments.model)
    load_s = time.perf_counter() - started
    options = {name: getattr(arguments, name) for name in Options.__annotations__}
    if arguments.score is not None:
        _print_scores(model, pictures, arguments)
        return 0
    if len(arguments.prompts) > 1:
        _answer_several(model, pictures, arguments, options, load_s)
        _hint(arguments)
        return 0
    (prompt,) = arguments.prompts
    pieces = None if arguments.json or quiet else Piecewise(_print, sys.stdout.isatty())
    answered = model.answer(pictures, prompt, stream=pieces.push if pieces else None, **options)
    if pieces:
        pieces.close(answered)
    if arguments.draw:
        write_drawing(arguments.draw, draw(pictures[0], prompt, answered))
    if look:
        look(model, pictures, answered)
    if arguments.json:
        print(json.dumps(as_json(answered, load_s)))
    _hint(arguments)
    return 0


def _hint(arguments) -> None:
    """Say on stderr if the model was never taught one of the prompts, as far as it says what it was taught.

    Nothing of one that was warned of.
    """
    if getattr(arguments, "adapter", None):
        return
    folder = checkpoint.SHIPPED if arguments.model is None else hub.directory(arguments.model)
    known = knows.load(folder) if folder.is_dir() else None
    if known and (
        hints := [hint for each in arguments.prompts if not prompt_warning(each) and (hint := known.hint(each))]
    ):
        note(f"hint: {hints[0]}")


def _answer_several(model, pictures, arguments, options, load_s) -> None:
    """Answer several prompts about the same pictures, and print each answer."""
    about = model.picture(pictures)
    for start in range(0, len(arguments.prompts), BATCH):
        prompts = arguments.prompts[start : start + BATCH]
        for prompt, answered in zip(prompts, about.answer_all(prompts, **options), strict=True):
            if arguments.json:
                print(json.dumps({"prompt": prompt, **as_json(answered, load_s)}), flush=True)
            else:
                _print(one_of_several(prompt, answered, sys.stdout.isatty()))


def _print_scores(model, pictures, arguments) -> None:
    """Print the log-probability of an answer to each prompt."""
    several = len(arguments.prompts) > 1
    about = model.picture(pictures) if several else None
    for prompt in arguments.prompts:
        text = arguments.score
        ids, logprobs = about.score(prompt, text) if about else model.score(pictures, prompt, text)
        plain = {"prompt": prompt} if several else {}
        plain |= score_as_json(text, ids, logprobs)
        print(json.dumps(plain) if arguments.json else f"{sum(logprobs):.6f}", flush=True)


def _print(text: str) -> None:
    print(printable(text), end="", flush=True)


def printable(text: str) -> str:
    """A model's text without what a terminal would obey.

    Line breaks and tabs stay. Other control characters are replaced; characters of format, which turn the direction of
    what follows or have no width, are shown as escapes.
    """
    return "".join(letter if letter in "\n\t" else _SHOWN.get(category(letter), _as_it_is)(letter) for letter in text)


def _as_it_is(letter: str) -> str:
    return letter


def _escape(letter: str) -> str:
    return ascii(letter)[1:-1]


#: How characters of Unicode's categories are shown: control, format, surrogate, line and paragraph separator.
_SHOWN = {"Cc": lambda _: "\N{REPLACEMENT CHARACTER}", **dict.fromkeys(("Cf", "Cs", "Zl", "Zp"), _escape)}


def as_json(answered: Answer, load_s: float) -> dict:
    """An answer as `--json` has it."""
    times = {
        "load_s": round(load_s, 4),
        "prefill_s": round(answered.timings.prefill_s, 4),
        "decode_tokens_per_s": round(answered.timings.decode_tokens_per_s, 2),
    }
    return {**answered.as_json(masks=True), "timings": times}


def score_as_json(text: str, ids: Sequence[int], logprobs: Sequence[float]) -> dict:
    """A scored answer as `--json` has it: its ids, the last of which ends it, and their log-probabilities."""
    return {
        "text": text, "tokens": [*ids], "logprobs": [round(each, 6) for each in logprobs],
        "logprob": round(sum(logprobs), 6),
    }  # fmt: skip


def draw(
    image: "Image.Image", prompt: str, answered: Answer, right: bool | None = None, wanted: str = ""
) -> "Image.Image":
    """The picture with what was answered about it, the prompt below, and the text unless the boxes show it.

    `right` and `wanted` are as for `detection.draw`.
    """
    found = f"{len(answered.boxes)} found" if answered.boxes else answered.text
    return detection.draw(image, answered.boxes, prompt, found, answered.masks, right, wanted)
