"""PaliGemma in PyTorch: the twin of `numpy_ref`, file by file and name by name, and where training happens."""

import numpy_ref  # noqa: F401, first of all: it sees to Ctrl-C while the rest of a command is loaded
