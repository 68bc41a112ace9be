"""Where a service listens."""

import ipaddress
import os
import socket
from contextlib import ExitStack

from numpy_ref.errors import PaliGemmaError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address, which does not listen yet. Raises PaliGemmaError if it cannot have it."""
    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            # told that this is TCP, asyncio sends a small part without waiting until the last one is acknowledged
            found = stack.enter_context(socket.socket(family, kind, protocol))
            if os.name == "posix":
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PaliGemmaError(f"--host {host} --port {port}: cannot listen there ({reason})") from None
        stack.pop_all()
    return found


def url_of(host: str, port: int) -> str:
    """The URL of an address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
