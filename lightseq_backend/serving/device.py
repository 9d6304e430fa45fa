"""Whether this machine has a GPU that the engine can use, found out without loading CuPy or a CUDA context."""

from __future__ import annotations

import ctypes
from importlib import metadata
from importlib.util import find_spec

DEVICES = ("auto", "cpu", "gpu")
_CUPY_WHEELS = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}  # by the major version of CUDA they are built for


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
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver"
    return _driver_obstacle(driver) or _package_obstacle(_newest_cuda(driver))


def _driver_obstacle(driver: ctypes.CDLL) -> str | None:
    status = driver.cuInit(0)
    if status:
        return f"the NVIDIA driver does not start: cuInit gave error {status}"
    count = ctypes.c_int()
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return f"the NVIDIA driver does not count its devices: cuDeviceGetCount gave error {status}"
    return None if count.value else "the NVIDIA driver shows no device"


def _newest_cuda(driver: ctypes.CDLL) -> int:
    """The major version of CUDA up to which the driver runs programs."""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


def _package_obstacle(newest_cuda: int) -> str | None:
    if find_spec("cupy") is None:
        return "CuPy is not installed (extras cuda12, cuda13)"
    if find_spec("lightseq_backend.ops.cuda") is None:
        return "this version has no CUDA operations"
    built = [cuda for cuda, wheel in _CUPY_WHEELS.items() if _is_installed(wheel)]  # none where built from source
    if built and max(built) > newest_cuda:
        return f"the NVIDIA driver runs CUDA {newest_cuda} and CuPy was built for CUDA {max(built)}"
    return None


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
