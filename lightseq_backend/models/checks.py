"""What must hold of weights before a device gets them: numbers that its precision can hold, and room for them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from lightseq_backend.errors import ConfigError, WeightError

Weights = Mapping[str, Any]
_STAGED = 4  # bytes an element: an array goes to the device in float32


def check_weights(weights: Weights, ops: ModuleType) -> None:
    """WeightError names every array with something else than numbers of ops.FLOAT; ConfigError says what is missing."""
    faults = [fault for name, array in weights.items() if (fault := _fault(name, array, ops.FLOAT))]
    if faults:
        raise WeightError("\n".join(faults))
    needed, free = bytes_needed(weights, ops), ops.available_memory()
    if needed > free:
        raise _no_room(needed, free, ops.FLOAT)


def check_folded(name: str, weight: np.ndarray, norm: str, gain: np.ndarray, dtype: np.dtype[Any]) -> None:
    """WeightError when weight [in, out] times gain [in] is beyond half precision, where a device stores the product."""
    limit = _limit(dtype)
    if dtype != np.float16 or _largest(weight) * _largest(gain) <= limit:  # as always; the exact look takes a copy
        return
    products = np.abs(weight).max(axis=1) * np.abs(gain)
    if products.max() > limit:
        raise WeightError(f"{name} times {norm} holds {products.max():g}; {_beyond(dtype)}")


def bytes_needed(weights: Weights, ops: ModuleType) -> int:
    """Device memory for all weights, and for the largest while it is converted."""
    sizes = [ops.weight_bytes(array.shape, name.endswith(".weight")) for name, array in weights.items()]
    staged = _STAGED * max((array.size for array in weights.values()), default=0)
    return sum(sizes) + staged if any(sizes) else 0


def room_missed(weights: Weights, ops: ModuleType, error: MemoryError) -> ConfigError:
    """For an upload that failed although the memory had seemed to be there."""
    return _no_room(bytes_needed(weights, ops), ops.available_memory(), ops.FLOAT, f" (then: {error})")


def _fault(name: str, array: np.ndarray, dtype: np.dtype[Any]) -> str | None:
    largest = _largest(array)
    if not np.isfinite(largest):
        return f"{name} holds NaN or infinity"
    return f"{name} holds {largest:g}; {_beyond(dtype)}" if largest > _limit(dtype) else None


def _largest(array: np.ndarray) -> float:
    """The largest absolute value; no number where there is a NaN or infinity. Makes no copy."""
    return float(np.maximum(-np.min(array, initial=0.0), np.max(array, initial=0.0)))  # maximum keeps a NaN


def _limit(dtype: np.dtype[Any]) -> float:
    return float(np.finfo(dtype).max)  # as a half, NumPy 2 would compare in halves


def _beyond(dtype: np.dtype[Any]) -> str:
    return f"{_precision(dtype)} ends at {_limit(dtype):g}: use precision fp32"


def _no_room(needed: int, free: int, dtype: np.dtype[Any], then: str = "") -> ConfigError:
    advice = "take a GPU with more memory" if dtype.itemsize == 2 else "in fp16 they need half as much"
    return ConfigError(
        f"the weights need {needed / 2**20:.0f} MiB in {_precision(dtype)} and {free / 2**20:.0f} MiB are free{then}, "
        f"so that not even one slot would fit: {advice}"
    )


def _precision(dtype: np.dtype[Any]) -> str:
    return f"fp{8 * dtype.itemsize}"
