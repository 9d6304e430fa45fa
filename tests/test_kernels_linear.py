"""The kernels of linear.cu, norm.cu and embed.cu: their own source, run on the CPU, against float64."""

from __future__ import annotations

from pathlib import Path

import cuda_on_cpu
import kernel_ops
import numpy as np
import op_cases
import pytest
import reference
from kernel_ops import Array, Ops, integers, row_in_company
from op_cases import Case

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops import cpu, linear_launch
from lightseq_backend.ops.linear_launch import Device
from lightseq_backend.ops.linear_shapes import BY_DEVICE, H200_FP16, MOST_ROWS, Shape

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")

HOPPER = Device(90, 132, 227 * 1024)  # clusters
SMALL_HOPPER = Device(90, 12, 227 * 1024)  # ten of which are taken to be filled by clusters of four
TURING = Device(75, 40, 64 * 1024)  # none, and the least shared memory
DEVICES = {"hopper": HOPPER, "turing": TURING}
PRECISIONS = ("float16", "float32")

# Each shape is compiled anew: of the products, those that differ in kind.
SHAPES = ("7x768x64 transposed", "19x1000x257", "99x64x1000 transposed", "7x1x19", "241x257x99")
CASES = [
    case
    for op in ("embed_tokens", "embed_rows", "layer_norm", "linear", "norm_linear", "linear_residual")
    for case in op_cases.cases(op)
    if op[:5] in ("embed", "layer") or (case.name.startswith(SHAPES) and "relu" not in case.name)
]


def ops(precision: str, device: Device = HOPPER) -> Ops:
    return Ops(precision == "float16", device)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_agrees_with_the_specification(case: Case, precision: str) -> None:
    results, expected = op_cases.run(ops(precision), case), op_cases.run(cpu, case)  # type: ignore[arg-type]
    for name, result in results.items():
        error = np.abs(result.astype(np.float64) - expected[name]) / (1 + np.abs(expected[name]))
        assert error.max() <= case.tolerance[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["linear_residual 19x1000x257 beside", "norm_linear 19x1000x257 gelu"])
