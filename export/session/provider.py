"""Which of ONNX Runtime's providers runs a bundle, and with which options."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from threading import Lock

import numpy as np
import onnxruntime

from numpy_ref.errors import PaliGemmaError, note

from ..bundle import Bundle
from . import cuda

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
INSTALL = "it needs a driver that supports CUDA 13 and pip install 'onnxruntime-gpu[cuda,cudnn]'"
#: Products of float32 in float32: the provider's own default rounds their factors to TF32, which is off by 1e-3.
DEFAULTS = {"use_tf32": "0"}
CUDNN = ("libcudnn.so.9", "cudnn64_9.dll")

_stdout_lock = Lock()


@contextmanager
def stdout_kept() -> Iterator[None]:
    """The runtime prints what it misses, and our output may have to be JSON alone. One thread at a time.

    Two that redirect the one stdout and put it back in turns would leave it redirected.
    """
    with _stdout_lock, redirect_stdout(sys.stderr):
        yield


def place(bundle: Bundle, provider: str, provider_options: Mapping[str, object] | None = None) -> str:
    """The name of the provider that runs a bundle.

    What cannot run wholly on the device is not run there, since it would leave it at every token: "auto" takes the CPU
    and says why in one line. Raises PaliGemmaError if "cuda" is asked for.
    """
    chosen = choose_provider(provider, provider_options)
    return CPU if chosen == CUDA and stays_on_cpu(bundle, provider) else chosen


def stays_on_cpu(bundle: Bundle, provider: str) -> bool:
    """Whether a bundle is not run on a device that is there; if so it is said in one line, or raised as by `place`."""
    if not bundle.only_for_cpu:
        return False
    if provider == "cuda":
        raise PaliGemmaError(f"{bundle.path}: --provider cuda: {bundle.only_for_cpu}")
    note(f"running on the CPU: {bundle.path}: {bundle.only_for_cpu}")
    return True


def choose_provider(wanted: str, provider_options: Mapping[str, object] | None = None, quietly: bool = False) -> str:
    """ "auto", "cpu" or "cuda" -> the provider's name.

    Auto takes CUDA only where a device answers: the GPU build of the runtime lists CUDA on every machine. Where one
    does but CUDA's libraries do not load, it takes the CPU and says so in one line, unless `quietly`.
    Raises PaliGemmaError if CUDA is asked for and cannot be had: there is no silent fallback.
    """
    if wanted == "cpu":
        return CPU
    has_device = False
    if CUDA not in onnxruntime.get_available_providers():
        missing = "this onnxruntime is built without it"
    elif not cuda.device_count():
        missing = "no NVIDIA device answers"
    elif reason := _cuda_trouble(chosen_device(provider_options or {})):
        missing, has_device = f"its libraries do not load ({reason})", True
    else:
        return CUDA
    if wanted == "cuda":
        raise PaliGemmaError(f"--provider cuda: {missing}; {INSTALL}")
    if has_device and not quietly:
        note(f"running on the CPU: there is an NVIDIA device, but {missing}; {INSTALL}")
    return CPU


@cache
def _cuda_trouble(device_id: int) -> str:
    """Why the runtime's CUDA provider does not load, in one line; empty if it does. It takes a byte of the device."""
    with stdout_kept():
        onnxruntime.preload_dlls()
    try:
        onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", device_id)
    except Exception as error:  # the runtime's exceptions have no common class
        return " ".join(str(error).split())
    return ""


def prefer_cudnn() -> None:
    """Have decode's attention done by cuDNN where it is installed, not by the runtime's XQA kernels.

    One block of threads goes through all of a row's keys there: at 970 positions a 3B step took 2.72 ms with XQA and
    2.60 with cuDNN, at 270 the same (H100, captured, float16).
    """
    if cuda.library(CUDNN) is not None:
        os.environ.setdefault("ORT_ENABLE_XQA", "0")


def chosen_device(provider_options: Mapping[str, object]) -> int:
    """The number of the device that `device_id` asks for; PaliGemmaError if there is none."""
    wanted, count = str(provider_options.get("device_id", "0")), cuda.device_count()
    if not wanted.isdecimal() or int(wanted) >= count:
        there = "one device, 0" if count == 1 else f"the devices 0 to {count - 1}"
        raise PaliGemmaError(f"--provider-option device_id={wanted}: this machine has {there}")
    return int(wanted)
