"""Every operation on the GPU against ops/cpu.py, from the one table of cases."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import op_cases
import pytest

from lightseq_backend import ops
from lightseq_backend.ops import cpu, cpu_int8

OPERATIONS = (
    *("embed_tokens", "embed_rows", "layer_norm", "linear", "norm_linear", "linear_residual", "packed_attention"),
    *("decode_attention", "cross_attention", "store", "vocabulary_logits", "top", "vocabulary_scores"),
    *("vocabulary_search", "target_log_probabilities", "beam_step", "sample_step"),
    *("vocabulary_standard_search", "standard_step", "apply_rules"),
)
CASES = [case for operation in OPERATIONS for case in op_cases.cases(operation)]
WORK_SPACE = {"vocabulary_logits": {"normed"}}  # which a device may leave
SEARCHES = {"vocabulary_search", "vocabulary_standard_search"}
WEIGHTED = [
    case for case in CASES if case.op in {"linear", "norm_linear", "linear_residual"} or "vocabulary" in case.op
]
# What follows from the order of near ties.
ORDER = {"token", "finished", "done", "length"}
ORDERED = {"ancestors", "history", "details", "pool", "pool_details"}


@functools.cache
def cuda(precision: str) -> Any:
    return ops.load("cuda", 0, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_equals_the_specification(case: op_cases.Case, precision: str) -> None:
    compare(case, precision, cpu)


@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_operation_with_int8_weights_equals_the_specification(case: op_cases.Case) -> None:
    compare(case, "int8", cpu_int8)


def compare(case: op_cases.Case, precision: str, specification: Any) -> None:
    gpu = cuda(precision)
    gpu.start()
    expected, found = op_cases.run(specification, case), op_cases.run(gpu, case)
    tolerance = case.tolerance[gpu.FLOAT.name]
    orders = case.op not in SEARCHES or precision == "fp32"  # half precision orders near ties otherwise
    for name in set(expected) - WORK_SPACE.get(case.op, set()) - (set() if orders else ORDERED):
        wanted, array = case.meaningful(name, expected[name]), case.meaningful(name, found[name])
        parts = [part for part in wanted.dtype.names or (...,) if orders or part not in ORDER]
        for part in parts:
            one, other = wanted[part].astype(np.float64), array[part].astype(np.float64)
            with np.errstate(invalid="ignore"):
                error = np.where(one == other, 0, np.abs(one - other) / (1 + np.abs(one)))
            assert not error.size or error.max() <= tolerance, (name, part, error.max())
