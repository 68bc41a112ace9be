"""Calibration: weights of few bits that answer a user's own rows best, instead of each being closest to what it was.

First the exact model reads the rows. The embedding table, or the head where there is one apart, is rounded by the
states from which tokens are drawn: those count most behind which several are likely, since only there can a small error
change what is drawn. Then the rounded model reads them, layer by layer beside the exact one. Each kernel is moved to
where what it reads by now, changed by the roundings before it, gives what the exact model has there (as in GPTAQ, Li et
al. 2025), and then rounded (gptq.py).

In memory there are a layer of both models in float32, the Hessian of one kernel's inputs, and a batch of rows; all else
lies in files of a folder.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from numpy_ref.checkpoint import Checkpoint
from numpy_ref.errors import PaliGemmaError

from ..bundle import weights
from ..bundle.rounded import Rounded
from . import rows
from .rows import Example
from .walk import Walk


def check(precision: str) -> None:
    """Raise PaliGemmaError unless weights of a precision can be calibrated."""
    few = [each for each in weights.QUANTIZED if each != "int8"]
    if precision not in few:
        raise PaliGemmaError(
            f"--calibrate: it is for weights in four bits or two ({', '.join(few)}), not for {precision}; leave it out"
        )


def by_rows(checkpoint: Checkpoint, path: Path, precision: str) -> Callable[[Path], Rounded]:
    """What `bundle.write` takes to calibrate by the rows of a file, which is read now.

    Raises PaliGemmaError that names the first row that cannot be used.
    """
    return partial(calibrate, checkpoint, rows.read(path, checkpoint), precision)


def calibrate(checkpoint: Checkpoint, examples: list[Example], precision: str, folder: Path) -> Rounded:
    """Round a checkpoint's weights of four bits or two by examples (`rows.read`); what is made lies in an empty folder.

    Raises PaliGemmaError that names a picture that cannot be read, or a weight that is not finite.
    """
    with Walk(checkpoint, precision, folder) as walk:
        walk.read(examples)
        for layer in range(checkpoint.config.text.depth):
            walk.pass_layer(layer)
        walk.round_head()
        for layer in range(checkpoint.config.text.depth):
            walk.round_layer(layer)
        return walk.rounded
