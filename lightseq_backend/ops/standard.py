"""The standard beam search and the rules on scores, in NumPy: as Hugging Face's generate has them, for ops/cpu.py.

The conventions are those of ops/cpu.py, which hands these operations on as its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightseq_backend.ops.choice import FLOAT, Array, leaders, log_sum_exp
from lightseq_backend.ops.slots import SAMPLE, STANDARD, UNTIL_FULL, UNTIL_NONE_CAN_BE, end_ids


def apply_rules(
    rows: Array, slots: Array, rules: Array, listed: Array, contexts: Array, history: Array, logits: Array,
    normalisations: Array,
) -> None:  # fmt: skip
    """Changes, in place, the logits of rows that have rules; normalisations[r] = their log sum exp before that.

    normalisations[r] is not a number for the other rows. In this order: a token of the past has its score s become
    s * penalty where s < 0, else s / penalty; then -inf for what would repeat an n-gram of the past, for what would
    complete a listed word, and for all end ids while there are too few tokens; at the limit's last token -inf for all
    but a forced one, whose log-probability is 0; -inf for suppressed ids. s is the log-probability, or the logit where
    there is one row to a choice (samples, one beam). The past is the sequence's context, then what the row generated.
    rows: [n]; rules: RULES [slots], listed: int32 [slots, LISTED], contexts: int32 [slots, steps], each in the lane of
    beam 0; history: int32 [slots, steps]; logits: [n, vocabulary]; normalisations: [n]. Negative tokens of a context
    stand for padding. (Keskar et al. 2019 for the penalty; Paulus et al. 2017 for the n-grams.)
    """
    records = slots[rows]
    normalisations[:] = np.nan
    for row in np.flatnonzero(records["ruled"] & (records["done"] == 0)).tolist():
        record = records[row]
        lead = rows[row - record["beam"]]
        rule = rules[lead]
        past = np.concatenate([contexts[lead, : rule["context"]], history[rows[row], : record["generated"]]])
        normalisations[row] = log_sum_exp(logits[row])
        shift = FLOAT.type(0) if record["method"] == SAMPLE or record["width"] == 1 else normalisations[row]
        _change(logits[row], past, record, rule, listed[lead], shift, normalisations[row])


def _change(scores: Array, past: Array, record: Any, rule: Any, listed: Array, shift: Any, certain: Any) -> None:
    if rule["repetition_penalty"] != 1:
        seen = np.unique(past[past >= 0])
        values = scores[seen] - shift
        scores[seen] = np.where(values < 0, values * rule["repetition_penalty"], values / rule["repetition_penalty"])
        scores[seen] += shift
    width = int(rule["no_repeat"])
    if 0 < width <= past.size:
        windows = np.lib.stride_tricks.sliding_window_view(past, width)
        repeated = windows[(windows[:, :-1] == past[past.size + 1 - width :]).all(axis=1), -1]
        scores[repeated[repeated >= 0]] = -np.inf
    suppressed, first, place = _parts(rule)
    for _ in range(rule["words"]):
        word = listed[place + 1 : place + 1 + listed[place]]
        place += 1 + word.size
        if word.size - 1 <= past.size and (past[past.size - word.size + 1 :] == word[:-1]).all():
            scores[word[-1]] = -np.inf
    if record["generated"] < rule["least"]:
        scores[end_ids(record)] = -np.inf
    if rule["forced_end"] >= 0 and record["generated"] + 1 >= record["limit"]:
        scores[:] = -np.inf
        scores[rule["forced_end"]] = certain
    scores[listed[suppressed]] = -np.inf
    if record["generated"] == 0:
        scores[listed[first]] = -np.inf


def _parts(rule: Any) -> tuple[slice, slice, int]:
    """Where in `listed` the suppressed ids are, those suppressed at first, and the first word."""
    between, behind = int(rule["suppressed"]), int(rule["suppressed"] + rule["suppressed_first"])
    return slice(between), slice(between, behind), behind


def standard_step(
    rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, pool: Array, pool_details: Array,
    ids: Array, log_probabilities: Array,
) -> None:  # fmt: skip
    """Advances every sequence of the standard search by one token.

    Beams offer their best tokens at log_probability + log p; the (1 + end ids) * width best offers count, best first
    (among equals the lower beam, then the better rank). Those of the first `width` that end (with one of the end ids,
    or all of them at the limit) go to the pool of the sequence at their sum / n ** length_penalty, n the counted
    tokens, if they are better than its worst. The first `width` that do not end are the next beams. The sequence is
    done at the limit; when the best beam, at n (with UNTIL_NONE_CAN_BE and a positive penalty, at the most n there may
    be), is no better than the pool's worst; with UNTIL_FULL when the pool has `width` hypotheses.
    rows: [n]; history: int32 [slots, steps], details: [slots, steps]: the generated tokens of each beam, and their
    log-probabilities where `detailed`; pool, pool_details: the same of the finished hypothesis that each lane keeps,
    pool_length tokens of it; ids, log_probabilities: [n, at least min(looked_at, ids that may come)].
    """
    for first, record in leaders(rows, slots, (STANDARD,)):
        if record["done"]:
            continue
        width, step, length = int(record["width"]), int(record["generated"]), int(record["length"])
        more = int(record["more"])
        count = min(int(record["looked_at"]), ids.shape[1])
        group = rows[first : first + width]
        before = slots[group]
        offers = before["log_probability"][:, None] + log_probabilities[first : first + width, :count]
        order = np.argsort(-offers, axis=None, kind="stable")[: (2 + more) * width]
        parents, places = order // count, order % count
        tokens, totals = ids[first + parents, places], offers[parents, places]
        chances = log_probabilities[first + parents, places]
        ends = np.isin(tokens, end_ids(record))
        last = step + 1 >= record["limit"]

        scores = totals / _divisor(record["counted"] + step + 1, record)
        pooled = before["pool_score"].copy()
        newcomers: dict[int, int] = {}  # place in the pool: offer
        for offer in np.flatnonzero(ends[:width] | last).tolist():
            worst = int(pooled.argmin())
            if scores[offer] > pooled[worst]:
                pooled[worst], newcomers[worst] = scores[offer], offer
        for place, offer in newcomers.items():
            lane, parent = group[place], group[parents[offer]]
            pool[lane, :step], pool[lane, step] = history[parent, :step], tokens[offer]
            if record["detailed"]:
                pool_details[lane, :step], pool_details[lane, step] = details[parent, :step], chances[offer]
            slots["pool_length"][lane] = step + 1
        slots["pool_score"][group] = pooled

        beams = np.argsort(ends, kind="stable")[:width]  # those that do not end, first
        origins = group[parents[beams]]
        history[group, :step] = history[origins, :step]
        history[group, step] = tokens[beams]
        if record["detailed"]:
            details[group, :step] = details[origins, :step]
            details[group, step] = chances[beams]
        ancestors[group, : length + 1] = ancestors[origins, : length + 1]
        slots["log_probability"][group] = totals[beams]
        slots["token"][group] = tokens[beams]

        counted = record["counted"] + step + 1
        if record["stopping"] == UNTIL_NONE_CAN_BE and record["length_penalty"] > 0:
            counted = record["counted"] + record["limit"]
        hopeless = not totals[beams[0]] / _divisor(counted, record) > pooled.min()
        full = bool((slots["pool_length"][group] > 0).all())
        done = last or hopeless or (full and record["stopping"] == UNTIL_FULL)
        slots["length"][group] += not done
        slots["generated"][group] += 1
        slots["done"][group] = done


def _divisor(tokens: int, record: Any) -> np.floating[Any]:
    """tokens ** length_penalty, float32."""
    return FLOAT.type(float(tokens) ** float(record["length_penalty"]))
