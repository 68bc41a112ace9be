"""The command serve-onnx: how it starts and refuses to, how it stops, and what becomes of a worker that is killed."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from export import bundle
from export.service import address, command, running
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli import run
from numpy_ref.errors import PaliGemmaError

from .test_stopping import children_of

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-c", "from export.service.command import serve_main; serve_main()"]
PNG = (SHIPPED / "example.png").read_bytes()


@contextmanager
def started(*options):
    """The process of serve-onnx, and the URL at which it answers."""
    bundle.shipped()  # so that nothing is said about making it
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", "--provider", "cpu", "--threads", "1", *options], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), process.stderr.read()
        yield process, line.split("/v1")[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(url, prompt="caption en", **keywords):
    return httpx.post(f"{url}/v1/answer", files={"image": PNG}, data={"prompt": prompt}, timeout=60, **keywords)


def worker_of(process):
    """The process of the worker that a process of serve-onnx has."""
    commands = {pid: (Path("/proc") / str(pid) / "cmdline").read_text() for pid in children_of(process.pid)}
    (found,) = [pid for pid, line in commands.items() if "spawn_main" in line]
    return found


def test_it_answers_and_ends_at_sigterm():
    with started("--no-log", "--name", "shapes") as (process, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "shapes"
        assert ask(url).json()["text"].startswith("a yellow star")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (0, "", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_what_runs_is_finished_and_nothing_new_is_taken(number, code):
    """Answers of 150 tokens: begun before the signal they all come, later nobody is listening."""
    with started("--no-log", "--slots", "2") as (process, url), ThreadPoolExecutor(6) as pool:
        options = {"prompt": "caption en", "temperature": "1000000", "max_new_tokens": "150"}
        ask(url)

        def long(seed):
            return httpx.post(f"{url}/v1/answer", files={"image": PNG}, data={**options, "seed": seed}, timeout=60)

        asked = [pool.submit(long, seed) for seed in range(6)]
        end = time.monotonic() + 20
        while "serve_onnx_live 2.0" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < end
        process.send_signal(number)
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            ask(url)
        assert [each.result().status_code for each in asked] == [200] * 6
        output, errors = process.communicate(timeout=30)
        assert (process.returncode, output, errors) == (code, "", "")


def test_a_second_interrupt_ends_it_at_once():
    with started("--no-log") as (process, url):
        connection = socket.create_connection(httpx.URL(url).netloc.decode().split(":"))
        connection.sendall(b"POST /v1/answer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\nx")  # and no more
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=10)
        connection.close()
        assert (process.returncode, output, errors) == (130, "", "")


def test_a_worker_that_is_killed_loses_only_its_requests():
    """Everything that was asked is answered, or may be asked again; another worker takes over, and none is left behind."""
    with started("--no-log", "--slots", "4") as (process, url):
        assert ask(url).status_code == 200
        codes, lock, stop = [], threading.Lock(), threading.Event()

        def keep_asking():
            while not stop.is_set():
                found = ask(url)
                with lock:
                    codes.append(found.status_code)
                if found.status_code == 503:
                    assert found.headers["retry-after"] == "1"
                    time.sleep(0.05)

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(keep_asking) for _ in range(6)]
            time.sleep(1)
            killed = worker_of(process)
            os.kill(killed, signal.SIGKILL)
            with lock:
                codes.clear()
            end = time.monotonic() + 60
            while codes[-6:] != [200] * 6:
                assert time.monotonic() < end
                time.sleep(0.05)
            stop.set()
            for each in asking:
                each.result(60)
        assert set(codes) == {200, 503}
        assert worker_of(process) != killed
        assert "serve_onnx_restarts 1.0" in httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert errors == "serve-onnx: a worker stopped (exit code -9); another is started\n"


def test_a_worker_that_hangs_is_stopped_and_another_takes_over():
    with started("--no-log", "--timeout", "1") as (process, url):
        assert ask(url).status_code == 200
        hung = worker_of(process)
        os.kill(hung, signal.SIGSTOP)
        with ThreadPoolExecutor(3) as pool:
            found = [each.result(90) for each in [pool.submit(ask, url) for _ in range(3)]]
        assert {(each.status_code, each.json()["error"]["code"]) for each in found} == {(503, "worker_lost")}
        end = time.monotonic() + 60
        while ask(url).status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert worker_of(process) != hung
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert errors == "serve-onnx: a worker stopped (exit code -9); another is started\n"


def test_workers_go_when_the_service_is_killed():
    with started("--no-log", "--workers", "2") as (process, url):
        assert ask(url).status_code == 200
        workers = [
            pid
            for pid in children_of(process.pid)
            if "spawn_main" in (Path("/proc") / str(pid) / "cmdline").read_text()
        ]
        assert len(workers) == 2
        process.kill()
        process.wait()
        end = time.monotonic() + 20
        while any((Path("/proc") / str(pid)).exists() for pid in workers):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_log_lines():
    with started() as (process, url):
        ask(url)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        (line,) = map(json.loads, errors.splitlines())
        assert (line["route"], line["status"]) == ("answer", 200)


def test_a_key_out_of_a_file(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    with started("--api-key", f"@{tmp_path / 'key'}") as (_, url):
        assert ask(url).status_code == 401
        assert ask(url, headers={"authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others reach this address"),
        (["--host", "::"], "others reach this address"),
        (["--host", "203.0.113.1", "--api-key", "x"], "cannot listen there"),
        (["--host", "no such name"], "others reach this address"),
        (["--api-key", ""], "the key is empty"),
        (["--api-key", "@nowhere"], "nowhere"),
        (["nowhere"], "nowhere: no such bundle"),
        (["--provider", "cuda"], "--provider cuda"),
    ],
)
def test_it_refuses_to_start(arguments, words, capsys):
    bundle.shipped()
    capsys.readouterr()
    assert run("serve-onnx", command.serve_onnx, arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve-onnx: error: ")
    assert words in line


def test_a_port_that_is_taken(capsys):
    bundle.shipped()
    capsys.readouterr()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("serve-onnx", command.serve_onnx, ["--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen there (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--replicas", "2"], ["--autoscale", "max_replicas=2"], ["--engine", "ray", "--workers", "2"], ["--slots", "0"]],
)
def test_options_that_do_not_go_together(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.serve_onnx(arguments)
    assert ended.value.code == 2
    assert f"argument {arguments[-2]}" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "pydantic", "prometheus_client", "httpx"])
def test_without_its_packages_it_says_which_are_missing(package):
    code = f"import sys; sys.modules[{package!r}] = None; {COMMAND[-1]}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line == f"serve-onnx: error: {command.INSTALL.format(package)}"


def test_a_bundle_that_cannot_be_run_ends_it_in_one_line(copy):
    (copy / "decode.onnx").write_bytes(b"nothing")
    ended = subprocess.run([*COMMAND, str(copy), "--port", "0"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (1, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("serve-onnx: error: ")


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True),
                                                ("0.0.0.0", False), ("::", False), ("192.168.1.1", False), ("host", False)])  # fmt: skip
def test_addresses_of_this_machine_alone(host, expected):
    assert address.is_loopback(host) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_tokens_are_sent_as_they_come(host):
    """A second small part waits for 40 ms, until the first is acknowledged, unless the connection has no delay."""
    found = []

    async def main():
        async def answered(_, writer):
            found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answered, sock=address.bind(host, 0)) as server:
            name = server.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*name[:2])
            await reader.read()
            writer.close()

    asyncio.run(main())
    assert found == [1]


def test_keys():
    assert running.read_key(None) is None
    assert running.read_key("a key") == "a key"
    with pytest.raises(PaliGemmaError, match="the key is empty"):
        running.read_key("")
