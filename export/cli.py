"""The commands `export-onnx`, `run-onnx` and `run-onnx-batch`."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from numpy_ref import interrupts

with interrupts.while_loading():
    from numpy_ref import checkpoint as checkpoints
    from numpy_ref import cli, files
    from numpy_ref.cli.options import check_on_cores, on_cores, pair
    from numpy_ref.errors import listed, note, one_line, plural
    from numpy_ref.model.sampling import Sampling

    from . import bundle as bundles
    from . import layouts
    from .model.layers import OPERATORS
    from .stopping import leave, stoppable

SCHEMA = Path(__file__).parent / "answer.schema.json"
SOME_FAILED = 3  # the exit code that --fail-on-error asks for; 1 is an error, 2 a wrong command line


def export_onnx(argv: Sequence[str] | None = None) -> int | None:
    """export-onnx [CHECKPOINT] --output DIR: write a bundle."""
    options = cli.Parser(prog="export-onnx", description="Write an ONNX bundle of a PaliGemma checkpoint.")
    options.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT",
        help="a Hugging Face PaliGemma directory, its Hub id (google/paligemma2-3b-mix-224, perhaps with @REVISION) or "
        "a big_vision .npz; left out: the base that --adapter names, or the model that ships",
    )  # fmt: skip
    cli.add_adapter_option(options)
    options.add_argument("--output", type=Path, metavar="DIR", help="the new directory to write")
    options.add_argument(
        "--layout", choices=layouts.LAYOUTS, default=layouts.BUNDLE,
        help="for whom: this project's hosts (bundle), or the libraries transformers.js and onnxruntime-genai; the "
        "same command again adds another --precision to a directory for transformers.js",
    )  # fmt: skip
    options.add_argument(
        "--precision", choices=bundles.weights.PRECISIONS, default="float32",
        help="precision of the weights (float32): float32, int8, int4 and int2 for the CPU, the others for CUDA; int2 "
        "needs --calibrate; int4-float16 has weights in four bits and activations in float16",
    )  # fmt: skip
    options.add_argument(
        "--operators", choices=OPERATORS,
        help="standard ones alone, or ONNX Runtime's own where they are quicker (fused); float32 runs on CUDA with "
        "portable ones",
    )  # fmt: skip
    options.add_argument(
        "--residual", choices=tuple(bundles.weights.FLOATS), metavar="DTYPE",
        help="dtype of the residual stream, of fused operators in half precision: float32, which cannot overflow (the "
        "default in float16), or that of the weights, which is quicker (the default in bfloat16)",
    )  # fmt: skip
    options.add_argument(
        "--max-length",
        type=cli.whole(1),
        metavar="C",
        help="longest prompt and answer together (the model's own limit)",
    )
    options.add_argument(
        "--verify", action="store_true", help="compare every stage with the NumPy reference, print the table"
    )
    options.add_argument(
        "--prepack", action="store_true",
        help="keep the weights in the order of this processor's kernels too: sessions share them, for twice the disk",
    )  # fmt: skip
    options.add_argument(
        "--calibrate", type=Path, metavar="ROWS.jsonl",
        help='choose weights in four bits or two by rows with "image", "prompt" and perhaps "answer", so that those '
        "are answered as in float32, as nearly as can be; it takes minutes for a billion weights",
    )  # fmt: skip
    options.add_argument("--plan", action="store_true", help="print what would be written, and write nothing")
    arguments = options.parse_args(argv)
    if not arguments.output and not arguments.plan:
        options.error("--output DIR is required (or --plan, to see what would be written)")
    if arguments.layout != layouts.BUNDLE:
        return _export_layout(options, arguments)
    if arguments.calibrate:
        from . import calibration

        calibration.check(arguments.precision)
    checkpoint = checkpoints.load(arguments.checkpoint, arguments.adapter)
    calibrate = (
        calibration.by_rows(checkpoint, arguments.calibrate, arguments.precision) if arguments.calibrate else None
    )
    if arguments.plan:
        wanted = arguments.precision, arguments.max_length, arguments.operators, arguments.residual, arguments.prepack
        return _print_plan(bundles.plan(checkpoint, *wanted))
    if arguments.precision in bundles.weights.CALIBRATED and not calibrate and bundles.has_tokenizer(checkpoint):
        options.error(f"--precision {arguments.precision} needs --calibrate ROWS.jsonl, to choose its weights by")
    verify = None
    if arguments.verify:
        from . import verify as verification

        verify = verification.verify
        verification.check(checkpoint, arguments.precision)  # before gigabytes are written
    bundles.write(
        checkpoint, arguments.output, arguments.precision, arguments.max_length, verify, arguments.operators,
        arguments.prepack, arguments.residual, answered=True, calibrate=calibrate,
    )  # fmt: skip
    print(one_line(f"wrote {arguments.output}"))
    return 0


def _export_layout(options, arguments) -> int:
    """What export-onnx does for other libraries."""
    for name in ("prepack", "residual", "calibrate"):
        if getattr(arguments, name):
            options.error(f"argument --{name}: not with --layout {arguments.layout}")
    checkpoint = checkpoints.load(arguments.checkpoint, arguments.adapter)
    wanted = arguments.layout, arguments.precision, arguments.max_length
    if arguments.plan:
        return _print_plan(layouts.plan(checkpoint, *wanted, arguments.operators))
    verify = None
    if arguments.verify:
        from .layouts import verify as verification

        verify = verification.verify
    layouts.write(checkpoint, arguments.output, *wanted, verify, arguments.operators)
    print(one_line(f"wrote {arguments.output}"))
    return 0


def _print_plan(plan):
    width = max(20, *(len(name) + 2 for name in plan["files"]))
    for name, size in plan["files"].items():
        print(f"{name:<{width}}{size:>18,} bytes")
    print(f"{'in all':<{width}}{sum(plan['files'].values()):>18,} bytes")
    print(f"{'memory':<{width}}{plan['memory']:>18,} bytes beside the mapped checkpoint")
    return 0


def run_onnx(argv: Sequence[str] | None = None) -> int | None:
    """run-onnx [BUNDLE] IMAGE [IMAGE ...] PROMPT [PROMPT ...]: answer with a bundle.

    run-onnx --serve [BUNDLE]: a page that does.
    """
    if "--serve" in (sys.argv[1:] if argv is None else argv):
        return _serve(argv)
    options = cli.parser("run-onnx", "BUNDLE", "Answer a prompt about a picture with an ONNX bundle.")
    options.add_argument("--threads", type=on_cores(0), default=0, metavar="N", help="on the CPU, 0 for all (0)")
    options.add_argument("--serve", action="store_true", help="serve a page that answers; see run-onnx --serve --help")
    options.add_argument("--json-schema", action=_PrintSchema, help="print the JSON Schema of what --json prints")
    options.add_argument(
        "--host-graphs", action="store_true", help="prepare the picture and draw tokens by the bundle's own graphs"
    )
    _add_provider_options(options)
    _add_timeout(options)
    arguments = cli.parse(options, argv)

    def load(path):
        from .api import PaliGemma

        return PaliGemma.load(
            path, arguments.provider, arguments.threads, host_graphs=arguments.host_graphs,
            provider_options=dict(arguments.provider_option), in_halves=len(arguments.prompts) > 1,
        )  # fmt: skip

    return stoppable(lambda: cli.answer(arguments, load), arguments.timeout)


class _PrintSchema(argparse.Action):
    """What `--json-schema` does, as `--version`."""

    def __init__(self, **keywords):
        super().__init__(**keywords, nargs=0)

    def __call__(self, parser, *arguments):
        print(SCHEMA.read_text(encoding="utf-8"), end="")
        parser.exit()


def _serve(argv):
    options = cli.Parser(
        prog="run-onnx --serve", description="Serve a page that runs a bundle in the browser, on this machine alone."
    )  # fmt: skip
    options.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="left out: the model that ships")
    options.add_argument(
        "--port", type=cli.whole(0, 65535), default=8000, metavar="P", help="to listen on, 0 for any (8000)"
    )
    arguments = options.parse_args(argv)
    from .serve import serve

    serve(arguments.bundle, arguments.port)


def _left_out(names) -> str:
    """What a folder has besides pictures, by count and name."""
    endings = Counter(Path(name).suffix.lower() for name in names)
    kinds = listed(f"{count} {kind or 'without ending'}" for kind, count in endings.most_common())
    files = plural(len(names), "file")
    return f"{files} left out, by their endings not pictures that can be read: {kinds} ({listed(names)})"


def _add_provider_options(options):
    options.add_argument(
        "--provider-option", action="append", default=[], type=pair, metavar="KEY=VALUE",
        help="an option of the CUDA provider, such as device_id=1 or enable_cuda_graph=1",
    )  # fmt: skip


def _add_timeout(options):
    options.add_argument(
        "--timeout", type=cli.real(0.001, 1e9), metavar="SECONDS",
        help="give up after so long, loading included (never): for bundles that may hold an endless graph",
    )  # fmt: skip


def run_onnx_batch(argv: Sequence[str] | None = None) -> int | None:
    """run-onnx-batch [BUNDLE] --input ROWS --prompt PROMPT --output OUT.jsonl: answer about every row of a data set."""
    options = cli.Parser(
        prog="run-onnx-batch", description="Answer about every picture of a data set with an ONNX bundle. The same "
        "command again goes on where one was stopped.",
    )  # fmt: skip
    options.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="left out: the model that ships")
    options.add_argument(
        "--input", type=Path, required=True, metavar="ROWS",
        help='a folder of pictures; or a .jsonl or .parquet file of rows with "image", a picture or a list of them, '
        'and perhaps "prompt" or "prefix"',
    )  # fmt: skip
    options.add_argument("--prompt", metavar="PROMPT", help=f"for rows without; {cli.PROMPT_HELP}")
    options.add_argument("--output", type=Path, required=True, metavar="OUT.jsonl", help="the new file to write")
    options.add_argument("--batch-size", type=cli.whole(1), default=8, metavar="N", help="rows answered at once (8)")
    options.add_argument("--workers", type=cli.whole(1), default=1, metavar="N", help="processes, a session each (1)")
    options.add_argument(
        "--threads",
        type=cli.whole(0),
        default=0,
        metavar="N",
        help="on the CPU, the workers' together, 0 for all (0)",
    )
    options.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="workers on this machine, or Ray's (local)"
    )
    options.add_argument(
        "--fail-on-error", action="store_true",
        help=f"exit with {SOME_FAILED} where rows could not be answered; the output is written all the same",
    )  # fmt: skip
    cli.add_answer_options(options)
    options.add_argument("--masks", action="store_true", help="add masks, as run-onnx --json has them")
    _add_provider_options(options)
    _add_timeout(options)
    arguments = options.parse_args(argv)
    if arguments.engine == "local":
        check_on_cores(options, arguments, "threads", "workers")
        return stoppable(lambda: _answer_rows(options.prog, arguments), arguments.timeout)
    if arguments.timeout:
        options.error("argument --timeout: not with --engine ray, whose workers are Ray's to stop")
    return _answer_rows(options.prog, arguments)


def _answer_rows(prog, arguments) -> int:
    """What run-onnx-batch does."""
    files.absent(arguments.output, "file")
    prompt = None if arguments.prompt is None else cli.read_prompt(arguments.prompt)

    from . import batch
    from .batch import dataset
    from .session import shipped

    rows = dataset.open_dataset(arguments.input, prompt)
    if rows.left_out:
        note(f"{prog}: warning: {_left_out(rows.left_out)}")
    if arguments.engine == "ray":
        from .batch.ray_workers import workers
    else:
        from .batch import workers
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    chosen = dict(arguments.provider_option)
    bundle = bundles.load(arguments.bundle) if arguments.bundle else shipped(arguments.provider, chosen)
    job = batch.Job(
        rows, bundle, prompt, arguments.max_new_tokens, sampling, arguments.boxes, arguments.provider, chosen,
        arguments.transparency, arguments.masks,
    )  # fmt: skip
    start_workers = partial(workers, count=arguments.workers, threads=arguments.threads)
    count, errors = batch.run(job, arguments.output, arguments.batch_size, start_workers)
    failed = f", {errors} of them {'an error' if errors == 1 else 'errors'}" if errors else ""
    print(one_line(f"wrote {arguments.output}: {plural(count, 'row')}{failed}"))
    return SOME_FAILED if errors and arguments.fail_on_error else 0


def export_main() -> NoReturn:
    leave(cli.run("export-onnx", export_onnx))


def run_main() -> NoReturn:
    leave(cli.run("run-onnx", run_onnx))


def batch_main() -> NoReturn:
    leave(cli.run("run-onnx-batch", run_onnx_batch))


if __name__ == "__main__":
    run_main()
