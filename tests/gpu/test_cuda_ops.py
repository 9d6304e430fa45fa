"""Every operation on the GPU against ops/cpu.py, from the one table of cases."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import op_cases
import pytest

from lightseq_backend import ops
from lightseq_backend.ops import cpu
from lightseq_backend.ops.int8 import quantise
from lightseq_backend.quantised import Rounded

OPERATIONS = (
    *("embed_tokens", "embed_rows", "layer_norm", "linear", "norm_linear", "linear_residual", "packed_attention"),
    *("decode_attention", "cross_attention", "store", "vocabulary_logits", "top", "vocabulary_scores"),
    *("vocabulary_search", "target_log_probabilities", "beam_step", "sample_step"),
    *("vocabulary_standard_search", "standard_step", "apply_rules"),
)
CASES = [case for operation in OPERATIONS for case in op_cases.cases(operation)]
WORK_SPACE = {"vocabulary_logits": {"normed"}}  # which a device may leave
SEARCHES = {"vocabulary_search", "vocabulary_standard_search"}
# What follows from the order of near ties.
ORDER = {"token", "finished", "done", "length"}
ORDERED = {"ancestors", "history", "details", "pool", "pool_details"}


PRODUCTS = {"linear", "norm_linear", "linear_residual", "vocabulary_logits", "vocabulary_scores", *SEARCHES}


class Kept:
    """Operations that get weights which are rounded already, and no norm to fold into them."""

    def __init__(self, operations: Any):
        self._operations = operations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operations, name)

    def matrix(self, array: Any, norm: Any = None) -> Any:
        return self._operations.matrix(Rounded(*quantise(np.ascontiguousarray(array))))

    def vocabulary_matrix(self, array: Any, norm: Any = None) -> Any:
        return self._operations.vocabulary_matrix(Rounded(*quantise(np.ascontiguousarray(array))))


@functools.cache
def cuda(precision: str) -> Any:
    return ops.load("cuda", 0, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_equals_the_specification(case: op_cases.Case, precision: str) -> None:
    compare(cpu, cuda(precision), case, precision)


@pytest.mark.parametrize("kept", [False, True], ids=["rounded here", "rounded before"])
@pytest.mark.parametrize("case", [case for case in CASES if case.op in PRODUCTS], ids=str)
def test_product_with_int8_weights_equals_the_specification(case: op_cases.Case, kept: bool) -> None:
    both = (ops.load("cpu", precision="int8"), cuda("int8"))
    compare(*(map(Kept, both) if kept else both), case, "int8")


def compare(specification: Any, gpu: Any, case: op_cases.Case, precision: str) -> None:
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
