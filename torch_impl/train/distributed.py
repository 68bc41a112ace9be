"""Several processes that train one model: PyTorch's own, as `torchrun --nproc-per-node N` starts them.

Every process has the whole model and a share of each batch; gradients are averaged (DistributedDataParallel). The first
process writes; the others only compute. Without torchrun all this is one process that is the first.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import distributed, nn

#: How long the others wait for the first, which alone validates and writes.
PATIENCE = timedelta(hours=6)


def count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process writes."""
    return rank() == 0


def device(kind: str) -> torch.device:
    """Where this process computes: the CPU, or, of several GPUs, that of its number on this machine."""
    number = os.environ.get("LOCAL_RANK")
    return torch.device(kind, int(number)) if kind == "cuda" and number else torch.device(kind)


@contextmanager
def joined(kind: str) -> Iterator[None]:
    """Join the processes that torchrun started on a kind of device; nothing where it did not."""
    if not distributed.is_torchelastic_launched():
        yield
        return
    if kind == "cuda":
        torch.cuda.set_device(device(kind))
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """Return once all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


def shared(model: nn.Module) -> nn.Module:
    """A module whose gradients are the mean over all processes."""
    return nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model


def apart(model: nn.Module) -> AbstractContextManager:
    """Where gradients are gathered without being shared, as for all batches of a step but the last."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of a number over all processes: [] -> []."""
    if not distributed.is_initialized():
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value / count()
