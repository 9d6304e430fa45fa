"""The operations models are written in: `cpu` (NumPy, the specification) and `cuda`, which has the same functions."""

from __future__ import annotations

import sys
from typing import Any

from lightseq_backend.errors import ConfigError
from lightseq_backend.ops.device import import_obstacle, library_obstacle


def load(device: str, device_id: int = 0, precision: str = "fp32") -> Any:
    """The operations for "cpu" (a module) or "cuda" (an object of one device, precision and stream).

    ConfigError for any other device, a precision it does not compute in, or a GPU that cannot be used.
    """
    if device == "cpu":
        if precision not in ("fp32", "int8"):
            raise ConfigError(f"precision is {precision!r}; a CPU computes in fp32 or int8")
        from lightseq_backend.ops import cpu, cpu_int8

        return cpu if precision == "fp32" else cpu_int8
    if device == "cuda":
        try:
            from lightseq_backend.ops.cuda import Cuda
        except Exception as error:  # CuPy raises more than ImportError where libraries do not fit together
            if sys.modules.get("cupy"):  # CuPy is there: the fault is ours
                raise
            raise ConfigError(import_obstacle(error)) from error
        try:
            return Cuda(device_id, precision)
        except MemoryError as error:
            raise ConfigError(f"GPU {device_id} cannot be used: it has no memory left ({error})") from error
        except ImportError as error:
            raise ConfigError(f"GPU {device_id} cannot be used: {library_obstacle(error)}") from error
    raise ConfigError(f"device is {device!r}; devices are cpu, cuda")
