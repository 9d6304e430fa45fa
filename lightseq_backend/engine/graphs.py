"""Decode steps, one captured for each number of rows and each mix of methods."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lightseq_backend.engine.buffers import Buffers, buckets


class Steps:
    """Captured at load; `run(rows, ...)` replays. Whatever changes between replays lives in device memory."""

    def __init__(self, model: Any, buffers: Buffers, slots: int, ops: ModuleType):
        self.buckets = buckets(slots)
        self._graphs = {
            (rows, searching, sampling): ops.capture(_step(model, buffers, rows, searching, sampling, ops))
            for rows in self.buckets
            for searching, sampling in ((True, False), (False, True), (True, True))
        }

    def bucket(self, rows: int) -> int:
        """The smallest number of rows a step exists for that is at least `rows`."""
        return self.buckets[bisect_left(self.buckets, rows)]

    def run(self, rows: int, searching: bool, sampling: bool) -> None:
        """One step over the first `rows` rows of the state; `rows` is one of the buckets."""
        self._graphs[rows, searching, sampling]()


def _step(
    model: Any, buffers: Buffers, count: int, searching: bool, sampling: bool, ops: ModuleType
) -> Callable[[], None]:
    work, state, cache, head = buffers.work.first(count), buffers.state, buffers.cache, model.head
    rows, logits = state.rows[:count], state.logits[:count]
    ids, log_probabilities = state.ids[:count], state.log_probabilities[:count]
    vocabulary = (work.x, head.norm, head.output, head.epsilon, head.scale, work.normed, logits)

    def run() -> None:
        model.step(rows, state.slots, work, cache)
        if sampling:
            ops.vocabulary_logits(*vocabulary)
            if searching:
                ops.top(logits, head.banned, ids, log_probabilities)
        else:
            ops.vocabulary_top(*vocabulary, head.banned, ids, log_probabilities)
        if searching:
            ops.beam_step(rows, state.slots, cache.ancestors, state.history, ids, log_probabilities)
        if sampling:
            ops.sample_step(rows, state.slots, state.history, logits, head.banned)

    return run
