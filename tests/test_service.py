"""serve-onnx over HTTP: OpenAI's own client, what is refused and how, and that no slot is ever lost."""

import base64
import http.client
import io
import json
import shutil
import socket
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from export import bundle
from export.service import app as application
from export.service.app import Options
from export.service.backend import Backend, Load, LocalLink
from export.service.limits import Limits
from export.service.worker import Settings
from export.session import load
from numpy_ref import answer as answering
from numpy_ref import cli
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.grammar import Grammar
from numpy_ref.image import open_image
from numpy_ref.model.sampling import Sampling

from .served import running
from .test_hosts import need

PNG = (SHIPPED / "example.png").read_bytes()
SLOTS = 4
LIMITS = Limits(queued=8, body_bytes=2**20, all_bytes=4 * 2**20, choices=SLOTS, request_s=20, body_s=2)


def data_url(contents=PNG, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"


def message(prompt="caption en", *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls or (data_url(),)]
    return [{"role": "user", "content": [{"type": "text", "text": prompt}, *parts]}]


@contextmanager
def service(limits=LIMITS, slots=SLOTS, **options):
    """A backend in this process, and the base URL of a service over it."""
    backend = Backend([LocalLink(Load(bundle.shipped(), "cpu", threads=1, settings=Settings(slots, 256)))])
    with running(backend, Options("shipped", limits, logs=False, **options)) as base:
        yield backend, base


@pytest.fixture(scope="module")
def served():
    with service() as found:
        yield found


@pytest.fixture
def base(served):
    """The URL of the service; afterwards every slot has to be free again, and nothing may wait."""
    backend, base = served
    yield base
    until(lambda: (backend.busy, *backend_is_at(backend)) == (0, 0, 0))


def backend_is_at(backend):
    scheduler = backend.links[0].worker.scheduler
    return len(scheduler.live), len(scheduler.waiting)


@pytest.fixture
def client(base):
    with openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def alone():
    """A function that answers with the bundle, without any service."""
    engine, tokenizer = load(bundle.shipped().path, "cpu", 1)
    image = open_image(SHIPPED / "example.png")

    def answer(prompt, sampling=None, image=image, constrain=None, **keywords):
        grammar = Grammar(constrain, tokenizer) if constrain else None
        return answering.answer(engine, tokenizer, image, prompt, sampling=sampling, grammar=grammar, **keywords)

    return answer


def until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def slowed(backend, seconds):
    """Decode steps that take so long."""
    slots = backend.links[0].worker.scheduler.slots
    decode = slots.decode

    def slow(*arguments):
        time.sleep(seconds)
        return decode(*arguments)

    slots.decode = slow
    try:
        yield
    finally:
        slots.decode = decode


# --- OpenAI's client ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["caption en", "detect star", "answer en how many shapes are there?"])
def test_text(client, alone, prompt):
    expected = alone(prompt)
    answer = client.chat.completions.create(model="shipped", messages=message(prompt))
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, "stop")
    assert answer.usage.completion_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id.startswith("req_")


