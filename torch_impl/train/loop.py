"""The training loop, for any loss: resumable, and the same whether it was interrupted or not.

Example i is a pure function of the seed and i, so the data need no state. The rest (weights, optimizer, step, curve)
goes into one safetensors file every so often, replaced whole; after a kill the run goes on from there. Weights that are
frozen are not kept: they are where the run began. The best weights, where there is a validation, lie in a second file.

Under torchrun each process has an equal share of each batch (distributed.py), and the first one does all writing.
"""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from numpy_ref.errors import PaliGemmaError, note, plural, quote
from numpy_ref.files import claimed

from . import distributed

STATE, LOG, BEST = "state.safetensors", "log.csv", "best.safetensors"
COLUMNS = ["step", "seconds", "loss", "rate"]
LOG_EVERY = 50  # steps
MOST_WORKERS = 8
LINE_EVERY = 10.0  # seconds, or a tenth of those that have passed, where no terminal shows a bar
#: What the optimizers keep of each weight.
_MOMENTS = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, torch.optim.Muon: {"momentum_buffer"}}


@dataclass(frozen=True)
class Settings:
    """How to train. `batch_size` examples are seen at once, `accumulate` times before each step."""

    steps: int
    batch_size: int
    peak: float = 1e-3  # learning rate
    seed: int = 0
    accumulate: int = 1
    warmup: int = 300
    decay: float = 1.0  # of the steps, that the rate falls to nothing in; 1 is a straight line, 0.2 holds it first
    weight_decay: float = 0.05
    optimizer: str = "adamw"
    bfloat16: bool = True
    freeze: tuple[str, ...] = ()


@dataclass
class Validation:
    """What is measured on the way, each `every` steps and at the end; the weights of the best are what `fit` leaves.

    `measure(model)` gives named numbers, `score` the one of them, or of several, that is to be large. `rows` has what
    was measured so far, with the step.
    """

    measure: Callable[[nn.Module], dict[str, float]]
    score: Callable[[dict[str, float]], tuple[float, ...]]
    every: int
    rows: list[dict] = field(default_factory=list)

    def best(self) -> dict:
        """The first of the rows with the largest score."""
        return max(self.rows, key=self.score)


class Examples(Protocol):
    """An endless stream: `examples[i]` is the i-th."""

    def __getitem__(self, index: int) -> tuple: ...


