"""Who waits, who gets slots, and in which order."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count

from lightseq_backend.config import EngineConfig
from lightseq_backend.errors import Overloaded
from lightseq_backend.request import LOW, PRIORITIES, Sequence

# Seconds that a sequence gives way for each token it reads or may generate: short ones wait less behind long ones.
GIVES_WAY = 0.002
PACE_OVER = 64  # admissions by which the pace is judged
SOONEST, LATEST = 0.1, 60.0  # seconds after which callers are told to come again


class Scheduler:
    """The bounded queue (any thread) and the free slots (the engine's thread).

    First come, first served, but for what a sequence gives way: its priority's seconds, and GIVES_WAY for each of its
    tokens. Nobody is overtaken by what came more than that after it, so nobody waits for ever. The head of the queue
    is never passed over, however many slots it needs.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic):
        self._config, self._clock = config, clock
        self._waiting: list[tuple[float, int, Sequence]] = []  # a heap; the number keeps equals in order
        self._tokens = 0
        self._numbers = count()
        self._free = list(range(config.slots))
        self._admissions: deque[float] = deque(maxlen=PACE_OVER)
        self.changed = threading.Condition()  # guards the queue; notified when there is something to do
        self._closed = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Of all that wait."""
        return self._tokens

    @property
    def age(self) -> float:
        """Seconds that the one who has waited longest has waited."""
        with self.changed:
            return self._clock() - min((one.arrived for _, _, one in self._waiting), default=self._clock())

    @property
    def slots_in_use(self) -> int:
        return self._config.slots - len(self._free)

    def enqueue(self, sequences: list[Sequence]) -> None:
        """All of them or none: Overloaded when they do not fit in the queue together, or once it is closed."""
        with self.changed:
            if self._closed:
                raise Overloaded("the engine is stopping")
            now = self._clock()
            self._check_room(sequences, now)
            for one in sequences:
                one.arrived = now if one.request.arrived is None else one.request.arrived
                due = now + PRIORITIES[one.request.priority] + GIVES_WAY * (one.rows + one.limit)
                heapq.heappush(self._waiting, (due, next(self._numbers), one))
            self._tokens += sum(one.rows for one in sequences)
            self.changed.notify()

    def admit(self) -> list[Sequence]:
        """Takes from the head of the queue what has slots and fits in one prefill pass; gives out the slots."""
        admitted: list[Sequence] = []
        rows = 0
        with self.changed:
            now = self._clock()
            while self._waiting:
                sequence = self._waiting[0][-1]
                width = sequence.width
                rows += sequence.rows
                if width > len(self._free) or (admitted and rows > self._config.prompt_tokens):
                    break
                sequence.slots = [heapq.heappop(self._free) for _ in range(width)]
                sequence.admitted = now
                admitted.append(heapq.heappop(self._waiting)[-1])
                self._tokens -= sequence.rows
            self._admissions.extend([now] * len(admitted))
        return admitted

    def retire(self, sequence: Sequence) -> None:
        """Takes the slots back."""
        for slot in sequence.slots:
            heapq.heappush(self._free, slot)
        sequence.slots = []

    def close(self) -> None:
        """Lets no more into the queue; what waits stays."""
        with self.changed:
            self._closed = True
            self.changed.notify()

    def remove(self, unwanted: Callable[[Sequence], bool] = lambda sequence: True) -> list[Sequence]:
        """Takes out of the queue what is unwanted, all by default, and returns it."""
        with self.changed:
            removed = [one for _, _, one in self._waiting if unwanted(one)]
            gone = set(map(id, removed))
            self._waiting = [entry for entry in self._waiting if id(entry[-1]) not in gone]
            heapq.heapify(self._waiting)
            self._tokens -= sum(one.rows for one in removed)
        return removed

    def remove_expired(self) -> list[Sequence]:
        """Takes out of the queue what has waited for longer than the configuration allows."""
        oldest = self._clock() - self._config.queue_seconds
        return self.remove(lambda one: one.arrived < oldest)

    def _check_room(self, sequences: list[Sequence], now: float) -> None:
        """Overloaded when there is none. Of low priority are half of the queue at most, so that others find room."""
        more, places = len(sequences), self._config.queue
        limits = [(len(self._waiting), places, "")]
        if any(one.request.priority == LOW for one in sequences):
            low = sum(one.request.priority == LOW for _, _, one in self._waiting)
            limits.append((low, -(-places // 2), " for low priority"))
        for taken, limit, share in limits:
            if more > limit - taken:
                raise Overloaded(
                    f"the queue has {taken} of {limit} places{share} taken and cannot take {more} more; "
                    f"{self._advice(more, now)}"
                )
        tokens = sum(one.rows for one in sequences)
        if tokens > self._config.queue_tokens - self._tokens:
            raise Overloaded(
                f"the queue holds {self._tokens} of {self._config.queue_tokens} tokens and cannot take {tokens} more; "
                f"{self._advice(more, now)}"
            )

    def _advice(self, places: int, now: float) -> str:
        """When so many places will be free, at the pace at which others left while the oldest of the queue waited."""
        since = min((one.arrived for _, _, one in self._waiting), default=now)
        if len(self._admissions) == PACE_OVER:
            since = max(since, self._admissions[0])
        left = sum(moment > since for moment in self._admissions)
        pace = (now - since) / max(left, 1)
        return f"come again in {min(max(places * pace, SOONEST), LATEST):.1f} s"
