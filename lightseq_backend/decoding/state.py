"""The decoding state in device memory, and the records a new sequence puts there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_backend.models.cache import Plan
from lightseq_backend.ops.slots import RULES, SLOT, STANDARD, ranks
from lightseq_backend.options import LISTED, DecodingOptions

Array = Any


@dataclass(frozen=True)
class DecodingState:
    """slots              SLOT [lanes]: one record a cache lane, the last for padding rows
    history, details   int32, float [lanes, steps]: generated tokens and, where wanted, their log-probabilities
    pool, pool_details  [lanes, steps]: the same of the finished hypotheses of standard searches, one a lane
    rules, listed, contexts  RULES [lanes], int32 [lanes, LISTED], int32 [lanes, steps]: what changes the scores of a
                       sequence's rows, in the lane of its beam 0
    rows               int32 [rows]: the slots that the next step works on
    logits             float [rows or more, vocabulary]: work space; rows begin at multiples of ops.LOGITS_ALIGNMENT
    normalisations     float [rows]: log sum exp of logits that rules have changed
    ids, log_probabilities  [rows, beams]: each row's best next tokens
    candidate_ids, candidate_log_probabilities  [rows, candidates]: the same where there are standard searches
    """

    slots: Array
    history: Array
    details: Array
    pool: Array
    pool_details: Array
    rules: Array
    listed: Array
    contexts: Array
    rows: Array
    logits: Array
    normalisations: Array
    ids: Array
    log_probabilities: Array
    candidate_ids: Array
    candidate_log_probabilities: Array

    @staticmethod
    def plan(lanes: int, rows: int, logits: int, steps: int, vocabulary: int, beams: int, candidates: int) -> Plan:
        integer, number = np.dtype(np.int32), np.dtype(np.float32)
        return {
            "slots": ((lanes,), SLOT),
            "history": ((lanes, steps), integer),
            "details": ((lanes, steps), number),
            "pool": ((lanes, steps), integer),
            "pool_details": ((lanes, steps), number),
            "rules": ((lanes,), RULES),
            "listed": ((lanes, LISTED), integer),
            "contexts": ((lanes, steps), integer),
            "rows": ((rows,), integer),
            "logits": ((logits, vocabulary), number),
            "normalisations": ((rows,), number),
            "ids": ((rows, beams), integer),
            "log_probabilities": ((rows, beams), number),
            "candidate_ids": ((rows, candidates), integer),
            "candidate_log_probabilities": ((rows, candidates), number),
        }


def new_records(options: DecodingOptions, method: int, end_id: int) -> np.ndarray:
    """What every method starts from, of what the options say: SLOT [width], beam i at index i. The other fields stay
    zero."""
    records = np.zeros(options.width, SLOT)
    records["method"] = method
    records["beam"] = np.arange(options.width)
    records["width"] = options.width
    records["end_id"] = end_id
    more = [id_ for id_ in dict.fromkeys(options.end_ids) if id_ != end_id]
    records["more"] = len(more)
    records["more_ends"][:, : len(more)] = more
    records["looked_at"] = ranks(options.width, len(more)) if method == STANDARD else options.width
    records["length_penalty"] = options.length_penalty
    return records
