"""serve-onnx --engine ray: a replica is killed under load on a cluster of this machine, and nobody waits in vain."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from export import bundle
from export.service.backend import Load

from .test_batch_ray import processes
from .test_serve_onnx import COMMAND, PNG, ROOT
from .test_service import message

REPLICA = "ray::ServeReplica"  # what Ray calls the process of one
RETRYABLE = {429, 500, 503, 504}  # which OpenAI's clients try again


def replicas(ancestor):
    """The processes of Ray Serve's replicas below a process."""
    found = processes()

    def below(pid):
        return pid == ancestor or (pid in found and below(found[pid][0]))

    return [pid for pid, (_, line) in found.items() if line.startswith(REPLICA) and below(pid)]


def test_a_replica_is_killed_and_nobody_waits_in_vain():
    bundle.shipped()
    options = ["--engine", "ray", "--replicas", "2", "--threads", "2", "--provider", "cpu", "--port", "0", "--no-log"]
    with subprocess.Popen(
        [*COMMAND, *options, "--slots", "4"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("http"):
                    break
            url = line.split("/v1")[0]
            with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
                (choice,) = client.chat.completions.create(model="shipped", messages=message()).choices
                streamed = client.chat.completions.create(model="shipped", messages=message(), stream=True)
                text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
                assert choice.message.content == text
            codes, waits, lock, stop = [], [], threading.Lock(), threading.Event()

            def keep_asking():
                while not stop.is_set():
                    began = time.monotonic()
                    found = httpx.post(
                        f"{url}/v1/answer", files={"image": PNG}, data={"prompt": "caption en"}, timeout=90
                    )
                    with lock:
                        codes.append(found.status_code)
                        waits.append(time.monotonic() - began)
                    if found.status_code == 200:
                        assert found.json()["text"] == text
                    else:
                        time.sleep(0.1)

            with ThreadPoolExecutor(6) as pool:
                asking = [pool.submit(keep_asking) for _ in range(6)]
                time.sleep(3)
                victims = replicas(process.pid)
                assert len(victims) == 2
                os.kill(victims[0], signal.SIGKILL)
                end = time.monotonic() + 120
                while set(replicas(process.pid)) in ({*victims}, {victims[1]}) or codes[-12:] != [200] * 12:
                    assert time.monotonic() < end
                    time.sleep(0.2)
                stop.set()
                for each in asking:
                    each.result(120)
            assert codes.count(200) > len(codes) / 2
            assert set(codes) <= {200, *RETRYABLE}
            assert max(waits) < 60
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            assert "Traceback" not in output  # Ray itself says that a process was lost
        finally:
            if process.poll() is None:
                process.kill()


def test_more_replicas_than_cores_are_refused():
    bundle.shipped()
    options = ["--engine", "ray", "--replicas", "1000", "--port", "0", "--provider", "cpu"]
    ended = subprocess.run([*COMMAND, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("serve-onnx: error: --replicas 1000: Ray has")


def test_options_of_autoscaling_reach_ray():
    ray_serve = pytest.importorskip("export.service.ray_serve")

    class Cluster:
        @staticmethod
        def nodes():
            return [{"Alive": True, "Resources": {"CPU": 8.0}}]

    class Arguments:
        autoscale = (("min_replicas", "1"), ("max_replicas", "4"), ("target_ongoing_requests", "6"))
        replicas, threads, slots, queue, grace = 1, 0, 8, 16, 30.0

    scale = ray_serve.scale_of(Cluster, Load(bundle.shipped(), "cpu"), Arguments)
    assert scale["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 6}
    assert scale["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}
    assert "num_replicas" not in scale


def test_it_needs_ray_serve():
    code = f"import sys; sys.modules['ray'] = None; sys.argv[1:] = ['--engine', 'ray']; {COMMAND[-1]}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith("(the extra `ray`): pip install 'ray[serve]'")
