"""ops/cpu.py against float64 definitions, and its promise that a row's result depends on that row alone."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import op_cases
import pytest
import reference
from op_cases import Array, Case, Table

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops import choice, standard
from lightseq_backend.ops import cpu as ops
from lightseq_backend.ops.slots import FAN_OUT, SAMPLE, SLOT, UNTIL_FULL, UNTIL_NONE_CAN_BE

CASES = op_cases.cases()


@pytest.fixture(autouse=True, scope="module")
def _started() -> None:
    ops.start()


# Definitions ---------------------------------------------------------------------------------------------------------
# Same parameters as the operations, written a row at a time; float64 in, float64 out.


def embed_tokens(tokens: Array, positions: Array, token_table: Array, position_table: Array, out: Array) -> None:
    for row, (token, position) in enumerate(zip(tokens, positions)):
        out[row] = 0 if token < 0 else token_table[token] + position_table[position]


def embed_rows(rows: Array, slots: Array, token_table: Array, position_table: Array, out: Array) -> None:
    embed_tokens(slots["token"][rows], slots["length"][rows], token_table, position_table, out)


def layer_norm(x: Array, norm: Norm, epsilon: float, out: Array) -> None:
    out[:] = reference.layer_norm(x, norm.gain, norm.bias, epsilon)


def product(x: Array, linear: Linear) -> Array:
    return x @ linear.weight + (0 if linear.bias is None else linear.bias)


def linear(x: Array, linear: Linear, out: Array) -> None:
    out[:] = product(x, linear)


def norm_linear(
    x: Array, norm: Norm, linear: Linear, epsilon: float, activation: str, normed: Array, out: Array
) -> None:
    normed[:] = reference.layer_norm(x, norm.gain, norm.bias, epsilon)
    out[:] = reference.ACTIVATIONS[activation](product(normed, linear))


def linear_residual(x: Array, linear: Linear, residual: Array, out: Array) -> None:
    out[:] = residual + product(x, linear)


def packed_attention(qkv: Array, starts: Array, heads: int, causal: bool, out: Array) -> None:
    for first, last in pairwise(starts):
        q, k, v = np.split(qkv[first:last], 3, axis=1)
        visible = np.ones((last - first, last - first), bool)
        out[first:last] = reference.attention(q, k, v, heads, np.tril(visible) if causal else visible)


def decode_attention(
    qkv: Array, rows: Array, slots: Array, ancestors: Array, keys: Array, values: Array, heads: int, out: Array
) -> None:
    q, k, v = np.split(qkv, 3, axis=1)
    for row, slot in enumerate(rows):
        step = slots[slot]["length"]
        keys[slot, step], values[slot, step], ancestors[slot, step] = k[row], v[row], slot
    for row, slot in enumerate(rows):
        steps = range(slots[slot]["length"] + 1)
        past_keys = np.array([keys[ancestors[slot, step], step] for step in steps])
        past_values = np.array([values[ancestors[slot, step], step] for step in steps])
        everything = np.ones((1, len(past_keys)), bool)
        out[row] = reference.attention(q[row : row + 1], past_keys, past_values, heads, everything)[0]


def cross_attention(
    query: Array, rows: Array, slots: Array, keys: Array, values: Array, heads: int, out: Array
) -> None:
    for row, slot in enumerate(rows):
        lane, length = slots[slot]["memory"], slots[slot]["memory_length"]
        visible = np.ones((1, length), bool)
        out[row] = reference.attention(query[row : row + 1], keys[lane, :length], values[lane, :length], heads, visible)


def store(key_values: Array, lanes: Array, steps: Array, keys: Array, values: Array) -> None:
    for row, (lane, step) in enumerate(zip(lanes, steps)):
        for layer, part in enumerate(np.split(key_values[row], len(keys))):
            keys[layer, lane, step], values[layer, lane, step] = np.split(part, 2)


def vocabulary_logits(
    x: Array, norm: Norm | None, output: Linear, epsilon: float, scale: float, normed: Array, logits: Array
) -> None:
    normed[:] = x if norm is None else reference.layer_norm(x, norm.gain, norm.bias, epsilon)
    logits[:] = scale * (normed @ output.weight) + (0 if output.bias is None else output.bias)


def top(logits: Array, banned: int, ids: Array, log_probabilities: Array) -> None:
    for row, scores in enumerate(logits):
        order = np.lexsort((np.arange(len(scores)), -scores))
        best = order[order != banned][: ids.shape[1]]
        ids[row], log_probabilities[row] = best, reference.log_softmax(scores)[best]


def vocabulary_scores(logits: Array, targets: Array, out: Array, **others: Any) -> None:
    all_logits = np.empty((len(targets), logits.shape[1]))  # of which there is room for some
    vocabulary_logits(logits=all_logits, **others)
    target_log_probabilities(all_logits, targets, out)


def vocabulary_search(banned: int, ids: Array, log_probabilities: Array, logits: Array, **others: Any) -> None:
    state = {name: others.pop(name) for name in ("rows", "slots", "ancestors", "history", "details")}
    vocabulary_logits(logits=logits, **others)
    top(logits, banned, ids, log_probabilities)
    beam_step(**state, ids=ids, log_probabilities=log_probabilities)


def target_log_probabilities(logits: Array, targets: Array, out: Array) -> None:
    for row, target in enumerate(targets):
        out[row] = reference.log_softmax(logits[row])[target]


def beam_step(
    rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, ids: Array, log_probabilities: Array
) -> None:
    for first, slot in enumerate(rows):
        if slots[slot]["beam"] != 0 or slots[slot]["done"] or not slots[slot]["width"]:
            continue
        record = slots[slot].copy()
        own = rows[first : first + record["width"]].tolist()
        offers = []  # while choosing, parent, token, sum, score
        for parent, slot in enumerate(own):
            beam = slots[slot]
            if beam["finished"]:
                offer = (beam["score"] - record["diverse_lambda"], parent, record["end_id"], beam["log_probability"])
                offers.append([(*offer, beam["score"], 0)])
                continue
            offers.append([])
            for rank in range(record["width"]):
                total = float(beam["log_probability"]) + log_probabilities[first + parent, rank]
                score = total * reference.length_norm(int(record["generated"]) + 1, float(record["length_penalty"]))
                choosing = score - float(record["diverse_lambda"]) * (rank + 1)
                chance = log_probabilities[first + parent, rank]
                offers[-1].append((choosing, parent, ids[first + parent, rank], total, score, chance))
        if record["method"] == FAN_OUT and record["generated"] > 0:
            chosen = [ranked[0] for ranked in offers]
        else:
            every = sorted((offer for ranked in offers for offer in ranked), key=lambda offer: -offer[0])
            chosen = every[: record["width"]]
        before = {slot: (history[slot].copy(), ancestors[slot].copy(), details[slot].copy()) for slot in own}
        for slot, (_, parent, token, total, score, chance) in zip(own, chosen):
            text, past, chances = before[own[parent]]
            if record["detailed"]:
                details[slot, : record["generated"]] = chances[: record["generated"]]
                details[slot, record["generated"]] = chance
            history[slot, : record["generated"]] = text[: record["generated"]]
            history[slot, record["generated"]] = token
            ancestors[slot, : record["length"] + 1] = past[: record["length"] + 1]
            slots[slot]["log_probability"], slots[slot]["score"] = total, score
        _advance(slots, own, [offer[2] for offer in chosen], record)


def sample_step(rows: Array, slots: Array, history: Array, details: Array, logits: Array, banned: int) -> None:
    for first, slot in enumerate(rows):
        record = slots[slot].copy()
        if record["beam"] != 0 or record["done"] or not record["width"]:
            continue
        own = rows[first : first + record["width"]].tolist()
        step, tokens = int(record["generated"]), []
        for row, slot in enumerate(own, first):
            beam, token = slots[slot], int(record["end_id"])
            if not beam["finished"]:
                settings = int(beam["top_k"]), float(beam["top_p"]), float(beam["temperature"])
                shares = reference.distribution(logits[row], *settings, banned)
                seed, stream = int(beam["seed"]), int(beam["stream"])
                # The Gumbel race: the largest log(share) + noise is a draw from the shares.
                race = {
                    choice: math.log(shares[choice]) + reference.gumbel(seed, stream, step, choice)
                    for choice in np.flatnonzero(shares).tolist()
                }
                token = max(race, key=race.__getitem__)
                chance = reference.log_softmax(logits[row])[token]
                if beam["detailed"]:
                    details[slot, step] = chance
                beam["log_probability"] += chance
                norm = reference.length_norm(step + 1, float(beam["length_penalty"]))
                beam["score"] = beam["log_probability"] * norm
            history[slot, step] = token
            tokens.append(token)
        _advance(slots, own, tokens, record)


def standard_step(
    rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, pool: Array, pool_details: Array,
    ids: Array, log_probabilities: Array,
) -> None:  # fmt: skip
    for first, slot in enumerate(rows):
        record = slots[slot].copy()
        if record["beam"] != 0 or record["done"] or not record["width"]:
            continue
        width, step, length = int(record["width"]), int(record["generated"]), int(record["length"])
        own = rows[first : first + width].tolist()
        offers = [
            (float(slots[slot]["log_probability"]) + log_probabilities[row, rank], parent, row, rank)
            for parent, (slot, row) in enumerate(zip(own, range(first, first + width)))
            for rank in range(ids.shape[1])
        ]
        offers = sorted(offers, key=lambda offer: -offer[0])[: (1 + len(_ends(record))) * width]
        texts = [(history[slot, :step].tolist(), details[slot, :step].tolist()) for slot in own]
        grown, going, n = [], [], step + 1 + int(record["counted"])
        for total, parent, row, rank in offers:
            token = int(ids[row, rank])
            text, chances = texts[parent]
            one = (total, token, [*text, token], [*chances, log_probabilities[row, rank]], own[parent])
            grown.append(one)
            if token not in _ends(record):
                going.append(one)
        at_limit = step + 1 >= record["limit"]
        for total, token, text, chances, _ in grown[:width]:
            worst = min(own, key=lambda slot: slots[slot]["pool_score"])
            score = total / n ** float(record["length_penalty"])
            if (token in _ends(record) or at_limit) and score > slots[worst]["pool_score"]:
                slots[worst]["pool_score"], slots[worst]["pool_length"] = score, step + 1
                pool[worst, : step + 1] = text
                if record["detailed"]:
                    pool_details[worst, : step + 1] = chances
        pasts = {slot: ancestors[slot, : length + 1].copy() for slot in own}
        for slot, (total, token, text, chances, parent) in zip(own, going):
            history[slot, : step + 1], ancestors[slot, : length + 1] = text, pasts[parent]
            if record["detailed"]:
                details[slot, : step + 1] = chances
            slots[slot]["log_probability"], slots[slot]["token"] = total, token
        if record["stopping"] == UNTIL_NONE_CAN_BE and record["length_penalty"] > 0:
            n = int(record["counted"] + record["limit"])
        held = [float(slots[slot]["pool_score"]) for slot in own]
        full = all(slots[slot]["pool_length"] for slot in own)
        better = going[0][0] / n ** float(record["length_penalty"]) > min(held)
        ended = at_limit or not better or (full and record["stopping"] == UNTIL_FULL)
        for slot in own:
            slots[slot]["generated"] += 1
            slots[slot]["done"] = ended
            slots[slot]["length"] += not ended


def vocabulary_standard_search(
    x: Array, norm: Norm, output: Linear, epsilon: float, scale: float, normed: Array, logits: Array, banned: int,
    ids: Array, log_probabilities: Array, **state: Array,
) -> None:  # fmt: skip
    vocabulary_logits(x, norm, output, epsilon, scale, normed, logits)
    top(logits, banned, ids, log_probabilities)
    standard_step(**state, ids=ids, log_probabilities=log_probabilities)


def apply_rules(
    rows: Array, slots: Array, rules: Array, listed: Array, contexts: Array, history: Array, logits: Array,
    normalisations: Array,
) -> None:  # fmt: skip
    for row, slot in enumerate(rows):
        record, scores = slots[slot], logits[row]
        if not record["ruled"] or record["done"]:
            continue
        lead = rows[row - record["beam"]]
        rule, numbers = rules[lead], listed[lead].tolist()
        past = [*contexts[lead, : rule["context"]].tolist(), *history[slot, : record["generated"]].tolist()]
        normalisations[row] = math.log(np.exp(scores - scores.max()).sum()) + scores.max()
        shift = 0 if record["width"] == 1 or record["method"] == SAMPLE else normalisations[row]
        for token in set(past) - {-1}:
            score = scores[token] - shift
            times = score < 0
            penalty = float(rule["repetition_penalty"])
            scores[token] = (score * penalty if times else score / penalty) + shift
        for token in range(len(scores)):
            text, size = [*past, token], int(rule["no_repeat"])
            earlier = [past[i : i + size] for i in range(max(0, len(past) - size + 1))] if size else []
            if size and text[-size:] in earlier:
                scores[token] = -math.inf
        suppressed, first = (int(rule[name]) for name in ("suppressed", "suppressed_first"))
        rest = numbers[suppressed + first :]
        for _ in range(rule["words"]):
            word, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
            if len(word) == 1 or past[1 - len(word) :] == word[:-1]:
                scores[word[-1]] = -math.inf
        if record["generated"] < rule["least"]:
            scores[list(_ends(record))] = -math.inf
        if rule["forced_end"] >= 0 and record["generated"] + 1 == record["limit"]:
            scores[:] = -math.inf
            scores[rule["forced_end"]] = normalisations[row]
        scores[numbers[:suppressed]] = -math.inf
        if record["generated"] == 0:
            scores[numbers[suppressed : suppressed + first]] = -math.inf


def _ends(record: Any) -> set[int]:
    return {int(record["end_id"]), *record["more_ends"][: record["more"]].tolist()}


def _advance(slots: Array, own: list[int], tokens: list[int], record: Any) -> None:
    ended = _ends(record).issuperset(tokens) or record["generated"] + 1 >= record["limit"]
    for slot, token in zip(own, tokens):
        slots[slot]["token"], slots[slot]["finished"] = token, token in _ends(record)
        slots[slot]["generated"] += 1
        slots[slot]["done"] = ended
        if not ended:
            slots[slot]["length"] += 1


DEFINITIONS: dict[str, Callable[..., None]] = {
    definition.__name__: definition
    for definition in (
        embed_tokens, embed_rows, layer_norm, linear, norm_linear, linear_residual, packed_attention, decode_attention,
        cross_attention, store, vocabulary_logits, top, vocabulary_scores, vocabulary_search, target_log_probabilities,
        beam_step, sample_step, standard_step, vocabulary_standard_search, apply_rules,
    )
}  # fmt: skip


def defined(case: Case) -> dict[str, Array]:
    """A case's outputs by definition."""
    arguments = case.build()
    wide: dict[int, Any] = {}
    for value in arguments.values():
        wide.setdefault(id(value), _wide(value))
    DEFINITIONS[case.op](**{name: wide[id(value)] for name, value in arguments.items()})
    return {name: wide[id(arguments[name])] for name in case.outputs}


