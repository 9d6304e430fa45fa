"""Beam search as LightSeq does it (lightseq_format.md 3.6): its start and its result; the step is ops.beam_step."""

from __future__ import annotations

import numpy as np

from lightseq_backend.config import TOPK_GREEDY, DecodingOptions, Dialect
from lightseq_backend.decoding.state import new_records
from lightseq_backend.ops.slots import FAN_OUT, SEARCH, end_ids
from lightseq_backend.request import Hypothesis, Output, Sequence

# LightSeq's topk_greedy never writes the score of a hypothesis that ends: its clients read this.
UNSCORED = -1e6


def begin(options: DecodingOptions, end_id: int, dialect: Dialect) -> np.ndarray:
    """SLOT [beams]. All beams start alike; all but the first carry a handicap, so the first step fans out from it."""
    method = FAN_OUT if options.sampling_method == TOPK_GREEDY else SEARCH
    records = new_records(options, method, end_id)
    records["diverse_lambda"] = options.diverse_lambda
    records["log_probability"][1:] = dialect.other_beams
    return records


def finish(sequence: Sequence, records: np.ndarray, history: np.ndarray, details: np.ndarray | None = None) -> Output:
    """records: SLOT [beams]; history: int32 [beams, steps]; details: float32 [beams, steps]. Beams already stand best
    first, unless the penalty is negative: then the search ran on plain sums, and the mean over the tokens before the
    end decides."""
    options = sequence.request.options
    steps, cut = int(records["generated"][0]), not all(records["finished"].tolist())
    if options.length_penalty >= 0:
        records = records[: options.hypotheses]
    scores = _scores(sequence, records, history)
    hypotheses = made_of(records, history[: len(records), :steps], scores, details)
    if options.length_penalty < 0:
        hypotheses.sort(key=lambda one: -one.score)
    return Output(tuple(hypotheses[: options.hypotheses]), steps, cut)


def made_of(
    records: np.ndarray, tokens: np.ndarray, scores: list[float], details: np.ndarray | None = None
) -> list[Hypothesis]:
    """One hypothesis a record. tokens: int32 [records, 1 step or more], filled up with the end id behind the end;
    details: [records, as many steps or more], the log-probability of each."""
    made = []
    for number, (ended, row, score) in enumerate(zip(records["finished"].tolist(), tokens, scores, strict=True)):
        length, silent = len(row), 0
        if ended:
            length = text_length(records[number], row)
            silent = int(row[length - 1] != records[number]["end_id"])
        each = None if details is None else details[number, :length]
        made.append(Hypothesis(row[:length], score, bool(ended), each, silent))
    return made


def text_length(record: np.void, tokens: np.ndarray) -> int:
    """How many of a row's tokens, int32 [1 step or more], are its text: up to and with what ends it."""
    if not record["finished"]:
        return len(tokens)
    ends = end_ids(record)
    return next((i for i, token in enumerate(tokens.tolist(), 1) if token in ends), 1)


def _scores(sequence: Sequence, records: np.ndarray, history: np.ndarray) -> list[float]:
    options = sequence.request.options
    if options.length_penalty < 0:
        rows, totals = history[:, : int(records["generated"][0])], records["log_probability"].tolist()
        lengths = [text_length(record, row) - int(record["finished"]) for record, row in zip(records, rows)]
        return [total / max(n, 1e-6) for total, n in zip(totals, lengths, strict=True)]
    scores: list[float] = records["score"].tolist()
    if options.sampling_method == TOPK_GREEDY:
        ended = records["finished"].tolist()
        scores = [UNSCORED if over else score for over, score in zip(ended, scores, strict=True)]
    return scores
