"""Models by their Hub id, from an endpoint that the tests serve themselves, and from the cache."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from numpy_ref.checkpoint import SHIPPED, hub

ROOT = Path(__file__).parent.parent
PICTURE = SHIPPED / "example.png"
REVISIONS = {"main": "a" * 40, "small": "b" * 40}


class Endpoint(BaseHTTPRequestHandler):
    """As much of the Hub's API as a download takes: the commit of a revision, its files, and their bytes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        if found := re.fullmatch(r"/api/models/(\w+/[\w.-]+)/(revision|tree)/(\w+)(\?.*)?", self.path):
            repo, what, revision, _ = found.groups()
            if self._refused(repo, revision):
                return
            files = self.server.files
            commit = REVISIONS.get(revision, revision)
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            about = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            self._send(json.dumps(tree if what == "tree" else about).encode(), {"Content-Type": "application/json"})
        elif found := re.fullmatch(r"/(\w+/[\w.-]+)/resolve/(\w+)/([\w.-]+)", self.path):
            repo, commit, name = found.groups()
            if not self._refused(repo, commit):
                contents = self.server.files[name]
                self._send(contents, {"ETag": f'"{hashlib.sha1(contents).hexdigest()}"', "X-Repo-Commit": commit})
        else:
            self._send(b"", {}, 404)

    def _refused(self, repo, revision):
        if repo == "some/gated":
            self._send(b"{}", {"X-Error-Code": "GatedRepo"}, 403)
        elif repo != "some/model":
            self._send(b"{}", {"X-Error-Code": "RepoNotFound"}, 401)
        elif revision not in {*REVISIONS, *REVISIONS.values()}:
            self._send(b"{}", {"X-Error-Code": "RevisionNotFound"}, 404)
        else:
            return False
        return True

    def _send(self, contents, headers, status=200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(contents)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(contents)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.files = {file.name: file.read_bytes() for file in SHIPPED.iterdir()}
    server.files["pytorch_model.bin"] = b"never asked for"
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(home, *command, endpoint=None, **changes):
    environment = {**os.environ, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "0"}
    if endpoint:
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{endpoint.server_port}"
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment | changes, capture_output=True, text=True, cwd=ROOT, timeout=300)


def ask(home, name, **options):
    return run(home, "-m", "numpy_ref", name, PICTURE, "caption en", **options)


def test_a_model_is_downloaded_once_and_then_taken_from_the_cache(endpoint, tmp_path):
    here = ask(tmp_path, SHIPPED)
    first = ask(tmp_path, "some/model", endpoint=endpoint)
    assert first.returncode == 0, first.stderr
    assert first.stdout == here.stdout
    assert not any("pytorch_model.bin" in path or "training.json" in path for path in endpoint.asked)
    endpoint.asked.clear()
    again = ask(tmp_path, "some/model", endpoint=endpoint)
    assert (again.returncode, again.stdout) == (0, here.stdout)
    assert not endpoint.asked  # nobody is told that the model is used
    offline = ask(tmp_path, "some/model", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, here.stdout)


def test_a_bundle_and_a_revision(endpoint, tmp_path):
    code = "from export.cli import export_main; export_main()"
    made = run(tmp_path, "-c", code, "some/model@small", "--output", tmp_path / "bundle", endpoint=endpoint)
    assert made.returncode == 0, made.stderr
    assert any(REVISIONS["small"] in path for path in endpoint.asked)
    endpoint.files = {file.name: file.read_bytes() for file in (tmp_path / "bundle").iterdir()}
    answered = run(tmp_path, "-m", "export", "some/model", PICTURE, "caption en", endpoint=endpoint)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout == ask(tmp_path, SHIPPED).stdout


def test_half_a_download_is_completed(endpoint, tmp_path):
    whole, endpoint.files = endpoint.files, {n: c for n, c in endpoint.files.items() if not n.endswith("safetensors")}
    assert ask(tmp_path, "some/model", endpoint=endpoint).returncode == 1
    shutil.rmtree(next(tmp_path.rglob("models--some--model")) / "trees", ignore_errors=True)
    endpoint.files = whole
    assert ask(tmp_path, "some/model", endpoint=endpoint).returncode == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some/gated", "its licence has to be accepted first"),
        ("some/other", "no such directory here, and no such model at http://127.0.0.1"),
        ("some/model@nowhere", "there is no revision 'nowhere'"),
    ],
)
def test_what_cannot_be_had_is_one_line(endpoint, tmp_path, name, message):
    ended = ask(tmp_path, name, endpoint=endpoint)
    assert ended.returncode == 1
    assert not ended.stdout
    (line,) = ended.stderr.splitlines()
    assert message in line


def test_without_a_connection(tmp_path):
    offline = ask(tmp_path, "some/model@small", HF_HUB_OFFLINE="1")
    unreachable = ask(tmp_path, "some/model", HF_ENDPOINT="http://127.0.0.1:9")
    for ended, reason in [
        (offline, "HF_HUB_OFFLINE is set; unset it"),
        (unreachable, "http://127.0.0.1:9 cannot be reached"),
    ]:
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert "no such directory here, nor is all of it in the Hugging Face cache, and" in line
        assert reason in line


@pytest.mark.parametrize(
    "name", ["model", "/some/model", "./some/model", "some/model/here", "some/model.npz", "a/b c", ""]
)
def test_what_is_not_an_id_is_a_path(name):
    assert hub.directory(name) == Path(name)


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.directory("some/model") == Path("some/model")
