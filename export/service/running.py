"""Running the service: on this machine until a signal, or on Ray Serve."""

import asyncio
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import uvicorn

from numpy_ref import cli
from numpy_ref.errors import PaliGemmaError, one_line

from .. import bundle as bundles
from ..session import CPU, place, shipped
from .address import bind, is_loopback, url_of
from .app import Options, build
from .backend import Backend, Load, ProcessLink
from .limits import TEXT_POSITIONS, Limits
from .worker import Settings

SHIPPED_NAME = "shipped"


def run(arguments: Namespace) -> int:
    """What serve-onnx does; its exit code. Raises PaliGemmaError if it cannot begin."""
    key = read_key(arguments.api_key)
    is_public = not is_loopback(arguments.host)
    if is_public and key is None and not arguments.without_key:
        raise PaliGemmaError(
            f"--host {arguments.host}: others reach this address, and anybody could ask; give --api-key KEY, or "
            "--without-key if something else keeps them away"
        )
    load = load_of(arguments)
    name = arguments.name or (load.bundle.path.name if arguments.bundle else SHIPPED_NAME)
    mebibyte = 2**20
    limits = Limits(
        queued=arguments.queue, body_bytes=arguments.max_body * mebibyte,
        all_bytes=max(512, 4 * arguments.max_body) * mebibyte, choices=min(arguments.slots, Limits.choices),
        request_s=arguments.timeout, fetched_hosts=tuple(arguments.fetch_from),
    )  # fmt: skip
    options = Options(name, limits, key, any_host=is_public, logs=not arguments.no_log)
    if arguments.engine == "ray":
        from . import ray_serve

        return ray_serve.run(load, options, arguments)
    share = max(1, (arguments.threads or os.cpu_count() or 1) // arguments.workers) if arguments.workers > 1 else 0
    load = replace(load, threads=share or arguments.threads)
    listening = bind(arguments.host, arguments.port)
    with listening:
        return asyncio.run(serve(load, options, arguments, listening))


def load_of(arguments: Namespace) -> Load:
    """What every worker loads. The weights are checked here, once."""
    chosen = dict(arguments.provider_option)
    bundle = bundles.load_but_weights(arguments.bundle) if arguments.bundle else shipped(arguments.provider, chosen)
    bundles.check_weights_once(bundle)
    # Chosen here, so that what there is to say about it is printed once and not by every worker.
    provider = "cpu" if place(bundle, arguments.provider, chosen) == CPU else "cuda"
    positions = arguments.positions or bundle.config.vision.patches + TEXT_POSITIONS
    settings = Settings(arguments.slots, positions, arguments.gap, arguments.picture_cache * 2**20)
    return Load(bundle, provider, chosen, arguments.threads, settings)


def read_key(given: str | None) -> str | None:
    """The API key, out of a file for @FILE. Raises PaliGemmaError if it is empty."""
    if given is None:
        return None
    key = cli.read_prompt(given).strip() if given.startswith("@") else given
    if not key:
        raise PaliGemmaError("--api-key: the key is empty")
    return key


async def serve(load: Load, options: Options, arguments: Namespace, listening: socket.socket) -> int:
    """Load the workers, and answer until a signal. Raises KeyboardInterrupt if that was Ctrl-C."""
    backend = Backend([ProcessLink(load) for _ in range(arguments.workers)])
    await backend.start()
    try:
        config = uvicorn.Config(
            build(backend, options), http="h11", loop="asyncio", ws="none", lifespan="off", log_config=None,
            log_level="critical", access_log=False, server_header=False, timeout_graceful_shutdown=arguments.grace,
            h11_max_incomplete_event_size=65536,
        )  # fmt: skip
        server = Server(config)
        listening.listen()  # whoever reads the line may ask at once
        where = url_of(*listening.getsockname()[:2])
        print(one_line(f"{where}/v1 answers with the model {options.model}; Ctrl-C stops it"), flush=True)
        await server.serve(sockets=[listening])
    finally:
        await backend.stop()
    if server.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


class Server(uvicorn.Server):
    """Finishes what runs on the first SIGTERM or Ctrl-C, and accepts nothing new; the second one ends it at once."""

    stopped_by = 0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Have both signals stop it, while it serves."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take note of a signal."""
        self.force_exit, self.should_exit = self.should_exit, True
        self.stopped_by = self.stopped_by or sig
