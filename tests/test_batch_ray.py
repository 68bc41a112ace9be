"""run-onnx-batch --engine ray: the same answers on a cluster of this machine, an actor of which is killed mid-way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from export import cli
from export.batch import ray_workers
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli import run
from numpy_ref.errors import PaliGemmaError

from .test_batch import alike, read

COMMAND = [sys.executable, "-c", "from export.cli import batch_main; batch_main()"]
ACTOR = "ray::MapWorker"  # what Ray calls the process of one


def processes():
    """Process id -> parent's id and command line, of all."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # gone meanwhile
    return found


def actors(ancestor):
    """The processes of Ray's actors below a process."""
    found = processes()

    def below(pid):
        return pid == ancestor or (pid in found and below(found[pid][0]))

    return [pid for pid, (_, command) in found.items() if command.startswith(ACTOR) and below(pid)]


def test_an_actor_is_killed_and_every_row_is_there_once(tmp_path):
    file, output, part = tmp_path / "rows.jsonl", tmp_path / "ray.jsonl", tmp_path / "ray.jsonl.part"
    prompts = ["caption en", "detect star", " "]
    rows = [{"image": str(SHIPPED / "example.png"), "prompt": prompts[i % 3]} for i in range(240)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ["--input", str(file), "--provider", "cpu", "--temperature", "1", "--threads", "2"]
    options += ["--max-new-tokens", "16"]

    command = [*COMMAND, *options, "--engine", "ray", "--workers", "2", "--batch-size", "2", "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    victims = actors(process.pid)
    assert victims, process.communicate()[0]
    os.kill(victims[0], signal.SIGKILL)
    done = part.read_bytes().count(b"\n")
    found, _ = process.communicate(timeout=600)
    assert process.returncode == 0, found
    assert done < len(rows)  # it was killed mid-way

    assert run("run-onnx-batch", cli.run_onnx_batch, [*options, "--output", str(tmp_path / "local.jsonl")]) == 0
    found, expected = read(output), read(tmp_path / "local.jsonl")
    assert [each["row"] for each in found] == [each["row"] for each in expected] == list(range(len(rows)))
    answered = [i for i, each in enumerate(expected) if "error" not in each]
    assert len(answered) == 160
    assert alike([found[i] for i in answered], [expected[i] for i in answered])
    assert found[2::3] == expected[2::3]  # those without a prompt


@pytest.mark.parametrize(
    ("cores", "count", "threads", "share"),
    [([8], 2, 0, 4), ([8], 3, 0, 2), ([2], 2, 0, 1), ([4, 4], 2, 0, 4), ([4, 4], 3, 0, 2), ([3, 3], 4, 0, 1), ([8], 2, 2, 1),
     ([8], 2, 1, 1), ([8], 1, 6, 6), ([4, 4], 1, 8, 4)],
)  # fmt: skip
def test_cores_are_shared_out(cores, count, threads, share):
    assert ray_workers.share_out(cores, count, threads) == share


def test_more_workers_than_cores():
    with pytest.raises(PaliGemmaError, match="--workers 3: Ray has 2 cores"):
        ray_workers.share_out([1, 1], 3)


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError, ValueError])
def test_a_cluster_that_does_not_answer(monkeypatch, error):
    asked = []

    def init(**options):
        asked.append(options)
        raise error("a long story\nno such cluster")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray = SimpleNamespace(init=init, exceptions=SimpleNamespace(RayError=PaliGemmaError))
    with pytest.raises(PaliGemmaError, match=r"RAY_ADDRESS is not a cluster \(no such cluster\)$"):
        ray_workers._start(ray)
    assert asked[0]["address"] == "10.0.0.1:6379"
    assert "object_store_memory" not in asked[0]  # a running cluster refuses to be told


def test_an_actor_tells_what_is_wrong(monkeypatch):
    def fail(*arguments):
        raise PaliGemmaError("the session does not open")

    monkeypatch.setattr(ray_workers, "Worker", fail)
    found = ray_workers.Actor(None, 1)({"begin": [0], "end": [4], "size": [2]})
    assert found == {"begin": [0], "answers": ["[]"], "error": ["the session does not open"]}


def test_an_actor_answers_a_task_batch_by_batch(monkeypatch):
    class Worker:
        def __init__(self, job, threads):
            assert (job, threads) == ("job", 3)

        def answers(self, begins, size):
            yield from ([{"row": row} for row in range(begin, begin + size)] for begin in begins)

    monkeypatch.setattr(ray_workers, "Worker", Worker)
    found = ray_workers.Actor("job", 3)({"begin": [4], "end": [8], "size": [2]})
    assert json.loads(found["answers"][0]) == [[{"row": 4}, {"row": 5}], [{"row": 6}, {"row": 7}]]
    assert found["error"] == [""]
