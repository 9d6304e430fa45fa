"""kernels/standard_search.cu, and what other sources do for that search, on the CPU against ops/cpu.py."""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import numpy as np
import op_cases
import pytest
from cuda_on_cpu import Kernels
from op_cases import TOLERANCE, Arguments, Array, Case
from test_kernels_search import SAMPLING_KERNELS, SEARCH_KERNELS, a_head, apart, check, tiled, top, vocabulary, wanted

from lightseq_backend.ops import cpu
from lightseq_backend.ops.slots import (
    EMPTY,
    RULES,
    SLOT,
    STANDARD,
    UNTIL_FULL,
    UNTIL_NO_BETTER,
    UNTIL_NONE_CAN_BE,
    ranks,
)

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")

STANDARD_KERNELS = Kernels("standard_search.cu", HALF=0)
OUTPUTS = ("slots", "ancestors", "history", "details", "pool", "pool_details")


def standard_step(
    rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, pool: Array, pool_details: Array,
    ids: Array, log_probabilities: Array,
) -> None:  # fmt: skip
    STANDARD_KERNELS.launch(
        "standard_step", len(rows), 128,
        (
            rows, slots, ancestors, history, details, pool, pool_details, ids, log_probabilities,
            np.int32(ids.shape[1]), np.int32(history.shape[1]),
        ),
    )  # fmt: skip


