"""run-onnx --serve: the page's server gives out what it must, to this machine, and nothing else."""

import http.client
import os
import re
import shutil
import socket
import threading
from contextlib import closing, contextmanager
from urllib.parse import urljoin

import pytest

from export import bundle, cli, serve
from numpy_ref.cli import run
from numpy_ref.errors import PaliGemmaError

from .fuzz import corpus


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The folder of the hosts, with stand-ins where npm ci puts libraries."""
    hosts = tmp_path_factory.mktemp("hosts")
    for folder in ("common", "web"):
        (hosts / folder).mkdir()
        for file in (serve.HOSTS / folder).iterdir():
            if file.is_file():
                (hosts / folder / file.name).write_bytes(file.read_bytes())
    for folder in serve.LIBRARIES:
        (hosts / folder).mkdir(parents=True)
        (hosts / folder / "library.mjs").write_text("export default 1;\n")
    (hosts / "node_modules" / "secret.mjs").write_text("not served")
    return hosts


@pytest.fixture(scope="module")
def port(libraries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "HOSTS", libraries)
        with serve.open_server(bundle.shipped()) as server:
            assert server.server_address[0] == "127.0.0.1"
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            yield server.server_port
            server.shutdown()
            thread.join()


def ask(port, path, method="GET", **headers):
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/web/", "text/html"), ("/web/style.css", "text/css"), ("/web/page.mjs", "text/javascript"),
        ("/common/generate.mjs", "text/javascript"), (f"/{serve.LIBRARIES[0]}/library.mjs", "text/javascript"),
        ("/bundle/bundle.json", "application/json"), ("/bundle/weights.bin", "application/octet-stream"),
        ("/example.png", "image/png"), ("/web/?backend=wasm", "text/html"),
    ],
)  # fmt: skip
def test_what_is_served(port, path, kind):
    response, body = ask(port, path)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith(kind)
    assert len(body) == int(response.headers["Content-Length"]) > 0
    head, nothing = ask(port, path, "HEAD")
    assert (head.status, nothing, head.headers["Content-Length"]) == (200, b"", response.headers["Content-Length"])


def test_headers_keep_the_page_to_itself(port):
    headers = ask(port, "/web/")[0].headers
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"  # with the next, what threads need
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe-eval" not in policy.replace("wasm-unsafe-eval", "")


STRANGE = ("evil.html", "evil.mjs", "evil.js", "evil.svg", "evil.css", "evil.wasm", "evil.xhtml", "evil", "evil.json")


@pytest.fixture
def strangers(copy, libraries, monkeypatch):
    """The port that serves a bundle with files that a browser would run, and the bundle's folder."""
    for name in STRANGE:
        corpus.sealed(copy, name, b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    monkeypatch.setattr(serve, "HOSTS", libraries)
    with serve.open_server(bundle.load(copy)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server.server_port, copy
        server.shutdown()
        thread.join()


def test_what_a_stranger_wrote_is_bytes(strangers):
    """To the browser no page, script, style or picture, whatever its name; and no service worker."""
    port, folder = strangers
    for name in (*STRANGE, *(file.name for file in folder.iterdir())):
        response, _ = ask(port, f"/bundle/{name}")
        assert response.status == 200
        kind = "application/json" if name == bundle.DESCRIPTION else "application/octet-stream"
        assert response.headers.get_all("Content-Type") == [kind]
        (policy,) = response.headers.get_all("Content-Security-Policy")
        assert policy.startswith("sandbox; default-src 'none'")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        for use in ("document", "iframe", "script", "worker", "serviceworker", "style", "image", "object", "embed"):
            assert ask(port, f"/bundle/{name}", **{"Sec-Fetch-Dest": use})[0].status == 403
        assert ask(port, f"/bundle/{name}", **{"Service-Worker": "script"})[0].status == 403
        assert ask(port, f"/bundle/{name}", **{"Sec-Fetch-Dest": "empty"})[0].status == 200


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "absent", "longer", "shorter"])
@pytest.mark.parametrize("name", ["evil.json", bundle.DESCRIPTION])
def test_files_that_were_changed_are_not_served(strangers, tmp_path, capfd, name, kind):
    port, folder = strangers
    file = folder / name
    (tmp_path / "secret").write_bytes(b"secret".ljust(file.stat().st_size))
    contents = file.read_bytes()
    file.unlink()
    {"link": lambda: file.symlink_to(tmp_path / "secret"), "fifo": lambda: os.mkfifo(file), "folder": file.mkdir,
     "absent": lambda: None, "longer": lambda: file.write_bytes(contents + b" "),
     "shorter": lambda: file.write_bytes(contents[:-1])}[kind]()  # fmt: skip
    response, body = ask(port, f"/bundle/{name}")
    assert b"secret" not in body
    assert response.status == (200 if name == bundle.DESCRIPTION and kind in ("longer", "shorter") else 404)
    assert "Traceback" not in capfd.readouterr().err


