"""Who still waits for an answer is asked of Triton often enough to be of use, and seldom enough to cost little."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from lightseq_backend.errors import Cancelled
from lightseq_backend.serving import callers as module
from lightseq_backend.serving.callers import Callers

QUESTION = 0.002  # seconds


class Sender:
    """A call that is cancelled or not; asking takes a while, as it does of a server."""

    def __init__(self, log: list[float], cancelled: bool = False):
        self._log, self._cancelled = log, cancelled

    def is_cancelled(self) -> bool:
        time.sleep(QUESTION)
        self._log.append(time.monotonic())
        return self._cancelled


class Watched:
    def __init__(self) -> None:
        self.asked: list[float] = []
        self.cancelled: list[Any] = []
        self.told = threading.Event()
        self.callers = Callers(self._cancel)
        self.callers.start()

    def _cancel(self, requests: Any, error: Exception) -> None:
        assert isinstance(error, Cancelled)
        self.cancelled += requests
        self.told.set()

    def add(self, name: str, cancelled: bool = False) -> None:
        self.callers.watch(Sender(self.asked, cancelled), name, [name], time.monotonic())  # type: ignore[list-item]


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.callers.close()


def test_single_cancelled_call_is_noticed_soon(watched: Watched) -> None:
    began = time.monotonic()
    watched.add("gone", cancelled=True)
    assert watched.told.wait(10)
    assert module.AGE <= time.monotonic() - began < 2
    assert watched.cancelled[0] == "gone"


def test_many_calls_cost_a_small_part_of_the_time_and_are_all_asked_about(watched: Watched) -> None:
    calls = 100  # a round takes a fifth of a second
    for number in range(calls):
        watched.add(str(number))
    watched.add("gone", cancelled=True)
    assert watched.told.wait(10)
    began = time.monotonic()
    watched.callers.stop("gone")
    watched.asked.clear()
    time.sleep(2.5)
    seconds = time.monotonic() - began
    assert len(watched.asked) * QUESTION < 0.25 * seconds


def test_many_calls_keep_a_cancelled_one_waiting_for_a_second_or_two_at_most(watched: Watched) -> None:
    for number in range(100):
        watched.add(str(number))
    time.sleep(0.6)  # a round is over, whose share of the time would be four seconds
    watched.add("gone", cancelled=True)
    assert watched.told.wait(2.5)
    assert watched.cancelled[0] == "gone"
