"""The kernel of warpgroup.cu: its own source, run on the CPU, against float64."""

from __future__ import annotations

import cuda_on_cpu
import numpy as np
import op_cases
import pytest
import reference
from kernel_ops import Array, Ops

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops import warpgroup_launch
from lightseq_backend.ops.linear_launch import Device

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")

HOPPER = Device(90, 132, 227 * 1024)
TOLERANCE = op_cases.TOLERANCE["float16"]
# rows, inner, wide, blocks that share a sum (17 stages in four: unequal parts)
SHAPES = [
    *((33, 192, 5504, 1), (40, 448, 2560, 2), (128, 1088, 1024, 4), (128, 192, 5504, 1), (150, 1088, 1024, 2)),
    *((50, 1024, 1024, 4), (97, 1024, 1024, 2)),  # of those that were measured
]


PAYS = warpgroup_launch.pays


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warpgroup_launch, "pays", lambda *asked: True)


def operands(rows: int, inner: int, wide: int) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(rows + inner + wide)
    x = random.standard_normal((rows, inner), np.float32).astype(np.float16)
    weight = random.standard_normal((inner, wide), np.float32) / np.float32(inner**0.5)
    return x, weight, random.standard_normal(wide, np.float32).astype(np.float16)


@pytest.mark.parametrize(("rows", "inner", "wide", "split"), SHAPES)
def test_product_with_residual(rows: int, inner: int, wide: int, split: int) -> None:
    ops, (x, weight, bias) = Ops(True, HOPPER), operands(rows, inner, wide)
    assert warpgroup_launch.plan(HOPPER, rows, inner, wide, False).cluster[0] == split
    around = np.random.default_rng(1).standard_normal((rows, wide + 8), np.float32).astype(np.float16)
    expected = around[:, 4:-4] + (x.astype(np.float64) @ weight.astype(np.float16).astype(np.float64) + bias)
    borders = around[:, :4].copy(), around[:, -4:].copy()
    ops.linear_residual(x, Linear(ops.matrix(weight), bias), around[:, 4:-4], around[:, 4:-4])
    np.testing.assert_allclose(around[:, 4:-4], expected, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_array_equal(around[:, :4], borders[0])
    np.testing.assert_array_equal(around[:, -4:], borders[1])


@pytest.mark.parametrize(
    ("rows", "inner", "wide"),
    [(50, 192, 5504), (99, 1024, 1088), (64, 448, 2560), (150, 1024, 1024), (33, 512, 1536), (128, 512, 2048)],
)
def test_product_folds_the_norm_in_front(rows: int, inner: int, wide: int) -> None:
    ops, (x, weight, bias) = Ops(True, HOPPER), operands(rows, inner, wide)
    random = np.random.default_rng(2)
    norm = Norm(*(random.standard_normal((2, inner), np.float32) + np.array([[1], [0]], np.float32)))
    beside = np.full((rows, inner + 8), np.nan, np.float16)
    beside[:, 8:] = x
    out = np.full((rows, wide), np.nan, np.float16)
    x = beside[:, 8:]
    ops.norm_linear(x, norm, Linear(ops.matrix(weight, norm), bias), 1e-6, "gelu", np.full_like(x, np.nan), out)
    normed = reference.layer_norm(*(array.astype(np.float64) for array in (x, norm.gain, norm.bias)), 1e-6)
    expected = reference.ACTIVATIONS["gelu"](normed @ weight.astype(np.float64) + bias)
    np.testing.assert_allclose(out, expected, rtol=2 * TOLERANCE, atol=2 * TOLERANCE)


def test_row_does_not_depend_on_how_many_come_with_it() -> None:
    ops, (x, weight, bias) = Ops(True, HOPPER), operands(100, 1024, 1088)
    linear, results = Linear(ops.matrix(weight), bias), []
    for first, last in ((0, 100), (10, 74)):
        out = np.full((last - first, 1088), np.nan, np.float16)
        ops.linear(x[first:last], linear, out)
        results.append(out[40 - first])
    np.testing.assert_array_equal(results[1], results[0])


@pytest.mark.parametrize(("inner", "wide", "split"), [(192, 5504, 1), (1088, 1024, 2)])
def test_more_rows_than_a_block_takes_are_divided(inner: int, wide: int, split: int) -> None:
    ops, (x, weight, bias) = Ops(True, HOPPER), operands(150, inner, wide)
    assert warpgroup_launch.plan(HOPPER, 150, inner, wide, False).cluster[0] == split
    out = np.full((150, wide), np.nan, np.float16)
    ops.linear(x, Linear(ops.matrix(weight), bias), out)
    expected = x.astype(np.float64) @ weight.astype(np.float16).astype(np.float64) + bias
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("capability", "half", "inner", "wide", "can"),
    [
        (90, True, 1024, 4096, True),
        (100, True, 1024, 4096, False),  # its instructions are Hopper's alone
        (80, True, 1024, 4096, False),
        (90, False, 1024, 4096, False),
        (90, True, 1000, 4096, False),
        (90, True, 1024, 4100, False),
        (90, True, 1024, 960, False),  # too little: `linear` is faster
        (90, True, 512, 1536, True),  # as little, but measured to be slower by it
    ],
)
def test_weights_that_have_such_a_product(capability: int, half: bool, inner: int, wide: int, can: bool) -> None:
    assert warpgroup_launch.can(Device(capability, 132, 227 * 1024), inner, wide, half) == can


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rows", [33, 64, 65, 128, 192])
@pytest.mark.parametrize(("inner", "wide"), [(1024, 3072), (4096, 1024), (1600, 6400), (6400, 1600), (16384, 4096)])
def test_plan_fits_the_device(inner: int, wide: int, rows: int, norm: bool) -> None:
    plan = warpgroup_launch.plan(HOPPER, rows, inner, wide, norm)
    assert plan.shared <= HOPPER.shared
    assert plan.cluster[0] * wide // 64 <= HOPPER.multiprocessors
    assert plan.grid[0] % plan.cluster[0] == 0


@pytest.mark.parametrize(
    ("rows", "wide", "paying"),
    [(32, 4096, False), (33, 4096, True), (128, 1024, True), (129, 4096, False), (192, 3072, False), (192, 1024, True),
     (256, 1024, True), (257, 1024, False)],
)  # fmt: skip
def test_more_rows_than_of_a_step_pay_where_cublas_has_too_few_blocks(rows: int, wide: int, paying: bool) -> None:
    assert PAYS(HOPPER, rows, 1600, wide, False) == paying


@pytest.mark.parametrize(
    ("rows", "inner", "wide", "norm", "paying"),
    [
        (32, 1024, 1024, False, False),
        (33, 1024, 1024, False, True),
        (128, 1024, 1024, False, True),
        (128, 1024, 1024, True, False),  # `linear` is faster
        (129, 1024, 1024, True, True),  # than cuBLAS
        (64, 512, 2048, True, False),
        (65, 512, 2048, True, True),
        (128, 2048, 512, False, False),
        (40, 512, 1536, True, True),
        (129, 512, 1536, True, False),
    ],
)
def test_small_ones_pay_where_that_was_measured(rows: int, inner: int, wide: int, norm: bool, paying: bool) -> None:
    assert PAYS(HOPPER, rows, inner, wide, norm) == paying
