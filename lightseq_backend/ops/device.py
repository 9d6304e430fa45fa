"""Whether a GPU can run a model, asked before anything else is done with it: one sentence for every obstacle.

Apart from ops/cuda.py so that no CuPy is needed to read or test it: `cuda` is cupy.cuda.
"""

from __future__ import annotations

import os
from typing import Any

from lightseq_backend.errors import ConfigError

LEAST_CAPABILITY = 70  # what tests/test_kernels_compile.py begins with
_NO_DEVICE = 100  # cudaErrorNoDevice
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapability*


def check(cuda: Any, device_id: int) -> None:
    """Makes the GPU the calling thread's; ConfigError with the values, and what to do, where that is in vain."""
    obstacle = (
        _driver_obstacle(cuda.runtime)
        or _device_obstacle(cuda.runtime, device_id)
        or _compiler_obstacle(cuda.runtime, cuda.nvrtc, device_id)
    )
    if obstacle:
        raise ConfigError(f"GPU {device_id} cannot be used: {obstacle}")


def import_obstacle(error: BaseException) -> str:
    """What it means that CuPy could not be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
        return (
            "a GPU needs CuPy, which is not installed; install this package's extra cuda13 (drivers from 580 on) or "
            "cuda12 (from 525 on), or serve on the CPU"
        )
    # CuPy wraps what went wrong into a page of advice.
    cause = error.__cause__ or error
    return (
        f"a GPU needs CuPy, which is installed and does not load ({type(cause).__name__}: {_first_line(cause)}); "
        "install the extra cuda12 or cuda13 anew, one of them alone, or serve on the CPU"
    )


def library_obstacle(error: BaseException) -> str:
    """What it means that CuPy is there and a library of CUDA's is not."""
    return (
        f"CuPy misses a library of CUDA's ({_first_line(error)}); install this package's extra cuda12 or cuda13, "
        "which brings them along"
    )


def _driver_obstacle(runtime: Any) -> str | None:
    driver, wanted = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if not driver:
        return "this machine has no NVIDIA driver; install one, or serve on the CPU"
    if driver // 1000 >= wanted // 1000:  # within a major version old drivers run new programs
        return None
    found, built = _version(driver), _version(wanted)
    other = "" if driver < 12000 else f", or install the extra cuda{driver // 1000} instead"
    return f"the NVIDIA driver runs CUDA {found} and CuPy was built for CUDA {built}; update the driver{other}"


def _device_obstacle(runtime: Any, device_id: int) -> str | None:
    try:
        count = runtime.getDeviceCount()
    except Exception as error:  # what CuPy raises differs by its version
        if getattr(error, "status", None) != _NO_DEVICE:
            return f"the NVIDIA driver does not start ({error}); nvidia-smi may say why"
        count = 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    if count == 0:
        return f"the NVIDIA driver shows no GPU{hidden}; nvidia-smi should list one, or serve on the CPU"
    if not 0 <= device_id < count:
        shown = "GPU 0 alone" if count == 1 else f"{count} GPUs, 0 to {count - 1}"
        return f"the NVIDIA driver shows {shown}{hidden}; choose one of them in instance_group"
    try:
        runtime.setDevice(device_id)
    except Exception as error:
        return f"{error}; nvidia-smi may say who else uses it"
    return None


def _compiler_obstacle(runtime: Any, nvrtc: Any, device_id: int) -> str | None:
    try:
        major, minor = nvrtc.getVersion()
        compiles = min(nvrtc.getSupportedArchs())
    except Exception as error:
        return library_obstacle(error)
    capability = 10 * runtime.deviceGetAttribute(_MAJOR, device_id) + runtime.deviceGetAttribute(_MINOR, device_id)
    if capability < LEAST_CAPABILITY:
        least = LEAST_CAPABILITY / 10
        return f"its compute capability is {capability / 10:.1f}, the kernels need {least:.1f}; serve on the CPU"
    if capability < compiles:
        return (
            f"its compute capability is {capability / 10:.1f} and the compiler of CUDA {major}.{minor} begins at "
            f"{compiles / 10:.1f}; install the extra cuda12 instead"
        )
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" =\t")), "no reason given")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
