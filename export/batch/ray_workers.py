"""The workers of `batch.py` as actors of Ray Data, on one machine or on a cluster.

RAY_ADDRESS names a running cluster, whose machines must see the input and the bundle at the same paths; without it Ray
is started on this machine. What an actor had not handed over when it was lost is answered again by another.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from numpy_ref.errors import PaliGemmaError, explained, plural

from ..session.provider import stays_on_cpu
from . import Answers, Job, Worker

TASKS = 10_000  # at most, that Ray keeps account of: each is one batch, or several where there are more batches
OBJECT_STORE = 2**28  # bytes: only numbers and lines go through it


@contextmanager
def workers(job: Job, count: int = 1, threads: int = 0) -> Iterator[Answers]:
    """As `batch.workers`: `count` actors that share `threads` (0: every core of the cluster) evenly."""
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _start(ray)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cards = 0 if job.provider == "cpu" else sum(machine.get("GPU", 0) for machine in machines)
        if cards and stays_on_cpu(job.bundle, job.provider):
            cards, job = 0, replace(job, provider="cpu")
        able = [machine for machine in machines if not cards or machine.get("GPU")]  # a worker wants its card beside it
        share = share_out([int(machine.get("CPU", 0)) for machine in able], count, threads)
        card = 1 / math.ceil(count / cards) if cards else 0  # of an actor: a whole one, or one over a whole number
        yield partial(_answers, ray, job, count, share, card)
    finally:
        if started:
            ray.shutdown()


def share_out(cores: Sequence[int], count: int, threads: int = 0, option: str = "--workers") -> int:
    """Threads of each of `count` workers: as many as leave room for all on machines of so many cores.

    `threads`, if given, is the most for all together. Raises PaliGemmaError that names the option if there are fewer
    cores than workers.
    """
    most = max(1, min(threads // count, max(cores))) if threads else max(cores)
    for share in range(most, 0, -1):
        if sum(each // share for each in cores) >= count:
            return share
    raise PaliGemmaError(f"{option} {count}: Ray has {plural(sum(cores), 'core')}, and a worker takes one at least")


def _answers(ray, job, count, share, card, begins, size):
    """Yield the answers of each batch, in order."""
    _quiet(ray)
    if not begins:
        return
    several = math.ceil(len(begins) / TASKS)
    tasks = [begins[i : i + several] for i in range(0, len(begins), several)]
    items = [{"begin": task.start, "end": task.stop, "size": size} for task in tasks]
    answered = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Actor, fn_constructor_args=(job, share), batch_size=1, compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=share, num_gpus=card,
    )  # fmt: skip
    try:
        for task, result in zip(tasks, answered.iter_rows(), strict=True):
            if result["error"]:
                raise PaliGemmaError(result["error"])
            if result["begin"] != task.start:
                raise PaliGemmaError(f"Ray gave the answers from row {result['begin']} in place of row {task.start}")
            yield from json.loads(result["answers"])
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise PaliGemmaError(f"Ray stopped: {reason}; the same command again goes on") from None


class Actor:
    """A worker that Ray hands one task at a time, as columns of one row.

    A PaliGemmaError is an answer: an exception Ray would try again, and report in a hundred lines.
    """

    def __init__(self, job: Job, threads: int):
        self.worker, self.error = None, ""
        try:
            self.worker = Worker(job, threads)
        except Exception as error:
            self.error = str(explained(error))

    def __call__(self, task: dict) -> dict:
        answers: list = []
        if self.worker:
            begin, end, size = (int(task[name][0]) for name in ("begin", "end", "size"))
            try:
                answers = list(self.worker.answers(range(begin, end, size), size))
            except Exception as error:
                self.error = str(explained(error))
        return {"begin": task["begin"], "answers": [json.dumps(answers)], "error": [self.error]}


def _import_ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what matters is raised, and told in one line
    try:
        import ray
        import ray.data
    except ImportError:
        raise PaliGemmaError("--engine ray needs Ray (the extra `ray`): pip install 'ray[data]'") from None
    return ray


def _start(ray) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray here."""
    address = os.environ.get("RAY_ADDRESS", "local")
    here = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == "local" else {}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **here)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise PaliGemmaError(f"--engine ray: Ray does not start, or RAY_ADDRESS is not a cluster ({reason})") from None


def _quiet(ray) -> None:
    """In the order of the rows, and without Ray's own bars and messages."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error is raised as well