def test_stream(client, alone):
    expected = alone("detect star").text
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(
        model="shipped", messages=message("detect star"), stream=True, stream_options=options
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == expected
    assert len(list(filter(None, pieces))) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == len(alone("detect star").tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_pictures(client, alone):
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    urls = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "PNG")
        urls.append(data_url(file.getvalue()))
    expected = alone("caption en", image=pictures)
    answer = client.chat.completions.create(model="shipped", messages=message("caption en", *urls))
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == 128 + 4


def test_logprobs(client, alone):
    expected = alone("caption en")
    answer = client.chat.completions.create(model="shipped", messages=message(), logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == expected.text
    assert [entry.logprob for entry in content] == pytest.approx(expected.logprobs, abs=1e-4)
    for entry in content:
        assert [each.logprob for each in entry.top_logprobs] == sorted(
            (each.logprob for each in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token  # it is greedy
        assert bytes(entry.bytes).decode() == entry.token
    streamed = client.chat.completions.create(
        model="shipped", messages=message(), logprobs=True, top_logprobs=3, stream=True
    )
    found = [entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in found] == [entry.token for entry in content]


def test_seeds_and_choices(client, alone):
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=7)
    create = client.chat.completions.create
    options = {"model": "shipped", "messages": message(), "temperature": 1.2, "top_p": 0.95, "seed": 7}
    first, again = create(**options, n=3), create(**options, n=3)
    texts = [choice.message.content for choice in first.choices]
    assert texts[0] == alone("caption en", sampling).text
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in create(**options, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_limits_of_an_answer(client, alone):
    create = client.chat.completions.create
    text = alone("caption en").text
    cut = create(model="shipped", messages=message(), max_tokens=4).choices[0]
    assert (cut.finish_reason, cut.message.content) == ("length", alone("caption en", max_new_tokens=4).text)
    assert create(model="shipped", messages=message(), max_completion_tokens=4).choices[0] == cut
    stopped = create(model="shipped", messages=message(), stop=[" red", "nowhere"]).choices[0]
    assert (stopped.finish_reason, stopped.message.content) == ("stop", text[: text.index(" red")])
    pieces = create(model="shipped", messages=message(), stop=" red", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == stopped.message.content


@pytest.mark.parametrize("spec", ["detect:star", "choice:yes|no", "number", "regex:[a-z ]{3,9}"])
def test_grammars(client, base, alone, spec):
    expected = alone("caption en", constrain=spec)
    answer = client.chat.completions.create(model="shipped", messages=message(), extra_body={"constrain": spec})
    assert answer.choices[0].message.content == expected.text
    assert ask(base, constrain=spec).json()["tokens"] == expected.tokens


def test_what_changes_nothing_is_taken(client, alone):
    answer = client.chat.completions.create(
        model="shipped", messages=message(), user="somebody", metadata={"a": "b"}, store=False, frequency_penalty=0,
        presence_penalty=0.0, response_format={"type": "text"}, n=1, service_tier="auto", extra_body={"top_k": 1},
        temperature=1.0,
    )  # fmt: skip
    assert answer.choices[0].message.content == alone("caption en").text


def test_the_models(client):
    assert [model.id for model in client.models.list()] == ["shipped"]
    assert client.models.retrieve("shipped").owned_by == "serve-onnx"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt/5")


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "system", "content": "be brief"}, *message()]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "no picture"}]}, openai.BadRequestError, "messages[0].content"),
        ({"messages": message(" ")}, openai.BadRequestError, "messages[0].content"),
        ({"messages": message("x" * 40_000)}, openai.BadRequestError, "messages[0].content"),
        ({"messages": message("caption en " * 300)}, openai.BadRequestError, None),
        ({"messages": message("caption en", "https://example.com/cat.png")}, openai.BadRequestError, "messages"),
        ({"messages": message("caption en", "file:///etc/passwd")}, openai.BadRequestError, "messages"),
        ({"messages": message("caption en", "data:image/png;base64,!!!")}, openai.BadRequestError, "messages"),
        ({"messages": message("caption en", data_url(b"no picture"))}, openai.BadRequestError, None),
        ({"messages": message("caption en", *[data_url(b"x")] * 20)}, openai.BadRequestError, "messages[0].content"),
        ({"messages": message("caption en", *[data_url()] * 5)}, openai.BadRequestError, None),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 10_000}, openai.BadRequestError, None),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"temperature": 1e-9}, openai.BadRequestError, "temperature"),
        ({"top_p": 2}, openai.BadRequestError, "top_p"),
        ({"n": 100}, openai.BadRequestError, "n"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"stream": False, "stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"extra_body": {"constrain": "poem"}}, openai.BadRequestError, None),
        ({"extra_body": {"constrain": "regex:(" + "a{999}" * 99}}, openai.BadRequestError, None),
        ({"extra_body": {"constrain": "number"}, "max_tokens": 4000}, openai.BadRequestError, None),
        ({"extra_body": {"no_such": 1}}, openai.BadRequestError, "no_such"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors(client, change, error, param, stream):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**{"model": "shipped", "messages": message(), "stream": stream, **change})
    body = raised.value.body
    assert body["param"] == param
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"].isprintable()
    assert len(body["message"]) < 700
    assert str(SHIPPED.parent) not in json.dumps(body)


# --- /v1/answer --------------------------------------------------------------------------------------------


def ask(base, prompts="caption en", pictures=(PNG,), **fields):
    files = [("image", ("picture", picture)) for picture in pictures]
    return httpx.post(f"{base}/v1/answer", files=files, data={"prompt": prompts, **fields}, timeout=60)


def without_times(found):
    return {name: value for name, value in found.items() if name not in ("timings", "logprobs", "boxes", "masks")}


@pytest.mark.parametrize("prompt", ["caption en", "segment star"])
def test_the_object_of_json(base, alone, prompt):
    found, expected = ask(base, prompt).json(), json.loads(json.dumps(cli.as_json(alone(prompt), 0)))
    assert list(found) == list(expected)
    assert without_times(found) == without_times(expected)
    assert [mask["counts"] for mask in found["masks"]] == [mask["counts"] for mask in expected["masks"]]
    assert [box["label"] for box in found["boxes"]] == [box["label"] for box in expected["boxes"]]
    assert found["timings"].keys() == expected["timings"].keys()


def test_several_prompts(base, alone):
    found = ask(base, ["caption en", "detect star"]).json()["answers"]
    assert [each["prompt"] for each in found] == ["caption en", "detect star"]
    assert [each["text"] for each in found] == [alone("caption en").text, alone("detect star").text]


def test_fields_of_a_form(base, alone):
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.9, seed=5)
    fields = {
        "temperature": "1.0",
        "top_k": "3",
        "top_p": "0.9",
        "seed": "5",
        "max_new_tokens": "7",
        "boxes": "huggingface",
    }
    assert ask(base, **fields).json()["tokens"] == alone("caption en", sampling, max_new_tokens=7).tokens


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"temperature": "hot"}, 400),
        ({"boxes": "none"}, 400),
        ({"nothing": "x"}, 400),
        ({"max_new_tokens": "1e3"}, 400),
    ],
)
def test_forms_that_are_refused(base, fields, status):
    found = ask(base, **fields)
    assert (found.status_code, found.json()["error"]["param"]) == (status, next(iter(fields)))


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "application/json", 415), (b"", "multipart/form-data", 400), (b"x", "multipart/form-data; boundary=a", 400),
        (b"--a\r\n\r\n", "multipart/form-data; boundary=a", 400), (b"--a--", "multipart/form-data; boundary=a", 400),
        (b"--a\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\nx\r\n--a--\r\n", "multipart/form-data; boundary=a", 400),
    ],
)  # fmt: skip
def test_what_is_no_form(base, body, kind, status):
    found = httpx.post(f"{base}/v1/answer", content=body, headers={"content-type": kind})
    assert found.status_code == status
    assert found.json()["error"]["message"]