def _wide(value: Any) -> Any:
    if isinstance(value, Table):
        return value.array.astype(np.float64)
    if isinstance(value, tuple):
        return type(value)(*(None if part is None else part.astype(np.float64) for part in value))
    if not isinstance(value, np.ndarray):
        return value
    return value.astype(np.float64) if value.dtype == np.float32 else value.copy()


def distance(case: Case, results: dict[str, Array], truth: dict[str, Array]) -> str:
    """What differs by more than the case's tolerance; "" when nothing does."""
    tolerance = case.tolerance[ops.FLOAT.name]
    faults = []
    for name in case.outputs:
        result, wanted = case.meaningful(name, results[name]), case.meaningful(name, truth[name])
        fields = wanted.dtype.names or (None,)
        for part in fields:
            ours, theirs = (result[part], wanted[part]) if part else (result, wanted)
            if np.issubdtype(theirs.dtype, np.floating):
                wide = theirs.astype(np.float64)
                with np.errstate(invalid="ignore"):
                    near = np.abs(ours.astype(np.float64) - wide) <= tolerance * (1 + np.abs(wide))
                far = ~(near | (ours == wide))  # infinities are equal or far
            else:
                far = ours != theirs
            if far.any():
                where = tuple(int(i) for i in np.argwhere(far)[0])
                difference = f"{ours[where]} for {theirs[where]}; {far.sum()} differ"
                faults.append(f"{name} {part or ''}{list(where)}: {difference}")
    return "\n".join(faults)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_equals_its_definition(case: Case) -> None:
    assert distance(case, op_cases.run(ops, case), defined(case)) == ""


