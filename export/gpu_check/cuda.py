"""The CUDA runtime asked directly, without another library: bandwidth, memory, waiting, and copies to the host."""

import ctypes
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np

from .stage import NotHere

GIB = 2**30
RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "cudart64_13.dll", "cudart64_12.dll")
PRODUCTS = ("libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll")
TO_HOST, ON_DEVICE = 2, 3  # kinds of cudaMemcpy
ROUNDS = 6
#: Bytes a second of the memory, by the data sheet: the first whose word is in the device's name.
DATA_SHEETS = {
    "B200": 8.0e12, "GH200": 4.0e12, "H200": 4.8e12, "H100 NVL": 3.9e12, "H100 PCIe": 2.0e12, "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12, "A100 80GB": 1.935e12, "A100": 1.555e12, "L40S": 0.864e12, "L40": 0.864e12,
    "L4": 0.3e12, "A10G": 0.6e12, "A10": 0.6e12, "A40": 0.696e12, "A6000": 0.768e12, "V100": 0.9e12, "T4": 0.32e12,
    "RTX 5090": 1.792e12, "RTX 4090": 1.008e12, "RTX 4080": 0.717e12, "RTX 3090": 0.936e12,
}  # fmt: skip


def data_sheet(name: str) -> float | None:
    """The bandwidth that a device of this name is sold with, in bytes a second; None if it is not in the table."""
    return next((width for word, width in DATA_SHEETS.items() if re.search(rf"\b{re.escape(word)}\b", name)), None)


@cache
def library(names: tuple[str, ...]):
    """The first of the libraries that loads, by name or from an `nvidia` package beside others; None without one."""
    for name in names:
        packages = (file for path in sys.path for file in Path(path or ".").glob(f"nvidia/*/lib/{name}"))
        for file in (name, *packages):
            try:
                return ctypes.CDLL(str(file))
            except OSError:
                continue
    return None


def call(function: str, *arguments, names=RUNTIMES) -> None:
    """Call a function of a library; OSError if it says that it failed, NotHere without it."""
    found = library(names)
    if found is None or not hasattr(found, function):
        raise NotHere(f"{names[0]} with {function} is not to be found")
    if code := getattr(found, function)(*arguments):
        raise OSError(f"{function} failed with code {code}")


def number(function: str, kind=ctypes.c_int, names=RUNTIMES) -> int:
    """What a function writes into its one argument."""
    value = kind()
    call(function, ctypes.byref(value), names=names)
    return value.value


def device_name() -> str:
    """The name of the first device: what its properties begin with."""
    properties = ctypes.create_string_buffer(16384)  # far more than the structure of any version has
    call("cudaGetDeviceProperties", properties, 0)
    return properties.value.decode(errors="replace")


def memory() -> tuple[int, int]:
    """Bytes of the device's memory that are in use, and all of them."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value, total.value


def synchronize() -> None:
    """Wait until the device has done all that it was given."""
    call("cudaDeviceSynchronize")


def to_host(pointer: int, size: int) -> np.ndarray:
    """Bytes of the device's memory."""
    values = np.empty(size, np.uint8)
    call("cudaDeviceSynchronize")
    call("cudaMemcpy", values.ctypes.data_as(ctypes.c_void_p), ctypes.c_void_p(pointer), ctypes.c_size_t(size), TO_HOST)
    return values


class Buffer:
    """Memory of the device, zeroed, for a `with` statement."""

    def __init__(self, size: int):
        self.size, self.pointer = size, ctypes.c_void_p()

    def __enter__(self):
        call("cudaMalloc", ctypes.byref(self.pointer), ctypes.c_size_t(self.size))
        call("cudaMemset", self.pointer, 0, ctypes.c_size_t(self.size))
        return self

    def __exit__(self, *error):
        call("cudaFree", self.pointer)


def best_seconds(work) -> float:
    """The shortest of several runs of what `work` gives to the device, after one to warm up."""
    begin, end, times = ctypes.c_void_p(), ctypes.c_void_p(), []
    for event in (begin, end):
        call("cudaEventCreate", ctypes.byref(event))
    for _ in range(1 + ROUNDS):
        call("cudaEventRecord", begin, None)
        work()
        call("cudaEventRecord", end, None)
        call("cudaEventSynchronize", end)
        milliseconds = ctypes.c_float()
        call("cudaEventElapsedTime", ctypes.byref(milliseconds), begin, end)
        times.append(milliseconds.value / 1000)
    return min(times[1:])


def copy_bandwidth(size: int = GIB) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    with Buffer(size) as source, Buffer(size) as target:
        amount = ctypes.c_size_t(size)
        seconds = best_seconds(lambda: call("cudaMemcpyAsync", target.pointer, source.pointer, amount, ON_DEVICE, None))
    return 2 * size / seconds


def read_bandwidth(size: int = GIB) -> float:
    """Bytes a second of a dot product of two large arrays, which only reads."""
    handle, count = ctypes.c_void_p(), size // 4

    def blas(function, *arguments):
        call(function, *arguments, names=PRODUCTS)

    blas("cublasCreate_v2", ctypes.byref(handle))
    with Buffer(size) as a, Buffer(size) as b, Buffer(256) as result:
        blas("cublasSetPointerMode_v2", handle, 1)  # the result stays on the device: no wait a product
        arguments = (handle, count, a.pointer, 1, b.pointer, 1, result.pointer)
        seconds = best_seconds(lambda: blas("cublasSdot_v2", *arguments))
    blas("cublasDestroy_v2", handle)
    return 2 * size / seconds