@pytest.mark.parametrize("left", [0, 20, 60, 200])
def test_forms_that_are_cut_off(base, left):
    picture = {"image": ("a.png", b"x" * 100), "max_new_tokens": (None, "3")}  # the last part is a field, or a file
    for files in (picture, dict(reversed(picture.items()))):
        whole = httpx.Request("POST", f"{base}/v1/answer", data={"prompt": "caption en"}, files=files)
        body = whole.read()[: -left - 4]
        found = httpx.post(whole.url, content=body, headers={"content-type": whole.headers["content-type"]})
        assert (found.status_code, "last boundary" in found.json()["error"]["message"]) == (400, True)


# --- what people send --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"messages":' + b"[" * 10**5, b'{"seed":' + b"9" * 10**5 + b"}", b'"\\ud800"',
     b'{"messages":[{"role":"user","content":"\\u0000"}]}', b'{"temperature":NaN}', b'{"a":1,"a":2}'],
)  # fmt: skip
def test_bodies_that_are_none(base, body):
    found = httpx.post(f"{base}/v1/chat/completions", content=body)
    assert found.status_code == 400
    assert found.json()["error"]["message"].isprintable()


def png_of(width, height):
    """The beginning of a picture that says it is so large."""

    def block(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + block(b"IDAT", zlib.compress(b"\0" * 1000)) + block(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (1, 70_000), (0, 0), (2**31 - 1, 2**31 - 1)])
