"""Two models side by side: settings that differ, arrays that only one has, and how far the others are apart."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightseq_backend.config import Config
from lightseq_backend.export.model import Model
from lightseq_backend.weights.layout import layout_of

_ROWS = 4096  # of a table that are looked at at once


@dataclass(frozen=True)
class Difference:
    """Of one array: the largest absolute difference, and the largest one as a share of the larger value."""

    absolute: float
    relative: float


@dataclass
class Comparison:
    """settings: (name, here, there) of those that differ; only: (name, 1 or 2); shapes and arrays by name."""

    settings: list[tuple[str, Any, Any]] = field(default_factory=list)
    only: list[tuple[str, int]] = field(default_factory=list)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    arrays: dict[str, Difference] = field(default_factory=dict)

    def holds(self, tolerance: float = 0.0) -> bool:
        """Whether nothing differs by more than that, in absolute value."""
        return not (self.settings or self.only or self.shapes or self._beyond(tolerance))

    def lines(self, tolerance: float = 0.0) -> list[str]:
        """As text, a line each; the last one sums up."""
        beyond = self._beyond(tolerance)
        shown = [f"{name}: {here!r}, {there!r}" for name, here, there in self.settings]
        shown += [f"{name}: only in the {'first' if side == 1 else 'second'}" for name, side in self.only]
        shown += [f"{name}: {list(here)}, {list(there)}" for name, (here, there) in self.shapes.items()]
        shown += [
            f"{name}: largest difference {each.absolute:.3g}, as a share of the value {each.relative:.3g}"
            for name, each in beyond.items()
        ]
        largest = max((each.absolute for each in self.arrays.values()), default=0.0)
        shown.append(
            f"{len(self.settings)} settings differ, {len(self.only) + len(self.shapes)} arrays have no counterpart, "
            f"{len(beyond)} of {len(self.arrays)} are apart by more than {tolerance:g}, at most by {largest:.3g}"
        )
        return shown

    def _beyond(self, tolerance: float) -> dict[str, Difference]:
        return {name: each for name, each in self.arrays.items() if each.absolute > tolerance}


def compare(first: Model, second: Model) -> Comparison:
    result = Comparison()
    here, there = _settings(first.config), _settings(second.config)
    for name in [*here, *(name for name in there if name not in here)]:
        if here.get(name) != there.get(name) or (name in here) != (name in there):
            result.settings.append((name, here.get(name), there.get(name)))
    for name in [*first.arrays, *(name for name in second.arrays if name not in first.arrays)]:
        if name not in second.arrays or name not in first.arrays:
            result.only.append((name, 1 if name in first.arrays else 2))
        elif first.arrays[name].shape != second.arrays[name].shape:
            result.shapes[name] = first.arrays[name].shape, second.arrays[name].shape
        else:
            result.arrays[name] = _difference(first.arrays[name], second.arrays[name])
    return result


def _settings(config: Config) -> dict[str, Any]:
    """Every setting by name, those of decoding with that in front."""
    values = {"kind": layout_of(config).kind, **dataclasses.asdict(config), "dialect": config.dialect.name}
    decoding = values.pop("decoding")
    return {**values, **{f"decoding.{name}": value for name, value in decoding.items()}}


def _difference(a: np.ndarray, b: np.ndarray) -> Difference:
    absolute = relative = 0.0
    for row in range(0, len(a), _ROWS):
        here, there = (np.asarray(each[row : row + _ROWS], np.float64) for each in (a, b))
        same = (here == there) | (np.isnan(here) & np.isnan(there))
        if same.all():
            continue
        here, there = here[~same], there[~same]
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(here - there)
            shares = apart / np.maximum(np.abs(here), np.abs(there))
        absolute = max(absolute, _largest(apart))
        relative = max(relative, _largest(shares))
    return Difference(absolute, relative)


def _largest(values: np.ndarray) -> float:
    """Infinity where one of two values is no number."""
    return float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max())
