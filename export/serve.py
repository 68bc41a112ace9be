"""run-onnx --serve: the page of `export/hosts/web` with a bundle, on this machine alone.

Serves what the page needs and nothing else: its own modules, the two libraries that `npm ci` puts beside it, the files
that the bundle's description lists, and the example picture.
"""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from pathlib import Path
from urllib.parse import unquote, urlsplit

from numpy_ref import checkpoint as checkpoints
from numpy_ref import knows
from numpy_ref.errors import PaliGemmaError, note, one_line
from numpy_ref.files import opened, within

from . import bundle as bundles

ADDRESS = "127.0.0.1"
HTTP_PORT = 80  # which browsers leave out of the Host header
HOSTS = Path(__file__).parent / "hosts"
LIBRARIES = ("node_modules/onnxruntime-web/dist", "node_modules/@huggingface/tokenizers/dist")
PAGE = "/web/"
PAGE_FILES = ("index.html", "style.css", "page.mjs", "engines.mjs", "browser.mjs", "pictures.mjs", "worker.mjs")
HEADERS = {
    # What a browser asks of a page that uses threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The page talks to this server alone.
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {
    ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json", ".html": "text/html",
    ".css": "text/css", ".png": "image/png",
}  # fmt: skip
#: What a stranger wrote is bytes, whatever its name: no page, no script, no style, no picture that could hold one.
_FROM_BUNDLE = {"Content-Security-Policy": "sandbox; default-src 'none'; frame-ancestors 'none'"}
_BUNDLE_TYPE = "application/octet-stream"


def serve(path: Path | None, port: int = 0) -> None:
    """Serve a bundle, or the shipped model's, until interrupted. Raises PaliGemmaError if it cannot."""
    bundle = bundles.load(path) if path else bundles.shipped()
    with open_server(bundle, port) as server:
        address = f"http://{ADDRESS}:{server.server_port}{PAGE}"
        print(one_line(f"{address} serves {bundle.path}; Ctrl-C stops it"), flush=True)
        server.serve_forever()


def open_server(bundle: bundles.Bundle, port: int = 0) -> ThreadingHTTPServer:
    """A server that listens, port 0 being any that is free."""
    if not all((HOSTS / folder).is_dir() for folder in LIBRARIES):
        _fetch_libraries()
    handler = partial(_Handler, files_of(bundle))
    try:
        return _Server((ADDRESS, port), handler)
    except OSError as error:
        raise PaliGemmaError(f"--port {port}: cannot listen on {ADDRESS} ({error.strerror})") from None


def _fetch_libraries() -> None:
    """Have npm put the page's libraries where they belong: the versions, and checksums, of package-lock.json."""
    # What is optional is for Node.
    command = ["npm", "ci", "--omit=dev", "--omit=optional", "--no-audit", "--no-fund", "--prefix", str(HOSTS)]
    if not (npm := shutil.which("npm")):
        raise PaliGemmaError(f"the page's libraries are missing, and so is npm (nodejs.org); then: {' '.join(command)}")
    note(f"fetching the page's libraries: {' '.join(command)}")
    done = subprocess.run([npm, *command[1:]], capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if "error" in line] or ["it gave no reason"]
        raise PaliGemmaError(f"{' '.join(command)} failed: {reason[0].strip()}")


@dataclass(frozen=True)
class Served:
    """A file, and of what kind it is to the browser. One out of a bundle has as many bytes as it had when checked."""

    file: Path
    kind: str
    bundled: bool = False
    size: int | None = None


def files_of(bundle: bundles.Bundle) -> dict[str, Served]:
    """Every path that is served -> what is."""
    files = {f"/{file.relative_to(HOSTS).as_posix()}": file for file in [*HOSTS.glob("common/*.mjs"), *_page_files()]}
    for folder in LIBRARIES:  # which are not there before they were fetched
        libraries = (file for file in (HOSTS / folder).glob("*") if file.suffix in (".mjs", ".wasm"))
        files |= {f"/{folder}/{file.name}": file for file in libraries}
    files |= {PAGE: HOSTS / "web" / "index.html"}
    files |= {f"/{file.name}": file for file in checkpoints.SHIPPED.glob("example*.png")}
    served = {path: Served(file, _TYPES[file.suffix]) for path, file in files.items()}
    for name, listed in bundle.description.files.items():
        served[f"/bundle/{name}"] = Served(bundle.path / name, _BUNDLE_TYPE, True, listed.bytes)
    if knows.FILE in bundle.description.files:  # of a model that a server runs too, whose bundle no page fetches
        served[f"/{knows.FILE}"] = Served(bundle.path / knows.FILE, "application/json", True)
    served[f"/bundle/{bundles.DESCRIPTION}"] = Served(bundle.path / bundles.DESCRIPTION, "application/json", True)
    return served


def _page_files():
    return (HOSTS / "web" / name for name in PAGE_FILES)


@contextmanager
def opened_served(served: Served) -> Iterator[tuple[BufferedReader, int]]:
    """A served file to read, and its size. Raises OSError or PaliGemmaError if it is not the one that it was."""
    if served.bundled:
        within(served.file.parent, served.file.name)  # still: it may have become a link
    with opened(served.file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if served.size not in (None, size):
            raise OSError(errno.ESTALE, "another file by now")
        yield stream, size


def headers_of(served: Served, size: int) -> dict[str, str]:
    """The headers of a file that is sent."""
    headers = {**HEADERS, "Content-Type": served.kind, "Content-Length": str(size)}
    return headers | (_FROM_BUNDLE if served.bundled else {})


def may_have(served: Served, headers: Mapping[str, str] | Message) -> bool:
    """Whether whoever sends these headers may have a file.

    A bundle's is for a page that asks for data, and not for a document, a script, a style or a service worker.
    """
    kind = headers.get("Sec-Fetch-Dest", "empty")  # older browsers, and all other programs, say nothing
    return not served.bundled or (kind == "empty" and "Service-Worker" not in headers)


class _Server(ThreadingHTTPServer):
    def get_request(self):
        """A connection on which a body does not wait for the browser's word that it has the headers."""
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection, address

    def handle_error(self, request, client_address):
        """A connection that broke is the browser's affair; anything else is told in a line."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            note(f"run-onnx: a request failed ({error!r})")


class _Handler(BaseHTTPRequestHandler):
    server: ThreadingHTTPServer
    timeout = 30  # seconds that a silent connection is kept
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "run-onnx", ""

    def __init__(self, files, *arguments):
        self.files = files
        super().__init__(*arguments)

    def do_GET(self):
        self._answer(with_body=True)

    def do_HEAD(self):
        self._answer(with_body=False)

    def _answer(self, with_body):
        try:
            path = unquote(urlsplit(self.path).path)
        except ValueError:  # half an IPv6 address, for one
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        if self.headers.get("Host", "") not in self._names():  # another site's name may point to this machine
            self._refuse(HTTPStatus.FORBIDDEN)
        elif path == "/":
            self._head(HTTPStatus.FOUND, {"Location": PAGE, "Content-Length": "0"})
        elif path not in self.files:
            self._refuse(HTTPStatus.NOT_FOUND)
        elif not may_have(self.files[path], self.headers):
            self._refuse(HTTPStatus.FORBIDDEN)
        else:
            self._send(self.files[path], with_body)

    def _send(self, served, with_body):
        sent = False
        try:
            with opened_served(served) as (stream, size):
                sent = True
                self._head(HTTPStatus.OK, headers_of(served, size))
                if with_body:
                    self._copy(stream, size)
        except (OSError, PaliGemmaError) as error:
            if isinstance(error, ConnectionError | TimeoutError) or sent:
                raise
            note(f"run-onnx: {served.file} is not served any more ({error})")
            self._refuse(HTTPStatus.NOT_FOUND)

    def _copy(self, stream, size) -> None:
        """Send so many bytes: a file that grows must not become the next answer, nor one that shrinks its head."""
        while size and (block := stream.read(min(size, 2**20))):
            self.wfile.write(block)
            size -= len(block)
        self.close_connection = self.close_connection or size > 0

    def _refuse(self, status):
        self._head(status, {"Content-Length": "0"})

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _names(self):
        names, port = (ADDRESS, "localhost"), self.server.server_port
        return {f"{name}:{port}" for name in names} | (set(names) if port == HTTP_PORT else set())

    def log_message(self, *arguments):
        """The page shows what matters."""
