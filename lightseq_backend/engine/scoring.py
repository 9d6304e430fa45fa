"""Scores of given tokens: what their pass attends to, and what is made of its log-probabilities."""

from __future__ import annotations

from itertools import accumulate, chain

import numpy as np

from lightseq_backend.ops.slots import SLOT
from lightseq_backend.request import Output, Sequence


def record(sequence: Sequence) -> np.ndarray:
    """SLOT [1]: where a target's rows, each of which is a sequence of one beam to cross_attention, find the source."""
    records = np.zeros(1, SLOT)
    records["width"] = 1
    records["memory"], records["memory_length"] = sequence.slots[0], len(sequence.tokens)
    return records


class Scored:
    """Where in the scores of a pass its sequences' are; known while the device is at it."""

    def __init__(self, sequences: list[Sequence]):
        ends = list(accumulate(len(one.scored) for one in sequences))
        self._own = [(start + one.given - 1, end - 1) for one, start, end in zip(sequences, (0, *ends), ends)]
        self._bounds = np.array([*chain.from_iterable(self._own)])

    @property
    def tokens(self) -> int:
        return sum(end - start for start, end in self._own)

    def outputs(self, scored: np.ndarray) -> list[Output]:
        """scored: float32, for every row of all sequences the log-probability of the token after it; none of a last
        row's means anything. The mean is a float64 sum's."""
        # One call for all: from each index to the next, and of an empty span what is there.
        sums = np.add.reduceat(scored.astype(np.float64), self._bounds)[::2].tolist()
        return [
            # 0 - 0 is not -0
            Output(loss=0 - sum_of / (end - start) if end > start else 0.0, target_log_probabilities=scored[start:end])
            for (start, end), sum_of in zip(self._own, sums)
        ]
