"""Products with int8 weights: the kernels' own source, run on the CPU, against float64 with the weights as rounded."""

from __future__ import annotations

from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import reference
from kernel_ops import Array, Ops, integers, row_in_company
from test_kernels_linear import DEVICES, HOPPER, TURING, operands

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops import linear_launch
from lightseq_backend.ops.int8 import quantise
from lightseq_backend.ops.linear_launch import Device
from lightseq_backend.quantised import Rounded

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")

TOLERANCE = 2e-3  # a result is rounded to half precision, which has eleven bits; sums are float32
SHAPES = [(1, 520, 96), (7, 1000, 257), (19, 64, 19), (33, 2080, 64)]


def as_rounded(weight: Array) -> Array:
    """float64: each column in steps of its largest absolute value / 127."""
    steps = np.abs(weight.astype(np.float64)).max(axis=0) / 127
    return np.round(weight / np.where(steps, steps, 1)) * steps


def placed(rows: int, inner: int, wide: int, norm: bool, device: Device) -> tuple[Ops, Array, Norm, Linear, Array]:
    """Kernels, x half, the norm, the linear with int8 weights (columns of zeros among them), and float32 W."""
    ops = Ops(True, device, int8=True)
    x, weight, bias, gain, norm_bias = operands("float32", rows, inner, wide)
    weight[:, wide // 2] = 0
    weight[:, 1] *= 1e-6
    own = Norm(gain, norm_bias)
    linear = Linear(ops.matrix(weight, own if norm else None), bias.astype(np.float16))
    return ops, x.astype(np.float16), own, linear, weight


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(("rows", "inner", "wide"), SHAPES)
def test_product_is_that_of_the_rounded_weights(rows: int, inner: int, wide: int, device: Device) -> None:
    ops, x, _, linear, weight = placed(rows, inner, wide, False, device)
    residual = operands("float16", rows, wide, 8)[0]
    out = np.full((rows, wide), np.nan, np.float16)
    ops.linear_residual(x, linear, residual, out)
    expected = residual + (x.astype(np.float64) @ as_rounded(weight) + linear.bias)
    np.testing.assert_allclose(out, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("mean", [0, 10])
@pytest.mark.parametrize(("rows", "inner", "wide"), SHAPES)
def test_norm_in_front_is_folded_before_weights_are_rounded(rows: int, inner: int, wide: int, mean: int) -> None:
    ops, x, norm, linear, weight = placed(rows, inner, wide, True, HOPPER)
    x += np.float16(mean)
    out = np.full((rows, wide), np.nan, np.float16)
    ops.norm_linear(x, norm, linear, 1e-6, "gelu", np.full_like(x, np.nan), out)
    plain = reference.layer_norm(x.astype(np.float64), np.ones(inner), np.zeros(inner), 1e-6)
    products = plain @ as_rounded(norm.gain[:, None] * weight) + norm.bias.astype(np.float64) @ weight
    expected = reference.ACTIVATIONS["gelu"](products + linear.bias)
    tolerance = TOLERANCE * (1 + mean / 10)  # squares that cancel
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


def test_rows_that_are_all_their_mean_give_the_offset_exactly() -> None:
    ops, x, norm, linear, weight = placed(8, 520, 96, True, HOPPER)
    x[:] = np.arange(1, 9, dtype=np.float16)[:, None]
    out = np.full((8, 96), np.nan, np.float16)
    ops.norm_linear(x, norm, linear, 1e-6, "none", np.full_like(x, np.nan), out)
    expected = norm.bias @ weight + linear.bias
    np.testing.assert_allclose(out, np.repeat(expected[None], 8, axis=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_weight_that_is_rounded_already_stays_as_it_is(device: Device) -> None:
    """With a LayerNorm in front as well, which is computed apart: no column reaches 127, so nothing else keeps it."""
    ops, random = Ops(True, device, int8=True), np.random.default_rng(3)
    numbers, scales = random.integers(-90, 91, (520, 96), np.int8), random.uniform(0.001, 0.01, 96).astype(np.float32)
    kept = Linear(ops.matrix(Rounded(numbers[:, ::-1], scales)), None)  # any order in memory
    x, _, _, gain, bias = operands("float16", 7, 520, 96)
    weight = numbers[:, ::-1] * scales.astype(np.float64)
    out, normed = np.full((7, 96), np.nan, np.float16), np.full_like(x, np.nan)
    ops.linear(x, kept, out)
    np.testing.assert_allclose(out, x.astype(np.float64) @ weight, rtol=TOLERANCE, atol=TOLERANCE)
    norm = Norm(gain.astype(np.float16), bias.astype(np.float16))
    ops.norm_linear(x, norm, kept, 1e-6, "relu", normed, out)
    np.testing.assert_allclose(out, np.maximum(normed.astype(np.float64) @ weight, 0), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("norm", [False, True])
def test_row_does_not_depend_on_how_many_come_with_it(norm: bool) -> None:
    ops, x, own, linear, _ = placed(40, 520, 96, norm, HOPPER)
    results = row_in_company(ops, x, own, linear, "none", ((0, 40), (5, 6), (3, 15)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_transposed_weights_are_packed_as_they_are() -> None:
    weight = operands("float32", 1, 72, 40)[1]
    ops = Ops(True, HOPPER, int8=True)
    one, other = ops.matrix(weight), ops.matrix(np.asfortranarray(weight))
    np.testing.assert_array_equal(one.memory, other.memory)
    assert one.memory.nbytes == (3 * 32) * (3 * 16)  # 72 and 40 filled up; a byte a weight


def test_weights_take_half_of_the_packed_form_of_fp16() -> None:
    weight = operands("float32", 1, 1024, 512)[1]
    half, int8 = (Ops(True, HOPPER, int8=int8).matrix(weight) for int8 in (False, True))
    assert int8.memory.nbytes + int8.columns.nbytes == half.memory.nbytes // 2 + 4 * 512


def test_bytes_are_fragments_of_both_steps_of_a_chunk() -> None:
    """A scale of one, so that the numbers are the weights; lane (g, t) has k 8 t to 8 t + 7 of outputs g and g + 8."""
    weight = np.zeros((40, 20), np.float32)
    weight[0] = 127  # a largest weight in every column
    weight[8:16, 3], weight[8:16, 11] = range(1, 9), range(-8, 0)
    weight[34, 16] = 50
    packed = Ops(True, HOPPER, int8=True).matrix(weight)
    tiles = packed.memory.reshape(2, 2, 8, 4, 16).astype(int) - 128  # tile, chunk, g, t
    assert tiles[0, 0, 3, 1].tolist() == [1, 2, -8, -7, 3, 4, -6, -5, 5, 6, -4, -3, 7, 8, -2, -1]
    assert tiles[0, 0, 5, 0].tolist() == [127, 0, 127, 0] + [0] * 12
    assert tiles[1, 1, 0, 0].tolist() == [0, 0, 0, 0, 50] + [0] * 11
    assert not tiles[1, :, 4:].any()  # beyond W
    np.testing.assert_array_equal(packed.columns, np.ones(20, np.float32))


def test_every_byte_becomes_its_number() -> None:
    """Rows of the identity read the weights: all 255 numbers, with a scale of one."""
    weight = np.zeros((256, 16), np.float32)
    weight[:255] = np.arange(-127, 128, dtype=np.float32)[:, None]
    ops, out = Ops(True, TURING, int8=True), np.full((256, 16), np.nan, np.float16)
    ops.linear(np.eye(256, dtype=np.float16), Linear(ops.matrix(weight), None), out)
    np.testing.assert_array_equal(out, weight)


@pytest.mark.parametrize(("first", "scale"), [(0, 1.0), (16, 1.0), (48, 0.25)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("inner", "wide"), [(520, 96), (1000, 257), (36, 64)])
def test_weights_made_halves_are_numbers_times_scales(
    inner: int, wide: int, norm: bool, first: int, scale: float
) -> None:
    ops, _, own, linear, weight = placed(1, inner, wide, norm, HOPPER)
    numbers, scales = quantise(own.gain[:, None] * weight if norm else weight)
    rounded = (numbers.astype(np.float64) * scales)[:, first:]
    stride, count = -(-inner // 8) * 8, wide - first
    out, bias = np.full((count + 1, stride), np.nan, np.float16), np.full(count + 1, np.nan, np.float16)
    packed, columns = linear.weight.memory, linear.weight.columns.reshape(-1, wide)[:, first:]
    begin = linear_launch.packed_elements(inner, first, half=True)
    pieces = linear_launch.packed_elements(inner, count, half=True) // 16
    given = linear.bias[first:] if first else None
    offsets, bias_out = (columns[1].copy(), bias) if norm else (None, None)
    ops.kernels("linear.cu", WEIGHT_BITS=8).launch(
        "unpack_weight", -(-pieces // 256), 256,
        (packed[begin:], columns[-1].copy(), given, offsets, np.float32(scale), out, *integers(stride), bias_out,
         *integers(inner, count)),
    )  # fmt: skip
    np.testing.assert_allclose(out[:-1, :inner], rounded.T, rtol=2**-11, atol=1e-7)
    assert not out[:-1, inner:].any()
    assert np.isnan(out[-1]).all(), "written behind the last output"
    if norm:
        expected = scale * (own.bias.astype(np.float64) @ weight)[first:] + (0 if given is None else given)
        np.testing.assert_allclose(bias[:-1], expected, rtol=1e-3, atol=1e-3)
        assert np.isnan(bias[-1])


def test_halves_are_for_many_rows() -> None:
    assert [linear_launch.unpacks(rows) for rows in (1, 192, 193, 4096)] == [False, False, True, True]


def test_kernels_are_clean_under_sanitizers() -> None:
    chosen = "(7-1000-257 and turing) or (made_halves and 1000-257-True-16)"
    outcome = cuda_on_cpu.sanitized(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen], timeout=115
    )
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-4000:]