def test_picture_bombs(base, size):
    began = time.monotonic()
    found = ask(base, pictures=[png_of(*size)])
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith("picture 1: ")
    assert time.monotonic() - began < 5


def test_bodies_that_are_too_large(base):
    url = f"{base}/v1/chat/completions"
    assert httpx.post(url, content=b"x" * (LIMITS.body_bytes + 1)).status_code == 413

    def endless():
        for _ in range(40):
            yield b"x" * 2**16

    with closing(socket.create_connection(httpx.URL(base).netloc.decode().split(":"))) as connection:
        connection.sendall(b"POST /v1/answer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in connection.recv(100)
    with suppress(httpx.WriteError):  # it answered before it was all sent
        assert httpx.post(url, content=endless()).status_code == 413


def test_bodies_that_do_not_come(base):
    with closing(socket.create_connection(httpx.URL(base).netloc.decode().split(":"), timeout=20)) as connection:
        connection.sendall(b"POST /v1/answer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\nx")
        assert b" 408 " in connection.recv(100)


@pytest.mark.parametrize(
    "raw", [b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\xfe\x00" * 99, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000, b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_request(base, raw, capfd):
    with closing(socket.create_connection(httpx.URL(base).netloc.decode().split(":"), timeout=20)) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        connection.makefile("rb").read()
    assert httpx.get(f"{base}/health").status_code == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/nowhere", "GET", 404),
        ("/v1/answer", "GET", 405),
        ("/v1/models", "POST", 405),
        ("/web/../etc/passwd", "GET", 404),
    ],
)
def test_paths_that_there_are_not(base, path, method, status):
    with closing(http.client.HTTPConnection(httpx.URL(base).netloc.decode(), timeout=20)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        assert response.status == status
        assert json.loads(response.read())["error"]["message"]


def test_other_sites(base):
    """A name of another site that leads here, and a page of another site that asks."""
    assert httpx.get(f"{base}/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert httpx.post(f"{base}/v1/answer", headers={"origin": "https://evil.example"}).status_code == 403
    assert httpx.post(f"{base}/v1/answer", headers={"origin": "null"}).status_code == 403
    assert httpx.get(f"{base}/v1/models", headers={"origin": base}).status_code == 200
    port = httpx.URL(base).port
    assert httpx.get(f"{base}/v1/models", headers={"host": f"localhost:{port}"}).status_code == 200


def test_nothing_is_fetched_unless_its_host_is_allowed():
    seen = []

    class Pictures(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "/picture")
            else:
                self.send_response(200 if self.path == "/picture" else 404)
            self.end_headers()
            if self.path == "/picture":
                self.wfile.write(PNG)

        def log_message(self, *arguments):
            pass

    pictures = HTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=pictures.serve_forever, args=(0.01,), daemon=True).start()
    where = f"http://127.0.0.1:{pictures.server_port}"
    try:
        with service(replace(LIMITS, fetched_hosts=("127.0.0.1",))) as (_, base):
            url = f"{base}/v1/chat/completions"
            assert httpx.post(url, json={"messages": message("caption en", f"{where}/picture")}).status_code == 200
            for path in ("away", "gone"):
                found = httpx.post(url, json={"messages": message("caption en", f"{where}/{path}")})
                assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_image_url")
            assert seen == ["/picture", "/away", "/gone"]
            other = httpx.post(
                url, json={"messages": message("caption en", f"http://localhost:{pictures.server_port}/picture")}
            )
            assert other.status_code == 400
            assert len(seen) == 3
    finally:
        pictures.shutdown()
        pictures.server_close()


def test_a_key():
    with service(key="correct horse") as (_, base):
        assert httpx.get(f"{base}/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic correct horse"},
            {"authorization": "Bearer"},
        ):
            for path in ("/v1/models", "/metrics", "/web/", "/openapi.json"):
                found = httpx.get(f"{base}{path}", headers=headers)
                assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=f"{base}/v1", api_key="correct horse") as client:
            assert client.chat.completions.create(model="shipped", messages=message()).choices
        assert httpx.get(f"{base}/web/", headers={"authorization": "Bearer correct horse"}).status_code == 404