def test_a_file_that_grows_while_it_is_sent_ends_where_it_was(strangers, monkeypatch):
    """Two answers on one connection: what came to the file is not taken for the second."""
    port, folder = strangers
    file, opened = folder / bundle.DESCRIPTION, serve.opened
    size = file.stat().st_size

    @contextmanager
    def growing(path):
        with opened(path) as stream:
            fstat = os.fstat(stream.fileno())
            monkeypatch.setattr(serve.os, "fstat", lambda descriptor: fstat)
            with file.open("ab") as more:
                more.write(b"HTTP/1.1 200 OK\r\n\r\nsmuggled")
            yield stream

    monkeypatch.setattr(serve, "opened", growing)
    response, body = ask(port, f"/bundle/{bundle.DESCRIPTION}")
    assert len(body) == int(response.headers["Content-Length"]) == size
    assert b"smuggled" not in body


def test_the_root_leads_to_the_page(port):
    response, _ = ask(port, "/")
    assert (response.status, response.headers["Location"]) == (302, "/web/")


@pytest.mark.parametrize(
    "path",
    [
        "/web", "/web/../serve.py", "/web/%2e%2e/serve.py", "/bundle/../../../../etc/passwd", "//etc/passwd", "/bundle/",
        "/bundle/%00", "/node_modules/secret.mjs", "/web/package.json", "/node/index.mjs", "/common/", "/\udcff",
        "/bundle/..%2f..%2fetc%2fpasswd", "http://127.0.0.1/web/../../serve.py",
    ],
)  # fmt: skip
def test_nothing_else_is(port, path):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        line = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
        connection.sendall(line.encode("utf-8", "surrogateescape"))
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 404")


def test_another_sites_name_is_refused(port):
    assert ask(port, "/web/", Host=f"evil.example:{port}")[0].status == 403
    assert ask(port, "/web/", Host=f"localhost:{port}")[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "BREW"])
def test_other_methods_are_refused(port, method):
    assert ask(port, "/web/", method)[0].status == 501


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\xff\xfe\x00" * 99,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 70000,
        b"GET http://[ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ],
)
def test_malformed_requests_are_survived(port, request_, capfd):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        connection.makefile("rb").read()
    assert ask(port, "/web/")[0].status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_silent_connection_holds_nobody_up(port):
    with socket.create_connection(("127.0.0.1", port)):
        assert ask(port, "/web/")[0].status == 200


def test_a_port_that_is_taken(port, libraries, monkeypatch):
    monkeypatch.setattr(serve, "HOSTS", libraries)
    with pytest.raises(PaliGemmaError, match=f"--port {port}: cannot listen"):
        serve.open_server(bundle.shipped(), port)


def without_libraries(tmp_path, monkeypatch, npm):
    """A folder of hosts in which npm ci was not run, and an npm that is a script, or none."""
    shutil.copytree(serve.HOSTS, tmp_path / "hosts", ignore=shutil.ignore_patterns("node_modules"))
    monkeypatch.setattr(serve, "HOSTS", tmp_path / "hosts")
    (tmp_path / "bin").mkdir()
    if npm:
        (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin" if npm else str(tmp_path / "bin"))


def test_without_npm_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    bundle.shipped()
    without_libraries(tmp_path, monkeypatch, npm=None)
    assert run("run-onnx", cli.run_onnx, ["--serve", "--port", "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "npm (nodejs.org)" in line


def test_an_npm_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    bundle.shipped()
    without_libraries(tmp_path, monkeypatch, npm="echo npm error no network >&2; exit 1")
    assert run("run-onnx", cli.run_onnx, ["--serve", "--port", "0"]) == 1
    _, line = capsys.readouterr().err.splitlines()
    assert line.endswith("failed: npm error no network")


def test_libraries_are_fetched_once(tmp_path, monkeypatch, capsys):
    opened = bundle.shipped()
    folders = " ".join(f'"$7/{folder}"' for folder in serve.LIBRARIES)
    without_libraries(tmp_path, monkeypatch, npm=f"mkdir -p {folders}")
    for _ in range(2):
        with serve.open_server(opened):
            pass
    assert capsys.readouterr().err.count("fetching") == 1


def test_bad_bundles_and_ports_are_named(tmp_path, capsys):
    assert run("run-onnx", cli.run_onnx, ["--serve", str(tmp_path / "none")]) == 1
    assert "no such bundle" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.run_onnx(["--serve", "--port", "70000"])
    assert exit_.value.code == 2


def test_every_module_of_the_page_is_served(port):
    """What a page's module imports or starts, the server gives out."""
    todo, seen = ["/web/index.html"], set()
    while todo:
        path = todo.pop()
        if path in seen or "/node_modules/" in path:
            continue
        seen.add(path)
        response, body = ask(port, path)
        assert response.status == 200, path
        targets = re.findall(r"""(?:from |src=|href=|URL\()["']([^"':]+)["']""", body.decode())
        todo += [urljoin(path, target) for target in targets if "." in target and not target.endswith("bundle/")]
    assert {f"/web/{name}" for name in serve.PAGE_FILES} == {path for path in seen if path.startswith("/web/")}
    common = {f"/common/{file.name}" for file in (serve.HOSTS / "common").glob("*.mjs")}
    assert common == {path for path in seen if path.startswith("/common/")}
