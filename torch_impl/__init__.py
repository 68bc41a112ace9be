"""PaliGemma in PyTorch: the twin of `numpy_ref`, file by file and name by name, and where training happens."""

import importlib.util
import sys

from numpy_ref import interrupts  # first of all: it sees to Ctrl-C while the rest of a command is loaded

if importlib.util.find_spec("torch") is None:
    MISSING = "PyTorch is missing, which torch_impl needs (the extra `torch`): pip install 'torch>=2.9,<2.14'"
    if interrupts.is_command():
        sys.exit(f"python -m torch_impl: error: {MISSING}")
    raise ModuleNotFoundError(MISSING, name="torch")
