"""The training loop, for any loss: resumable, and the same whether it was interrupted or not.

Example i is a pure function of the seed and i, so the data need no state. The rest (weights, optimizer, step, curve)
goes into one safetensors file every so often, replaced whole; after a kill the run goes on from there.
"""

import csv
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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

from numpy_ref.errors import PaliGemmaError, quote
from numpy_ref.files import claimed

STATE, LOG = "state.safetensors", "log.csv"
COLUMNS = ["step", "seconds", "loss", "rate"]
LOG_EVERY = 50  # steps
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
) -> list:
    """Train `model` in place by `loss(model, batch)`; the curve as (step, seconds, loss, rate) rows.

    `examples[i]` is the i-th example of an endless stream, `collate` makes a batch of several. Progress is kept in
    `folder` (state.safetensors, log.csv) every `save_every` seconds, and taken up again from there; `about` says what
    else makes a run this one (its data, where it began), and must be the same then. Raises PaliGemmaError if another
    process is at work in `folder`.
    """
    with claimed(folder):
        return _fit(model, loss, examples, collate, settings, folder, label, save_every, about)


def _fit(model, loss, examples, collate, settings, folder, label, save_every, about) -> list:
    torch.use_deterministic_algorithms(True)
    model.train()
    optimizers = optimizers_for(model, settings)
    if os.path.lexists(folder / LOG) and not (folder / LOG).is_file():
        raise PaliGemmaError(f"{folder / LOG}: not a file; remove it")
    run = asdict(settings) | (about or {})
    begin, curve, recent = _resume(folder / STATE, model, optimizers, run)
    _write_log(folder / LOG, curve)
    before = curve[-1][1] if curve else 0.0
    seen = settings.accumulate * settings.batch_size  # examples a step
    loader = DataLoader(
        _ErrorsAsValues(examples), settings.batch_size, num_workers=1, prefetch_factor=8,
        collate_fn=partial(_collate, collate), sampler=range(begin * seen, settings.steps * seen),
    )  # fmt: skip
    batches, started = iter(loader), time.perf_counter()
    saved, cost = started, 0.0
    with tqdm(total=settings.steps, initial=begin, desc=label, disable=None) as bar:
        for step in range(begin, settings.steps):
            rate = learning_rate(step, settings)
            recent.append(_step(model, loss, batches, optimizers, settings, rate))
            last = step + 1 == settings.steps
            bar.update()
            bar.set_postfix(loss=f"{recent[-1]:.3f}", rate=f"{rate:.1e}")
            if (step + 1) % LOG_EVERY == 0 or last:
                seconds = before + time.perf_counter() - started
                curve.append((step + 1, round(seconds, 1), round(float(np.mean(recent)), 4), float(f"{rate:.3g}")))
                recent = []
                _write_log(folder / LOG, curve[-1:], append=True)
            if time.perf_counter() - saved > max(save_every, 20 * cost) or last:
                save_started = time.perf_counter()
                progress = {"step": step + 1, "curve": curve, "recent": recent, "settings": run}
                _save(folder / STATE, model, optimizers, progress)
                saved = time.perf_counter()
                cost = saved - save_started  # a state that takes long to write is written less often
    return curve


def _step(model, loss, batches, optimizers, settings, rate) -> float:
    """One step of the optimizers; the mean loss of its batches."""
    total, device = 0.0, next(model.parameters()).device
    for _ in range(settings.accumulate):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            value = loss(model, _next(batches, device)) / settings.accumulate
        if not torch.isfinite(value):
            raise PaliGemmaError("the loss is not a number any more; lower --learning-rate")
        value.backward()
        total += value.item()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
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


# --- state -------------------------------------------------------------------------------------------------


def _save(file, model, optimizers, progress) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{j}.{key}": tensor for key, tensor in entry.items()}
    temporary = file.with_suffix(f".{os.getpid()}.part")
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, {"progress": json.dumps({**progress, "tensors": sorted(tensors)})})
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        raise PaliGemmaError(f"{file}: cannot keep the state of training ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def _resume(file, model, optimizers, settings: dict) -> tuple[int, list, list]:
    """Take up what a state file says: step, curve, and losses since its last row. Without one: the beginning."""
    for left_over in (*file.parent.glob("*.part"), *file.parent.glob(".tmp*")):  # ours, and the library's own
        left_over.unlink(missing_ok=True)
    if not os.path.lexists(file):
        return 0, [], []
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
    return progress["step"], [tuple(row) for row in progress["curve"]], progress["recent"]


def _progress(found) -> dict:
    """What a state file says of itself, if that is what `_save` writes. Raises ValueError if it is not."""
    if not isinstance(found, dict):
        raise ValueError("its progress is not an object")
    step, curve, recent = found.get("step"), found.get("curve"), found.get("recent")
    table = [
        (isinstance(step, int) and not isinstance(step, bool) and step > 0, f"step {quote(step)}"),
        (isinstance(found.get("settings"), dict), "settings"),
        (isinstance(found.get("tensors"), list), "the list of its tensors"),
        (isinstance(recent, list) and all(map(_is_number, recent)), "recent losses"),
        (isinstance(curve, list) and all(_is_row(row) for row in curve), "the curve"),
    ]
    if wrong := [name for holds, name in table if not holds]:
        raise ValueError(f"{wrong[0]} cannot be right")
    return found


def _is_row(row) -> bool:
    return isinstance(row, list) and len(row) == len(COLUMNS) and all(map(_is_number, row))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _restore(tensors, model, optimizers) -> None:
    """Put stored tensors into the model and its optimizers. Raises one of several errors if they do not fit."""
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
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
    try:
        with file.open("a" if append else "w", newline="") as stream:
            writer = csv.writer(stream)
            if not append:
                writer.writerow(COLUMNS)
            writer.writerows(rows)
    except OSError as error:
        raise PaliGemmaError(f"{file}: cannot be written ({error.strerror})") from None
