"""Who leaves before its text is done: cancelled, or past its deadline."""

from __future__ import annotations

import threading
import time

from lightseq_backend.errors import DeadlineExceeded
from lightseq_backend.request import Request


class Departures:
    """Any thread tells; the engine's asks once a round. Costs nothing where nobody leaves and nobody has a deadline."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled: dict[int, tuple[Request, Exception]] = {}  # by id()
        self._timed: dict[int, Request] = {}

    def expect(self, request: Request) -> None:
        """A request has come; its deadline counts until `forget`."""
        if request.deadline is not None:
            with self._lock:
                self._timed[id(request)] = request

    def forget(self, request: Request) -> None:
        if request.deadline is not None:
            with self._lock:
                self._timed.pop(id(request), None)

    def cancel(self, request: Request, error: Exception) -> None:
        with self._lock:
            self._cancelled[id(request)] = request, error

    def due(self) -> dict[int, Exception]:
        """What to answer to whom, by the id() of the request; some may have had an answer."""
        if not self._cancelled and not self._timed:
            return {}
        now = time.monotonic()
        with self._lock:
            due = {key: error for key, (_, error) in self._cancelled.items()}
            self._cancelled.clear()
            for key, request in self._timed.items():
                assert request.deadline is not None
                if request.deadline <= now:
                    late = (now - request.deadline) * 1e3
                    due.setdefault(key, DeadlineExceeded(f"the deadline passed {late:.1f} ms before the text was done"))
        return due
