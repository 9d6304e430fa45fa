"""Who waits for an answer, and whether they still do: cancelled calls and ids that are to be stopped.

Asking Triton is a round trip to the server, so a thread of its own does it, only of calls that last, and with a small
part of its time: with 64 calls under way, asking about all of them every 50 ms took a sixth of the tokens/s on a CPU.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightseq_backend.errors import Cancelled
from lightseq_backend.request import Request

log = logging.getLogger(__name__)

PERIOD = 0.05  # seconds between two rounds of questions, at least
SHARE = 0.05  # of the time, that questions may take
LONGEST = 1.0  # seconds between two rounds, at most: a busy machine must not make cancelled calls go on and on
AGE = 0.25  # of a call that is asked about: most are answered by then

Cancel = Callable[[Sequence[Request], Exception], None]


@dataclass
class Caller:
    """One call under way. `lock` is held while Triton is asked about it: not behind its final answer."""

    sender: Any
    name: str
    requests: Sequence[Request]
    since: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    gone: bool = False


class Callers:
    """Watches the calls of one model instance. cancel: the engine's"""

    def __init__(self, cancel: Cancel) -> None:
        self._cancel = cancel
        self._callers: dict[int, Caller] = {}  # by id() of the sender
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="callers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def watch(self, sender: Any, name: str, requests: Sequence[Request], since: float) -> None:
        """name: the call's request id, "" for none; since: when it came, by time.monotonic()"""
        self._callers[id(sender)] = Caller(sender, name, requests, since)

    def leave(self, sender: Any) -> None:
        """The call gets its final answer now; nobody asks about it any more when this returns."""
        caller = self._callers.pop(id(sender), None)
        if caller is not None:
            with caller.lock:
                caller.gone = True

    def alone(self) -> bool:
        """Whether there is no more than one, and nothing is asked about it yet."""
        now = time.monotonic()
        return len(self._callers) <= 1 and all(now - one.since < AGE for one in list(self._callers.values()))

    def stop(self, name: str) -> int:
        """Cancels the calls with that request id; how many there were."""
        named = [caller for caller in list(self._callers.values()) if caller.name == name]
        for caller in named:
            self._cancel(caller.requests, Cancelled(f"the request was stopped by its id, {name}"))
        return len(named)

    def _loop(self) -> None:
        pause = PERIOD
        while not self._closed.wait(pause):
            now = time.monotonic()
            for caller in list(self._callers.values()):
                if now - caller.since >= AGE:
                    self._ask(caller)
            pause = min(LONGEST, max(PERIOD, (time.monotonic() - now) / SHARE))

    def _ask(self, caller: Caller) -> None:
        with caller.lock:
            if caller.gone:
                return
            try:
                if not caller.sender.is_cancelled():
                    return
            except Exception:  # the others are asked all the same
                log.exception("Triton could not be asked whether a request was cancelled")
                return
        self._cancel(caller.requests, Cancelled("the request was cancelled"))
