"""How sessions of ONNX Runtime are opened and run: the one place that makes their options.

Keys of `entries` are the runtime's own, as its onnxruntime_session_options_config_keys.h and
onnxruntime_run_options_config_keys.h list them.
"""

from pathlib import Path

import onnxruntime

from numpy_ref.errors import PaliGemmaError

from . import stopping

LOGGED_FROM = 4  # of the runtime's levels of severity: fatal. What goes wrong is raised too, and becomes one line.
onnxruntime.set_default_logger_severity(LOGGED_FROM)  # what belongs to no session, such as the folding of constants


def check_path(path: Path) -> None:
    """Raise PaliGemmaError unless the runtime can open files there: it takes paths in UTF-8 alone."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise PaliGemmaError(f"{path}: ONNX Runtime opens no path that is not UTF-8; rename the directory") from None


def session_options(
    entries: dict[str, str] | None = None, threads: int = 0, optimized: bool = True
) -> onnxruntime.SessionOptions:
    """Options of a session that logs nothing but what is fatal.

    `threads` are for the work within a node; 0 takes every core. Not `optimized`, a graph is run node by node as it
    stands: fused kernels keep float32 attributes, and with them no float64 product is one.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = LOGGED_FROM, threads
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return options


def run_options(entries: dict[str, str] | None = None) -> onnxruntime.RunOptions:
    """Options of runs of a session, which end when the command is to stop."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = LOGGED_FROM
    for key, value in (entries or {}).items():
        options.add_run_config_entry(key, value)
    stopping.RUNS.add(options)
    return options
