"""The CUDA runtime asked directly, without another library: devices, streams, memory, and copies."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from numpy_ref.errors import PaliGemmaError

if TYPE_CHECKING:
    from onnxruntime import OrtValue

RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll")
DRIVERS = ("libcuda.so.1", "nvcuda.dll")
TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # kinds of cudaMemcpy


class MissingError(PaliGemmaError):
    """A library of CUDA's, or a function of it, is not on this machine."""


@cache
def library(names: tuple[str, ...]) -> ctypes.CDLL | None:
    """The first of the libraries that loads, by name or from an `nvidia` package beside others; None without one."""
    for name in names:
        packages = (file for path in sys.path for file in Path(path or ".").glob(f"nvidia/*/lib/{name}"))
        for file in (name, *packages):
            try:
                return ctypes.CDLL(str(file))
            except OSError:
                continue
    return None


def call(function: str, *arguments: object, names: tuple[str, ...] = RUNTIMES) -> None:
    """Call a function of a library. Raises MissingError without it, PaliGemmaError if it says that it failed."""
    found = library(names)
    if found is None or not hasattr(found, function):
        raise MissingError(f"{names[0]} with {function} was not found")
    if code := getattr(found, function)(*arguments):
        raise PaliGemmaError(f"CUDA's {function} failed with error {code}")


def number(function: str, kind: type = ctypes.c_int, names: tuple[str, ...] = RUNTIMES) -> int:
    """What a function writes into its one argument."""
    value = kind()
    call(function, ctypes.byref(value), names=names)
    return value.value


def device_count() -> int:
    """How many devices the driver reports; 0 without a driver."""
    try:
        call("cuInit", 0, names=DRIVERS)
        return number("cuDeviceGetCount", names=DRIVERS)
    except PaliGemmaError:
        return 0


def device_name(device: int = 0) -> str:
    """The name of a device: what its properties begin with."""
    properties = ctypes.create_string_buffer(16384)  # far more than the structure of any version has
    call("cudaGetDeviceProperties", properties, device)
    return properties.value.decode(errors="replace")


def memory() -> tuple[int, int]:
    """Bytes of the current device's memory that are in use, and all of them."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value, total.value


def synchronize() -> None:
    """Wait until the current device has done all that it was given."""
    call("cudaDeviceSynchronize")


def stream(device: int = 0) -> int:
    """The address of a new stream on a device.

    It waits for the device's default stream and is waited for by it, so what the runtime copies there has its place
    among the launches here.
    """
    made, before = ctypes.c_void_p(), number("cudaGetDevice")
    call("cudaSetDevice", device)
    try:
        call("cudaStreamCreate", ctypes.byref(made))
    finally:
        call("cudaSetDevice", before)
    return made.value or 0


def copy_to(address: int, array: np.ndarray, queue: int) -> None:
    """Copy a small array to the device, in the order of a stream's launches and without a wait for them.

    CUDA takes what is pageable into a buffer of its own before it returns, so the array may change from then on.
    """
    source, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
    call("cudaMemcpyAsync", ctypes.c_void_p(address), source, size, TO_DEVICE, ctypes.c_void_p(queue))


def copy_within(target: int, source: int, size: int, queue: int) -> None:
    """Copy so many bytes from one address of the device to another, in the order of a stream's launches."""
    places = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size)
    call("cudaMemcpyAsync", *places, ON_DEVICE, ctypes.c_void_p(queue))


def on_host(value: "OrtValue") -> np.ndarray:
    """A copy of an OrtValue as an array, of bfloat16 too (as ml_dtypes has it), once the device is done with it."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    values = np.empty(value.shape(), ml_dtypes.bfloat16)
    if value.device_name() == "cpu":
        ctypes.memmove(values.ctypes.data, value.data_ptr(), values.nbytes)
    else:
        target, source = ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(value.data_ptr())
        call("cudaMemcpy", target, source, ctypes.c_size_t(values.nbytes), TO_HOST)
    return values
