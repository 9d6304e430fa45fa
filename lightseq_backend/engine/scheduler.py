"""Who waits, who gets slots, and in which order: first come, first served."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable

from lightseq_backend.config import EngineConfig
from lightseq_backend.errors import Overloaded
from lightseq_backend.request import Sequence


class Scheduler:
    """The bounded queue (any thread) and the free slots (the engine's thread)."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._waiting: deque[Sequence] = deque()
        self._free = list(range(config.slots))
        self.changed = threading.Condition()  # guards the queue; notified when there is something to do
        self._closed = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def slots_in_use(self) -> int:
        return self._config.slots - len(self._free)

    def enqueue(self, sequences: list[Sequence]) -> None:
        """All of them or none: Overloaded when they do not fit in the queue together, or once it is closed."""
        with self.changed:
            if self._closed:
                raise Overloaded("the engine is stopping")
            room = self._config.queue - len(self._waiting)
            if len(sequences) > room:
                raise Overloaded(
                    f"the queue has {len(self._waiting)} of {self._config.queue} places taken and cannot take "
                    f"{len(sequences)} more; come again later"
                )
            self._waiting.extend(sequences)
            self.changed.notify()

    def admit(self) -> list[Sequence]:
        """Takes from the head of the queue what has slots and fits in one prefill pass; gives out the slots."""
        admitted: list[Sequence] = []
        rows = 0
        with self.changed:
            while self._waiting:
                sequence = self._waiting[0]
                width = sequence.width
                rows += sequence.rows
                if width > len(self._free) or (admitted and rows > self._config.prompt_tokens):
                    break
                sequence.slots = [heapq.heappop(self._free) for _ in range(width)]
                admitted.append(self._waiting.popleft())
        return admitted

    def retire(self, sequence: Sequence) -> None:
        """Takes the slots back."""
        for slot in sequence.slots:
            heapq.heappush(self._free, slot)
        sequence.slots = []

    def withdraw(self, leaves: Callable[[Sequence], bool]) -> list[Sequence]:
        """Takes those out of the queue that leave it without having had slots."""
        with self.changed:
            leaving = [one for one in self._waiting if leaves(one)]
            self._waiting = deque(one for one in self._waiting if not leaves(one))
        return leaving

    def close(self) -> None:
        """Lets no more into the queue; what waits stays."""
        with self.changed:
            self._closed = True
            self.changed.notify()

    def clear(self) -> list[Sequence]:
        """Empties the queue and returns what waited."""
        with self.changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        return waiting
