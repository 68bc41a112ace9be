"""Stage 5: the random model of full size: first token, a further one, and what share of the memory's speed that is."""

import time

import numpy as np

from numpy_ref.generate import generate, pad_prompts

from ..benchmark.bounds import weight_bytes
from ..benchmark.peers.prompt import prompt
from ..session import Session, cuda
from . import bandwidth, models
from .stage import LABEL, Found, Settings

LIMIT, PART_LIMIT = 200, 100
FRESH = True  # loading and the peak of memory are those of a process of its own
FIRST_TOKENS = 7  # timed answers of one token
BATCH, BATCH_STEPS = 8, 32


def parts(settings: Settings) -> list[str]:
    ways = ("captured", "plain") if settings.on_device else ("plain",)
    return [f"{name} {way}" for name in models.full_names(settings) for way in ways]


def run(part: str, settings: Settings, found: Found) -> None:
    name, way = part.split()
    bundle = models.full(settings, name)
    made = float(models.seconds_of(bundle.path).read_text())
    found.add(made_s=made, operators=bundle.operators, residual=bundle.description.residual)
    before = cuda.memory()[0] if settings.on_device else 0
    started = time.perf_counter()
    engine = models.opened(bundle, settings, captured=way == "captured")
    found.add(load_s=round(time.perf_counter() - started, 2))
    if settings.on_device:
        found.add(loaded_bytes=cuda.memory()[0] - before)
    found.add(**answer_times(engine, 1, settings.steps))
    read, copy, sheet = weight_bytes(bundle.path, "decode"), None, None
    if settings.on_device:
        found.add(peak_bytes=cuda.memory()[0] - before)  # the runtime keeps what it once took
        copy, sheet = bandwidth.copy_bandwidth(bandwidth.GIB), bandwidth.data_sheet(cuda.device_name())
    found.add(**shares(read, found["ms_per_token"], copy, sheet))
    found.add(step=split(engine, settings))
    found.add(batch_8=answer_times(engine, BATCH, min(BATCH_STEPS, settings.steps)))


def shares(read: int, milliseconds: float, copy: float | None, sheet: float | None) -> dict:
    """How a token's bytes of weights over its time compare with bandwidths in bytes a second."""
    reached = read / (milliseconds / 1000)
    return {
        "weight_bytes": read, "bytes_per_s": reached, "copy_bytes_per_s": copy, "data_sheet": sheet,
        "share_of_copy": reached / copy if copy else None, "share_of_data_sheet": reached / sheet if sheet else None,
    }  # fmt: skip


def answer_times(engine: Session, batch: int, steps: int) -> dict:
    """Medians of the times of whole answers, each from the picture file on, after one to warm up."""
    known = models.endless(engine.config)

    def answer(count):
        times = [time.perf_counter()]
        pixels = models.picture(engine, batch)
        times.append(time.perf_counter())
        for _ in generate(engine, pixels, [prompt(engine.config)] * batch, known, count):
            times.append(time.perf_counter())
        return np.diff(times) * 1000

    started = time.perf_counter()
    answer(3)
    warm_s = time.perf_counter() - started
    firsts = np.array([answer(1) for _ in range(FIRST_TOKENS)])
    further = answer(1 + steps)[2:]
    median = float(np.median(further))
    return {
        "first_answer_s": round(warm_s, 3), "picture_ms": float(np.median(firsts[:, 0])),
        "first_token_ms": float(np.median(firsts.sum(1))), "ms_per_token": median,
        "ms_per_token_quartiles": np.percentile(further, [25, 75]).tolist(),
        "tokens_per_s": 1000 * batch / median, "steps": steps,
    }  # fmt: skip


def split(engine: Session, settings: Settings) -> dict:
    """Milliseconds of a step's graph alone, of its launch as the host sees it, and of sampling with its wait."""
    config, steps = engine.config, max(2, settings.steps // 2)
    ids, lengths = pad_prompts([prompt(config)], config.pad)
    logits, cache = engine.prefill(models.picture(engine), ids, lengths, ids.shape[1] + 2)
    token, known = ids[:, -1:], models.endless(config)
    wait = cuda.synchronize if settings.on_device else lambda: None

    def each(call):
        for _ in range(2):
            call()
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            call()
        launched = time.perf_counter()
        wait()
        return [1000 * (moment - started) / steps for moment in (time.perf_counter(), launched)]

    graph, launch = each(lambda: engine.decode(token, lengths, cache))
    sampling, _ = each(lambda: engine.sample(logits, known, uniform=np.zeros(1, np.float32)))
    prefill, _ = each(lambda: engine.prefill(models.picture(engine), ids, lengths, ids.shape[1] + 2))
    return {"graph_ms": graph, "launch_ms": launch, "sampling_ms": sampling, "picture_and_prefill_ms": prefill}


def lines(part: str, found: dict) -> list[str]:
    rows = [
        f"{part:<{LABEL}}first token {found['first_token_ms']:.2f} ms (picture {found['picture_ms']:.2f}), "
        f"{found['ms_per_token']:.3f} ms a token, {found['tokens_per_s']:.1f} tokens/s; load {found['load_s']:.1f} s"
    ]
    if "weight_bytes" in found:
        rows.append(f"{'':<{LABEL}}{reading(found)}; residual stream {found['residual']}")
    if step := found.get("step"):
        parts = f"graph {step['graph_ms']:.3f} ms, launched in {step['launch_ms']:.3f}"
        rows.append(f"{'':<{LABEL}}a step: {parts}, sampling {step['sampling_ms']:.3f} ms")
    if batch := found.get("batch_8"):
        rate = f"{batch['ms_per_token']:.3f} ms a step, {batch['tokens_per_s']:.1f} tokens/s"
        rows.append(f"{'':<{LABEL}}batch {BATCH}: first tokens {batch['first_token_ms']:.2f} ms, {rate}")
    return rows


def reading(found: dict) -> str:
    """What a token reads and how quickly, beside the bandwidths that are known, and the memory it took."""
    text = f"reads {found['weight_bytes'] / 1e9:.2f} GB a token at {found['bytes_per_s'] / 1e12:.3f} TB/s"
    if found["share_of_copy"]:
        text += f", {found['share_of_copy']:.0%} of the copy's {found['copy_bytes_per_s'] / 1e12:.2f}"
    if found["share_of_data_sheet"]:
        text += f", {found['share_of_data_sheet']:.0%} of the data sheet's {found['data_sheet'] / 1e12:.2f}"
    if found.get("peak_bytes"):
        text += f"; {found['peak_bytes'] / bandwidth.GIB:.2f} GiB of the device"
    return text