def test_one_block_takes_the_whole_sum_before_clusters(name: str, precision: str) -> None:
    case = next(case for case in CASES if str(case) == name)
    results, expected = op_cases.run(ops(precision, TURING), case), op_cases.run(cpu, case)  # type: ignore[arg-type]
    for output, result in results.items():
        np.testing.assert_allclose(
            result, expected[output], atol=case.tolerance[precision], rtol=case.tolerance[precision]
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("device", "inner"), [(HOPPER, 520), (SMALL_HOPPER, 2080)], ids=["hopper", "clusters of four"])
def test_row_does_not_depend_on_how_many_come_with_it(device: Device, inner: int, norm: bool, precision: str) -> None:
    """Nor on the shape of a block, which on the small device has 48 outputs for few rows."""
    kernels, (x, weight, bias, gain, norm_bias) = ops(precision, device), operands(precision, 40, inner, 96)
    own = Norm(gain, norm_bias)
    linear = Linear(kernels.matrix(weight, own if norm else None), bias)
    results = row_in_company(kernels, x, own, linear, "gelu", ((0, 40), (5, 6), (3, 15), (5, 35)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


# Bits of a weight, the numbers it is multiplied with, and how far a result may be off.
WEIGHTS = [(16, "float16", op_cases.TOLERANCE["float16"]), (32, "float32", op_cases.TOLERANCE["float32"]),
           (8, "float16", 0.05)]  # fmt: skip


@pytest.mark.parametrize(("bits", "precision", "tolerance"), WEIGHTS, ids=["fp16", "fp32", "int8"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("split", "warps"), [(1, 4), (2, 4), (4, 4), (1, 8)])
def test_shapes_that_were_measured_give_the_same_rows(
    split: int, warps: int, norm: bool, bits: int, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the shape for so many rows: outputs, weights in registers, and when the next kernel begins."""
    device, inner, wide, int8 = Device(90, 5, 227 * 1024), 520, 99, bits == 8
    shapes = {
        8: Shape(48, split, warps, 1, True),
        16: Shape(32, split, warps, 2, False),
        32: Shape(64, split, warps, 1, True),
    }
    monkeypatch.setitem(BY_DEVICE, (90, 5), {bits: {(inner, wide, norm): shapes}})
    kernels, (x, weight, bias, gain, norm_bias) = Ops(bits < 32, device, int8), operands(precision, 70, inner, wide)
    own = Norm(gain, norm_bias)
    linear = Linear(kernels.matrix(weight, own if norm else None), bias)
    companies = ((0, 70), (5, 6), (3, 15), (5, 35))
    for first, last in companies:
        plan = linear_launch.plan(device, last - first, inner, wide, bits < 32, norm, True, int8)
        assert (plan.cluster[0], plan.threads) == (split, 32 * warps)
    results = row_in_company(kernels, x, own, linear, "none", companies)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    row = x[5].astype(np.float64)
    if norm:
        row = reference.layer_norm(row[None], gain.astype(np.float64), norm_bias.astype(np.float64), 1e-6)[0]
    expected = row @ weight.astype(np.float64) + bias
    np.testing.assert_allclose(results[0], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rows", "inner", "wide"), [(5, 3300, 150), (5, 1600, 90)])
def test_weights_by_way_of_shared_memory_change_no_result(rows: int, inner: int, wide: int) -> None:
    """More of them than go there at once, and warps without a last chunk."""
    precision = "float16"
    x, weight, bias, gain, norm_bias = operands(precision, rows, inner, wide)
    results = []
    for device in (Device(90, 2, 227 * 1024), Device(89, 2, 227 * 1024)):
        plan = linear_launch.plan(device, rows, inner, wide, True, True, True)
        assert plan.holds_weights == (device.capability == 90)
        assert plan.cluster[0] == 1
        kernels = ops(precision, device)
        norm, out = Norm(gain, norm_bias), np.full((rows, wide), np.nan, precision)
        linear = Linear(kernels.matrix(weight, norm), bias)
        kernels.norm_linear(x, norm, linear, 1e-6, "none", np.full_like(x, np.nan), out)
        results.append(out)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("rows", "inner", "wide", "mean"), [(19, 1000, 257, 0), (7, 520, 96, 10), (40, 2080, 64, 0), (99, 1000, 257, 1)]
)
def test_product_folds_the_norm_in_front(
    rows: int, inner: int, wide: int, mean: float, precision: str, device: Device
) -> None:
    kernels, (x, weight, bias, gain, norm_bias) = ops(precision, device), operands("float32", rows, inner, wide)
    x, norm = (x + np.float32(mean)).astype(precision), Norm(gain, norm_bias)
    linear = Linear(kernels.matrix(weight, norm), bias.astype(precision))
    out = np.full((rows, wide), np.nan, precision)
    kernels.norm_linear(x, norm, linear, 1e-6, "relu", np.full_like(x, np.nan), out)
    normed = reference.layer_norm(*(array.astype(np.float64) for array in (x, gain, norm_bias)), 1e-6)
    expected = np.maximum(normed @ weight.astype(np.float64) + bias, 0)
    tolerance = op_cases.TOLERANCE[precision] * (1 + mean)  # squares that cancel
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_slices_of_columns_are_read_and_written_in_place(precision: str) -> None:
    device, (x, weight, bias, _, _) = ops(precision), operands(precision, 9, 520, 96)
    wide, out = np.full((9, 560), np.nan, device.FLOAT), np.full((9, 203), 7, device.FLOAT)
    wide[:, 16:536] = x
    residual = np.full((9, 100), 0.5, device.FLOAT)
    device.product(wide[:, 16:536], Linear(device.matrix(weight), bias), out[:, 3:99], residual[:, 4:], "relu")
    tolerance = op_cases.TOLERANCE[precision]
    product = x.astype(np.float64) @ weight.astype(np.float64) + bias
    np.testing.assert_allclose(out[:, 3:99], 0.5 + np.maximum(product, 0), rtol=tolerance, atol=tolerance)
    assert (out[:, :3] == 7).all()
    assert (out[:, 99:] == 7).all()


@pytest.mark.parametrize(("half", "rows"), [(True, 8), (True, 32), (False, 8), (False, 16), (False, 32)])
def test_all_blocks_of_a_long_sum_begin_together(half: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 holds 30 clusters of four and 15 of eight, with a block on each multiprocessor. (In fp32 32 of four were
    measured to be faster: there it is the rules that are held to it.)"""
    monkeypatch.delitem(BY_DEVICE[90, 132], 32)
    plans = [linear_launch.plan(HOPPER, count, 4096, 1024, half, False, True) for count in (rows, 8)]
    split = plans[0].cluster[0]
    assert plans[0].grid[0] // split <= {4: 30, 8: 15}[split]
    assert plans[1].cluster[0] == split  # the order of a sum


def test_half_weights_are_packed_as_fragments_of_the_tensor_core() -> None:
    inner, wide = 40, 20
    source = np.arange(1, inner * wide + 1, dtype=np.float16).reshape(inner, wide)
    tiles = ops("float16").matrix(source).memory.reshape(2, 2, 2, 8, 4, 2, 2, 2)
    # tile, chunk, step, g, t, pair of k, half of the outputs, one of the pair
    padded = np.zeros((64, 32), np.float16)
    padded[:inner, :wide] = source
    expected = padded.reshape(2, 4, 2, 2, 2, 2, 2, 8)  # chunk, t, step, pair, one of it, tile, half, g
    np.testing.assert_array_equal(tiles, expected.transpose(5, 0, 2, 7, 1, 3, 6, 4))


@pytest.mark.parametrize("activation", ["gelu", "gelu_erf", "silu"])
@pytest.mark.parametrize("wide", [64, 99])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bias_and_activation_follow_a_product_in_place(precision: str, wide: int, activation: str) -> None:
    device, x = ops(precision), operands(precision, 7, wide, wide)[0]
    bias, out = operands(precision, 7, wide, wide)[2], x.copy()
    arguments = (out, bias, *integers(7, wide, kernel_ops.ACTIVATIONS[activation]), np.float32(0.5))
    device.kernels("linear.cu").launch("bias_activation", (1, 3), 256, arguments)
    expected = reference.ACTIVATIONS[activation](0.5 * x.astype(np.float64) + bias)
    np.testing.assert_allclose(out, expected, rtol=2e-3 if device.half else 2e-6, atol=1e-3 if device.half else 1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_norm_of_a_slice_reads_nothing_beside_it(precision: str) -> None:
    device, (x, _, _, gain, bias) = ops(precision), operands(precision, 5, 5000, 8)
    wide, out = np.full((5, 5016), np.nan, device.FLOAT), np.full((5, 5000), np.nan, device.FLOAT)
    wide[:, 8:5008] = x  # wider than what stays in registers
    arguments = (wide[:, 8:5008], np.int32(5016), gain, bias, np.float32(1e-6), out, np.int32(5000))
    device.kernels("norm.cu").launch("layer_norm", 5, 128, arguments)
    tolerance = op_cases.TOLERANCE[precision]
    expected = reference.layer_norm(x.astype(np.float64), gain.astype(np.float64), bias.astype(np.float64), 1e-6)
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("width", "precision"), [(8, "float16"), (600, "float16"), (1024, "float16"), (512, "float32")]
)
def test_norm_of_a_row_does_not_depend_on_how_many_there_are(width: int, precision: str) -> None:
    device, (x, _, _, gain, bias) = ops(precision), operands(precision, 6, width, 8)
    by_blocks, by_warps = np.full((2, *x.shape), np.nan, device.FLOAT)
    arguments = (x, np.int32(width), gain, bias, np.float32(1e-6))
    device.kernels("norm.cu").launch("layer_norm", 6, 128, (*arguments, by_blocks, np.int32(width)))
    device.kernels("norm.cu").launch("layer_norm_rows", 2, 128, (*arguments, by_warps, *integers(width, 6)))
    assert not np.isnan(by_blocks).any()
    assert np.array_equal(by_blocks, by_warps)


# Launch arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_sum_is_split_alike_for_any_number_of_rows(norm: bool, half: bool) -> None:
    for inner, wide in ((1024, 3072), (4096, 1024), (1600, 4800), (768, 768), (64, 64)):
        plans = [linear_launch.plan(HOPPER, rows, inner, wide, half, norm, True) for rows in (1, 9, 32, 33, 64)]
        assert len({plan.cluster for plan in plans}) == 1


@pytest.mark.parametrize(
    ("bits", "product"), [(bits, product) for bits, table in BY_DEVICE[90, 132].items() for product in table], ids=str
)
def test_measured_shapes_can_be_launched_and_keep_the_order_of_a_sum(bits: int, product: tuple[int, int, bool]) -> None:
    """Also for numbers of rows that were not measured."""
    (inner, wide, norm), half, int8 = product, bits < 32, bits == 8
    shapes = BY_DEVICE[90, 132][bits][product]
    assert set(shapes) <= set(MOST_ROWS)
    for most, shape in shapes.items():
        plan = linear_launch.plan(HOPPER, most, inner, wide, half, norm, True, int8)
        definitions = dict(plan.definitions)
        assert definitions["OUTPUTS"] == shape.outputs
        assert definitions["DEPTH"] <= linear_launch.share(shape, inner, half)
        assert definitions["WEIGHT_BITS"] == bits
        assert plan.grid[0] == shape.split * -(-wide // shape.outputs)
        assert plan.shared + 1024 <= 228 * 1024 // 2  # beside the next kernel's
    plans = [linear_launch.plan(HOPPER, rows, inner, wide, half, norm, True, int8) for rows in (1, 9, 17, 33, 129)]
    assert len({(plan.cluster, plan.threads) for plan in plans}) == 1


def test_shapes_are_of_the_device_and_the_precision_they_were_measured_with() -> None:
    product = (1024, 1024, False)
    measured = H200_FP16[product][8]
    assert measured.warps == 4
    for device, half, int8, wanted in (
        (HOPPER, True, False, 128),
        (Device(90, 114, 227 * 1024), True, False, 256),
        (Device(100, 132, 227 * 1024), True, False, 256),
        (HOPPER, False, False, 256),
        (HOPPER, True, True, 256),
    ):
        assert linear_launch.plan(device, 8, *product[:2], half, product[2], True, int8).threads == wanted


def test_plan_fills_the_device_in_one_wave() -> None:
    for half in (True, False):
        for inner, wide in ((1088, 3264), (1088, 1088), (1088, 4352), (4352, 1088), (1600, 6400)):
            blocks = linear_launch.plan(HOPPER, 32, inner, wide, half, False, True).grid[0]
            assert 64 <= blocks <= 132


@pytest.mark.parametrize(
    ("capability", "rows", "inner", "wide", "half", "wanted"),
    [
        (90, 32, 1024, 4096, True, True),
        (90, 33, 1024, 4096, True, False),
        (90, 128, 1024, 1024, True, True),
        (90, 129, 1024, 1024, True, False),
        (90, 64, 1024, 4096, False, True),
        (90, 65, 1024, 4096, False, False),
        (75, 32, 1024, 4096, True, True),
        (75, 8, 1024, 4096, False, False),  # no TF32
        (70, 8, 1024, 4096, True, False),
    ],
)
def test_kernel_is_chosen_where_it_is_faster(
    capability: int, rows: int, inner: int, wide: int, half: bool, wanted: bool
) -> None:
    assert linear_launch.pays(Device(capability, 132, 96 * 1024), rows, inner, wide, half) == wanted


def test_two_blocks_of_a_product_fit_a_multiprocessor() -> None:
    """The next kernel's waits beside this one's, both with weights in shared memory; a block has a KiB more of it."""
    for rows in (8, 16, 32):
        for inner, wide in ((1600, 4800), (1600, 6400), (6400, 1600)):
            plan = linear_launch.plan(HOPPER, rows, inner, wide, True, inner < wide, True)
            assert plan.holds_weights == (rows == 8)
            assert plan.shared + 1024 <= 228 * 1024 // 2


def test_plan_takes_fewer_rows_where_shared_memory_is_short() -> None:
    for device, wanted in ((Device(75, 40, 48 * 1024), 16), (HOPPER, 32)):
        definitions = dict(linear_launch.plan(device, 32, 1024, 4096, True, True, True).definitions)
        assert definitions["ROWS"] == wanted


# Sanitizers ----------------------------------------------------------------------------------------------------------


def test_kernels_are_clean_under_sanitizers() -> None:
    chosen = "(specification and (19x1000x257 or embed_rows or 1000x99)) or (7x1x19 and beside)"
    outcome = cuda_on_cpu.sanitized(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen], timeout=115
    )
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-4000:]


def operands(precision: str, rows: int, inner: int, wide: int) -> tuple[Array, ...]:
    """x, weight, bias, gain, bias of the norm."""
    random = np.random.default_rng([rows, inner, wide])
    shapes = ((rows, inner), (inner, wide), (wide,), (inner,), (inner,))
    arrays = [random.standard_normal(shape).astype(precision) for shape in shapes]
    arrays[1] *= np.asarray(inner**-0.5, precision)
    return tuple(arrays)
