"""python -m numpy_ref.dataset convert SRC --output DIR: COCO, Pascal VOC, parquet, WebDataset as lines to train on."""

import sys
from pathlib import Path

from ..checkpoint import SHIPPED, hub
from ..cli import Parser, run
from ..cli.drawing import check_drawing, write_drawing
from ..errors import note, one_line
from ..files import absent
from .convert import MOST_LINES, Problems, codec_of, convert, open_rows, preview, speller, summary
from .rows import TASKS, Options

PROG = "python -m numpy_ref.dataset"


def main(argv=None):
    options = Parser(prog=PROG, description="Data sets of others as lines to train on.")
    command = options.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "convert", help="COCO, Pascal VOC, parquet or WebDataset -> rows.jsonl"
    )
    command.add_argument(
        "source", type=Path, metavar="SRC",
        help="COCO's FILE.json, a folder of Pascal VOC, a file or folder of .parquet, or one of .tar (WebDataset)",
    )  # fmt: skip
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new folder to write")
    command.add_argument("--task", choices=TASKS, default="detect", help="what boxes and masks are used for (detect)")
    command.add_argument("--images", type=Path, metavar="DIR", help="where the pictures of COCO or Pascal VOC lie")
    command.add_argument(
        "--all-labels", action="store_true",
        help="detect every label of the data set in each picture (those that the picture has)",
    )  # fmt: skip
    command.add_argument("--prefix", metavar="PROMPT", help="of rows with an answer and no question")
    command.add_argument(
        "--codec", type=Path, metavar="CHECKPOINT", default=SHIPPED,
        help="whose vae.npz spells masks: that of the model to be trained (the shipped one)",
    )  # fmt: skip
    command.add_argument("--draw", type=Path, metavar="OUT.png", help="draw the first twelve rows as they were read")
    arguments = options.parse_args(argv)
    absent(arguments.output, "folder")
    if arguments.draw:
        check_drawing(arguments.draw)
    needs_codec = arguments.task == "segment"
    params, masks = codec_of(hub.directory(arguments.codec)) if needs_codec else (None, None)
    wanted = Options(arguments.task, prefix=arguments.prefix, spell=speller(params) if params else None)
    problems = Problems()
    rows = open_rows(arguments.source, arguments.images, wanted, arguments.all_labels, problems)
    lines = convert(rows, arguments.output, problems)
    if problems.count > MOST_LINES:
        note(f"left out: {problems.count - MOST_LINES} more")
    if arguments.draw:
        write_drawing(arguments.draw, preview(arguments.output, lines, masks))
    print(one_line(summary(lines, problems.count, arguments.output)))
    return 0


if __name__ == "__main__":
    sys.exit(run(PROG, main))
