"""What must hold of weights before a device gets them: numbers that its precision can hold, and room for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from lightseq_backend.errors import ConfigError, WeightError

Weights = Mapping[str, Any]
log = logging.getLogger(__name__)
_JOINED = ".cross_kv.weight"  # of all layers side by side
_STAGED = 4  # bytes an element: an array goes to the device in float32


def check_weights(weights: Weights, ops: ModuleType) -> None:
    """WeightError names every array with something else than numbers of ops.FLOAT; ConfigError says what is missing."""
    faults = [fault for name, array in weights.items() if (fault := _fault(name, array, ops.FLOAT))]
    if faults:
        raise WeightError("\n".join(faults))
    needed, free = bytes_needed(weights, ops), ops.available_memory()
    if needed > free:
        raise _no_room(needed, free, ops)
    if needed:
        log.info("weights: %d bytes in %s", _lasting(weights, ops), ops.PRECISION)


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
    staged = _STAGED * max((prod(shape) for shape, _ in _used(weights)), default=0)
    needed = _lasting(weights, ops)
    return needed + staged if needed else 0


def _lasting(weights: Weights, ops: ModuleType) -> int:
    used = list(_used(weights))
    return sum(ops.weight_bytes(*one) for one in used) + max((ops.shared_bytes(*one) for one in used), default=0)


def _used(weights: Weights) -> Iterator[tuple[tuple[int, ...], str]]:
    """The shapes of the arrays as layers.Reader puts them to use, and by which operation."""
    joined = [array.shape for name, array in weights.items() if name.endswith(_JOINED)]
    if joined:
        yield (joined[0][0], sum(wide for _, wide in joined)), "matrix"
    for name, array in weights.items():
        if name == "output.weight":
            yield array.shape, "vocabulary_matrix"
        elif not name.endswith(_JOINED):
            yield array.shape, "matrix" if name.endswith(".weight") else "vector"


def room_missed(weights: Weights, ops: ModuleType, error: MemoryError) -> ConfigError:
    """For an upload that failed although the memory had seemed to be there."""
    return _no_room(bytes_needed(weights, ops), ops.available_memory(), ops, f" (then: {error})")


def _fault(name: str, array: Any, dtype: np.dtype[Any]) -> str | None:
    largest = _largest(np.asarray(array))
    if not np.isfinite(largest):
        return f"{name} holds NaN or infinity"
    return f"{name} holds {largest:g}; {_beyond(dtype)}" if largest > _limit(dtype) else None


def _largest(array: np.ndarray) -> float:
    """The largest absolute value; no number where there is a NaN or infinity. Makes no copy."""
    return float(np.maximum(-np.min(array, initial=0.0), np.max(array, initial=0.0)))  # maximum keeps a NaN


def _limit(dtype: np.dtype[Any]) -> float:
    return float(np.finfo(dtype).max)  # as a half, NumPy 2 would compare in halves


def _beyond(dtype: np.dtype[Any]) -> str:
    return f"fp{8 * dtype.itemsize} ends at {_limit(dtype):g}: use precision fp32"


_ADVICE = {
    "fp32": "in fp16 they need half as much",
    "fp16": "in int8 they need less, or take a GPU with more memory",
    "int8": "take a GPU with more memory",
}


def _no_room(needed: int, free: int, ops: ModuleType, then: str = "") -> ConfigError:
    advice = "fp32 needs none beside them on a CPU" if ops.NAME == "cpu" else _ADVICE[ops.PRECISION]
    return ConfigError(
        f"the weights need {needed / 2**20:.0f} MiB in {ops.PRECISION} and {free / 2**20:.0f} MiB are free{then}, "
        f"so that not even one slot would fit: {advice}"
    )
