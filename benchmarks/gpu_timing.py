"""Clocks: how long a device takes for what is queued on it. One for each library, so that all are timed alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    def mark(self) -> Any:
        """A point between what is queued so far and what comes next."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two points; waits for the second."""

    def wait(self) -> None:
        """Until the device has done all that is queued."""


class HostClock:
    """For a device that has done a thing when the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        pass


class CupyClock:
    """The points are events on one stream."""

    def __init__(self, stream: Any):
        self._stream = stream

    def mark(self) -> Any:
        import cupy

        event = cupy.cuda.Event()
        event.record(self._stream)
        return event

    def seconds(self, start: Any, end: Any) -> float:
        import cupy

        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def wait(self) -> None:
        self._stream.synchronize()


class TorchClock:
    """The points are events on PyTorch's current stream."""

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()


def device_seconds(
    clock: Clock, run: Callable[[], Any], times: int = 8, samples: int = 30, before: Callable[[], Any] | None = None
) -> float:
    """Seconds that the device takes for one `run`: `times` of them queued at once, median of `samples`.

    One more goes ahead of the first point, so that the device has work while the host queues the others. before: what
    precedes each sample, untimed.
    """
    taken = []
    for _ in range(samples):
        if before is not None:
            before()
        run()
        start = clock.mark()
        for _ in range(times):
            run()
        taken.append(clock.seconds(start, clock.mark()) / times)
    return statistics.median(taken)


def wall_seconds(clock: Clock, run: Callable[[], Any], samples: int = 7, warm_up: int = 3) -> float:
    """Seconds of one `run` from the call until the device has done it, median of `samples`."""
    taken = []
    for _ in range(warm_up + samples):
        start = time.perf_counter()
        run()
        clock.wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[warm_up:])
