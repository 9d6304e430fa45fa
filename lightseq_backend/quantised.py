"""Weights that are rounded already: numbers of int8 and a scale for each output. What LightSeq's int8 files hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rounded:
    """A weight W [inner, wide] = numbers * scales. numbers: int8 from -127 to 127; scales: float32 [wide].

    NumPy takes it for the float32 array that it stands for, which each time is made anew.
    """

    numbers: np.ndarray
    scales: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def size(self) -> int:
        return self.numbers.size

    @property
    def T(self) -> np.ndarray:
        """float32 [wide, inner], a transposed view."""
        return np.asarray(self).T

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return (self.numbers * self.scales).astype(dtype or np.float32, copy=False)


def side_by_side(weights: Sequence[Any]) -> Any:
    """Weights [inner, ...] of one inner width as one, their outputs one after the other; Rounded if all are."""
    if all(isinstance(weight, Rounded) for weight in weights):
        numbers = np.concatenate([weight.numbers for weight in weights], axis=1)
        return Rounded(numbers, np.concatenate([weight.scales for weight in weights]))
    return np.concatenate([np.asarray(weight) for weight in weights], axis=1)
