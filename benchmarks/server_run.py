"""One measurement of a server or an engine under constant load, and how it comes out of what perf_analyzer exports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PERCENTILES = (50, 95, 99)
NANOSECONDS = 1e-9


class TooShort(SystemExit):
    """Nothing was answered meanwhile."""


class Run(NamedTuple):
    """requests, tokens: a second; latency, first: milliseconds to the whole answer and to its first part, by
    percentile; cores: processor seconds a second, by who used them."""

    requests: float
    tokens: float
    latency: dict[str, float]
    first: dict[str, float]
    cores: dict[str, float]


def summary(
    requests: Iterable[tuple[float, Sequence[float], int]], start: float, end: float, cores: dict[str, float]
) -> Run:
    """Of requests (begun, arrivals of the parts, tokens) those that were answered between start and end, in seconds."""
    counted = [one for one in requests if start <= one[1][-1] <= end]
    if not counted:
        raise TooShort(f"no request was answered in {end - start:.1f} s: measure for longer")
    return Run(
        len(counted) / (end - start),
        sum(tokens for _, _, tokens in counted) / (end - start),
        _percentiles([arrivals[-1] - begun for begun, arrivals, _ in counted]),
        _percentiles([arrivals[0] - begun for begun, arrivals, _ in counted]),
        cores,
    )


def read_export(path: Path, tokens_of: dict[int, int], cores: dict[str, float]) -> Run:
    """What perf_analyzer exported: all ids of a source, or its first alone (before 2.60).

    tokens_of: those of an answer, by the first id of its source.
    """
    # Tensors are in it as raw bytes; as Latin-1 each is a character, and the whole is JSON.
    (experiment,) = json.loads(path.read_text("latin-1"))["experiments"]
    bounds = [bound * NANOSECONDS for bound in experiment["window_boundaries"]]
    requests = [
        (
            one["timestamp"] * NANOSECONDS,
            [arrival * NANOSECONDS for arrival in one["response_timestamps"]],
            tokens_of[np.ravel(one["request_inputs"]["source_ids"])[0]],
        )
        for one in experiment["requests"]
        if one["response_timestamps"]
    ]
    return summary(requests, bounds[0], bounds[-1], cores)


def middle(runs: Sequence[Run]) -> Run:
    """Medians of each figure."""

    def of(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: of([one[name] for one in values]) for name in values[0]}
        return float(np.median(values))

    return Run(*(of([run[place] for run in runs]) for place in range(len(Run._fields))))


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{each}": float(value) * 1e3 for each, value in zip(PERCENTILES, np.percentile(seconds, PERCENTILES))}
