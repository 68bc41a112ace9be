"""PaliGemma in PyTorch: the twin of `numpy_ref`, file by file and name by name, and where training happens."""

import importlib.util
import sys

import numpy_ref  # noqa: F401, first of all: it sees to Ctrl-C while the rest of a command is loaded

if importlib.util.find_spec("torch") is None:
    MISSING = "PyTorch is missing, which torch_impl needs: pip install '.[torch]' in the folder of this project"
    if sys.argv[:1] == ["-m"]:  # a command of this package is being started
        sys.exit(f"python -m torch_impl: error: {MISSING}")
    raise ModuleNotFoundError(MISSING, name="torch")
