"""ops/cpu.py with weights of products rounded to int8: what ops/cuda.py computes with precision int8, in float32.

It is the specification of those numbers and saves no memory or time: the rounded weights are kept in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightseq_backend.ops import cpu
from lightseq_backend.ops.int8 import dequantise, quantise
from lightseq_backend.quantised import Rounded

PRECISION = "int8"


def __getattr__(name: str) -> Any:
    return getattr(cpu, name)


def matrix(array: cpu.Array | Rounded, norm: cpu.Norm | None = None) -> cpu.Array | cpu.Folded:
    """As ops/cpu.py's; a norm is folded in before the weight is rounded, as it is on the GPU. One that is rounded stays
    as it is: no norm comes with it."""
    if isinstance(array, Rounded):
        assert norm is None
        return np.asarray(array)
    weight = np.asarray(array, np.float32)
    if norm is None:
        return dequantise(*quantise(weight))
    gain, bias = (np.asarray(part, np.float32) for part in norm)
    return cpu.Folded(dequantise(*quantise(weight * gain[:, None])), bias @ weight)


def vocabulary_matrix(array: cpu.Array | Rounded, norm: cpu.Norm | None = None) -> cpu.Array | cpu.Folded:
    return matrix(array, norm)


def weight_bytes(shape: tuple[int, ...], use: str) -> int:
    """Of a product's weight the rounded copy, in float32, and what is left of a folded norm."""
    return 4 * (math.prod(shape) + shape[-1]) if use in ("matrix", "vocabulary_matrix") else 0
