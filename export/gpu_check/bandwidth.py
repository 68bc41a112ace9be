"""How fast a device's memory is: measured, and by its data sheet."""

import ctypes
import re
from collections.abc import Callable

from ..session.cuda import ON_DEVICE, call

GIB = 2**30
PRODUCTS = ("libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll")
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


def best_seconds(work: Callable[[], object]) -> float:
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