def test_table_has_cases_for_every_operation() -> None:
    transfer = {
        "start", "matrix", "vocabulary_matrix", "vector", "table", "weight_bytes", "shared_bytes", "available_memory",
        "allocate", "view", "put", "get", "fetch", "fault", "pass_sizes", "capture",
    }  # fmt: skip
    public = {
        name
        for name, member in vars(ops).items()
        if inspect.isfunction(member)
        and member.__module__ in (ops.__name__, choice.__name__, standard.__name__)
        and not name.startswith("_")
    }
    assert {case.op for case in CASES} == public - transfer


def test_table_names_each_case_once() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_counts_at_least_the_bytes_it_writes_in_full(case: Case) -> None:
    written = sum(
        value.nbytes
        for name, value in case.build().items()
        if name in case.outputs and value.dtype == np.float32 and np.isnan(value).all()
    )
    padding_rows = 7 * 4 * 1000 if "rows" in case.build() else 0  # rows of nobody fill eights
    assert case.bytes() >= written - padding_rows


# Literals ------------------------------------------------------------------------------------------------------------


def test_layer_norm_uses_the_biased_variance() -> None:
    out = np.empty((1, 2), np.float32)
    norm = ops.Norm(np.array([1, 2], np.float32), np.array([0, 10], np.float32))
    ops.layer_norm(np.array([[1, 3]], np.float32), norm, 0.0, out)
    assert out.tolist() == [[-1, 12]]


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [
        ("none", [-1, 0, 2]),
        ("relu", [0, 0, 2]),
        ("gelu", [-0.158808, 0, 1.954598]),
        ("gelu_erf", [-0.158655, 0, 1.954500]),
        ("silu", [-0.268941, 0, 1.761594]),
    ],
)
def test_norm_linear_activation_is(activation: str, wanted: list[float]) -> None:
    out, normed = np.empty((1, 3), np.float32), np.empty((1, 2), np.float32)
    norm = ops.Norm(np.zeros(2, np.float32), np.zeros(2, np.float32))
    linear = ops.Linear(np.zeros((2, 3), np.float32), np.array([-1, 0, 2], np.float32))
    ops.norm_linear(np.array([[1, 3]], np.float32), norm, linear, 0.0, activation, normed, out)
    np.testing.assert_allclose(out, [wanted], atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "silu"])
