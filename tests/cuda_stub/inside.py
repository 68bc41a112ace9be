"""What a script that runs over the stub may ask of it."""

import ctypes
from functools import cache


@cache
def runtime() -> ctypes.CDLL:
    """The stub's libcudart, with CUDA's functions and the stub's own."""
    library = ctypes.CDLL("libcudart.so.13")
    library.stub_mark.argtypes = [ctypes.c_char_p]
    library.stub_deliver.argtypes = [ctypes.c_longlong, ctypes.c_longlong]
    library.stub_mark.restype = library.stub_deliver.restype = None
    return library


def mark(phase: str) -> None:
    """Begin a phase of the log; what comes next belongs to it, until the next mark."""
    runtime().stub_mark(phase.encode())


def deliver(int32: int = 0, int64: int = 0) -> None:
    """From now on, copies of 4 and of 8 bytes from the device bring these numbers; 0 for what is in its memory.

    For sizes that a kernel computes and the host reads: they would be 0, since kernels compute nothing.
    """
    runtime().stub_deliver(int32, int64)


def device_count() -> int:
    """How many devices there are."""
    count = ctypes.c_int()
    runtime().cudaGetDeviceCount(ctypes.byref(count))
    return count.value


def use_device(device: int) -> None:
    """Make a device this thread's current one."""
    call("cudaSetDevice", device)


def in_use(device: int = 0) -> int:
    """Bytes of the device's memory that are allocated."""
    before, free, total = ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
    call("cudaGetDevice", ctypes.byref(before))
    use_device(device)
    call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    use_device(before.value)
    return total.value - free.value


def call(function: str, *arguments) -> None:
    """Call a function of the CUDA runtime; OSError with its error's name if it fails."""
    if error := getattr(runtime(), function)(*arguments):
        name = runtime().cudaGetErrorName
        name.restype = ctypes.c_char_p
        raise OSError(error, f"{function}: {name(error).decode()}")
