"""The command `serve-onnx`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from numpy_ref import interrupts

with interrupts.while_loading():
    from numpy_ref import cli
    from numpy_ref.cli.options import check_on_cores, pair
    from numpy_ref.errors import PaliGemmaError

    from ..stopping import leave
    from .limits import TEXT_POSITIONS

PROG = "serve-onnx"
INSTALL = (
    "serve-onnx needs more than is installed ({}; the extra `serve`): "
    "pip install starlette uvicorn pydantic python-multipart prometheus_client httpx"
)
KEY_HELP = "ask every request for it, as OpenAI's clients send theirs; @FILE reads it from a file"


def serve_onnx(argv: Sequence[str] | None = None) -> int | None:
    """serve-onnx [BUNDLE]: answer over HTTP, as OpenAI's API does, many requests at once."""
    options = cli.Parser(prog=PROG, description="Answer over HTTP, as OpenAI's API does, many requests at once.")
    options.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="left out: the model that ships")
    options.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1)")
    options.add_argument("--port", type=cli.whole(0, 65535), default=8000, metavar="P", help="0 for any (8000)")
    options.add_argument("--name", metavar="NAME", help="of the model, which requests may give (the bundle's folder)")
    options.add_argument("--api-key", metavar="KEY", help=KEY_HELP)
    options.add_argument(
        "--without-key",
        action="store_true",
        help="let anybody ask who reaches an address that others reach",
    )
    options.add_argument("--slots", type=cli.whole(1, 256), default=8, metavar="N", help="answers at once (8)")
    options.add_argument(
        "--positions", type=cli.whole(1), metavar="C",
        help=f"of a slot: a prompt, its pictures and its answer (a picture's and {TEXT_POSITIONS})",
    )  # fmt: skip
    options.add_argument(
        "--gap", type=cli.real(0, 3600), default=0.25, metavar="SECONDS",
        help="how long new requests together may hold up the others; one alone may take longer (0.25)",
    )  # fmt: skip
    options.add_argument("--queue", type=cli.whole(0), default=64, metavar="N", help="answers that may wait (64)")
    options.add_argument(
        "--timeout",
        type=cli.real(0.001, 1e6),
        default=120.0,
        metavar="SECONDS",
        help="for an answer (120)",
    )
    options.add_argument("--max-body", type=cli.whole(1, 2048), default=32, metavar="MIB", help="of a request (32)")
    options.add_argument(
        "--picture-cache", type=cli.whole(0, 2**20), default=256, metavar="MIB", help="for recent pictures (256)"
    )
    options.add_argument(
        "--fetch-from", action="append", default=[], metavar="HOST",
        help="a host whose pictures may be fetched by their URL; none is otherwise",
    )  # fmt: skip
    options.add_argument("--workers", type=cli.whole(1), default=1, metavar="N", help="processes, a model each (1)")
    options.add_argument(
        "--threads", type=cli.whole(0), default=0, metavar="N", help="on the CPU, the workers' together, 0 for all (0)"
    )
    options.add_argument("--grace", type=cli.real(0, 1e6), default=60.0, metavar="SECONDS",
                         help="for what is being answered when the service is stopped (60)")  # fmt: skip
    options.add_argument("--no-log", action="store_true", help="print no line for each request")
    options.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (auto)")
    options.add_argument(
        "--provider-option", action="append", default=[], type=pair, metavar="KEY=VALUE",
        help="an option of the CUDA provider, such as device_id=1 or enable_cuda_graph=1",
    )  # fmt: skip
    options.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="processes of this machine, or Ray Serve (local)"
    )
    options.add_argument("--replicas", type=cli.whole(1), default=1, metavar="N", help="with --engine ray (1)")
    options.add_argument(
        "--autoscale", action="append", default=[], type=pair, metavar="KEY=VALUE",
        help="with --engine ray, of Ray Serve's autoscaling_config, such as max_replicas=4",
    )  # fmt: skip
    arguments = options.parse_args(argv)
    if arguments.engine == "local":
        check_on_cores(options, arguments, "threads", "workers")
        for name, is_given in (("replicas", arguments.replicas > 1), ("autoscale", arguments.autoscale)):
            if is_given:
                options.error(f"argument --{name}: only with --engine ray")
    elif arguments.workers > 1:
        options.error("argument --workers: with --engine ray it is --replicas")
    try:
        from . import running
    except ImportError as error:
        raise PaliGemmaError(INSTALL.format(str(error.name).partition(".")[0])) from None
    return running.run(arguments)


def serve_main() -> NoReturn:
    leave(cli.run(PROG, serve_onnx))


if __name__ == "__main__":
    serve_main()
