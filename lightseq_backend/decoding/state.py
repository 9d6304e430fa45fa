"""The decoding state in device memory, and the records a new sequence puts there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_backend.models.cache import Plan
from lightseq_backend.ops.slots import SLOT
from lightseq_backend.request import Sequence

Array = Any


@dataclass(frozen=True)
class DecodingState:
    """slots              SLOT [lanes]: one record a cache lane, the last for padding rows
    history            int32 [lanes, steps]: generated tokens
    rows               int32 [rows]: the slots that the next step works on
    logits             float [rows or more, vocabulary]: work space; rows begin at multiples of ops.LOGITS_ALIGNMENT
    ids, log_probabilities  [rows, beams]: each row's best next tokens
    """

    slots: Array
    history: Array
    rows: Array
    logits: Array
    ids: Array
    log_probabilities: Array

    @staticmethod
    def plan(lanes: int, rows: int, logits: int, steps: int, vocabulary: int, beams: int) -> Plan:
        integer, number = np.dtype(np.int32), np.dtype(np.float32)
        return {
            "slots": ((lanes,), SLOT),
            "history": ((lanes, steps), integer),
            "rows": ((rows,), integer),
            "logits": ((logits, vocabulary), number),
            "ids": ((rows, beams), integer),
            "log_probabilities": ((rows, beams), number),
        }


def new_records(sequence: Sequence, method: int, end_id: int) -> np.ndarray:
    """What every method starts from: SLOT [width], beam i at index i. The model-dependent fields stay zero."""
    options = sequence.request.options
    records = np.zeros(options.width, SLOT)
    records["method"] = method
    records["beam"] = np.arange(options.width)
    records["width"] = options.width
    records["limit"] = sequence.limit
    records["end_id"] = end_id
    records["length_penalty"] = options.length_penalty
    return records
