"""Scores of given tokens: what their pass attends to, and what is made of its log-probabilities."""

from __future__ import annotations

import numpy as np

from lightseq_backend.ops.slots import SLOT
from lightseq_backend.request import Output, Sequence


def record(sequence: Sequence) -> np.ndarray:
    """SLOT [1]: where a target's rows, each of which is a sequence of one beam to cross_attention, find the source."""
    records = np.zeros(1, SLOT)
    records["width"] = 1
    records["memory"], records["memory_length"] = sequence.slots[0], len(sequence.tokens)
    return records


def outputs(sequences: list[Sequence], scored: np.ndarray) -> list[Output]:
    """scored: float32, for every row of all sequences the log-probability of the token after it; none of a last row's
    means anything. The mean is a float64 sum's."""
    results, end = [], 0
    for sequence in sequences:
        start, end = end, end + len(sequence.scored)
        own = scored[start + sequence.given - 1 : end - 1]
        loss = 0 - float(own.sum(dtype=np.float64)) / max(1, len(own))  # 0 - 0 is not -0
        results.append(Output(loss=loss, target_log_probabilities=own))
    return results