# --- load --------------------------------------------------------------------------------------------------


def test_many_at_once(base, alone):
    """More than there are slots, of every kind: each answer is the one alone."""
    prompts = ["caption en", "detect star", "segment star", "answer en how many shapes are there?"]
    expected = {prompt: alone(prompt).text for prompt in prompts}

    def one(i):
        prompt = prompts[i % 4]
        with openai.OpenAI(base_url=f"{base}/v1", api_key="any", timeout=60) as client:
            if i % 3:
                return prompt, client.chat.completions.create(model="shipped", messages=message(prompt)).choices[
                    0
                ].message.content
            stream = client.chat.completions.create(model="shipped", messages=message(prompt), stream=True)
            return prompt, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        for prompt, text in pool.map(one, range(60)):
            assert text == expected[prompt]


def test_too_many_are_turned_away(served, base):
    backend, _ = served
    with slowed(backend, 0.1), ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: ask(base), range(SLOTS + LIMITS.queued + 10)))
    codes = [each.status_code for each in found]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= SLOTS + LIMITS.queued
    refused = next(each for each in found if each.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(served, base, stream):
    backend, _ = served
    body = json.dumps({"messages": message(), "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    scheduler = backend.links[0].worker.scheduler
    with slowed(backend, 0.2):
        connection = socket.create_connection(httpx.URL(base).netloc.decode().split(":"))
        connection.sendall(head + body)
        until(lambda: scheduler.live)
        until(lambda: len(scheduler.live[0].tokens) > 1)
        steps = scheduler.steps
        connection.close()
        until(lambda: not scheduler.live)
        assert scheduler.steps - steps <= 2  # the one that ran, and one that had begun when the news came


def test_an_answer_that_takes_too_long():
    with service(replace(LIMITS, request_s=0.5)) as (backend, base), slowed(backend, 0.2):
        found = httpx.post(f"{base}/v1/chat/completions", json={"messages": message()})
        assert (found.status_code, found.json()["error"]["code"]) == (504, "overdue")
        with openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0) as client:
            stream = client.chat.completions.create(model="shipped", messages=message(), stream=True)
            with pytest.raises(openai.APIError, match="not done in time"):
                list(stream)
        until(lambda: backend_is_at(backend) == (0, 0))


def test_a_model_that_fails_is_one_error_without_a_path(served, base, monkeypatch):
    backend, _ = served
    slots = backend.links[0].worker.scheduler.slots
    broken = lambda *arguments: (_ for _ in ()).throw(RuntimeError(f"{bundle.shipped().path} is broken"))  # noqa: E731
    monkeypatch.setattr(slots, "prefill", broken)
    found = httpx.post(f"{base}/v1/chat/completions", json={"messages": message()})
    assert (found.status_code, found.json()["error"]["message"]) == (500, "the model failed to answer")
    monkeypatch.undo()
    assert httpx.post(f"{base}/v1/chat/completions", json={"messages": message()}).status_code == 200


def test_a_fault_of_the_service_is_one_line(served, base, monkeypatch, capfd):
    monkeypatch.setattr(application.shapes, "asked", lambda *arguments: 1 / 0)
    found = httpx.post(f"{base}/v1/chat/completions", json={"messages": message()})
    assert (found.status_code, found.json()["error"]["type"]) == (500, "server_error")
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("serve-onnx: this should not have happened")


# --- about itself ------------------------------------------------------------------------------------------


def values(base):
    lines = httpx.get(f"{base}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_and_the_cache_of_pictures():
    with service() as (_, base):
        for _ in range(3):
            assert ask(base).status_code == 200
        assert ask(base, pictures=[b"x"]).status_code == 400
        until(lambda: values(base)["serve_onnx_picture_hits"] == 2)
        found = values(base)
        assert (found["serve_onnx_picture_misses"], found["serve_onnx_encodes"]) == (2, 1)
        assert found["serve_onnx_picture_bytes"] > 0
        assert found['serve_onnx_requests_total{route="answer",status="200"}'] == 3
        assert found['serve_onnx_requests_total{route="answer",status="400"}'] == 1
        assert found["serve_onnx_tokens_total"] > 3
        assert found["serve_onnx_first_token_seconds_count"] == 3
        assert (found["serve_onnx_slots"], found["serve_onnx_live"]) == (SLOTS, 0)


def test_log_lines_have_no_content(capfd):
    backend = Backend([LocalLink(Load(bundle.shipped(), "cpu", threads=1, settings=Settings(SLOTS, 256)))])
    with running(backend, Options("shipped", LIMITS)) as base:
        capfd.readouterr()
        ask(base, "answer en what is secret ?")
        ask(base, "")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["route"], line["status"]) for line in lines] == [("answer", 200), ("answer", 400)]
    assert "secret" not in json.dumps(lines)
    assert lines[0].keys() == {
        "time", "id", "route", "status", "reason", "pictures", "prompt_tokens", "tokens", "first_token_s", "total_s"
    }  # fmt: skip


def test_the_openapi_document(base):
    document = httpx.get(f"{base}/openapi.json").json()
    schemas = document["components"]["schemas"]

    def references(value):
        if isinstance(value, dict):
            yield from [value["$ref"]] if "$ref" in value else []
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    assert {reference.rpartition("/")[2] for reference in references(document)} <= schemas.keys()
    for path, methods in document["paths"].items():
        for method in methods:
            url = base + path.replace("{model}", "shipped")
            assert httpx.request(method, url).status_code not in (404, 405), path


def test_the_page(base):
    page = httpx.get(f"{base}/", follow_redirects=True)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("bundle.json", "weights.bin", "tokenizer.model"):
        found = httpx.get(f"{base}/bundle/{name}")
        assert found.content == (bundle.shipped().path / name).read_bytes()
        assert httpx.get(f"{base}/bundle/{name}", headers={"sec-fetch-dest": "script"}).status_code == 403


def test_health():
    with service() as (backend, base):
        assert httpx.get(f"{base}/health").json() == {"status": "ok"}
        backend.links[0].alive = False
        try:
            assert httpx.get(f"{base}/health").status_code == 503
            found = ask(base)
            assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        finally:
            backend.links[0].alive = True


# --- OpenAI's client for Node ------------------------------------------------------------------------------


def test_openais_client_for_node(base, alone, tmp_path):
    folder = Path(__file__).parent / "openai_client"
    need(node := shutil.which("node"), "Node 20 or later (nodejs.org)")
    need((folder / "node_modules" / "openai").is_dir(), f"npm ci --prefix {folder}")
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PNG)
    command = [node, folder / "client.mjs", f"{base}/v1", tmp_path / "a.png", tmp_path / "b.png"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found, text = json.loads(ended.stdout), alone("caption en").text
    assert (found["text"], found["streamed"], "".join(found["tokens"])) == (text, text, text)
    assert (found["several"], found["models"]) == (128 + 4, ["shipped"])
    assert found["errors"] == [
        ["BadRequestError", 400, "messages"], ["NotFoundError", 404, "model"], ["BadRequestError", 400, "n"],
    ]  # fmt: skip
