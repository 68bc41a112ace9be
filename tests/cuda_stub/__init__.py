"""The CUDA provider of ONNX Runtime, on a machine without a GPU: a stub of the CUDA libraries, and its log.

The provider is the real one, so which nodes it takes, which kernels and products it begins on which stream, what it
copies, waits for, allocates and captures are what they are on a device. Kernels compute nothing: memory that only they
write keeps the zeros it began with, and no time is to be read from it.

    stdout, log = cuda_stub.run('''
        from tests.cuda_stub.inside import mark
        ...  # opens a session on CUDA, runs prefill
        mark("decode")
        ...  # runs decode
    ''')
    assert not log["decode"].copies("D2H")
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from .log import Log

__all__ = ["Log", "ScriptFailed", "build", "missing", "require", "run"]

_SOURCES = Path(__file__).parent / "src"
_PROJECT = Path(__file__).parents[2]
_RUNTIME = "libcudart.so.13"
_LIBRARIES = {  # as the provider names them; the first is what the others call
    _RUNTIME: ("log", "device", "stream", "launch", "memory"),
    "libcublasLt.so.13": ("blaslt",),
    "libcublas.so.13": ("blas",),
    "libcurand.so.10": ("rand",),
    "libcudnn.so.9": ("dnn",),
    "libcuda.so.1": ("driver",),
}
_FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


class ScriptFailed(Exception):  # noqa: N818 - it tells what happened, as CalledProcessError does
    """A script under the stub ended with another status than 0, negative for a signal; `log` has what it did."""

    def __init__(self, status: int, stdout: str, stderr: str, log: Log):
        super().__init__(f"status {status}\n{stdout}{stderr}")
        self.status, self.stdout, self.stderr, self.log = status, stdout, stderr, log


def missing() -> str | None:
    """Why the stub cannot be used here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "Linux on x86_64"
    if not shutil.which("g++"):
        return "g++"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime-gpu"
    if not getattr(onnxruntime, "cuda_version", "").startswith("13."):
        return "an onnxruntime-gpu for CUDA 13"
    return None


def require() -> None:
    """Skip the test where the stub cannot be used; where REQUIRE_CUDA_STUB is set, as in CI, that is a failure."""
    if reason := missing():
        (pytest.fail if os.environ.get("REQUIRE_CUDA_STUB") else pytest.skip)(f"the CUDA stub needs {reason}")


def build() -> Path:
    """The folder with the libraries, compiled when their sources or flags are new.

    Test processes that come here together each build, and one's folder stays. Raises CalledProcessError, with what the
    compiler says on stderr, if the sources do not compile.
    """
    from export.bundle.digests import cache_folder

    folder = cache_folder() / "cuda_stub" / _digest()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        for name, sources in _LIBRARIES.items():
            _compile(name, sources, made)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
    return folder


def run(script: str, *arguments: str, devices: int = 1, memory: int | None = None, timeout: float = 300):
    """Run Python source in a process of its own over the stub -> what it printed, and the Log of what it did.

    `arguments` become its sys.argv[1:]; it has so many devices, each with `memory` bytes (80 GiB). Raises ScriptFailed
    if it does not end with status 0.
    """
    folder = build()
    with tempfile.TemporaryDirectory() as temporary:
        record = Path(temporary) / "log"
        record.touch()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            env=os.environ | _environment(folder, record, devices, memory),
            cwd=_PROJECT, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        log = Log.read(record)
    if done.returncode:
        raise ScriptFailed(done.returncode, done.stdout, done.stderr, log)
    return done.stdout, log


def _digest() -> str:
    digest = hashlib.sha256(repr((_FLAGS, _LIBRARIES)).encode())
    for file in sorted(_SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(name, sources, folder):
    # The provider asks for each symbol in a version that has its library's name.
    versions = folder / f"{name}.map"
    versions.write_text(f"{name} {{ global: *; }};\n")
    runtime = [] if name == _RUNTIME else [f"-L{folder}", f"-l:{_RUNTIME}", "-Wl,-rpath,$ORIGIN"]
    files = [_SOURCES / f"{source}.cpp" for source in sources]
    link = ["-o", folder / name, f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}", *runtime]
    subprocess.run(["g++", *_FLAGS, *files, *link], check=True)


def _environment(folder, record, devices, memory) -> dict[str, str]:
    def before(name, *values):
        return os.pathsep.join([*values, *filter(None, [os.environ.get(name)])])

    return {
        "CUDA_STUB_LOG": str(record),
        "CUDA_STUB_DEVICES": str(devices),
        **({} if memory is None else {"CUDA_STUB_MEMORY": str(memory)}),
        "PYTHONPATH": before("PYTHONPATH", str(_PROJECT)),
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", str(folder)),
        # Loaded first, so that the real libraries do not come instead where PyPI's packages have them.
        "LD_PRELOAD": before("LD_PRELOAD", *_LIBRARIES),
    }
