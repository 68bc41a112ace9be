"""The same application on Ray Serve: a replica is a process with a worker in it, and Ray's proxies share out requests.

RAY_ADDRESS names a running cluster, whose machines must see the bundle at the same path; without it Ray is started on
this machine. What a replica had not answered when it was lost fails with a status that clients try again (500 or 503).
"""

import json
import logging
import os
import signal
import threading
from argparse import Namespace
from dataclasses import replace
from typing import Any

from numpy_ref.errors import PaliGemmaError, one_line

from ..batch.ray_workers import OBJECT_STORE, share_out
from .address import bind, url_of
from .app import Options, build
from .backend import Backend, Load, LocalLink

APP = "serve-onnx"
POLL_S = 0.2


def run(load: Load, options: Options, arguments: Namespace) -> int:
    """Deploy, and wait for a signal; the exit code. Raises PaliGemmaError if Ray cannot, and KeyboardInterrupt."""
    with bind(arguments.host, arguments.port) as found:  # a port that is free: Ray's proxies take no 0
        host, port = found.getsockname()[:2]
    stopped_by: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray, serve = _import_ray()
    try:
        _start(ray)
        for number in before:
            signal.signal(number, lambda number, frame: stopped_by.append(number))
        _deploy(ray, serve, load, options, arguments, host, port)
        print(one_line(f"{url_of(host, port)}/v1 answers with the model {options.model}; Ctrl-C stops it"), flush=True)
        waiting = threading.Event()
        while not stopped_by:
            waiting.wait(POLL_S)
        serve.delete(APP)  # what runs is finished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
    if stopped_by[0] == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


def _deploy(ray, serve, load, options, arguments, host, port):
    """Have Ray Serve run the replicas, and wait until they are ready."""
    try:
        scale = scale_of(ray, load, arguments)
        load = replace(load, threads=scale["ray_actor_options"]["num_cpus"])
        deployment = serve.deployment(serve.ingress(maker(load, options))(), name=APP, **scale)
        serve.start(http_options={"host": host, "port": port, "request_timeout_s": arguments.timeout + 60})
        serve.run(deployment.bind(), name=APP, route_prefix="/")
    except (RuntimeError, ValueError, TypeError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise PaliGemmaError(f"--engine ray: Ray Serve does not take it ({reason})") from None


def maker(load: Load, options: Options) -> Any:
    """A function of no arguments that makes the application, in the process of a replica."""

    def application():
        return build(Backend([LocalLink(load)]), options, starts_backend=True)

    return application


def scale_of(ray: Any, load: Load, arguments: Namespace) -> dict:
    """How many replicas, and what each takes of the cluster."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(machine.get("CPU", 0)) for machine in machines]
    autoscaling = {key: _value(key, text) for key, text in arguments.autoscale}
    count = int(autoscaling.get("max_replicas", arguments.replicas))
    share = share_out(cores, count, arguments.threads, "--replicas")
    resources = {"num_cpus": share, "num_gpus": 1 if load.provider == "cuda" else 0}
    replicas = {"autoscaling_config": autoscaling} if autoscaling else {"num_replicas": arguments.replicas}
    return {
        **replicas, "ray_actor_options": resources, "max_ongoing_requests": arguments.slots + arguments.queue + 16,
        "graceful_shutdown_timeout_s": arguments.grace, "health_check_period_s": 5, "health_check_timeout_s": 30,
    }  # fmt: skip


def _value(key, text):
    """A number of an option of Ray's, or its text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _import_ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters is raised, and told in one line
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    try:
        import ray
        from ray import serve
    except ImportError:
        raise PaliGemmaError("--engine ray needs Ray Serve (the extra `ray`): pip install 'ray[serve]'") from None
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is raised as well
    return ray, serve


def _start(ray) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray here."""
    address = os.environ.get("RAY_ADDRESS", "local")
    here = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.CRITICAL, log_to_driver=False, **here)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise PaliGemmaError(f"--engine ray: Ray does not start, or RAY_ADDRESS is not a cluster ({reason})") from None
