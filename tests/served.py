"""The service on a free port of this machine, for tests."""

import asyncio
import threading
from contextlib import contextmanager

import uvicorn

from export.service.address import bind
from export.service.app import build


@contextmanager
def running(backend, options):
    """The base URL of a service over a backend, which is started and stopped with it."""
    place, started, stop = bind("127.0.0.1", 0), threading.Event(), None

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
