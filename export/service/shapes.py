"""Requests and responses in OpenAI's shape, and the OpenAPI document.

A PaliGemma answers one prompt about one or more pictures. So of a chat there is one message, the user's; what it cannot
do (tools, penalties, audio) is refused by name, and what changes nothing (`user`, `metadata`) is taken.
"""

import base64
import binascii
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from numpy_ref import __version__, detection
from numpy_ref.cli.options import COLDEST, LARGEST
from numpy_ref.errors import shortened
from numpy_ref.grammar import HELP as GRAMMARS
from numpy_ref.image import TRANSPARENCIES
from numpy_ref.model.sampling import Sampling

from .limits import Limits, Refusal
from .worker import Done, Request, Token

MOST_STOPS, LONGEST_STOP, MOST_TOP, LONGEST_GRAMMAR = 4, 256, 20, 1024
_TAGS, _KINDS = {"as_text", "as_parts", "as_one", "as_list"}, {"text", "image_url"}  # pydantic puts these into a path
_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w.=+-]+)*;base64,", re.IGNORECASE)


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(_Shape):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Shape):
    """A picture as a data URL; `detail` changes nothing."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Shape):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _kind(value):
    return "as_text" if isinstance(value, str) else "as_parts"


def _count(value):
    return "as_one" if isinstance(value, str) else "as_list"


class Message(_Shape):
    """A message of a chat."""

    role: Literal["user", "system", "developer", "assistant", "tool", "function"]
    content: Annotated[Annotated[str, Tag("as_text")] | Annotated[list[Part], Tag("as_parts")], Discriminator(_kind)]
    name: str | None = None


class StreamOptions(_Shape):
    """Of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(_Shape):
    """Text alone."""

    type: Literal["text"]


Constrain = Annotated[str, Field(min_length=1, max_length=LONGEST_GRAMMAR, description=f"a grammar: {GRAMMARS}")]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class _Drawing(_Shape):
    temperature: float = Field(default=0.0, ge=0, le=1 / COLDEST, description="0 is greedy")
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=0, le=LARGEST, description="keep the likeliest; 0 keeps all")


class ChatRequest(_Drawing):
    """The body of POST /v1/chat/completions."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1, max_length=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=LARGEST)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=LARGEST)
    temperature: float | None = Field(default=None, ge=0, le=1 / COLDEST, description="0, the default, is greedy")  # type: ignore[assignment]
    top_p: float | None = Field(default=None, ge=0, le=1)  # type: ignore[assignment]
    top_k: int | None = Field(default=None, ge=0, le=LARGEST)  # type: ignore[assignment]
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: (
        Annotated[
            Annotated[Stop, Tag("as_one")]
            | Annotated[Annotated[list[Stop], Field(max_length=MOST_STOPS)], Tag("as_list")],
            Discriminator(_count),
        ]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP)
    response_format: ResponseFormat | None = None
    frequency_penalty: Literal[0] | float | None = Field(default=None, ge=0, le=0)
    presence_penalty: Literal[0] | float | None = Field(default=None, ge=0, le=0)
    modalities: list[Literal["text"]] | None = None
    constrain: Constrain | None = None
    transparency: Literal[TRANSPARENCIES] = "white"  # type: ignore[valid-type]
    # What changes nothing here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class AnswerRequest(_Drawing):
    """The fields of POST /v1/answer beside its pictures and prompts."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False, hide_input_in_errors=True)
    max_new_tokens: int | None = Field(default=None, ge=1, le=LARGEST)
    seed: int = Field(default=0, ge=0, lt=2**63)
    constrain: Constrain | None = None
    boxes: Literal[tuple(detection.CONVENTIONS)] = "big_vision"  # type: ignore[valid-type]
    transparency: Literal[TRANSPARENCIES] = "white"  # type: ignore[valid-type]


def parse(shape: type, body: bytes | dict) -> Any:
    """A body of JSON, or fields of a form, in the shape asked for. Raises Refusal that names what is wrong."""
    try:
        return shape.model_validate(body) if isinstance(body, dict) else shape.model_validate_json(body)  # type: ignore[attr-defined]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    except (RecursionError, ValueError) as error:
        raise Refusal(400, f"the body cannot be read ({shortened(str(error), 200)})") from None
    if first["type"] == "json_invalid":
        raise Refusal(400, f"the body is not JSON ({shortened(first['msg'], 200)})")
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        raise Refusal(400, f"{param} is not known here, or cannot be done", param=param, code="unknown_parameter")
    raise Refusal(400, f"{param or 'the body'}: {shortened(first['msg'], 300)}", param=param or None)


