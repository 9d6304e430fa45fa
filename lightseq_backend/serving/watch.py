"""What looks after an engine from outside, on a thread of its own: steps that hang, requests that wait, metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lightseq_backend.serving.notice import seconds_left
from lightseq_backend.serving.remote import RemoteEngine

log = logging.getLogger(__name__)

PERIOD = 1.0  # seconds


class Watch:
    """Gives an engine up, with the reason, when a round takes longer than `limit` seconds; has it answer what has
    waited for too long; stops it when the server is about to end; calls `update`. Triton 24.10 asks no model whether it
    is ready: this does.
    """

    def __init__(self, engine: RemoteEngine, limit: float, update: Callable[[], None], period: float = PERIOD):
        self._engine, self._limit, self._update, self._period = engine, limit, update, period
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after a last look."""
        self._ending.set()
        self._thread.join()

    def look(self) -> None:
        """One look at the engine."""
        engine, taken = self._engine, self._engine.round_seconds
        if taken > self._limit:
            reason = f"a step has taken {taken:.1f} s; the limit is {self._limit:g} s (step_seconds)"
            if engine.fault is None:
                log.error("%s: this model answers nothing more; load it again", reason)
            engine.give_up(f"{reason}; the model must be loaded again")
        elif not engine.stopping and (left := seconds_left()) is not None:
            log.info("the server is stopping: %g s for what is under way", left)
            engine.stop(left)
        else:
            engine.expire()

    def _loop(self) -> None:
        while not self._ending.wait(self._period):
            self._guarded(self.look)
            self._guarded(self._update)
        self._guarded(self._update)

    @staticmethod
    def _guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # whatever it is, the next look comes
            log.exception("a look at the engine failed")
