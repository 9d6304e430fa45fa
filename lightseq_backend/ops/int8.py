"""Weights as int8: one scale for each output, which is a column of W [inner, wide]. NumPy or CuPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = 127
_LEAST = 1e-30  # of a column's largest weight: columns of zeros need a scale, too


def quantise(weight: Any) -> tuple[Any, Any]:
    """int8 [inner, wide] in W's order of axes and float32 scales [wide]: W is about numbers * scales.

    A scale is the column's largest |weight| / 127, and each number the nearest (of two the even one), so that a weight
    is off by half a scale at most. weight: float32.
    """
    scales = np.maximum(abs(weight).max(0), np.float32(_LEAST)) / np.float32(LARGEST)
    return np.rint(weight / scales).astype(np.int8), scales


def dequantise(numbers: Any, scales: Any) -> Any:
    """The float32 weights that numbers and scales stand for."""
    return numbers * scales
