"""The routes of the service."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from numpy_ref.errors import explained, note, quote, shortened

from . import metrics, shapes
from .backend import LOST, PROG, Asked, Backend, LostError
from .limits import Admission, Entry, Limits, Refusal
from .page import page_routes
from .scheduler import CANCELLED, FAILED, OVERDUE
from .worker import Accepted, Done, Event, Refused, Token
from .worker import Request as Question

Result = TypeVar("Result")
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what is wrong with a form is answered
LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
RETRY_S = 1  # when a worker was lost
FETCH_S = 10.0
_FAILURES = {
    CANCELLED: (499, "the request was cancelled", "server_error"),
    OVERDUE: (504, "the answer was not done in time", "timeout"),
    FAILED: (500, "the model failed to answer", "server_error"),
}


@dataclass(frozen=True)
class Options:
    """How the application is served."""

    model: str
    limits: Limits = field(default_factory=Limits)
    key: str | None = None
    any_host: bool = False  # whether requests may name this machine as they like: it is not for itself alone
    logs: bool = True


def build(backend: Backend, options: Options, starts_backend: bool = False) -> ASGIApp:
    """The application over workers; it starts and stops them itself if asked to."""
    service = Service(backend, options)
    routes = [
        Route("/v1/chat/completions", service.route("chat", service.chat), methods=["POST"]),
        Route("/v1/answer", service.route("answer", service.answer), methods=["POST"]),
        Route("/v1/models", service.route("models", service.models), methods=["GET"]),
        Route("/v1/models/{model:path}", service.route("models", service.models), methods=["GET"]),
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.route("metrics", service.metrics_text), methods=["GET"]),
        Route("/openapi.json", service.route("openapi", service.openapi), methods=["GET"]),
    ]
    if options.key is None:  # the page has none, and the bundle's files are not for everybody
        routes += page_routes(backend.links[0].load.bundle)

    @asynccontextmanager
    async def lifespan(app):
        if starts_backend:
            await backend.start()
        yield
        if starts_backend:
            await backend.stop()

    handlers = {HTTPException: _http_error, Refusal: _refusal, Exception: _fault}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return Guard(app, options)


class Guard:
    """Around the application: whose requests are looked at, before anything else."""

    def __init__(self, app: ASGIApp, options: Options):
        self.app, self.options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))):
            await (await _refusal(None, refusal))(scope, receive, send)
        elif scope["type"] in ("http", "lifespan"):
            await self.app(scope, receive, send)

    def _refusal(self, request) -> Refusal | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if not self.options.any_host and name not in LOOPBACK:  # another site's name may lead to this machine
            return Refusal(403, "this service answers to the name localhost alone", code="unknown_host")
        if origin is not None and urlsplit_or_none(origin) != host:
            return Refusal(403, "pages of other sites may not ask", code="unknown_origin")
        if self.options.key is not None and request.url.path != "/health":
            kind, _, key = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.encode(), self.options.key.encode()):
                return Refusal(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key")
        return None


def urlsplit_or_none(url: str) -> str | None:
    """Host and port of a URL, None if there are none."""
    try:
        return urlsplit(url).netloc or None
    except ValueError:
        return None


class Service:
    """What the routes do."""

    def __init__(self, backend: Backend, options: Options):
        self.backend, self.options, self.limits = backend, options, options.limits
        self.admission = Admission(options.limits, backend.slots)
        self.metrics = metrics.Metrics(backend)
        self.created = int(time.time())

    def route(
        self, name: str, function: Callable[[Request, metrics.Entry], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that is counted and logged."""

        async def called(request):
            entry, began = metrics.Entry(f"req_{uuid.uuid4().hex}", name), time.monotonic()
            try:
                response = await function(request, entry)
            except Refusal as refusal:
                response = await _refusal(request, refusal)
                entry.reason, entry.error = refusal.code or refusal.kind, entry.error or refusal.message
            except ClientDisconnect:
                entry.reason, response = CANCELLED, Response(status_code=499)
            response.headers["X-Request-Id"] = entry.id
            entry.status = response.status_code
            if not isinstance(response, StreamingResponse):
                self.close(entry, began)
            return response

        return called

    def close(self, entry: metrics.Entry, began: float) -> None:
        """Count and log a request that is at its end."""
        entry.total_s = time.monotonic() - began
        self.metrics.note(entry)
        if self.options.logs:
            metrics.log(entry)

    # --- answers --------------------------------------------------------------------------------------------

    async def chat(self, request: Request, entry: metrics.Entry) -> Response:
        """POST /v1/chat/completions."""
        began = time.monotonic()
        with ExitStack() as stack:
            admitted = stack.enter_context(self.admission.request())
            body = shapes.parse(shapes.ChatRequest, await self.body(request, admitted))
            self.check_model(body.model)
            prompt, urls = shapes.asked(body, self.limits)
            contents = [await self.picture(url, f"picture {i + 1}", admitted) for i, url in enumerate(urls)]
            question = shapes.request_of(body, prompt, contents, self.limits)
            entry.pictures = len(contents)
            admitted.take_answers(len(question.seeds))
            asked = self.ask(question)
            stack.callback(asked.cancel)
            head = shapes.Head(f"chatcmpl-{entry.id[4:]}", int(time.time()), self.options.model)
            if not question.streamed:
                ends = await while_connected(request, self.ends(aiter(asked), entry))
                self.admission.note_seconds(time.monotonic() - began)
                return JSONResponse(shapes.chat(head, entry.prompt_tokens, ends), headers=HEADERS)
            events = aiter(asked)
            await while_connected(request, self.accepted(events, entry))
            include_usage = bool(body.stream_options and body.stream_options.include_usage)
            stack.callback(self.close, entry, began)
            return Events(self.chunks(events, question, head, include_usage, entry), stack.pop_all())

    async def chunks(
        self,
        events: AsyncIterator[Event],
        question: Question,
        head: shapes.Head,
        include_usage: bool,
        entry: metrics.Entry,
    ) -> AsyncIterator[str]:
        """The events of a chat that is streamed."""
        for choice in range(len(question.seeds)):
            yield sse(shapes.chunk(head, [shapes.delta(choice, {"role": "assistant", "content": ""})]))
        try:
            async for event in events:
                if isinstance(event, Token):
                    if event.piece.text or question.logprobs:
                        tokens = (event,) if question.logprobs else ()
                        yield sse(
                            shapes.chunk(head, [shapes.delta(event.choice, {"content": event.piece.text}, tokens)])
                        )
                elif isinstance(event, Done):
                    self.take_end(event, entry)
                    if event.text:
                        yield sse(shapes.chunk(head, [shapes.delta(event.choice, {"content": event.text})]))
                    yield sse(shapes.chunk(head, [shapes.delta(event.choice, {}, (), event.reason)]))
        except (LostError, Refusal) as error:
            refusal = error if isinstance(error, Refusal) else lost()
            entry.reason, entry.error = refusal.code or refusal.kind, entry.error or refusal.message
            yield sse(refusal.as_json())
            return
        if include_usage:
            yield sse(shapes.chunk(head, [], usage=shapes.usage(entry.prompt_tokens, entry.tokens)))
        yield "data: [DONE]\n\n"

    async def answer(self, request: Request, entry: metrics.Entry) -> Response:
        """POST /v1/answer: pictures and prompts of a form -> the object of --json, or a list of them."""
        began = time.monotonic()
        with ExitStack() as stack:
            admitted = stack.enter_context(self.admission.request())
            form = await self.form(request, await self.body(request, admitted))
            contents = [value for name, value in form if name == "image" and isinstance(value, bytes)]
            prompts = [value for name, value in form if name == "prompt" and isinstance(value, str)]
            rest = {name: value for name, value in form if name not in ("image", "prompt")}
            fields = shapes.parse(shapes.AnswerRequest, rest)
            if len(prompts) > self.limits.choices or not prompts:
                raise Refusal(400, f"prompt: give one, or up to {self.limits.choices}", param="prompt")
            for prompt in prompts:
                shapes.check_question(prompt, len(contents), self.limits, "image" if not contents else "prompt")
            entry.pictures = len(contents)
            admitted.take_answers(len(prompts))
            questions = [shapes.answer_request_of(fields, prompt, contents, self.limits) for prompt in prompts]
            answers = []
            for question in questions:
                asked = self.ask(question)
                stack.callback(asked.cancel)
                answers.append(self.ends(aiter(asked), entry))
            ended = await while_connected(request, gathered(answers))
            self.admission.note_seconds(time.monotonic() - began)
            results = [end.result or {} for (end,) in ended]
            pairs = zip(prompts, results, strict=True)
            several = {"answers": [{"prompt": prompt, **result} for prompt, result in pairs]}
            return JSONResponse(results[0] if len(results) == 1 else several, headers=HEADERS)

    def ask(self, question: Question) -> Asked:
        """Give a question to a worker. Raises Refusal (503) if there is none."""
        try:
            return self.backend.ask(question)
        except LostError:
            raise lost() from None

    async def accepted(self, events: AsyncIterator[Event], entry: metrics.Entry) -> None:
        """Wait until a question is accepted. Raises Refusal if it is not."""
        try:
            event = await anext(events)
        except LostError:
            raise lost() from None
        if isinstance(event, Refused):
            if event.is_fault:
                entry.error = event.message
                raise Refusal(500, "the request could not be prepared", "server_error")
            message = event.message.replace("--max-new-tokens", "max_tokens").replace("--constrain", "constrain")
            raise Refusal(400, message)
        assert isinstance(event, Accepted)
        entry.prompt_tokens += event.prompt_tokens

    async def ends(self, events: AsyncIterator[Event], entry: metrics.Entry) -> list[Done]:
        """Wait until all answers to a question are there. Raises Refusal if there is none."""
        await self.accepted(events, entry)
        ends = []
        try:
            async for event in events:
                if isinstance(event, Done):
                    self.take_end(event, entry)
                    ends.append(event)
        except LostError:
            raise lost() from None
        return ends

    def take_end(self, end: Done, entry: metrics.Entry) -> None:
        """Note the end of an answer. Raises Refusal if there is no answer."""
        if end.reason in _FAILURES:
            entry.error = end.error
            status, message, kind = _FAILURES[end.reason]
            raise Refusal(status, message, kind, code=end.reason)
        entry.tokens += end.count
        entry.reason = end.reason
        entry.first_token_s = max(entry.first_token_s, end.first_s)

    # --- what comes in --------------------------------------------------------------------------------------

    async def body(self, request: Request, admitted: Entry) -> bytes:
        """All of a request's body. Raises Refusal if it is too large, or too slow."""
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.body_bytes:
            raise Refusal(413, f"the request has more than {self.limits.body_bytes} bytes", code="request_too_large")
        parts = []
        try:
            async with asyncio.timeout(self.limits.body_s):
                async for part in request.stream():
                    admitted.take_bytes(len(part))
                    parts.append(part)
        except TimeoutError:
            raise Refusal(408, "the body of the request did not come in time", "timeout") from None
        return b"".join(parts)

    async def form(self, request: Request, body: bytes) -> list[tuple[str, str | bytes]]:
        """The fields of a form, files as their bytes. Raises Refusal if it is none."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Refusal(415, "give a form (multipart/form-data) with image and prompt")

        async def once():
            yield body
            if not parser.ended:  # raised here, the parser closes what it has opened
                raise MultiPartException("it ends before its last boundary")

        try:
            parser = _FormParser(request.headers, once(), max_files=64, max_fields=64, max_part_size=2**20)
            form = await parser.parse()
        except (MultiPartException, KeyError, ValueError, LookupError) as error:
            raise Refusal(400, f"the form cannot be read ({shortened(str(error), 200)})") from None
        try:
            return [
                (name, await value.read() if isinstance(value, UploadFile) else value)
                for name, value in form.multi_items()
            ]
        finally:
            await form.close()

    async def picture(self, url: str, name: str, admitted: Entry) -> bytes:
        """The bytes of a picture that a message names. Raises Refusal if there is none."""
        contents = shapes.picture_of(url, "messages")
        return await self.fetch(url, name, admitted) if contents is None else contents

    async def fetch(self, url: str, name: str, admitted: Entry) -> bytes:
        """A picture of the web, from a host that is allowed by name."""
        try:
            host = httpx.URL(url).host
        except (httpx.InvalidURL, ValueError):
            host = ""
        if host not in self.limits.fetched_hosts:
            raise Refusal(
                400, f"{name}: pictures are not fetched from the net; send a data URL", param="messages",
                code="invalid_image_url",
            )  # fmt: skip
        contents = bytearray()
        try:
            async with (
                asyncio.timeout(FETCH_S),
                httpx.AsyncClient(trust_env=False) as client,
                client.stream("GET", url) as response,
            ):
                if response.status_code != 200:
                    raise Refusal(400, f"{name}: {host} answers {response.status_code}", code="invalid_image_url")
                async for part in response.aiter_raw():
                    admitted.take_bytes(len(part))
                    contents += part
        except (httpx.HTTPError, TimeoutError, httpx.InvalidURL):
            raise Refusal(400, f"{name}: {host} did not send it", code="invalid_image_url") from None
        return bytes(contents)

    def check_model(self, name: str | None) -> None:
        """Raise Refusal (404) for another model than the one that is served."""
        if name not in (None, self.options.model):
            message = f"there is no model {quote(name)}; this service has {self.options.model}"
            raise Refusal(404, message, param="model", code="model_not_found")

    # --- about itself ---------------------------------------------------------------------------------------

    async def models(self, request: Request, entry: metrics.Entry) -> Response:
        """GET /v1/models, and the one of a name."""
        model = {"id": self.options.model, "object": "model", "created": self.created, "owned_by": "serve-onnx"}
        if (name := request.path_params.get("model")) is not None:
            self.check_model(name)
            return JSONResponse(model, headers=HEADERS)
        return JSONResponse({"object": "list", "data": [model]}, headers=HEADERS)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 if there is a worker, else 503."""
        ready = self.backend.ready
        return JSONResponse({"status": "ok" if ready else "no worker"}, 200 if ready else 503, headers=HEADERS)

    async def metrics_text(self, request: Request, entry: metrics.Entry) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), headers=HEADERS, media_type=metrics.CONTENT_TYPE)

    async def openapi(self, request: Request, entry: metrics.Entry) -> Response:
        """GET /openapi.json."""
        return JSONResponse(shapes.openapi(self.options.model), headers=HEADERS)


