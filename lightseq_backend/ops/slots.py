"""The record of one cache lane: everything a decode step needs to know of a beam or sample.

The records live in device memory and are advanced there by the step operations; the host writes one when a
sequence is admitted and reads them after a burst. Device code mirrors this layout field by field.
"""

from __future__ import annotations

import numpy as np

SEARCH = 1  # beam search in every step
FAN_OUT = 2  # one step of beam search, then every beam goes on greedily (LightSeq's topk_greedy)
SAMPLE = 3

SLOT = np.dtype(
    [
        ("seed", "<u8"),
        ("stream", "<u4"),  # keeps samples with equal seeds apart
        ("method", "<i4"),  # SEARCH, FAN_OUT, SAMPLE; 0 for a lane that belongs to nobody
        ("beam", "<i4"),  # number within its sequence; beam 0 leads
        ("width", "<i4"),  # beams or samples of its sequence
        ("token", "<i4"),  # what to feed next
        ("length", "<i4"),  # tokens in the cache: the next one's position, and where its keys and values go
        ("generated", "<i4"),  # tokens generated so far
        ("limit", "<i4"),  # and how many there may be
        ("end_id", "<i4"),
        ("finished", "<i4"),  # this beam has generated end_id
        ("done", "<i4"),  # the whole sequence is through: steps leave it alone
        ("memory", "<i4"),  # lane of the source's keys and values
        ("memory_length", "<i4"),
        ("top_k", "<i4"),
        ("log_probability", "<f4"),  # sum over the generated tokens
        ("score", "<f4"),  # length-normalised; frozen once finished
        ("length_penalty", "<f4"),
        ("diverse_lambda", "<f4"),
        ("temperature", "<f4"),
        ("top_p", "<f4"),
    ]
)
