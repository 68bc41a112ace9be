"""Counters of the service, and the log line of a request. Neither holds anything of what was asked or answered."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .backend import Backend, ProcessLink
from .worker import State

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STATE = {
    "live": "answers that have a slot", "waiting": "answers that wait for one", "steps": "decode steps so far",
    "prefills": "prefills so far", "picture_hits": "pictures that were in the cache",
    "picture_misses": "pictures that were not", "picture_bytes": "bytes in the cache of pictures",
    "encodes": "pictures that the vision tower looked at",
}  # fmt: skip
FAULTS = 500  # statuses from here on are the service's own fault
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Entry:
    """What is noted of a request; its line in the log has these fields, and `time`."""

    id: str
    route: str
    status: int = 0
    reason: str = ""
    pictures: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    error: str = ""


class Metrics:
    """What /metrics shows."""

    def __init__(self, backend: Backend):
        self.registry = registry = CollectorRegistry()
        routes = ["route", "status"]
        self.requests = Counter("serve_onnx_requests", "requests by route and status", routes, registry=registry)
        self.tokens = Counter("serve_onnx_tokens", "tokens of answers", registry=registry)
        self.prompt_tokens = Counter("serve_onnx_prompt_tokens", "of prompts, pictures included", registry=registry)
        self.pictures = Counter("serve_onnx_pictures", "pictures that came", registry=registry)
        self.first_token = Histogram(
            "serve_onnx_first_token_seconds", "until an answer's first token", buckets=_SECONDS, registry=registry
        )
        self.total = Histogram(
            "serve_onnx_request_seconds", "until an answer's end", buckets=_SECONDS, registry=registry
        )
        self.registry.register(_States(backend))

    def note(self, entry: Entry) -> None:
        """Count a request."""
        self.requests.labels(entry.route, str(entry.status)).inc()
        if not entry.prompt_tokens:
            return
        self.tokens.inc(entry.tokens)
        self.prompt_tokens.inc(entry.prompt_tokens)
        self.pictures.inc(entry.pictures)
        self.total.observe(entry.total_s)
        if entry.first_token_s:
            self.first_token.observe(entry.first_token_s)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


class _States(Collector):
    """What the workers are at, each number the sum over all."""

    def __init__(self, backend):
        self.backend = backend

    def collect(self) -> Iterator[GaugeMetricFamily]:
        links = self.backend.links
        for name in (field.name for field in fields(State)):
            yield GaugeMetricFamily(
                f"serve_onnx_{name}", _STATE[name], sum(getattr(each.state, name) for each in links)
            )
        yield GaugeMetricFamily("serve_onnx_slots", "answers that can be in the making at once", self.backend.slots)
        yield GaugeMetricFamily("serve_onnx_workers", "workers that are there", sum(each.alive for each in links))
        restarts = sum(each.restarts for each in links if isinstance(each, ProcessLink))
        yield GaugeMetricFamily("serve_onnx_restarts", "workers that were started again", restarts)


def log(entry: Entry) -> None:
    """Write the line of a request on stderr."""
    values = {name: value for name, value in asdict(entry).items() if value not in ("", 0)}
    if entry.status < FAULTS:  # what was wrong with a request may quote it
        values.pop("error", None)
    values = {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(json.dumps({"time": stamp, **values}), file=sys.stderr, flush=True)
