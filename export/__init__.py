"""PaliGemma as ONNX graphs: the model files are laid out as in `numpy_ref`, and build nodes instead of arrays.

    api.py        asking one: `from export import PaliGemma`
    model/        the same functions with `op` as their first argument; graphs.py has inputs, outputs and weights around
                  them: the models of prefill and decode
    bundle/       the directory that a host is given, and its weights file, written tensor by tensor
    session/      running it
    batch/        running it over a data set
    runtime.py    the options of ONNX Runtime's sessions
    stopping.py   ending them
    verify.py     proving it

`op.Add(x, y)` adds a node and returns its output value.
"""

import os
from typing import TYPE_CHECKING

import numpy_ref  # noqa: F401, first of all: it sees to Ctrl-C while the rest of a command is loaded

# Before anything here imports ONNX Runtime, which reads it as it is loaded: some builds then send telemetry and write a
# device's id to the user's cache. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from .api import PaliGemma

__all__ = ["PaliGemma"]


def __getattr__(name: str) -> object:
    """PaliGemma, which brings ONNX Runtime with it, once somebody asks for it."""
    if name == "PaliGemma":
        from .api import PaliGemma

        return PaliGemma
    raise AttributeError(f"module {__name__} has no attribute {name}")
