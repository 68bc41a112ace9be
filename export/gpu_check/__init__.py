"""python -m export.gpu_check: what this project does on a GPU, in one command.

Each stage runs in a process of its own, since a fault of the device stays with the process that met it; what one stage
found is kept where another fails. `command.py` runs them, `stage.py` says what a stage is, `models.py` makes what they
run, and `bandwidth.py` measures the memory. One file a stage: `environment.py`, `placement.py`, `correctness.py`,
`capture.py`, `speed.py`, `peer.py`, `kernels.py` and `compiled.py`.
"""
