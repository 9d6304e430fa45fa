"""The record of one cache lane: everything a decode step needs to know of a beam or sample.

The records live in device memory and are advanced there by the step operations; the host writes one when a
sequence is admitted and reads them after a burst. Device code mirrors this layout field by field.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SEARCH = 1  # beam search in every step
FAN_OUT = 2  # one step of beam search, then every beam goes on greedily (LightSeq's topk_greedy)
SAMPLE = 3
STANDARD = 4  # the beam search of Hugging Face's generate

# When a standard search ends: early_stopping false, true and never.
UNTIL_NO_BETTER, UNTIL_FULL, UNTIL_NONE_CAN_BE = 0, 1, 2
MOST_ENDS = 9  # ids that end a text, the model's own among them
EMPTY = -1e9  # score of a pool entry that holds no hypothesis; what is not better does not get in

SLOT = np.dtype(
    [
        ("seed", "<u8"),
        ("stream", "<u4"),  # keeps samples with equal seeds apart
        ("method", "<i4"),  # SEARCH, FAN_OUT, SAMPLE, STANDARD; 0 for a lane that belongs to nobody
        ("beam", "<i4"),  # number within its sequence; beam 0 leads
        ("width", "<i4"),  # beams or samples of its sequence
        ("token", "<i4"),  # what to feed next
        ("length", "<i4"),  # tokens in the cache: the next one's position, and where its keys and values go
        ("generated", "<i4"),  # tokens generated so far
        ("limit", "<i4"),  # and how many there may be
        ("end_id", "<i4"),
        ("finished", "<i4"),  # this beam has generated an id that ends a text
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
        ("detailed", "<i4"),  # the log-probability of every token is kept
        ("ruled", "<i4"),  # the rules in the lane of beam 0 apply
        ("counted", "<i4"),  # STANDARD: tokens in front of the generated ones that count in a length
        ("stopping", "<i4"),  # STANDARD: UNTIL_NO_BETTER, UNTIL_FULL or UNTIL_NONE_CAN_BE
        ("pool_length", "<i4"),  # STANDARD: tokens of the finished hypothesis that this lane keeps; 0: it keeps none
        ("pool_score", "<f4"),  # STANDARD: its normalised score, or EMPTY
        ("looked_at", "<i4"),  # best tokens of a row that its search looks at
        ("more", "<i4"),  # ids that end a text beside end_id
        ("more_ends", "<i4", (MOST_ENDS - 1,)),
    ]
)

# What changes the scores of a sequence's rows before anything is chosen; in the lane of its beam 0. The lists are in
# `listed` one after another: ids never chosen, ids not chosen first, then words, each its length and its ids.
RULES = np.dtype(
    [
        ("repetition_penalty", "<f4"),  # 1: none
        ("no_repeat", "<i4"),  # n-grams of so many tokens occur once; 0: any number of times
        ("least", "<i4"),  # tokens before the end id may come
        ("forced_end", "<i4"),  # the last token that the limit allows, or -1
        ("context", "<i4"),  # tokens in `contexts`: the prompt, or what the decoder was fed
        ("suppressed", "<i4"),  # how many ids
        ("suppressed_first", "<i4"),
        ("words", "<i4"),
    ]
)


def end_ids(record: Any) -> list[int]:
    """What ends a text of that record's sequence, the model's own end id first."""
    return [int(record["end_id"]), *record["more_ends"][: record["more"]].tolist()]


def ranks(width: int, more: int) -> int:
    """Best tokens of a beam that a standard search of that width looks at: as many that go on as there are beams, what
    ends beside them, and never fewer than twice the beams."""
    return max(2 * width, width + 1 + more)