def test_activation_holds_from_end_to_end(activation: str) -> None:
    x = np.concatenate([np.linspace(-20, 20, 4001), [-1e4, -200, 0, 200, 1e4]])
    out, normed = np.empty((1, x.size), np.float32), np.empty((1, 2), np.float32)
    norm = ops.Norm(np.zeros(2, np.float32), np.zeros(2, np.float32))
    linear = ops.Linear(np.zeros((2, x.size), np.float32), x.astype(np.float32))
    with np.errstate(all="raise", under="ignore"):
        ops.norm_linear(np.array([[1, 3]], np.float32), norm, linear, 0.0, activation, normed, out)
    with np.errstate(over="ignore"):
        wanted = reference.ACTIVATIONS[activation](linear.bias.astype(np.float64))
    np.testing.assert_allclose(out[0], wanted, rtol=3e-7, atol=5e-7)


def test_length_norm_is_gnmts() -> None:
    assert choice.length_norm(7, 1.0) == pytest.approx(0.5)
    assert choice.length_norm(1, 0.6) == 1
    assert choice.length_norm(19, 0.5) == pytest.approx(0.5)
    assert choice.length_norm(7, 0.0) == 1
    assert choice.length_norm(7, -2.0) == 1


def test_top_prefers_the_lower_id_among_equals_across_groups() -> None:
    logits = np.zeros((1, 1000), np.float32)
    logits[0, [900, 130, 64, 63]] = 1
    ids, log_probabilities = np.empty((1, 6), np.int32), np.empty((1, 6), np.float32)
    ops.top(logits, -1, ids, log_probabilities)
    assert ids.tolist() == [[63, 64, 130, 900, 0, 1]]


