"""The service on a free port of this machine, for tests."""

import asyncio
import socket
import threading
from contextlib import contextmanager

import uvicorn

from export.service.app import build


def listening(host="127.0.0.1"):
    """A socket with a port of its own."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((host, 0))
    return found


@contextmanager
def running(backend, options):
    """The base URL of a service over a backend, which is started and stopped with it."""
    place, started, stop = listening(), threading.Event(), None

    async def main():
        nonlocal stop
        loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            build(backend, options), http="h11", loop="asyncio", lifespan="off", log_config=None, log_level="critical"
        )
        server = uvicorn.Server(config)

        async def startup(*arguments, **keywords):
            await type(server).startup(server, *arguments, **keywords)
            started.set()

        server.startup = startup
        stop = lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)  # noqa: E731
        await backend.start()
        try:
            await server.serve(sockets=[place])
        finally:
            await backend.stop()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(120)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        stop()
        thread.join(60)
        assert not thread.is_alive()