class Events(StreamingResponse):
    """Server-sent events; `stack` is closed at their end, or when the client is gone."""

    def __init__(self, events: AsyncIterator[str], stack: ExitStack):
        super().__init__(events, media_type="text/event-stream", headers=HEADERS)
        self.stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.stack:
            await super().__call__(scope, receive, send)


class _FormParser(MultiPartParser):
    spool_max_size = 2**30  # the body is in memory as it is
    ended = False  # whether the last boundary was seen: without it, the last part would be left out in silence

    def on_end(self) -> None:
        self.ended = True


def sse(event: dict) -> str:
    """An object as a server-sent event."""
    return f"data: {json.dumps(event)}\n\n"


def lost() -> Refusal:
    """That a worker is gone: to ask again may help."""
    return Refusal(503, LOST, "server_error", code="worker_lost", retry_after_s=RETRY_S)


async def gathered(awaitables: list[Coroutine]) -> list:
    """The results of all, in order; the first that fails fails them all, and the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in awaitables]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What some work gives. Raises ClientDisconnect, and cancels it, if the client goes away before."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait({working, gone})


async def _gone(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refusal(request, refusal) -> Response:
    headers = dict(HEADERS)
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(refusal.retry_after_s)
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(refusal.as_json(), refusal.status, headers=headers)


async def _http_error(request, error) -> Response:
    """What Starlette refuses: a path that there is not, a method that a path does not take."""
    message = {404: "there is nothing at this path", 405: "this path does not take this method"}
    refusal = Refusal(error.status_code, message.get(error.status_code, str(error.detail)))
    response = await _refusal(request, refusal)
    response.headers.update(error.headers or {})
    return response


async def _fault(request, error) -> Response:
    """A fault of the service's own, in one line on stderr; the client learns that there was one."""
    note(f"{PROG}: {explained(error)}")
    return await _refusal(request, Refusal(500, "something went wrong in the service", "server_error"))