def test_beam_step_prefers_the_lower_parent_among_equals() -> None:
    slots = np.zeros(2, SLOT)
    slots["method"], slots["width"], slots["beam"], slots["end_id"], slots["limit"] = 1, 2, [0, 1], 9, 5
    history = np.array([[5, 0], [6, 0]], np.int32)
    slots["generated"], slots["length"] = 1, 1
    rows = np.array([0, 1], np.int32)
    same = np.array([[-1, -1], [-1, -1]], np.float32)
    ancestors, details = np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float32)
    ops.beam_step(rows, slots, ancestors, history, details, np.array([[3, 4], [3, 4]], np.int32), same)
    assert history.tolist() == [[5, 3], [5, 4]]


def test_put_copies_and_get_returns_a_copy() -> None:
    block = ops.allocate(16)
    array = ops.view(block, 4, (3,), np.dtype(np.int32))
    ops.put(array, np.array([1, 2, 3], np.int32))
    copy = ops.get(array)
    array[0] = 9
    assert copy.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        copy[0] = 9
    array[0] = 1
    assert block.view(np.int32).tolist() == [0, 1, 2, 3]


def test_fetch_returns_what_was_there_when_it_was_called() -> None:
    array = np.array([1, 2, 3], np.int32)
    fetched = ops.fetch(array)
    array[0] = 9
    assert fetched().tolist() == [1, 2, 3]
    assert not fetched().flags.writeable


