"""`--plan`: what a fine-tune would take, from counting weights and from two steps that are measured and thrown away."""

import sys
import time

import torch

from numpy_ref import memory as machine
from numpy_ref.errors import plural

from . import data, memory
from .finetune import Run, prefix_lm_loss
from .loop import Objective, duration, learning_rate, loader, optimizers_for, take_step

MEASURED = 2  # steps; the first one also sets up


def of(run: Run) -> str:
    """A table of lines: weights, data, steps, memory, time. Nothing is written, and the model is of no use afterwards.

    Steps are not measured where the counted memory alone is more than there is.
    """
    optimizers = optimizers_for(run.model, run.settings)  # which freezes what stays
    lines = {"weights": weights(run), "data": pictures(run), "steps": steps(run), "memory": counted(run)}
    needed = memory.of_gradients(run.model) + memory.of_moments(run.model, run.settings.optimizer)
    if next(run.model.parameters()).device.type == "cpu" and needed > (free := machine.available()):
        lines["time"] = f"not measured: {free / 1e9:.1f} GB of memory are free, too few for gradients and moments"
    else:
        seconds, peak = measure(run, optimizers)
        lines["memory"] += f"; {peak / 1e9:.2f} GB at the peak of a step, as measured"
        lines["time"] = f"{seconds:.2f} s a step here: {duration(seconds * run.settings.steps)} in all"
        if run.held_out:
            lines["time"] += ", and what validation takes"
    return "\n".join(f"{name:<9}{text}" for name, text in lines.items())


def weights(run: Run) -> str:
    """How many weights there are, and how many are trained."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    base = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    # The weights of an int4 kernel are no parameters; each of its codes has two.
    base += sum(2 * b.numel() for name, b in run.model.named_buffers() if name.endswith("codes"))
    return f"{trained:,} are trained, {base:,} stay as they are"


def pictures(run: Run) -> str:
    """How many lines there are to train on, and to measure on."""
    if not isinstance(run.examples, data.JsonLines):
        return "drawn scenes without end"
    parts = [f"{plural(len(run.examples.rows), 'line')} to train on"]
    parts += [f"{len(run.held_out.rows)} to validate on"] if run.held_out else []
    parts += [f"{len(run.tests.rows)} to test on"] if run.tests else []
    return ", ".join(parts)


def steps(run: Run) -> str:
    """How many steps of how many examples, and how often that goes through the data."""
    settings = run.settings
    seen = settings.batch_size * settings.accumulate
    text = f"{settings.steps} of {plural(seen, 'example')}, learning rate {settings.peak:g} at its peak"
    if isinstance(run.examples, data.JsonLines):
        text += f"; {settings.steps * seen / len(run.examples.rows):.1f} times through the data"
    return text


def counted(run: Run) -> str:
    """Bytes that follow from the weights alone."""
    sizes = {
        "weights": memory.of_weights(run.model),
        "gradients": memory.of_gradients(run.model),
        "moments of the optimizer": memory.of_moments(run.model, run.settings.optimizer),
    }
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sizes.items())


def measure(run: Run, optimizers: list[torch.optim.Optimizer]) -> tuple[float, int]:
    """Seconds of the last of MEASURED steps, and the most bytes that the device (or this process) held."""
    device = next(run.model.parameters()).device
    batches = iter(loader(run.examples, run.collate, run.settings))
    objective, seconds = Objective(run.model.train(), prefix_lm_loss), 0.0
    for step in range(min(MEASURED, run.settings.steps)):
        started = time.perf_counter()
        take_step(objective, batches, optimizers, run.settings, learning_rate(step, run.settings))
        seconds = time.perf_counter() - started
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return seconds, 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
