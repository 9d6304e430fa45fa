"""Copies between host and GPU (ops/transfer.py), on a device that is late with everything: CuPy is stood in for."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SOURCE = Path(__file__).resolve().parents[1] / "lightseq_backend" / "ops" / "transfer.py"
PLACES, PLACE = 8, 1 << 18  # copies to the device under way, and bytes of each
REPORTS = 20  # copies to the host under way


class LateDevice:
    """One stream, on which nothing happens before it is waited for."""

    def __init__(self) -> None:
        self._queued: list[Callable[[], Any]] = []
        self.done = 0
        runtime = SimpleNamespace(memcpyAsync=self._copy, memcpyHostToDevice=1, memcpyDeviceToHost=2)
        self.cupy = SimpleNamespace(cuda=SimpleNamespace(Event=self._event, runtime=runtime))

    def wait(self, until: int | None = None) -> None:
        until = len(self._queued) if until is None else until
        while self.done < until:
            self._queued[self.done]()
            self.done += 1

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self._queued.append(lambda: ctypes.memmove(to, source, size))

    def _event(self, disable_timing: bool) -> Any:
        recorded = [0]

        def record(stream: Any) -> None:
            recorded[0] = len(self._queued)

        return SimpleNamespace(record=record, synchronize=lambda: self.wait(recorded[0]))


class OnDevice:
    """What is asked of a CuPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.data = array, SimpleNamespace(ptr=array.ctypes.data)
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    late = LateDevice()
    monkeypatch.setitem(sys.modules, "cupy", late.cupy)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(empty_pinned=np.empty))  # type: ignore[arg-type]
    return late


@pytest.fixture
def transfers(device: LateDevice) -> Any:
    spec = util.spec_from_file_location("transfer_to_a_late_device", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Transfers(SimpleNamespace(ptr=0))


@pytest.mark.parametrize("size", [1, 7, 257, PLACE, PLACE + 1, 3 * PLACE])
def test_source_may_change_as_soon_as_it_is_on_its_way(device: LateDevice, transfers: Any, size: int) -> None:
    source, rooms = np.empty(size, np.uint8), [OnDevice(np.zeros(size, np.uint8)) for _ in range(2 * PLACES + 3)]
    for number, room in enumerate(rooms):
        source[:] = number + np.arange(size) % 100
        transfers.to_device(room, source)
        source[:] = 255
    device.wait()
    for number, room in enumerate(rooms):
        assert np.array_equal(room.array, (number + np.arange(size) % 100).astype(np.uint8))


def test_copy_to_the_device_waits_only_where_every_place_is_under_way(device: LateDevice, transfers: Any) -> None:
    room = OnDevice(np.zeros(3, np.int32))
    for _ in range(PLACES):
        transfers.to_device(room, np.arange(3, dtype=np.int32))
    assert device.done == 0
    transfers.to_device(room, np.arange(3, dtype=np.int32))
    assert device.done == 1


@pytest.mark.parametrize("backwards", [False, True])
def test_copies_to_the_host_are_of_what_was_there_when_they_were_queued(
    device: LateDevice, transfers: Any, backwards: bool
) -> None:
    room, found = OnDevice(np.zeros((2, 3), np.float32)), {}
    for begin in range(0, 3 * REPORTS, REPORTS):
        reports = {}
        for number in range(begin, begin + REPORTS):
            transfers.to_device(room, np.full((2, 3), number, np.float32))
            reports[number] = transfers.to_host(room)
        for number in sorted(reports, reverse=backwards):
            found[number] = reports[number]()
    # Now that places have changed hands.
    assert {(one.shape, one.dtype) for one in found.values()} == {((2, 3), np.dtype(np.float32))}
    assert all((one == number).all() for number, one in found.items())


def test_copies_nobody_asked_for_are_harmless(device: LateDevice, transfers: Any) -> None:
    room = OnDevice(np.zeros(5, np.int32))
    for number in range(3 * PLACES):
        transfers.to_device(room, np.full(5, number, np.int32))
        transfers.to_host(room)
    assert transfers.to_host(room)().tolist() == [3 * PLACES - 1] * 5


def test_larger_copy_leaves_those_under_way_alone(device: LateDevice, transfers: Any) -> None:
    small, large = OnDevice(np.arange(9, dtype=np.int64)), OnDevice(np.arange(PLACE, dtype=np.int64))
    first = transfers.to_host(small)
    whole = transfers.to_host(large)
    later = transfers.to_host(small)
    assert np.array_equal(whole(), large.array)
    assert first().tolist() == later().tolist() == list(range(9))


def test_one_place_is_enough_for_who_waits_for_each_copy(device: LateDevice, transfers: Any) -> None:
    room, single = OnDevice(np.zeros(5, np.int32)), type(transfers)(transfers._stream, places=1)
    for number in range(5):
        transfers.to_device(room, np.full(5, number, np.int32))
        assert single.to_host(room)().tolist() == [number] * 5
