"""python -m torch_impl.train --output DIR: teach a checkpoint from pictures with a prefix and a suffix.

The loss is big_vision's (`trainers/proj/paligemma/train.py`): cross-entropy of the suffix tokens and the eos,
averaged over the tokens of an example, then over the batch. The prefix and the picture are attended to in both
directions and are not predicted.

`--data FILE.jsonl` fine-tunes on your own; without it, the drawn scenes are the data. `--lora-rank` trains an adapter
in place of all weights. How the model that ships was made from nothing is in recipe.py.
"""

from argparse import ArgumentTypeError, Namespace
from contextlib import nullcontext
from pathlib import Path

import torch

from numpy_ref import checkpoint, cli
from numpy_ref.checkpoint import hub
from numpy_ref.errors import PaliGemmaError, note, one_line, plural, quote
from numpy_ref.files import absent, claimed

from . import augment, distributed, lora, memory, plan
from .finetune import prepare, train
from .loop import STATE, state_folder

PROG = "python -m torch_impl.train"


def main(argv=None):
    options = cli.Parser(prog=PROG, description="Fine-tune a checkpoint.")
    options.add_argument("--output", type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument(
        "--init", type=Path, default=checkpoint.SHIPPED, metavar="CHECKPOINT", help="what to train (the shipped model)"
    )
    options.add_argument(
        "--vision", type=Path, metavar="DIR", help="a vision tower from torch_impl.train.pretrain, to begin with"
    )
    options.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="lines of image (a path, or a list), prefix and suffix"
    )
    options.add_argument(
        "--validation", type=share_or_file, metavar="SHARE|FILE.jsonl",
        help="keep a share of the pictures of --data, or take another file, to measure on ten times on the way; the "
        "best weights are saved in place of the last",
    )  # fmt: skip
    options.add_argument(
        "--augment", nargs="+", choices=augment.KINDS, default=[],
        help="show each picture otherwise each time: shifted, zoomed, in another light, with its colors changed",
    )  # fmt: skip
    options.add_argument("--test", type=Path, metavar="FILE.jsonl", help="measure the result on these lines, once")
    options.add_argument(
        "--plan", action="store_true", help="say what memory and time it takes, by two measured steps; write nothing"
    )
    options.add_argument(
        "--steps", type=cli.whole(1),
        help="of the optimizer (three times through the data, at least 300 steps; 1000 without --data)",
    )  # fmt: skip
    options.add_argument("--batch-size", type=cli.whole(1), default=16, help="examples at once (16)")
    options.add_argument("--accumulate", type=cli.whole(1), default=1, metavar="N", help="batches before each step (1)")
    options.add_argument("--learning-rate", type=cli.real(0, 1), help="at its peak (2e-5; 2e-4 with --lora-rank)")
    options.add_argument("--warmup", type=cli.whole(0), default=100, help="steps (100)")
    options.add_argument("--weight-decay", type=cli.real(0, 10), default=0.0, help="of kernels (0)")
    options.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    options.add_argument("--freeze", nargs="+", default=[], choices=lora.PARTS, help="parts that stay as they are")
    options.add_argument(
        "--lora-rank", type=cli.whole(1), metavar="R", help="train a LoRA adapter of this rank, and no other weights"
    )
    options.add_argument("--lora-alpha", type=cli.real(0, 1e6), metavar="A", help="its scale is A / R (twice the rank)")
    options.add_argument(
        "--lora-targets", nargs="+", choices=lora.TARGETS, metavar="TARGET", default=["text"],
        help=f"which kernels it adapts, of a part or of a name ({', '.join(lora.TARGETS)}; text)",
    )  # fmt: skip
    options.add_argument(
        "--base-dtype", choices=memory.BASE_DTYPES, default="float32",
        help="what the frozen weights under an adapter are kept in (float32)",
    )  # fmt: skip
    options.add_argument(
        "--checkpointing", action="store_true", help="compute each block again for its gradients: less memory, slower"
    )
    options.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    options.add_argument("--save-dtype", choices=("float32", "bfloat16"), default="float32", help="of the result")
    options.add_argument(
        "--save-every", type=cli.real(0, 1e6), default=1.0, metavar="MINUTES", help="what a kill may cost (1)"
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (cpu)")
    options.add_argument("--seed", type=cli.whole(0), default=0, help="of the order, or of the scenes (0)")
    arguments = options.parse_args(argv)
    if not (arguments.output or arguments.plan):
        options.error("--output DIR is needed, or --plan")
    check(arguments)
    if arguments.plan:
        print(plan.of(prepare(arguments)))
        return 0
    absent(arguments.output, "folder")
    with distributed.joined(arguments.device):
        folder = state_folder(arguments.output)
        if (folder / STATE).exists() and distributed.is_first():
            note(f"going on from {folder}")
        with claimed(folder) if distributed.is_first() else nullcontext():
            curve = train(arguments, prepare(arguments))
        if distributed.is_first():
            print(one_line(f"wrote {arguments.output}, loss {curve[-1][2]} after {plural(curve[-1][0], 'step')}"))
    return 0


def share_or_file(text: str) -> float | Path:
    """The type of `--validation`: a share of the data, between 0 and 1, or a file."""
    try:
        share = float(text)
    except ValueError:
        return Path(text)
    if not 0 < share < 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, or a file, not {quote(text)}")
    return share


def check(arguments: Namespace) -> None:
    """Refuse what does not go together, and find the base by its name: its directory becomes `init`."""
    if arguments.lora_rank is None and arguments.base_dtype != "float32":
        raise PaliGemmaError("--base-dtype is for the frozen weights under an adapter; give --lora-rank too")
    if arguments.lora_rank and (arguments.vision or arguments.freeze):
        raise PaliGemmaError(
            "--lora-rank leaves the base as it is: without --freeze, and without --vision, whose tower an adapter "
            "would not bring along"
        )
    base, arguments.init = arguments.init, hub.directory(arguments.init)
    arguments.base = str(base.resolve() if base.exists() else base)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise PaliGemmaError("--device cuda: this build of torch finds no CUDA device")
