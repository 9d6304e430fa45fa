"""Every operation on the GPU against ops/cpu.py, from the one table of cases."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import op_cases
import pytest

from lightseq_backend import ops
from lightseq_backend.ops import cpu

OPERATIONS = (
    *("embed_tokens", "embed_rows", "layer_norm", "linear", "norm_linear", "linear_residual", "packed_attention"),
    *("decode_attention", "cross_attention", "store", "vocabulary_logits", "top", "vocabulary_top"),
    *("target_log_probabilities", "beam_step", "sample_step"),
)
CASES = [case for operation in OPERATIONS for case in op_cases.cases(operation)]
WORK_SPACE = {"vocabulary_logits": {"normed"}, "vocabulary_top": {"normed", "logits"}}  # which a device may leave


@functools.cache
def cuda(precision: str) -> Any:
    return ops.load("cuda", 0, precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_equals_the_specification(case: op_cases.Case, precision: str) -> None:
    gpu = cuda(precision)
    gpu.start()
    expected, found = op_cases.run(cpu, case), op_cases.run(gpu, case)
    tolerance = case.tolerance[gpu.FLOAT.name]
    if case.op == "vocabulary_top" and precision == "fp16":
        _assert_nearly_best(case, found["ids"], tolerance)
        del expected["ids"]  # half precision orders near ties otherwise
    for name in set(expected) - WORK_SPACE.get(case.op, set()):
        wanted, array = case.meaningful(name, expected[name]), case.meaningful(name, found[name])
        for part in wanted.dtype.names or (...,):
            one, other = wanted[part].astype(np.float64), array[part].astype(np.float64)
            with np.errstate(invalid="ignore"):
                error = np.where(one == other, 0, np.abs(one - other) / (1 + np.abs(one)))
            assert not error.size or error.max() <= tolerance, (name, part, error.max())


def _assert_nearly_best(case: op_cases.Case, ids: np.ndarray, tolerance: float) -> None:
    """Of each row different ids, none banned, that are worth what the best ids are worth, by the CPU's own logits."""
    arguments = case.build()
    cpu.vocabulary_top(**arguments)
    logits, banned = arguments["logits"].astype(np.float64), arguments["banned"]
    shifted = logits - logits.max(axis=1, keepdims=True)
    worth = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    assert (ids != banned).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    one, other = (np.take_along_axis(worth, each, axis=1) for each in (arguments["ids"], ids))
    assert (np.abs(one - other) / (1 + np.abs(one))).max() <= tolerance