def _path(location) -> str:
    """Where in a body something is: messages[0].content."""
    path = ""
    for i, part in enumerate(location):
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _TAGS and (part not in _KINDS or i + 1 == len(location)):
            path += f".{part}" if path else part
    return shortened(path, 200)


def asked(body: ChatRequest, limits: Limits) -> tuple[str, list[str]]:
    """The prompt of a chat, and the URLs of its pictures. Raises Refusal unless it is one message of the user's."""
    if len(body.messages) != 1 or body.messages[0].role != "user":
        wanted = "one message, of the role user: this model knows no conversation and no instructions beside the prompt"
        raise Refusal(400, f"messages: give {wanted}", param="messages")
    content = body.messages[0].content
    parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
    prompt = " ".join(part.text for part in parts if isinstance(part, TextPart))
    urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    check_question(prompt, len(urls), limits, "messages[0].content")
    return prompt, urls


def check_question(prompt: str, pictures: int, limits: Limits, param: str) -> None:
    """Raise Refusal without a prompt, without a picture, or with too much of either."""
    if not pictures:
        raise Refusal(400, "the message has no picture, and this model answers about pictures alone", param=param)
    if pictures > limits.pictures:
        raise Refusal(400, f"{pictures} pictures; at most {limits.pictures} are taken", param=param)
    if not prompt.strip():
        raise Refusal(400, "the prompt is empty", param=param)
    if len(prompt) > limits.prompt_letters:
        raise Refusal(
            400, f"the prompt has {len(prompt)} letters; at most {limits.prompt_letters} are taken", param=param
        )


def picture_of(url: str, param: str) -> bytes | None:
    """The bytes of a picture in a data URL; None for a URL of the web. Raises Refusal for any other."""
    if re.match("https?://", url, re.IGNORECASE):
        return None
    found = _DATA_URL.match(url[:256])
    if not found:
        raise Refusal(400, "a picture is a data URL: data:image/png;base64,…", param=param, code="invalid_image_url")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, "the data URL is not base64", param=param, code="invalid_image_url") from None


def request_of(body: ChatRequest, prompt: str, pictures: list[bytes], limits: Limits) -> Request:
    """What a worker is asked. Raises Refusal for what cannot go together."""
    choices = body.n or 1
    if choices > limits.choices:
        raise Refusal(400, f"n: at most {limits.choices} answers are given", param="n")
    if body.top_logprobs and not body.logprobs:
        raise Refusal(400, "top_logprobs: only with logprobs", param="top_logprobs")
    if body.stream_options and not body.stream:
        raise Refusal(400, "stream_options: only with stream", param="stream_options")
    seed = (body.seed or 0) % 2**64
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Request(
        tuple(pictures), prompt, body.max_completion_tokens or body.max_tokens,
        sampling_of(body), (seed, *([seed, i] for i in range(1, choices))), stops, body.constrain,
        bool(body.logprobs), body.top_logprobs or 0, bool(body.stream), transparency=body.transparency,
        timeout_s=limits.request_s,
    )  # fmt: skip


def answer_request_of(fields: AnswerRequest, prompt: str, pictures: list[bytes], limits: Limits) -> Request:
    """What a worker is asked for a prompt of a form."""
    return Request(
        tuple(pictures), prompt, fields.max_new_tokens, sampling_of(fields), (fields.seed,),
        constrain=fields.constrain, as_json=True, boxes=fields.boxes,
        transparency=fields.transparency, timeout_s=limits.request_s,
    )  # fmt: skip


def sampling_of(body: _Drawing) -> Sampling:
    """How to draw. Raises Refusal for a temperature that no logits bear."""
    temperature, top_p = body.temperature or 0.0, 1.0 if body.top_p is None else body.top_p
    if 0 < temperature < COLDEST:
        raise Refusal(400, f"temperature: 0, or {COLDEST:g} at least", param="temperature")
    return Sampling(temperature, body.top_k or 0, top_p)


@dataclass(frozen=True)
class Head:
    """What every object of a response begins with."""

    id: str
    created: int
    model: str


