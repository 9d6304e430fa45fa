"""Sampling: its start and its result; the step is ops.sample_step. A sequence's rows are independent samples."""

from __future__ import annotations

import numpy as np

from lightseq_backend.config import DecodingOptions
from lightseq_backend.decoding.beam import made_of
from lightseq_backend.decoding.state import new_records
from lightseq_backend.ops.slots import SAMPLE
from lightseq_backend.request import Output, Sequence


def begin(options: DecodingOptions, end_id: int) -> np.ndarray:
    """SLOT [samples], without what `draw` adds."""
    records = new_records(options, SAMPLE, end_id)
    records["temperature"] = options.temperature
    records["top_k"] = options.top_k
    records["top_p"] = options.top_p
    return records


def draw(records: np.ndarray, sequence: Sequence) -> None:
    """What tells samples from others: those of one request differ by their stream; so do the rows of one batch."""
    records["seed"] = sequence.seed
    records["stream"] = sequence.request.stream * 65536 + np.arange(len(records))


def finish(records: np.ndarray, history: np.ndarray, details: np.ndarray | None = None) -> Output:
    """records: SLOT [samples]; history: int32 [samples, steps]; details: float32 [samples, steps]."""
    steps = int(records["generated"][0])
    hypotheses = made_of(records, history[:, :steps], records["score"].tolist(), details)
    return Output(tuple(hypotheses), steps, cut=not all(one.finished for one in hypotheses))
