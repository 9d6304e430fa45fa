"""The operations models are written in: `cpu` (NumPy, the specification) and `cuda`, which has the same functions."""

from __future__ import annotations

from typing import Any

from lightseq_backend.errors import ConfigError


def load(device: str, device_id: int = 0, precision: str = "fp32") -> Any:
    """The operations for "cpu" (a module) or "cuda" (an object of one device, precision and stream).

    ConfigError for any other device, a precision it does not compute in, or a GPU that cannot be used.
    """
    if device == "cpu":
        if precision != "fp32":
            raise ConfigError(f"precision is {precision!r}; a CPU computes in fp32")
        from lightseq_backend.ops import cpu

        return cpu
    if device == "cuda":
        try:
            from lightseq_backend.ops.cuda import Cuda
        except ImportError as error:
            raise ConfigError(f"the GPU needs CuPy, the extra cuda12 or cuda13: {error}") from error
        return Cuda(device_id, precision)
    raise ConfigError(f"device is {device!r}; devices are cpu, cuda")
