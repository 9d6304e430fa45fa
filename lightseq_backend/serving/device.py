"""Whether this machine has a GPU that the engine can use, found out without loading CuPy or a CUDA context."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

DEVICES = ("auto", "cpu", "gpu")


def choose_device(wanted: str) -> tuple[str, str | None]:
    """("gpu" or "cpu", what stands in the GPU's way when "auto" came out as the CPU, else None)."""
    if wanted not in DEVICES:
        raise ValueError(f"device is {wanted!r}; devices are {', '.join(DEVICES)}")
    if wanted != "auto":
        return wanted, None
    obstacle = gpu_obstacle()
    return ("cpu", obstacle) if obstacle else ("gpu", None)


def gpu_obstacle() -> str | None:
    """What keeps the engine off the GPU, or None when nothing does."""
    return _driver_obstacle() or _package_obstacle()


def _driver_obstacle() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    status = driver.cuInit(0)
    if status:
        return f"the NVIDIA driver does not start: cuInit gave error {status}"
    count = ctypes.c_int()
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver does not count its devices: cuDeviceGetCount gave error {status}"
    return None if count.value else "the NVIDIA driver shows no device"


def _package_obstacle() -> str | None:
    if find_spec("cupy") is None:
        return "CuPy is not installed (extras cuda12, cuda13)"
    if find_spec("lightseq_backend.ops.cuda") is None:
        return "this version has no CUDA operations"
    return None
