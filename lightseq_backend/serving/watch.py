"""What looks after an engine from outside, on a thread of its own: steps that hang, requests that wait, metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from lightseq_backend.engine.engine import Engine
from lightseq_backend.serving.notice import seconds_left
from lightseq_backend.serving.remote import RemoteEngine

log = logging.getLogger(__name__)

PERIOD = 1.0  # seconds


class Watch:
    """Gives an engine up, with the reason, when a round takes longer than `limit` seconds or it has ended;
    answers what has waited for too long; stops it when the server is about to end; calls `update`. Triton 24.10 asks no
    model whether it is ready: this does.
    """

    def __init__(self, engine: Engine | RemoteEngine, limit: float, update: Callable[[], None], period: float = PERIOD):
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
            self._give_up(f"a step has taken {taken:.1f} s; the limit is {self._limit:g} s (step_seconds)")
        elif not engine.alive and not self._ending.is_set() and not engine.stopping:
            self._give_up("the engine has ended")
        elif not engine.stopping and (left := seconds_left()) is not None:
            log.info("the server is stopping: %g s for what is under way", left)
            engine.stop(left)
        else:
            engine.expire()

    def _give_up(self, reason: str) -> None:
        if self._engine.fault is None:
            log.error("%s: this model answers nothing more; load it again", reason)
        self._engine.give_up(f"{reason}; the model must be loaded again")

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