def test_allocate_is_zeroed_and_aligned() -> None:
    for size in (1, 63, 4096):
        block = ops.allocate(size)
        assert (block.size, block.dtype, block.any()) == (size, np.dtype(np.uint8), False)
        assert block.ctypes.data % 64 == 0


# A row's result depends on that row alone ----------------------------------------------------------------------------

COUNTS = (*range(1, 41), 64, 99, 240, 241, 257, 500)
# in, out: sizes at which OpenBLAS changes its ways (its kernels for small products, blocks of its loops, threads).
WEIGHTS = (
    (64, 192), (24, 100), (100, 24), (320, 8), (400, 30), (64, 257), (257, 64), (1, 7), (7, 1), (37, 53), (512, 512),
    (1000, 257), (300, 200), (384, 160),
)  # fmt: skip


def dependent_rows(weights: tuple[tuple[int, int], ...], seed: int = 0) -> list[str]:
    """Weight shapes and row counts for which `linear` gives a row other bits than when it is alone."""
    ops.start()
    random = np.random.default_rng(seed)
    faults = []
    for (narrow, wide), transposed in [(shape, view) for shape in weights for view in (False, True)]:
        weight = random.standard_normal((wide, narrow) if transposed else (narrow, wide), dtype=np.float32)
        linear = ops.Linear(weight.T if transposed else weight, random.standard_normal(wide, dtype=np.float32))
        rows = random.standard_normal((500, narrow), dtype=np.float32)
        # Big weights: rows repeat after 40, so that 40 products alone tell what all must be.
        rows = rows if narrow * wide < 50_000 else np.tile(rows[:40], (13, 1))[:500]
        distinct = 500 if narrow * wide < 50_000 else 40
        alone = np.empty((distinct, wide), np.float32)
        for row in range(distinct):
            ops.linear(rows[row : row + 1], linear, alone[row : row + 1])
        wanted = np.tile(alone, (13, 1))[:500]
        for count in COUNTS:
            for first in sorted({0, 3, 500 - count}):
                if first + count > 500:
                    continue
                out = np.empty((count, wide), np.float32)
                ops.linear(rows[first : first + count], linear, out)
                if not np.array_equal(out, wanted[first : first + count]):
                    faults.append(f"{narrow}x{wide}{' transposed' if transposed else ''} {count} rows from {first}")
    return faults