def state_folder(output: Path) -> Path:
    """Where a run that is to become `output` keeps its state."""
    return output.with_name(f"{output.name}.training")


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, a plateau, then a straight line down to nothing over the last share `decay` of the steps."""
    warmup = min(settings.warmup, settings.steps // 10 + 1)
    if step < warmup:
        return settings.peak * (step + 1) / warmup
    falling = max(1, round((settings.steps - warmup) * settings.decay))
    return settings.peak * min(1.0, (settings.steps - step) / falling)


def optimizers_for(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan 2024) for the kernels of the blocks and AdamW for the rest.

    Kernels decay; norms, biases and embedding tables do not.
    """
    hidden, decayed, kept = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the base of an adapter
            continue
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in settings.freeze):
            parameter.requires_grad_(False)
        elif not name.endswith("kernel"):
            kept.append(parameter)
        elif settings.optimizer == "muon" and ".blocks." in f".{name}":
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    if not [*hidden, *decayed, *kept]:
        raise PaliGemmaError(f"nothing is left to train: {', '.join(settings.freeze)} are frozen")
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=settings.peak, betas=(0.9, 0.98)))
    if hidden:  # its steps are scaled to the size of AdamW's, so that one rate serves both
        muon = torch.optim.Muon(
            hidden, lr=settings.peak, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return optimizers


def fit(
    model: nn.Module,
    loss: Callable[..., Tensor],
    examples: Examples,
    collate: Callable[..., dict[str, Tensor]],
    settings: Settings,
    folder: Path,
    label: str = "training",
    save_every: float = 60.0,
    about: dict | None = None,
    validation: Validation | None = None,
) -> list:
    """Train `model` in place by `loss(model, batch)`; the curve as (step, seconds, loss, rate) rows.

    `examples[i]` is the i-th example of an endless stream, `collate` makes a batch of several. Progress is kept in
    `folder` (state.safetensors, log.csv) every `save_every` seconds, and taken up again from there; `about` says what
    else makes a run this one (its data, where it began), and must be the same then. With a validation the model has
    the best weights in the end, in the first process. Raises PaliGemmaError if another process is at work in `folder`,
    or if the batch cannot be shared equally among those that torchrun started.
    """
    if settings.batch_size % distributed.count():
        raise PaliGemmaError(
            f"a batch of {plural(settings.batch_size, 'example')} cannot be shared by "
            f"{distributed.count()} processes; give a --batch-size that can"
        )
    with claimed(folder) if distributed.is_first() else nullcontext():
        if distributed.is_first():
            _remove_leftovers(folder)
        distributed.wait()
        return _fit(model, loss, examples, collate, settings, folder, label, save_every, about, validation)


def _fit(model, loss, examples, collate, settings, folder, label, save_every, about, validation) -> list:
    torch.use_deterministic_algorithms(True)
    # Filling memory that is written next takes a tenth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model.train()
    optimizers = optimizers_for(model, settings)
    if os.path.lexists(folder / LOG) and not (folder / LOG).is_file():
        raise PaliGemmaError(f"{folder / LOG}: not a file; remove it")
    run = asdict(settings) | (about or {})
    begin, curve, recent, rows = _resume(folder / STATE, model, optimizers, run)
    if validation:
        validation.rows[:] = rows
    distributed.wait()  # before the first process writes a new state
    _write_log(folder / LOG, curve)
    before = curve[-1][1] if curve else 0.0
    batches = iter(loader(examples, collate, settings, begin))
    objective, started = distributed.shared(Objective(model, loss)), time.perf_counter()
    saved, cost = started, 0.0
    shown = None if distributed.is_first() else True  # None: in a terminal
    with tqdm(total=settings.steps, initial=begin, desc=label, disable=shown) as bar:
        lines = _Lines(label, begin, settings.steps, bar.disable and distributed.is_first())
        for step in range(begin, settings.steps):
            rate = learning_rate(step, settings)
            recent.append(take_step(objective, batches, optimizers, settings, rate))
            last = step + 1 == settings.steps
            bar.update()
            bar.set_postfix(loss=f"{recent[-1]:.3f}", rate=f"{rate:.1e}")
            lines.show(step + 1, recent[-1])
            if (step + 1) % LOG_EVERY == 0 or last:
                seconds = before + time.perf_counter() - started
                curve.append((step + 1, round(seconds, 1), round(float(np.mean(recent)), 4), float(f"{rate:.3g}")))
                recent = []
                _write_log(folder / LOG, curve[-1:], append=True)
            measured = validation and ((step + 1) % validation.every == 0 or last)
            if measured and distributed.is_first():
                _validate(model, validation, step + 1, folder / BEST)
            if measured or time.perf_counter() - saved > max(save_every, 20 * cost) or last:
                save_started = time.perf_counter()
                rows = validation.rows if validation else []
                progress = {"step": step + 1, "curve": curve, "recent": recent, "validation": rows, "settings": run}
                _save(folder / STATE, model, optimizers, progress)
                saved = time.perf_counter()
                cost = saved - save_started  # a state that takes long to write is written less often
    if validation and distributed.is_first():
        _take_best(model, validation, folder / BEST)
    return curve


class Objective(nn.Module):
    """The loss as a module around the model, since it is a module's forward that shares gradients."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(self.model, batch)


class _Lines:
    """Progress as plain lines on stderr, further and further apart, for where a bar is not shown."""

    def __init__(self, label, begin, steps, shown):
        self.label, self.begin, self.steps, self.shown = label, begin, steps, shown
        self.started = self.last = time.perf_counter()

    def show(self, step, loss):
        now = time.perf_counter()
        elapsed = now - self.started
        if not self.shown or now - self.last < max(LINE_EVERY, elapsed / 10):
            return
        self.last = now
        each = elapsed / (step - self.begin)
        left = duration(each * (self.steps - step))
        note(f"{self.label}: step {step} of {self.steps}, loss {loss:.3f}, {each:.2f} s a step, {left} left")


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def loader(
    examples: Examples, collate: Callable[..., dict[str, Tensor]], settings: Settings, begin: int = 0
) -> DataLoader:
    """This process' share of each batch from step `begin` on, read in processes of their own, in order."""
    share = settings.batch_size // distributed.count()
    first = distributed.rank() * share
    seen = settings.accumulate * settings.batch_size  # examples a step
    starts = range(begin * seen, settings.steps * seen, settings.batch_size)
    return DataLoader(
        _ErrorsAsValues(examples), num_workers=workers(), prefetch_factor=8, collate_fn=partial(_collate, collate),
        batch_sampler=[list(range(start + first, start + first + share)) for start in starts],
    )  # fmt: skip


def workers() -> int:
    """How many processes read examples: one on two cores, more where a fast device would wait for them."""
    return max(1, min(MOST_WORKERS, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2) // 2))


def take_step(
    objective: nn.Module, batches: Iterator, optimizers: list[torch.optim.Optimizer], settings: Settings, rate: float
) -> float:
    """One step of the optimizers at a learning rate; the mean loss of its batches, over all processes."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    total, device = 0.0, parameters[0].device
    for turn in range(settings.accumulate):
        last = turn + 1 == settings.accumulate
        with nullcontext() if last else distributed.apart(objective):
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
                value = objective(_next(batches, device)) / settings.accumulate
            mean = distributed.mean(value.detach())
            if not torch.isfinite(mean):
                raise PaliGemmaError("the loss is not a number any more; lower --learning-rate")
            value.backward()
        total += mean.item()
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total


class _ErrorsAsValues(Dataset):
    """Examples whose errors are handed on as values: raised in a worker, they would come out as tracebacks."""

    def __init__(self, examples):
        self.examples = examples

    def __getitem__(self, index):
        try:
            return self.examples[index]
        except PaliGemmaError as error:
            return error


def _collate(collate, examples):
    wrong = [example for example in examples if isinstance(example, PaliGemmaError)]
    return wrong[0] if wrong else collate(examples)


def _next(batches, device):
    batch = next(batches)
    if isinstance(batch, PaliGemmaError):
        raise batch
    return {name: tensor.to(device) for name, tensor in batch.items()}


# --- validation --------------------------------------------------------------------------------------------


def _validate(model, validation, step, file) -> None:
    """Measure, say so, and keep the weights if they are the best yet."""
    model.eval()
    with torch.no_grad():
        row = {"step": step, **validation.measure(model)}
    model.train()
    validation.rows.append(row)
    is_best = validation.best() is row
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
    tqdm.write(f"validation after step {step}: {numbers}{' (the best so far)' if is_best else ''}", sys.stderr)
    if is_best:
        _write_tensors(file, _trained(model), {"step": str(step)}, "the best weights")


def _take_best(model, validation, file) -> None:
    """Put the weights of the best validation into the model."""
    best = validation.best()["step"]
    try:
        with safe_open(file, framework="pt") as stored:
            if stored.metadata() != {"step": str(best)}:
                raise ValueError("of another step")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        _load(model, tensors)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise PaliGemmaError(f"{file}: not the best weights ({error}); remove its folder to begin again") from None


# --- state -------------------------------------------------------------------------------------------------


def _trained(model) -> dict[str, Tensor]:
    """The weights of a model but those that are frozen, which are where the run began."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _load(model, tensors) -> None:
    """Put what `_trained` gave into a model. Raises ValueError or RuntimeError if it is of another one."""
    wanted = _trained(model)
    if odd := sorted(wanted.keys() ^ tensors.keys()):
        raise ValueError(f"{odd[0]} is missing, or too much")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(wanted[name].shape)}")
    model.load_state_dict(tensors, strict=False)


def _write_tensors(file, tensors, metadata, what) -> None:
    """Write tensors into a file, in place of the one that is there. Raises PaliGemmaError that says what they are."""
    temporary = file.with_suffix(f".{os.getpid()}.part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise PaliGemmaError(f"{file}: cannot keep {what} ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _save(file, model, optimizers, progress) -> None:
    if not distributed.is_first():
        return
    tensors = {f"model.{name}": tensor for name, tensor in _trained(model).items()}
    for i, optimizer in enumerate(optimizers):
        for j, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{key}": tensor for key, tensor in entry.items()}
    metadata = {"progress": json.dumps({**progress, "tensors": sorted(tensors)})}
    _write_tensors(file, tensors, metadata, "the state of training")


def _remove_leftovers(folder) -> None:
    """Remove what was half written when a run was killed: our own files, and those of the library."""
    for left_over in (*folder.glob("*.part"), *folder.glob(".tmp*")):
        left_over.unlink(missing_ok=True)


def _resume(file, model, optimizers, settings: dict) -> tuple[int, list, list, list]:
    """Take up what a state file says: step, curve, losses since its last row, validations. Without: the beginning."""
    if not os.path.lexists(file):
        return 0, [], [], []
    try:
        if not file.is_file():
            raise ValueError("not a file")
        with safe_open(file, framework="pt") as stored:
            progress = _progress(json.loads(stored.metadata()["progress"]))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        if sorted(tensors) != progress["tensors"]:
            raise ValueError("tensors are missing, or too many")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise PaliGemmaError(f"{file}: not a state of training ({error}); remove it to begin again") from None
    wanted = json.loads(json.dumps(settings))
    odd = [f"{key} {progress['settings'].get(key)}" for key in wanted if progress["settings"].get(key) != wanted[key]]
    if odd:
        raise PaliGemmaError(f"{file}: this run was begun with {', '.join(odd)}; go on with that, or remove it")
    if progress["step"] > settings["steps"]:
        raise PaliGemmaError(f"{file}: not a state of training (step {quote(progress['step'])} of {settings['steps']})")
    try:
        _restore(tensors, model, optimizers)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PaliGemmaError(f"{file}: a state of another model ({reason}); remove it to begin again") from None
    return progress["step"], [tuple(row) for row in progress["curve"]], progress["recent"], progress["validation"]


def _progress(found) -> dict:
    """What a state file says of itself, if that is what `_save` writes. Raises ValueError if it is not."""
    if not isinstance(found, dict):
        raise ValueError("its progress is not an object")
    step, curve, recent, rows = (found.get(key) for key in ("step", "curve", "recent", "validation"))
    table = [
        (isinstance(step, int) and not isinstance(step, bool) and step > 0, f"step {quote(step)}"),
        (isinstance(found.get("settings"), dict), "settings"),
        (isinstance(found.get("tensors"), list), "the list of its tensors"),
        (isinstance(recent, list) and all(map(_is_number, recent)), "recent losses"),
        (isinstance(curve, list) and all(_is_row(row) for row in curve), "the curve"),
        (isinstance(rows, list) and all(_is_measured(row) for row in rows), "validations"),
    ]
    if wrong := [name for holds, name in table if not holds]:
        raise ValueError(f"{wrong[0]} cannot be right")
    return found


def _is_row(row) -> bool:
    return isinstance(row, list) and len(row) == len(COLUMNS) and all(map(_is_number, row))


def _is_measured(row) -> bool:
    return isinstance(row, dict) and "step" in row and all(map(_is_number, row.values()))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _restore(tensors, model, optimizers) -> None:
    """Put stored tensors into the model and its optimizers. Raises one of several errors if they do not fit."""
    _load(model, {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict] = {}
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for name, tensor in tensors.items():
            kind, *rest = name.split(".")
            if kind != "optimizer" or rest[0] != str(i):
                continue
            _, place, key = rest
            if tensor.dim() and tensor.shape != weights[int(place)].shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(weights[int(place)].shape)}")
            state.setdefault(int(place), {})[key] = tensor
        wanted = _MOMENTS[type(optimizer)]
        if not state or any(entry.keys() != wanted for entry in state.values()):
            raise ValueError(f"optimizer {i} lacks moments, or has others")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _write_log(file, rows, append=False) -> None:
    if not distributed.is_first():
        return
    try:
        with file.open("a" if append else "w", newline="") as stream:
            writer = csv.writer(stream)
            if not append:
                writer.writerow(COLUMNS)
            writer.writerows(rows)
    except OSError as error:
        raise PaliGemmaError(f"{file}: cannot be written ({error.strerror})") from None