def apply_rules(
    rows: Array, slots: Array, rules: Array, listed: Array, contexts: Array, history: Array, logits: Array,
    normalisations: Array,
) -> None:  # fmt: skip
    SAMPLING_KERNELS.launch(
        "apply_rules", len(rows), 1024,
        (
            rows, slots, rules, listed, contexts, history, logits, np.int32(logits.strides[0] // 4), normalisations,
            *(np.int32(number) for number in (logits.shape[1], history.shape[1], listed.shape[1])),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("case", op_cases.cases("standard_step"), ids=str)
def test_standard_step_computes_what_the_cpu_does(case: Case) -> None:
    arguments = case.build()
    expected = wanted("standard_step", arguments)
    standard_step(**arguments)
    check(arguments, expected, case.outputs, case.tolerance["float32"])


def random_search(width: int, seed: int) -> Arguments:
    """Sixteen lanes in no order, scores with many equals, half of the best tokens ends, a pool that is partly full."""
    random = np.random.default_rng(seed)
    rows = random.permutation(19)[:width].astype(np.int32)
    slots = np.zeros(20, SLOT)
    own = rows.tolist()
    slots["method"], slots["width"][own], slots["beam"][own] = STANDARD, width, range(width)
    slots["generated"], slots["length"], slots["limit"], slots["end_id"] = 4, 5, int(random.choice([5, 99])), 2
    slots["length_penalty"], slots["stopping"] = float(random.choice([0, 1, -1])), int(random.integers(3))
    slots["counted"], slots["detailed"] = int(random.integers(2)), 1
    slots["log_probability"][own] = -random.integers(0, 4, width)
    full = random.random(width) < random.choice([0.5, 1.0])
    slots["pool_length"][own] = np.where(full, 3, 0)
    slots["pool_score"][own] = np.where(full, -random.integers(0, 4, width) / 2, EMPTY)
    integers = {name: random.integers(3, 31, (20, 12)).astype(np.int32) for name in ("ancestors", "history", "pool")}
    floats = {name: random.standard_normal((20, 12), dtype=np.float32) for name in ("details", "pool_details")}
    more = int(random.choice([0, 1, 8]))
    slots["more"], slots["more_ends"] = more, random.permutation(np.arange(3, 60))[:8]
    slots["looked_at"] = count = ranks(width, more)
    ids = np.stack([random.permutation(60)[:count] for _ in own]).astype(np.int32)
    ids[random.random(width) < 0.5, 0] = 2
    chances = -np.sort(random.integers(0, 5, (width, count)).astype(np.float32), axis=1)
    chances[random.random(width) < 0.1, width:] = -np.inf
    return {"rows": rows, "slots": slots, **integers, **floats, "ids": ids, "log_probabilities": chances}


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_standard_step_is_that_of_the_cpu_to_the_last_bit_among_equals(width: int) -> None:
    for seed in range(25):
        arguments = random_search(width, seed)
        expected = wanted("standard_step", arguments)
        standard_step(**arguments)
        for name in OUTPUTS:
            assert np.array_equal(arguments[name], expected[name]), (seed, name)


def test_standard_step_takes_fewer_candidates_where_there_are_no_more() -> None:
    """A vocabulary smaller than twice the beams: beams that end stay, behind the others."""
    arguments = random_search(2, 3)
    for name in ("ids", "log_probabilities"):
        arguments[name] = np.ascontiguousarray(arguments[name][:, :1])
    expected = wanted("standard_step", arguments)
    standard_step(**arguments)
    check(arguments, expected, OUTPUTS, 0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("case", op_cases.cases("apply_rules"), ids=str)
def test_apply_rules_computes_what_the_cpu_does(case: Case, aligned: bool) -> None:
    arguments = case.build()
    arguments["logits"] = apart(arguments["logits"]) if aligned else arguments["logits"]
    expected = wanted("apply_rules", arguments)
    apply_rules(**arguments)
    for each in (arguments, expected):
        each["normalisations"] = case.meaningful("normalisations", each["normalisations"])
    check(arguments, expected, case.outputs, case.tolerance["float32"])


def test_top_takes_the_normalisation_that_it_is_given() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 300), dtype=np.float32)
    logits[1, 5:] = -np.inf  # more ids are asked for than are possible
    normalisations = np.array([np.nan, 2.5, -1.0], np.float32)
    found, expected = [(np.zeros((3, 8), np.int32), np.zeros((3, 8), np.float32)) for _ in range(2)]
    top(logits, None, *found, 7, normalisations=normalisations)
    cpu.top(logits, 7, *expected, normalisations)
    assert np.array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=TOLERANCE["float32"])


def test_vocabulary_looks_for_twice_as_many_as_a_standard_search_has_beams() -> None:
    head, slots = a_head(3), np.zeros(4, SLOT)
    slots["width"], slots["looked_at"], slots["method"] = [2, 9, 0, 1], [4, 18, 0, 2], STANDARD
    _, few = vocabulary("float32", **head, best=6, group=8, rows=np.array([3, 0, 1], np.int32), slots=slots)
    _, all_six = vocabulary("float32", **head, best=6, group=8)
    for row, count in enumerate([2, 4, 6]):
        assert np.array_equal(few[row, :, :count], all_six[row, :, :count])
        assert not few[row, :, count:].any()


CHAINS = [case for case in op_cases.cases("vocabulary_standard_search") if case.build()["logits"].size < 12_000]


@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_vocabulary_standard_search_is_three_kernels(case: Case) -> None:
    arguments = case.build()
    expected = wanted("vocabulary_standard_search", arguments)
    state = {name: arguments[name] for name in ("rows", "slots")}
    head = {name: arguments[name] for name in ("x", "norm", "output", "epsilon", "scale", "banned")}
    best = arguments["ids"].shape[1]
    group = min(32, -(-len(arguments["x"]) // 8) * 8)
    statistics, choices = vocabulary("float32", **head, best=best, group=group, **state)
    found = arguments["ids"], arguments["log_probabilities"]
    numbers = (np.int32(statistics.shape[1]), np.int32(best))
    SEARCH_KERNELS.launch(
        "best_of_tiles", len(state["rows"]), 1024, (*state.values(), statistics, choices, *found, *numbers)
    )
    standard_step(**{name: arguments[name] for name in ("rows", *OUTPUTS, "ids", "log_probabilities")})
    check(arguments, expected, case.outputs, 1e-4)


@pytest.mark.parametrize("wide", [70, 5000, 150_000])
def test_best_of_tiles_is_top(wide: int) -> None:
    random, best = np.random.default_rng(1), 32
    logits = np.round(4 * random.standard_normal((3, wide), dtype=np.float32), 1)  # with equals
    slots = np.zeros(4, SLOT)
    slots["method"], slots["width"] = [STANDARD, STANDARD, 1, STANDARD], [16, 3, 3, 16]
    slots["looked_at"] = 2 * slots["width"]
    slots["done"][3] = 1
    rows = np.array([1, 0, 2, 3], np.int32)
    expected, found = [(np.full((4, best), -7, np.int32), np.full((4, best), 9, np.float32)) for _ in range(2)]
    cpu.top(logits[:2], 7, expected[0][:2], expected[1][:2])
    for each in expected:
        each[0, 6:] = found[0][0, 6:] if each.dtype == np.int32 else found[1][0, 6:]
    statistics, choices = tiled(np.concatenate([logits, logits[:1]]), best, 7)
    SEARCH_KERNELS.launch(
        "best_of_tiles", 4, 1024,
        (rows, slots, statistics, choices, *found, np.int32(statistics.shape[1]), np.int32(best)),
    )  # fmt: skip
    assert np.array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=5e-5)


def test_records_are_laid_out_as_the_kernels_read_them() -> None:
    """RULES and the numbers of `stopping`: what the host writes and what the source says."""
    text = (cuda_on_cpu.KERNELS / "sampling.cu").read_text().split("struct Rules {")[1].split("}")[0]
    names = [name.strip() for line in text.strip().splitlines() for name in line.strip(" ;").split(",")]
    assert [name.split()[-1] for name in names] == list(RULES.names or ())
    text = (cuda_on_cpu.KERNELS / "standard_search.cu").read_text().split("enum Stopping {")[1].split("}")[0]
    values: dict[str, Any] = dict(part.strip().split(" = ") for part in text.split(","))
    assert {name: int(value) for name, value in values.items()} == {
        "UNTIL_NO_BETTER": UNTIL_NO_BETTER, "UNTIL_FULL": UNTIL_FULL, "UNTIL_NONE_CAN_BE": UNTIL_NONE_CAN_BE,
    }  # fmt: skip


def test_sanitizers_see_no_fault() -> None:
    """Arrays end where they end: no kernel reads or writes behind them, and no shift or index is out of range."""
    cases = "computes_what_the_cpu_does and (many or limit or together or long) and not True"
    some = f"{cases} or equals and 16 or fewer or 70"
    outcome = cuda_on_cpu.sanitized(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", some])
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    assert "11 passed" in outcome.stdout