def test_linear_rows_do_not_depend_on_each_other() -> None:
    assert dependent_rows(WEIGHTS) == []


@pytest.mark.parametrize("core", ["Nehalem", "Haswell", "SkylakeX"])
def test_linear_rows_do_not_depend_on_each_other_on_another_processor(core: str) -> None:
    """OpenBLAS has kernels for each processor; what this one can run of them is tried as well."""
    needs = {"Nehalem": "sse4_2", "Haswell": "avx2", "SkylakeX": "avx512vl"}[core]
    if needs not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this processor has no {needs}, which OpenBLAS's kernels for {core} need")
    program = "import test_ops; print(*test_ops.dependent_rows(test_ops.WEIGHTS[:5] + ((300, 200),)), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent, env={**os.environ, "OPENBLAS_CORETYPE": core},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


def _products(narrow: int, wide: int, transposed: bool) -> dict[str, Callable[[Array], Array]]:
    """x -> the result of every operation that multiplies by a weight."""
    random = np.random.default_rng(narrow)
    norm = ops.Norm(*random.standard_normal((2, narrow), dtype=np.float32))
    weight = random.standard_normal((wide, narrow), dtype=np.float32).T
    linear = ops.Linear(weight if transposed else weight.copy(), random.standard_normal(wide, dtype=np.float32))

    def norm_linear(x: Array, activation: str) -> Array:
        out = np.empty((len(x), wide), np.float32)
        ops.norm_linear(x, norm, linear, 1e-12, activation, np.empty_like(x), out)
        return out

    def linear_residual(x: Array) -> Array:
        out = np.resize(x[:, :1], (len(x), wide)).astype(np.float32) * 0 + x[:, :1]
        ops.linear_residual(x, linear, out, out)
        return out

    def vocabulary_logits(x: Array) -> Array:
        out = np.empty((len(x), wide), np.float32)
        ops.vocabulary_logits(x, norm, linear, 1e-12, 0.125, np.empty_like(x), out)
        return out

    def vocabulary_scores(x: Array) -> Array:
        logits, out = np.empty((len(x), wide), np.float32), np.empty(len(x), np.float32)
        ops.vocabulary_scores(
            x, norm, linear, 1e-12, 0.125, np.empty_like(x), logits, np.full(len(x), 3, np.int32), out
        )
        return out[:, None]

    return {
        "norm_linear relu": lambda x: norm_linear(x, "relu"),
        "norm_linear gelu": lambda x: norm_linear(x, "gelu"),
        "norm_linear gelu_erf": lambda x: norm_linear(x, "gelu_erf"),
        "norm_linear silu": lambda x: norm_linear(x, "silu"),
        "linear_residual": linear_residual,
        "vocabulary_logits": vocabulary_logits,
        "vocabulary_scores": vocabulary_scores,
    }


@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "transposed view"])
@pytest.mark.parametrize(("narrow", "wide"), [(100, 24), (64, 257), (400, 30), (500, 300)])
def test_products_of_a_row_do_not_depend_on_the_others(narrow: int, wide: int, transposed: bool) -> None:
    rows = np.random.default_rng(1).standard_normal((257, narrow), dtype=np.float32)
    for name, operation in _products(narrow, wide, transposed).items():
        alone = np.concatenate([operation(rows[row : row + 1]) for row in range(41)])
        for count in (2, 7, 8, 9, 17, 25, 33, 40, 41, 257):
            for first in (0, 1):
                together = operation(rows[first : first + count])[: 41 - first]
                wanted = alone[first : first + count]
                assert together.tobytes() == wanted.tobytes(), f"{name}, {count} rows from {first}"


