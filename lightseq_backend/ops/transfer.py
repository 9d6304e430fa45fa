"""Copies between the host and a GPU that neither wait nor allocate: page-locked memory, used in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import cupyx
import numpy as np

from lightseq_backend.small import copied, fill

Array = Any
_OUTGOING = 8
_INCOMING = 20  # of two bursts the records and seven arrays each, and a score; places are as large as the largest
_OUT, _IN = 1 << 18, 1 << 12  # bytes of such a place, at first


class Transfers:
    """Queues copies on one stream, for one thread. A copy waits only where every place is still under way.

    places: how many copies to the host may be asked for before the first is waited for
    """

    def __init__(self, stream: Any, places: int = _INCOMING):
        self._stream = stream
        self._outgoing = _Ring(_OUTGOING, _OUT)
        self._incoming = _Ring(places, _IN)

    def to_device(self, destination: Array, source: np.ndarray) -> None:
        """Both contiguous, of the same type and size; source may change as soon as this returns."""
        source = source.reshape(-1).view(np.uint8)
        address = destination.data.ptr
        for start in range(0, source.size, self._outgoing.size):
            part = source[start : start + self._outgoing.size]
            room, arrived = self._outgoing.take()
            fill(room[: part.size], part)
            cupy.cuda.runtime.memcpyAsync(
                address + start, room.ctypes.data, part.size, cupy.cuda.runtime.memcpyHostToDevice, self._stream.ptr
            )
            arrived.record(self._stream)

    def to_host(self, source: Array) -> Callable[[], np.ndarray]:
        """Calling the result waits for the copy and returns it, read-only. It must be called before `places` more are
        asked for."""
        self._incoming.grow(source.nbytes)
        room, arrived = self._incoming.take()
        cupy.cuda.runtime.memcpyAsync(
            room.ctypes.data, source.data.ptr, source.nbytes, cupy.cuda.runtime.memcpyDeviceToHost, self._stream.ptr
        )
        arrived.record(self._stream)

        def wait() -> np.ndarray:
            arrived.synchronize()
            return copied(room[: source.nbytes]).view(source.dtype).reshape(source.shape)

        return wait


class _Ring:
    """Places of page-locked memory, each with the event that says when its last copy was done."""

    def __init__(self, places: int, size: int) -> None:
        self.size, self._places = 0, places
        self.grow(size)

    def grow(self, size: int) -> None:
        if size > self.size:
            self.size = size
            self._rooms = [cupyx.empty_pinned(size, np.uint8) for _ in range(self._places)]
            self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(self._places)]
            self._next = 0

    def take(self) -> tuple[np.ndarray, Any]:
        """The place that was taken longest ago, once it is free."""
        place, self._next = self._next, (self._next + 1) % self._places
        self._events[place].synchronize()  # at once where nothing was recorded
        return self._rooms[place], self._events[place]