def chat(head: Head, prompt_tokens: int, ends: list[Done]) -> dict:
    """The response of a chat that is not streamed."""
    choices = [
        {
            "index": end.choice,
            "message": {"role": "assistant", "content": end.text, "refusal": None},
            "logprobs": {"content": [token_of(each) for each in end.tokens], "refusal": None} if end.tokens else None,
            "finish_reason": end.reason,
        }
        for end in sorted(ends, key=lambda each: each.choice)
    ]
    tokens = usage(prompt_tokens, sum(end.count for end in ends))
    return {**asdict(head), "object": "chat.completion", "choices": choices, "usage": tokens}


def chunk(head: Head, choices: list[dict], **more: object) -> dict:
    """An event of a streamed chat."""
    return {**asdict(head), "object": "chat.completion.chunk", "choices": choices, **more}


def delta(choice: int, fields: dict, tokens: tuple[Token, ...] = (), reason: str | None = None) -> dict:
    """What is new of one of the answers."""
    logprobs = {"content": [token_of(each) for each in tokens], "refusal": None} if tokens else None
    return {"index": choice, "delta": fields, "logprobs": logprobs, "finish_reason": reason}


def usage(prompt_tokens: int, tokens: int) -> dict:
    """How many tokens there were; a picture's are part of the prompt's."""
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
    return {**counts, "total_tokens": prompt_tokens + tokens}


def token_of(token: Token) -> dict:
    """A token with its log-probability, and the likeliest in its place."""
    word, *words = token.words
    likeliest = [_entry(word, logprob) for word, (_, logprob) in zip(words, token.piece.top, strict=True)]
    return {**_entry(word, token.piece.logprob), "top_logprobs": likeliest}


def _entry(word, logprob) -> dict:
    whole = "\N{REPLACEMENT CHARACTER}" not in word  # else the token is a part of a character
    return {"token": word, "logprob": logprob, "bytes": list(word.encode()) if whole else None}


def openapi(model: str) -> dict:
    """The OpenAPI document of the service."""
    template = "#/components/schemas/{model}"
    schemas = {}
    for shape in (ChatRequest, AnswerRequest):
        schema = shape.model_json_schema(ref_template=template)
        schemas |= schema.pop("$defs", {})
        schemas[shape.__name__] = schema
    file, text = {"type": "string", "format": "binary"}, {"type": "string"}
    form = {
        "image": {"type": "array", "items": file, "description": "one or more pictures"},
        "prompt": {"type": "array", "items": text, "description": "one prompt, or several"},
    }
    schemas["AnswerRequest"]["properties"] |= form
    schemas["AnswerRequest"]["required"] = ["image", "prompt"]
    plain = {"type": "object"}
    error = {"type": "object", "properties": {name: {} for name in ("message", "type", "param", "code")}}
    schemas["Error"] = {"type": "object", "properties": {"error": error}, "required": ["error"]}

    def body(kind, schema):
        return {"required": True, "content": {kind: {"schema": schema}}}

    def responses(kind, schema):
        failed = {"description": "an error", "content": {"application/json": {"schema": _ref("Error")}}}
        return {"200": {"description": "the answer", "content": {kind: {"schema": schema}}}, "default": failed}

    json_, form_ = "application/json", "multipart/form-data"
    return {
        "openapi": "3.1.0",
        "info": {"title": f"serve-onnx: {model}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": {
                "summary": "Answer a prompt about pictures, as OpenAI's API does",
                "requestBody": body(json_, _ref("ChatRequest")), "responses": responses(json_, plain),
            }},
            "/v1/answer": {"post": {
                "summary": "Answer prompts about pictures with text, boxes and masks",
                "requestBody": body(form_, _ref("AnswerRequest")), "responses": responses(json_, plain),
            }},
            "/v1/models": {"get": {"summary": "The one model", "responses": responses(json_, plain)}},
            "/v1/models/{model}": {"get": {
                "summary": "The model of this name", "responses": responses(json_, plain),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
            }},
            "/health": {"get": {"summary": "Whether it can answer", "responses": responses(json_, plain)}},
            "/metrics": {"get": {"summary": "Counters", "responses": responses("text/plain", {"type": "string"})}},
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip


def _ref(name):
    return {"$ref": f"#/components/schemas/{name}"}
