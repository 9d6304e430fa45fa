"""Which of several ways to do the same is the quickest on this GPU, by doing it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_ROUNDS, _RUNS = 5, 3
_CLEARLY = 0.97  # of the first one's time: mere chance must decide nothing


def quickest(ways: Sequence[Callable[[], None]], stream: int) -> int:
    """Runs each a few times, in turn, alone on the device; returns the first one's index, 0, unless another is clearly
    quicker. Waits for the device.

    ways: each queues the same work on the stream, a cudaStream_t that is not captured
    """
    from cupy.cuda import runtime

    start, end = runtime.eventCreate(), runtime.eventCreate()
    times: list[list[float]] = [[] for _ in ways]
    try:
        for turn in range(1 + _ROUNDS):
            for way, own in zip(ways, times, strict=True):
                runtime.eventRecord(start, stream)
                for _ in range(_RUNS):
                    way()
                runtime.eventRecord(end, stream)
                runtime.eventSynchronize(end)
                if turn:  # the first loads what is run
                    own.append(runtime.eventElapsedTime(start, end))
    finally:
        runtime.eventDestroy(start)
        runtime.eventDestroy(end)
    return clearly_quickest([min(own) for own in times])


def clearly_quickest(times: Sequence[float]) -> int:
    """The index of the least, or 0 where that is not well below the first."""
    best = min(range(len(times)), key=times.__getitem__)
    return best if times[best] < _CLEARLY * times[0] else 0