@pytest.mark.parametrize(("hidden", "heads"), [(20, 4), (64, 4), (96, 1), (1000, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_of_a_sequence_does_not_depend_on_the_others(hidden: int, heads: int, causal: bool) -> None:
    random = np.random.default_rng(2)
    for length in (1, 2, 7, 19, 40):
        own = random.standard_normal((length, 3 * hidden), dtype=np.float32)
        alone = np.empty((length, hidden), np.float32)
        ops.packed_attention(own, np.array([0, length], np.int32), heads, causal, alone)
        for before, after in ((1, 0), (0, 3), (7, 40), (33, 1)):
            rest = random.standard_normal((before + after, 3 * hidden), dtype=np.float32)
            out = np.empty((before + length + after, hidden), np.float32)
            starts = np.array([0, before, before + length, before + length + after], np.int32)
            ops.packed_attention(np.concatenate([rest[:before], own, rest[before:]]), starts, heads, causal, out)
            assert np.array_equal(out[before : before + length], alone), (length, before, after)


@pytest.mark.parametrize(("hidden", "heads"), [(20, 4), (64, 4), (96, 1), (1000, 8)])
def test_decode_attention_of_a_row_does_not_depend_on_the_others_or_its_lane(hidden: int, heads: int) -> None:
    random = np.random.default_rng(3)
    lanes, steps = 12, 41
    qkv = random.standard_normal((lanes, 3 * hidden), dtype=np.float32)
    past = random.standard_normal((2, lanes, steps, hidden), dtype=np.float32)
    lengths = np.array([0, 5, 5, 5, 40, 7, 8, 1, 5, 40, 19, 19])

    def attend(members: list[int], into: list[int]) -> Array:
        """Those sequences' results when they sit in those lanes."""
        keys, values = np.zeros((2, lanes, steps, hidden), np.float32)
        slots, ancestors = np.zeros(lanes, SLOT), np.zeros((lanes, steps), np.int32)
        for member, lane in zip(members, into):
            keys[lane], values[lane], ancestors[lane] = past[0, member], past[1, member], lane
            slots["length"][lane] = lengths[member]
        out = np.empty((len(members), hidden), np.float32)
        ops.decode_attention(qkv[members], np.array(into, np.int32), slots, ancestors, keys, values, heads, out)
        return out

    alone = np.concatenate([attend([member], [0]) for member in range(lanes)])
    for _ in range(20):
        members = random.permutation(lanes)[: random.integers(1, lanes + 1)].tolist()
        into = random.permutation(lanes)[: len(members)].tolist()
        assert np.array_equal(attend(members, into), alone[members]), (members, into)


@pytest.mark.parametrize(("hidden", "heads"), [(20, 4), (64, 4), (96, 1), (1000, 8)])
def test_cross_attention_of_a_sequence_does_not_depend_on_the_others_or_its_lane(hidden: int, heads: int) -> None:
    random = np.random.default_rng(4)
    shapes = [(1, 1), (4, 7), (3, 40), (1, 40), (5, 19), (2, 8)]  # beams, source tokens
    lanes, steps = sum(width for width, _ in shapes) + 2, 40
    queries = [random.standard_normal((width, hidden), dtype=np.float32) for width, _ in shapes]
    memories = [random.standard_normal((2, length, hidden), dtype=np.float32) for _, length in shapes]

    def attend(members: list[int]) -> list[Array]:
        keys, values = np.zeros((2, lanes, steps, hidden), np.float32)
        slots, free, rows = np.zeros(lanes, SLOT), random.permutation(lanes).tolist(), []
        for member in members:
            width, length = shapes[member]
            own = [free.pop() for _ in range(width)]
            rows += own
            slots["method"][own], slots["width"][own], slots["beam"][own] = SAMPLE, width, range(width)
            slots["memory"][own], slots["memory_length"][own] = own[0], length
            keys[own[0], :length], values[own[0], :length] = memories[member]
        out = np.empty((len(rows), hidden), np.float32)
        query = np.concatenate([queries[member] for member in members])
        ops.cross_attention(query, np.array(rows, np.int32), slots, keys, values, heads, out)
        return np.split(out, np.cumsum([shapes[member][0] for member in members])[:-1])

    alone = [attend([member])[0] for member in range(len(shapes))]
    for _ in range(20):
        members = random.permutation(len(shapes))[: random.integers(1, len(shapes) + 1)].tolist()
        for member, result in zip(members, attend(members)):
            assert np.array_equal(result, alone[member]), (members, member)
