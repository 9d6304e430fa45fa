"""The operations models are written in. A backend is a module: `cpu` (NumPy, the specification) and `cuda`."""

from __future__ import annotations

from types import ModuleType

from lightseq_backend.errors import ConfigError


def load(device: str) -> ModuleType:
    """The operations module for "cpu" or "cuda"; ConfigError for anything else."""
    if device == "cpu":
        from lightseq_backend.ops import cpu

        return cpu
    raise ConfigError(f"device is {device!r}; this build runs on: cpu")
