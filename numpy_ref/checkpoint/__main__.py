"""python -m numpy_ref.checkpoint convert SRC DST: between Hugging Face directories and big_vision .npz files."""

import sys

from ..cli import Parser, run
from ..errors import note, one_line
from . import convert, left_behind

PROG = "python -m numpy_ref.checkpoint"


def main(argv=None):
    options = Parser(prog=PROG)
    command = options.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "convert", help="Hugging Face directory <-> big_vision .npz"
    )
    command.add_argument("source", metavar="SRC", help="a Hugging Face directory or a .npz")
    command.add_argument("target", metavar="DST", help="a new directory, or a new file that ends in .npz")
    command.add_argument("--tokenizer", metavar="FILE", help="the tokenizer.model or .json for the new directory")
    arguments = options.parse_args(argv)
    omitted = convert(arguments.source, arguments.target, arguments.tokenizer)
    if omitted:
        note(f"{PROG}: warning: a .npz cannot record these settings of the model: {', '.join(omitted)}")
    if left := left_behind(arguments.source, arguments.target):
        note(f"{PROG}: warning: a .npz holds weights alone; keep {', '.join(left)} beside it")
    print(one_line(f"wrote {arguments.target}"))
    return 0


if __name__ == "__main__":
    sys.exit(run(PROG, main))
