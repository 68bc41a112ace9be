"""Keeping the allocator from giving memory back while a bundle is opened."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt's parameters, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_WHILE_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1}
# As glibc begins, but for the thresholds, which it raises to these as it goes, and no longer does once one is set.
_AFTERWARDS = {_MMAP_MAX: 2**16, _TRIM_THRESHOLD: 2**26, _ARENA_MAX: 0, _MMAP_THRESHOLD: 2**25}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it freed memory is used again and not returned to the system; where the C library is not glibc, nothing.

    ONNX Runtime repacks each weight into a buffer of its own before it finds the repacked one in the file. As glibc
    maps and unmaps every large buffer, most of the time would go into page faults.
    """
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    _set(library, _WHILE_KEPT)
    try:
        yield
    finally:
        _set(library, _AFTERWARDS)
        if library:
            library.malloc_trim(0)


def _set(library, parameters):
    for parameter, value in parameters.items() if library else ():
        library.mallopt(parameter, value)
