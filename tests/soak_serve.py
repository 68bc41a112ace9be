"""python -m tests.soak serve [--seconds S] [--clients N]: serve-onnx under many clients, for long.

Each asks one thing after another: prompts, pictures and ways to draw at random, streams among them, and sometimes goes
away in the middle. Every answer has to be the one that the bundle gives alone. Prints the memory of the service's
processes as it goes; the exit code is 1 if an answer was another, or an error.
"""

import argparse
import asyncio
import io
import json
import os
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np

from export.benchmark.serve import service
from export.session import load
from numpy_ref import answer as answering
from numpy_ref.checkpoint import SHIPPED
from numpy_ref.cli.options import Parser, on_cores, real, whole
from numpy_ref.image import open_image
from numpy_ref.model.sampling import Sampling

from .soak import PROMPTS, slope
from .test_service import data_url

PICTURES, LEAVES = 4, 0.03  # how many there are; the share of requests whose client does not wait for the answer
SETTINGS = (Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=11), Sampling(temperature=1.3, top_k=7, seed=12))


def memory_of(pid):
    """Resident bytes of a process and of those that it started."""
    sizes = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if pid in (int(folder.name), parent):
                pages = int((folder / "statm").read_text().split()[1])
                sizes[int(folder.name)] = pages * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue  # it has just ended
    return sum(sizes.values())


def pictures():
    """The example, turned and mirrored: images, and their files."""
    example = open_image(SHIPPED / "example.png")
    images = [example.rotate(90 * i) for i in range(PICTURES)]
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, "PNG")
    return images, [file.getvalue() for file in files]


def expected_texts(images):
    """(picture, prompt, setting) -> what the bundle answers alone."""
    engine, tokenizer = load(None, "cpu", 1)
    return {
        (i, prompt, sampling): answering.answer(engine, tokenizer, image, prompt, sampling=sampling).text
        for i, image in enumerate(images)
        for prompt in PROMPTS
        for sampling in SETTINGS
    }


class Found:
    """What all clients saw."""

    def __init__(self):
        self.answers, self.left, self.wrong = 0, 0, []


async def client(url, seed, expected, files, found, until):
    """Ask until the time is over."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(timeout=120) as session:
        while time.monotonic() < until:
            i, prompt, sampling = rng.choice(list(expected))
            parts = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": data_url(files[i])}}]
            body = {
                "messages": [{"role": "user", "content": parts}], "temperature": sampling.temperature,
                "top_p": sampling.top_p, "top_k": sampling.top_k, "seed": sampling.seed, "stream": rng.random() < 0.5,
            }  # fmt: skip
            if rng.random() < LEAVES:
                asked = asyncio.ensure_future(session.post(f"{url}/v1/chat/completions", json=body))
                await asyncio.sleep(rng.random() / 20)
                asked.cancel()
                await asyncio.wait([asked])
                found.left += 1
                continue
            text = await ask(session, url, body)
            if text == expected[i, prompt, sampling]:
                found.answers += 1
            else:
                found.wrong.append((prompt, sampling, text))


async def ask(session, url, body):
    """The text of an answer, or what went wrong."""
    response = await session.post(f"{url}/v1/chat/completions", json=body)
    if response.status_code != 200:
        return f"{response.status_code}: {response.text}"
    if not body["stream"]:
        return response.json()["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    if events[-1] != "[DONE]":
        return events[-1]
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


async def soak(url, pid, arguments, expected, files):
    """All clients, and a look at the memory twenty times."""
    found, samples, began = Found(), [], time.monotonic()
    until = began + arguments.seconds
    clients = [
        asyncio.ensure_future(client(url, seed, expected, files, found, until)) for seed in range(arguments.clients)
    ]
    while time.monotonic() < until:
        await asyncio.sleep(arguments.seconds / 20)
        samples.append((found.answers, memory_of(pid)))
        if not arguments.json:
            print(
                f"{found.answers:>8} answers  {samples[-1][1] / 2**20:9.2f} MiB  {time.monotonic() - began:7.1f} s",
                flush=True,
            )
    await asyncio.gather(*clients)
    return found, samples


def main(argv=None):
    options = Parser(prog="python -m tests.soak serve", description=__doc__.splitlines()[0])
    options.add_argument("what", choices=["serve"], help=argparse.SUPPRESS)
    options.add_argument("--seconds", type=real(1), default=600, metavar="S", help="(600)")
    options.add_argument("--clients", type=whole(1), default=16, metavar="N", help="(16)")
    options.add_argument("--slots", type=whole(1), default=8, metavar="N", help="of the service (8)")
    options.add_argument("--threads", type=on_cores(0), default=1, help="of the service, 0 for all (1)")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args(argv)
    images, files = pictures()
    expected = expected_texts(images)
    with ExitStack() as stack:
        settings = ["--slots", arguments.slots, "--threads", arguments.threads, "--provider", "cpu"]
        process, port = stack.enter_context(service(None, settings))
        url = f"http://127.0.0.1:{port}"
        found, samples = asyncio.run(soak(url, process.pid, arguments, expected, files))
        metrics = httpx.get(f"{url}/metrics").text
    grows = slope([answers for answers, _ in samples], [size for _, size in samples])
    slots = {name: float(np.float64(line.split()[1])) for line in metrics.splitlines()
             for name in ("serve_onnx_live", "serve_onnx_waiting") if line.startswith(f"{name} ")}  # fmt: skip
    result = {
        "answers": found.answers,
        "left": found.left,
        "wrong": len(found.wrong),
        "bytes_per_answer": round(grows, 1),
        **slots,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print("  ".join(f"{name} {value}" for name, value in result.items()))
        for each in found.wrong[:5]:
            print(f"wrong: {each}", file=sys.stderr)
    return int(bool(found.wrong) or any(slots.values()))
