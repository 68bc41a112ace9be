"""Stage 1: the device, its driver and libraries, and how fast its memory is."""

import importlib.util
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import onnxruntime

from ..session import cuda
from . import bandwidth
from .stage import Found, NotHere, Settings

LIMIT = PART_LIMIT = 60
PACKAGES = ("onnxruntime", "onnx", "numpy", "torch", "transformers")
ASKED = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.memory")


def parts(settings: Settings) -> list[str]:
    return ["host", "device", "copy", "read"]


def run(part: str, settings: Settings, found: Found) -> None:
    if part == "host":
        found.add(**host())
        return
    if not settings.on_device:
        raise NotHere("runs on the CPU provider")
    if part == "device":
        found.add(**device())
    elif part == "copy":
        width, sheet = bandwidth.copy_bandwidth(amount(bandwidth.GIB)), bandwidth.data_sheet(cuda.device_name())
        found.add(bytes_per_s=width, data_sheet=sheet, share=round(width / sheet, 3) if sheet else None)
    else:
        found.add(bytes_per_s=bandwidth.read_bandwidth(amount(bandwidth.GIB)))


def amount(wanted: int) -> int:
    """Bytes of one of two arrays: as many as wanted, or a quarter of what is free."""
    used, total = cuda.memory()
    return min(wanted, (total - used) // 4 // 4096 * 4096)


def host() -> dict:
    found = {"python": platform.python_version(), "cores": os.cpu_count(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["onnxruntime"] = onnxruntime.__version__  # of what is imported, however it was installed
    return {**found, "providers": onnxruntime.get_available_providers()}


def device() -> dict:
    used, total = cuda.memory()
    found = {
        "name": cuda.device_name(), "memory_bytes": total, "memory_used_bytes": used,
        "runtime": cuda.number("cudaRuntimeGetVersion"), "driver_cuda": cuda.number("cudaDriverGetVersion"),
        "build": onnxruntime.get_build_info(), "torch_installed": importlib.util.find_spec("torch") is not None,
    }  # fmt: skip
    return {**found, **nvidia_smi()}


def nvidia_smi() -> dict:
    """What the driver's own command says; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia_smi": f"{type(error).__name__}: {error}"}
    return {f"smi_{key}": value.strip() for key, value in zip(ASKED, answer.split(","), strict=False)}


def lines(part: str, found: dict) -> list[str]:
    if part == "host":
        packages = ", ".join(f"{name} {found[name]}" for name in PACKAGES if found.get(name))
        return [f"python {found['python']}, {found['cores']} cores; {packages}"]
    if part == "device":
        driver = found.get("smi_driver_version", "unknown")
        return [
            f"{found['name']}, {found['memory_bytes'] / bandwidth.GIB:.1f} GiB; driver {driver}, CUDA runtime "
            f"{found['runtime']}, driver's CUDA {found['driver_cuda']}"
        ]
    width = f"{part:<8}{found['bytes_per_s'] / 1e12:.3f} TB/s"
    if part == "copy" and found["data_sheet"]:
        width += f", {found['share']:.0%} of the data sheet's {found['data_sheet'] / 1e12:.2f}"
    return [width + {"copy": " (read and written)", "read": " (a dot product)"}[part]]
