"""How tokens are chosen from scores, in NumPy: the part of ops/cpu.py that knows sequences and no weights.

The conventions are those of ops/cpu.py, which hands these operations on as its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lightseq_backend.ops.philox import gumbel
from lightseq_backend.ops.product import divide, scratch
from lightseq_backend.ops.slots import FAN_OUT, SAMPLE, SEARCH, end_ids

Array = np.ndarray[Any, Any]
FLOAT = np.dtype(np.float32)

# Whole rows of logits ------------------------------------------------------------------------------------------------


def top(logits: Array, banned: int, ids: Array, log_probabilities: Array, normalisations: Array | None = None) -> None:
    """The k best ids of each row, best first, the lower id first among equals, and their log-probabilities.

    ids: int32 [rows, k], log_probabilities: [rows, k], k <= vocabulary. Id `banned` (or -1) is never chosen, but
    counts in the normalisation, as in LightSeq; then k < vocabulary. normalisations: [rows], what the row's log sum exp
    was before its logits were changed, or not a number where it is that of these logits.
    """

    def share(rows: slice) -> None:
        for row in range(rows.start, rows.stop):
            scores = logits[row]
            ids[row] = _best(scores, ids.shape[1], banned)
            before = np.nan if normalisations is None else normalisations[row]
            log_probabilities[row] = scores[ids[row]] - (log_sum_exp(scores) if np.isnan(before) else before)

    divide(share, len(logits), 1 if logits.size < _WORTH_THREADS else None)


def target_log_probabilities(logits: Array, targets: Array, out: Array) -> None:
    """out[r] = log softmax(logits[r])[targets[r]]. targets: int32 [rows]; out: [rows]."""
    for row, scores in enumerate(logits):
        out[row] = scores[targets[row]] - log_sum_exp(scores)


def log_sum_exp(scores: Array) -> np.floating[Any]:
    most = scores.max()
    shifted = scratch("exponentials", scores.shape)
    np.subtract(scores, most, out=shifted)
    np.exp(shifted, out=shifted)
    return np.log(shifted.sum()) + most


_GROUP = 64
_WORTH_THREADS = 1 << 17  # scores below which handing out work costs more than it saves


def _best(scores: Array, count: int, banned: int) -> Array:
    """Indices of the `count` largest but `banned`, descending, the lower index first among equals."""
    candidates = _promising(scores, count + (banned >= 0))
    candidates = candidates[candidates != banned]
    return candidates[np.argsort(-scores[candidates], kind="stable")[:count]]


def _promising(scores: Array, wanted: int) -> Array:
    """Ascending indices of few scores, the `wanted` largest among them."""
    groups = scores.size // _GROUP  # group g is g, g + groups, g + 2 * groups, ...: maxima over whole vectors
    if groups > wanted:
        # As many scores as wanted are at least `bound`, one in each of the groups with the largest maxima.
        maxima = scores[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        bound = np.partition(maxima, groups - wanted)[groups - wanted]
        inside = np.flatnonzero(maxima >= bound) + np.arange(0, groups * _GROUP, groups)[:, None]
        passing = np.concatenate([inside.ravel(), np.arange(groups * _GROUP, scores.size)])
        passing = passing[scores[passing] >= bound]
        if passing.size >= wanted:  # fails only where scores are not numbers
            return np.sort(passing)
    return np.arange(scores.size)


# Decoding ------------------------------------------------------------------------------------------------------------


def beam_step(
    rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, ids: Array, log_probabilities: Array
) -> None:
    """Advances every searching sequence by one token (lightseq_format.md 3.6).

    A live beam offers its best tokens at (log_probability + log p) * norm, norm = ((5 + n) / 6) ** -length_penalty
    for n tokens (1 where the penalty is negative), less diverse_lambda * (rank + 1) while choosing; a finished beam
    offers itself at its frozen score. The `width` best offers become the beams, best first; among equals the lower
    parent, then the better rank. The sequence is done when all beams have finished, or at `limit` tokens.
    rows: [n]; history: int32 [slots, steps], the generated tokens; details: [slots, steps], their log-probabilities
    where `detailed` (0 behind the end); ids, log_probabilities: [n, at least width].
    """
    for first, record in leaders(rows, slots, (SEARCH, FAN_OUT)):
        if record["done"]:
            continue
        width, step, length = int(record["width"]), int(record["generated"]), int(record["length"])
        group = rows[first : first + width]
        before = slots[group]
        finished = before["finished"] != 0
        norm = length_norm(step + 1, record["length_penalty"])
        offers = before["log_probability"][:, None] + log_probabilities[first : first + width, :width]
        tokens = ids[first : first + width, :width].copy()
        offers[finished], tokens[finished] = -np.inf, record["end_id"]
        offers[finished, 0] = before["log_probability"][finished]
        scores = offers * norm
        scores[finished, 0] = before["score"][finished]
        if record["diverse_lambda"]:
            # LightSeq tells the beams of its one long sort apart by multiples of -2000, which costs resolution:
            # what it carries on is the rounded score.
            apart = np.arange(width, dtype=FLOAT)[:, None] * FLOAT.type(-2000)
            scores = (scores + apart) - apart
            offers = np.where(finished[:, None], offers, scores / norm)

        if record["method"] == FAN_OUT and step > 0:
            parents, ranks = np.arange(width), np.zeros(width, np.intp)
        else:
            penalised = scores - record["diverse_lambda"] * np.arange(1, width + 1, dtype=FLOAT)
            chosen = np.argsort(-penalised, axis=None, kind="stable")[:width]
            parents, ranks = chosen // width, chosen % width

        history[group, :step] = history[group[parents], :step]
        history[group, step] = tokens[parents, ranks]
        if record["detailed"]:
            details[group, :step] = details[group[parents], :step]
            details[group, step] = np.where(finished[parents], 0, log_probabilities[first + parents, ranks])
        ancestors[group, : length + 1] = ancestors[group[parents], : length + 1]
        slots["log_probability"][group] = offers[parents, ranks]
        slots["score"][group] = scores[parents, ranks]
        advance(slots, group, tokens[parents, ranks], record)


def sample_step(rows: Array, slots: Array, history: Array, details: Array, logits: Array, banned: int) -> None:
    """Draws the next token of every sampling sequence's rows.

    Scores are divided by the temperature; top_k keeps the k best (the lower id among equals), then top_p the
    smallest prefix of what is left that holds that share of its probability, at least one. The token with the
    largest score + Gumbel noise is drawn (philox.gumbel), which is a draw from the softmax of what is kept. Its
    log-probability is the undivided model's. rows: [n]; history, details as of beam_step; logits: [n, vocabulary];
    banned: an id never drawn, or -1.
    """
    for first, record in leaders(rows, slots, (SAMPLE,)):
        if record["done"]:
            continue
        width, step = int(record["width"]), int(record["generated"])
        group = rows[first : first + width]
        norm = length_norm(step + 1, record["length_penalty"])
        tokens = np.full(width, record["end_id"], np.int32)
        for row, slot in enumerate(group.tolist()):
            if not slots["finished"][slot]:
                scores = logits[first + row]
                tokens[row] = _draw(scores, slots[slot], step, banned)
                chance = scores[tokens[row]] - log_sum_exp(scores)
                if record["detailed"]:
                    details[slot, step] = chance
                slots["log_probability"][slot] += chance
                slots["score"][slot] = slots["log_probability"][slot] * norm
        history[group, step] = tokens
        advance(slots, group, tokens, record)


def length_norm(tokens: int, penalty: float) -> np.floating[Any]:
    """((5 + tokens) / 6) ** -penalty (GNMT), 1 where the penalty is negative; float32."""
    return FLOAT.type(((5 + tokens) / 6) ** -float(penalty)) if penalty >= 0 else FLOAT.type(1)


def leaders(rows: Array, slots: Array, methods: tuple[int, ...]) -> Iterator[tuple[int, Any]]:
    """Where each sequence of those methods starts among the rows, and a copy of the record of its beam 0."""
    records = slots[rows]
    leads = np.isin(records["method"], methods) & (records["beam"] == 0) & (records["width"] > 0)
    for first in np.flatnonzero(leads).tolist():
        yield first, records[first]


def advance(slots: Array, group: Array, tokens: Array, record: Any) -> None:
    """Feeds each slot its new token next, and closes the sequence when it is through.

    The rest of a burst still runs over a closed sequence: its length stays, so that it stays inside its lane.
    """
    finished = np.isin(tokens, end_ids(record)).astype(np.int32)
    done = bool(finished.all()) or record["generated"] + 1 >= record["limit"]
    slots["token"][group] = tokens
    slots["finished"][group] = finished
    slots["length"][group] += not done
    slots["generated"][group] += 1
    slots["done"][group] = done


def _draw(scores: Array, record: Any, step: int, banned: int) -> int:
    scores = scores / record["temperature"]
    kept = np.arange(scores.size)
    kept = kept[kept != banned]
    if 0 < record["top_k"] < kept.size:
        kept = _best(scores, int(record["top_k"]), banned)
    if record["top_p"] < 1:
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        shares = np.exp(scores[kept] - scores[kept[0]], dtype=np.float64)
        shares = np.cumsum(shares / shares.sum())
        kept = kept[: int(np.searchsorted(shares, record["top_p"])) + 1]
    noise = gumbel(int(record["seed"]), int(record["stream"]), step, kept)
    race = scores[kept] + noise
    winners = kept[race == race.max()]
    return int(winners.min())
