"""kernels/vocabulary.cu, search.cu and sampling.cu on the CPU against ops/cpu.py."""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import numpy as np
import op_cases
import pytest
from cuda_on_cpu import Kernels, TensorMap
from op_cases import TOLERANCE, Arguments, Array, Case

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops import cpu, linear_launch, vocabulary_launch, warpgroup_launch
from lightseq_backend.ops.linear_launch import Device
from lightseq_backend.ops.slots import SAMPLE, SLOT
from lightseq_backend.quantised import Rounded

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")

PRECISIONS = ("float32", "float16")
SEARCH_KERNELS, SAMPLING_KERNELS = Kernels("search.cu", HALF=0), Kernels("sampling.cu", HALF=0)
VOCABULARY_KERNELS: dict[tuple[tuple[str, int], ...], Kernels] = {}
H100 = Device(90, 132, 227 * 1024)
TURING = Device(75, 40, 64 * 1024)  # the least shared memory


def copied(arguments: Arguments) -> Arguments:
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in arguments.items()}


def wanted(op: str, arguments: Arguments) -> Arguments:
    """What ops/cpu.py makes of them."""
    computed = copied(arguments)
    getattr(cpu, op)(**computed)
    return computed


def check(arguments: Arguments, expected: Arguments, names: tuple[str, ...], tolerance: float) -> None:
    for name in names:
        for field in arguments[name].dtype.names or (None,):
            result, truth = (each[name] if field is None else each[name][field] for each in (arguments, expected))
            if truth.dtype.kind != "f":
                assert np.array_equal(result, truth), (name, field)
                continue
            assert not np.isnan(result).any(), (name, field)
            infinite = np.isinf(truth)
            assert np.array_equal(result[infinite], truth[infinite]), (name, field)
            error = np.abs(result[~infinite] - truth[~infinite]) / (1 + np.abs(truth[~infinite]))
            assert error.max(initial=0) <= tolerance, (name, field)


# The vocabulary ------------------------------------------------------------------------------------------------------


def packed_int8(numbers: Array) -> Array:
    """Numbers [inner, wide] in the order of kernels/linear.cu pack_weight: the two steps of a lane side by side."""
    pieces = packed(numbers.astype(np.float16)).reshape(-1, 2, 32, 8)  # chunk, step, lane, weight
    return np.ascontiguousarray(pieces.swapaxes(1, 2) + 128).astype(np.uint8).reshape(-1)


def packed(weight: Array) -> Array:
    """weight [inner, wide] in the order of kernels/linear.cu pack_weight."""
    inner, wide = weight.shape
    odd = 2 if weight.dtype == np.float16 else 1  # numbers in four bytes
    filled = np.pad(weight, ((0, -inner % (16 * odd)), (0, -wide % 16)))
    # k = 4 odd (4 chunk + t) + odd (2 step + pair) + one; output = 16 tile + 8 half + g
    parts = filled.reshape(-1, 4, 2, 2, odd, filled.shape[1] // 16, 2, 8)  # chunk, t, step, pair, one, tile, half, g
    return np.ascontiguousarray(parts.transpose(5, 0, 2, 7, 1, 3, 6, 4)).reshape(-1)


def warpgroup_vocabulary(
    x: Array, norm: Norm, output: Linear, epsilon: float, scale: float, banned: int, best: int,
    logits: Array | None = None, blocks: int = 0, rows: Array | None = None, slots: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """As `vocabulary` in half precision, by the kernel that Hopper has for it; what it leaves alone is UNTOUCHED."""
    (count, inner), wide = x.shape, output.weight.shape[1]
    plan = warpgroup_launch.vocabulary_plan(H100, count, inner, wide)
    definitions = dict(plan.definitions)
    statistics = np.full((count, vocabulary_launch.tiles(wide), 2), np.nan, np.float32)
    choices = np.full((count, vocabulary_launch.tiles(wide), best), UNTOUCHED, np.uint64)
    folded, columns = linear_launch.fold(output.weight, norm.gain, norm.bias, np.dtype(np.float16))
    kernels = VOCABULARY_KERNELS.setdefault(
        tuple(definitions.items()), Kernels("warpgroup_vocabulary.cu", **definitions)
    )
    kernels.launch(
        "warpgroup_vocabulary", (plan.grid[0], blocks or plan.grid[1]), plan.threads,
        (
            TensorMap(x.astype(np.float16), (64, definitions["ROWS"])),
            warpgroup_launch.packed_vocabulary(folded), columns,
            None if output.bias is None else output.bias.astype(np.float16), rows, slots, logits, np.int32(wide),
            statistics if best else None, choices if best else None,
            *(np.int32(number) for number in (count, wide, best, banned)), np.float32(epsilon), np.float32(scale),
        ),
        shared=plan.shared,
    )  # fmt: skip
    return statistics, choices


def warpgroup_scores(
    x: Array, weight: Array, targets: Array, bias: Array | None = None, scale: float = 1.0, pairs: int = 0,
    part: int | None = None,
) -> Array:  # fmt: skip
    """The targets' log-probabilities, of x [rows, inner] and weight [vocabulary, inner]. pairs: of blocks; part: ids
    that are computed at a time, all without."""
    (count, inner), vocabulary = x.shape, len(weight)
    tiles, box = warpgroup_launch.scored_tiles(vocabulary), (64, warpgroup_launch.SCORED_BOX)
    statistics = np.full((count, tiles, 2), np.nan, np.float32)
    kept, out = np.full((2, count), np.nan, np.float32)
    for first in range(0, vocabulary, part or vocabulary):
        ids = slice(first, first + (part or vocabulary))
        maps = (TensorMap(matrix.astype(np.float16), box) for matrix in (x, weight[ids]))
        wide = len(weight[ids])
        plan = warpgroup_launch.scores_plan(H100, count, inner, wide)
        Kernels("warpgroup_scores.cu", **dict(plan.definitions)).launch(
            "warpgroup_scores", 2 * pairs or plan.grid, plan.threads,
            (
                *maps, None if bias is None else bias[ids].astype(np.float16), targets, statistics, kept,
                *(np.int32(number) for number in (count, wide)), np.float32(scale), np.int32(first), np.int32(tiles),
            ),
            shared=plan.shared, cluster=plan.cluster,
        )  # fmt: skip
    SEARCH_KERNELS.launch(
        "target_of_tiles", -(-count // 8), 256, (statistics, kept, out, np.int32(count), np.int32(tiles))
    )
    return out


@pytest.mark.parametrize(
    ("rows", "inner", "vocabulary", "scale"),
    [(1, 64, 1, 1.0), (130, 320, 257, 1.0), (300, 64, 700, 0.5), (1400, 64, 300, 1.0)],
)
def test_scores_by_warpgroups_are_log_probabilities(rows: int, inner: int, vocabulary: int, scale: float) -> None:
    random = np.random.default_rng(rows)
    x, weight = (random.standard_normal((count, inner), dtype=np.float32) for count in (rows, vocabulary))
    bias = None if scale == 1 else random.standard_normal(vocabulary, dtype=np.float32)
    targets = random.integers(0, vocabulary, rows).astype(np.int32)
    targets[0], targets[-1] = 0, vocabulary - 1
    halves = (
        array.astype(np.float16).astype(np.float64) for array in (x, weight, 0 * weight[:, 0] if bias is None else bias)
    )
    own_x, own_weight, own_bias = halves
    logits = scale * own_x @ own_weight.T + own_bias
    expected = logits[np.arange(rows), targets] - np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(
        warpgroup_scores(x, weight, targets, bias, scale), expected, rtol=1e-5, atol=1e-5 * inner**0.5
    )


def test_scores_of_a_row_do_not_depend_on_the_others_or_on_the_blocks() -> None:
    random = np.random.default_rng(1)
    x, weight = (random.standard_normal((count, 128), dtype=np.float32) for count in (300, 300))
    targets = random.integers(0, 300, 300).astype(np.int32)
    together = warpgroup_scores(x, weight, targets)
    assert np.array_equal(together, warpgroup_scores(x, weight, targets, pairs=1))
    assert np.array_equal(together[290:], warpgroup_scores(x[290:], weight, targets[290:]))


@pytest.mark.parametrize("part", [256, 512])
def test_scores_of_a_vocabulary_in_parts_are_those_of_the_whole(part: int) -> None:
    random = np.random.default_rng(2)
    x, weight = (random.standard_normal((count, 64), dtype=np.float32) for count in (140, 1100))
    bias = random.standard_normal(1100, dtype=np.float32)
    targets = random.integers(0, 1100, 140).astype(np.int32)
    targets[:6] = 0, 255, 256, 511, 512, 1099
    whole = warpgroup_scores(x, weight, targets, bias)
    assert np.array_equal(warpgroup_scores(x, weight, targets, bias, part=part), whole)


@pytest.mark.parametrize(
    ("inner", "vocabulary", "ids"), [(768, 50257, 21760), (1600, 50257, 10240), (64, 300, 512), (1 << 20, 300, 256)]
)
def test_part_of_a_vocabulary_is_whole_tiles_that_stay_in_the_cache(inner: int, vocabulary: int, ids: int) -> None:
    """32 MiB of halves, of the 50 that an H200's L2 has; one tile at least, and no more than there are."""
    assert warpgroup_launch.scored_part(inner, vocabulary) == ids


UNTOUCHED = 2**64 - 1


def vocabulary(
    precision: str, x: Array, norm: Norm, output: Linear, epsilon: float, scale: float, banned: int, best: int,
    logits: Array | None = None, group: int = 32, rows: Array | None = None, slots: Array | None = None,
    blocks: int = 0, device: Device = H100, int8: bool = False, rounded: Rounded | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Statistics [rows, tiles, 2] and choices [rows, tiles, best] of every tile. int8: with weights of that; rounded:
    with these, and of x without a LayerNorm."""
    count, inner = x.shape
    wide = output.weight.shape[1]
    tiles = vocabulary_launch.tiles(wide)
    plan = vocabulary_launch.plan(device, group, inner, wide, precision == "float16", int8, rounded is None)
    statistics = np.full((count, tiles, 2), np.nan, np.float32)
    choices = np.full((count, tiles, best), 0, np.uint64)
    definitions: dict[str, Any] = dict(plan.definitions)
    kernels = VOCABULARY_KERNELS.setdefault(plan.definitions, Kernels("vocabulary.cu", **definitions))
    if rounded is not None:
        weight, columns = packed_int8(rounded.numbers), vocabulary_launch.without_norm(rounded.scales)
    elif int8:
        numbers, columns = linear_launch.fold_int8(output.weight, norm.gain, norm.bias)
        weight = packed_int8(numbers)
    else:
        folded, columns = linear_launch.fold(output.weight, norm.gain, norm.bias, np.dtype(precision))
        weight = packed(folded)
    kernels.launch(
        "vocabulary", (-(-count // group), blocks or tiles), plan.threads,
        (
            x.astype(precision), weight, columns,
            None if output.bias is None else output.bias.astype(precision), rows, slots, logits, np.int32(wide),
            statistics if best else None, choices if best else None,
            *(np.int32(number) for number in (count, wide, best, banned)), np.float32(epsilon), np.float32(scale),
        ),
        shared=plan.shared,
    )  # fmt: skip
    return statistics, choices


def rounded(arguments: Arguments, precision: str) -> Arguments:
    """Weights and activations as they are in that precision."""

    def round_one(value: Any) -> Any:
        if isinstance(value, Norm | Linear):
            return type(value)(*(round_one(part) for part in value))
        if isinstance(value, np.ndarray) and value.dtype == np.float32:
            return value.astype(precision).astype(np.float32)
        return value

    return {name: value if name == "logits" else round_one(value) for name, value in arguments.items()}


VOCABULARY_CASES = [case for case in op_cases.cases("vocabulary_search") if case.build()["logits"].size < 20_000]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", VOCABULARY_CASES, ids=str)
def test_vocabulary_finds_the_best_of_every_tile(case: Case, precision: str) -> None:
    arguments = rounded(case.build(), precision)
    expected = wanted("vocabulary_logits", {name: arguments[name] for name in LOGITS})
    best, group = arguments["ids"].shape[1], min(32, -(-len(arguments["x"]) // 8) * 8)
    statistics, choices = vocabulary(
        precision, **{name: arguments[name] for name in (*HEAD, "banned", "logits")}, best=best, group=group
    )
    check(arguments, expected, ("logits",), TOLERANCE[precision])
    of_tiles = tiled(arguments["logits"], best, arguments["banned"])  # for exactly these logits
    np.testing.assert_allclose(statistics, of_tiles[0], rtol=1e-5)
    assert np.array_equal(choices, of_tiles[1])


HEAD = ("x", "norm", "output", "epsilon", "scale")
LOGITS = (*HEAD, "normed", "logits")


def a_head(rows: int, inner: int = 64, wide: int = 700) -> Arguments:
    random = np.random.default_rng(rows)

    def floats(*shape: int) -> Array:
        return random.standard_normal(shape, dtype=np.float32)

    output = Linear(floats(inner, wide), None)
    norm = Norm(floats(inner), floats(inner))
    return {"x": floats(rows, inner), "norm": norm, "output": output, "epsilon": 1e-6, "scale": 1.0, "banned": -1}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_vocabulary_of_a_row_does_not_depend_on_the_others_or_on_the_blocks(precision: str) -> None:
    head = a_head(9)
    together = vocabulary(precision, **head, best=3, group=24)
    alone = vocabulary(precision, **{**head, "x": head["x"][6:7]}, best=3, group=8, blocks=2)
    for many, one in zip(together, alone, strict=True):
        assert np.array_equal(many[6], one[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_vocabulary_takes_more_rows_than_a_block(precision: str) -> None:
    head = a_head(9)
    for many, few in zip(
        vocabulary(precision, **head, best=2, group=8), vocabulary(precision, **head, best=2, group=24)
    ):
        assert np.array_equal(many, few)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_vocabulary_writes_the_same_logits_without_looking_for_the_best(precision: str) -> None:
    head = a_head(9)
    alone, beside = np.full((2, 9, 700), np.nan, np.float32)
    vocabulary(precision, **head, best=0, group=24, logits=alone)
    vocabulary(precision, **head, best=2, group=24, logits=beside)
    assert not np.isnan(alone).any()
    assert np.array_equal(alone, beside)


@pytest.mark.parametrize(("rows", "inner", "wide"), [(1, 64, 19), (7, 1000, 257), (33, 520, 700)])
def test_vocabulary_with_int8_weights_is_that_of_the_rounded_ones(rows: int, inner: int, wide: int) -> None:
    head = a_head(rows, inner, wide)
    x, norm, weight = head["x"].astype(np.float16).astype(np.float64), head["norm"], head["output"].weight
    logits = np.full((rows, wide), np.nan, np.float32)
    statistics, choices = vocabulary(
        "float16", **head, best=2, group=min(32, -(-rows // 8) * 8), logits=logits, int8=True
    )
    folded = norm.gain[:, None] * weight  # in float32: near the middle of two steps it decides
    steps = np.abs(folded).max(axis=0) / np.float32(127)
    normed = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6)
    expected = normed @ (np.round(folded / steps).astype(np.float64) * steps) + norm.bias.astype(np.float64) @ weight
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-3)
    of_tiles = tiled(logits, 2, -1)
    np.testing.assert_allclose(statistics, of_tiles[0], rtol=1e-5)
    assert np.array_equal(choices, of_tiles[1])


@pytest.mark.parametrize("device", [H100, TURING], ids=["h100", "turing"])
@pytest.mark.parametrize(("rows", "inner", "wide"), [(1, 64, 19), (33, 520, 300)])
def test_vocabulary_takes_weights_that_are_rounded_already(rows: int, inner: int, wide: int, device: Device) -> None:
    head, random = a_head(rows, inner, wide), np.random.default_rng(rows)
    numbers = random.integers(-127, 128, (inner, wide), np.int8)
    kept = Rounded(numbers, random.uniform(0.001, 0.01, wide).astype(np.float32))
    logits, group = np.full((rows, wide), np.nan, np.float32), min(32, -(-rows // 8) * 8)
    statistics, choices = vocabulary(
        "float16", **head, best=2, group=group, logits=logits, device=device, int8=True, rounded=kept
    )
    x = head["x"].astype(np.float16).astype(np.float64)  # whatever its mean and deviation
    np.testing.assert_allclose(logits, x @ (numbers * kept.scales.astype(np.float64)), rtol=1e-4, atol=1e-4)
    of_tiles = tiled(logits, 2, -1)
    np.testing.assert_allclose(statistics, of_tiles[0], rtol=1e-5)
    assert np.array_equal(choices, of_tiles[1])


@pytest.mark.parametrize(("device", "most"), [(TURING, 3_808), (H100, 14_240)], ids=["turing", "h100"])
def test_vocabulary_of_int8_goes_as_far_as_its_rows_fit_into_shared_memory(device: Device, most: int) -> None:
    """Eight rows of x in half precision, in an odd number of pieces of 64 bytes each, 132 logits and a mean and
    deviation of each row. What is wider is not int8."""
    assert 8 * (2 * most + 4 * 132 + 8) <= device.shared < 8 * (2 * (most + 64) + 4 * 132 + 8)
    assert vocabulary_launch.fits(device, most, half=True)
    assert not vocabulary_launch.fits(device, most + 1, half=True)
    head = a_head(2, most, 19)
    kept = Rounded(np.ones((most, 19), np.int8), np.full(19, 0.5, np.float32))
    logits = np.full((2, 19), np.nan, np.float32)
    vocabulary("float16", **head, best=2, group=8, logits=logits, device=device, int8=True, rounded=kept)
    expected = head["x"].astype(np.float16).astype(np.float64).sum(axis=1) / 2
    np.testing.assert_allclose(logits, np.repeat(expected[:, None], 19, axis=1), rtol=1e-4, atol=1e-3)


def test_vocabulary_of_many_rows_takes_two_tiles_at_a_time() -> None:
    head = a_head(40)
    few = vocabulary("float16", **head, best=2, group=8)
    for group, blocks in ((64, 0), (24, 1)):
        for one, other in zip(vocabulary("float16", **head, best=2, group=group, blocks=blocks), few, strict=True):
            assert np.array_equal(one, other)


# rows, inner, ids, blocks: as many tiles to a block as that leaves it
@pytest.mark.parametrize(
    ("rows", "inner", "wide", "blocks"),
    [(3, 256, 257, 1), (13, 1024, 128, 0), (32, 192, 700, 2), (50, 64, 900, 3), (130, 320, 520, 1)],
)
def test_vocabulary_by_warpgroups_finds_the_best_of_every_tile(rows: int, inner: int, wide: int, blocks: int) -> None:
    head = a_head(rows, inner, wide)
    head = rounded({**head, "output": Linear(head["output"].weight / np.float32(inner**0.5), None)}, "float16")
    banned, best, logits = wide - 3, 5, np.full((rows, wide), np.nan, np.float32)
    given = {name: head[name] for name in HEAD}
    expected = wanted("vocabulary_logits", {**given, "normed": np.empty_like(head["x"]), "logits": logits})
    statistics, choices = warpgroup_vocabulary(**given, banned=banned, best=best, logits=logits, blocks=blocks)
    np.testing.assert_allclose(logits, expected["logits"], rtol=TOLERANCE["float16"], atol=TOLERANCE["float16"])
    of_tiles = tiled(logits, best, banned)  # for exactly these logits
    np.testing.assert_allclose(statistics, of_tiles[0], rtol=1e-5)
    assert np.array_equal(choices, of_tiles[1])


# Up to four are found in registers, more in shared memory.
@pytest.mark.parametrize("best", [1, 3, 4, 6])
@pytest.mark.parametrize(
    ("rows", "inner", "wide", "blocks"), [(3, 256, 257, 1), (33, 64, 700, 2), (70, 256, 131, 0), (128, 320, 520, 1)]
)
def test_vocabulary_by_warpgroups_needs_no_logits(rows: int, inner: int, wide: int, blocks: int, best: int) -> None:
    head, bias = a_head(rows, inner, wide), np.zeros(wide, np.float32)
    weight = head["output"].weight
    weight[:, 7:90] = weight[:, 5:6]  # the same many times over
    weight[:, wide // 2 :: 3] = weight[:, 3:4]
    bias[[2, 11]] = -np.inf, np.nan
    head = {**head, "output": Linear(weight, bias), "banned": wide - 5}
    head["x"][rows // 2] = np.nan
    logits = np.full((rows, wide), np.nan, np.float32)
    warpgroup_vocabulary(**head, best=6, logits=logits)
    assert np.isnan(logits).any(axis=1).all()
    statistics, choices = warpgroup_vocabulary(**head, best=best, blocks=blocks)
    (most, sums), expected = np.moveaxis(tiled(logits, best, wide - 5)[0], 2, 0), tiled(logits, best, wide - 5)[1]
    assert np.array_equal(choices, expected)
    np.testing.assert_allclose(statistics[..., 1], sums, rtol=1e-5)
    np.testing.assert_allclose(statistics[..., 0][~np.isnan(sums)], most[~np.isnan(sums)], rtol=1e-6)


def test_vocabulary_by_warpgroups_gives_logits_alone() -> None:
    head = a_head(9, 64, 700)
    logits = np.full((9, 700), np.nan, np.float32)
    warpgroup_vocabulary(**head, best=2, logits=logits)
    alone = np.full((9, 700), np.nan, np.float32)
    warpgroup_vocabulary(**head, best=0, logits=alone)
    assert np.array_equal(alone, logits)


@pytest.mark.parametrize("rows", [1, 8, 9, 33, 64, 65, 128, 200])
@pytest.mark.parametrize(("inner", "wide"), [(64, 200), (1024, 30016), (1600, 50257), (8192, 256206)])
def test_vocabulary_by_warpgroups_has_a_launch_that_fits(rows: int, inner: int, wide: int) -> None:
    plan = warpgroup_launch.vocabulary_plan(H100, rows, inner, wide)
    definitions = dict(plan.definitions)
    assert plan.shared <= H100.shared
    assert plan.threads <= 1024
    assert plan.grid[0] * definitions["ROWS"] >= rows
    assert 1 <= plan.grid[1] <= -(-vocabulary_launch.tiles(wide) // definitions["SPAN"])
    assert definitions["ROWS"] <= 64 or definitions["DEPTH"] <= inner // 64


def test_vocabulary_is_left_to_cublas_where_a_block_has_no_room() -> None:
    turing = Device(75, 40, 64 * 1024)
    assert all(vocabulary_launch.fits(turing, inner, True) for inner in (1024, 3776))
    assert not any(vocabulary_launch.fits(turing, inner, True) for inner in (3840, 4096))


def test_vocabulary_in_less_shared_memory_computes_the_same() -> None:
    head = a_head(9)
    small = vocabulary("float32", **head, best=2, group=16, device=Device(75, 40, 47 * 1024))
    large = vocabulary("float32", **head, best=2, group=16)
    assert np.array_equal(small[0], large[0])
    assert np.array_equal(small[1], large[1])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shared", [64, 99, 227])
def test_vocabulary_has_a_launch_for_every_gpu_and_number_of_rows(half: bool, shared: int) -> None:
    device = Device(80, 40, shared * 1024)
    for rows in (1, 8, 19, 32, 33, 64, 200):
        plan = vocabulary_launch.plan(device, rows, 1600, 50257, half)
        groups, blocks, _ = plan.grid
        assert plan.shared <= device.shared
        assert groups * dict(plan.definitions)["ROWS"] >= rows
        assert 1 <= blocks <= vocabulary_launch.tiles(50257)


def test_vocabulary_looks_for_as_many_as_the_sequence_has_beams() -> None:
    head = a_head(3)
    slots = np.zeros(4, SLOT)
    slots["width"] = slots["looked_at"] = [2, 9, 0, 1]
    rows = np.array([3, 0, 1], np.int32)
    _, few = vocabulary("float32", **head, best=4, group=8, rows=rows, slots=slots)
    _, all_four = vocabulary("float32", **head, best=4, group=8)
    for row, count in enumerate([1, 2, 4]):
        assert np.array_equal(few[row, :, :count], all_four[row, :, :count])
        assert not few[row, :, count:].any()


# With one of five the block sorts in shared memory, else in registers.
@pytest.mark.parametrize("widths", [[2, 4, 0, 1], [2, 5, 0, 1]])
def test_vocabulary_by_warpgroups_looks_for_as_many_as_the_sequence_has_beams(widths: list[int]) -> None:
    head = a_head(3)
    slots = np.zeros(4, SLOT)
    slots["width"] = slots["looked_at"] = widths
    rows = np.array([3, 2, 1], np.int32)
    some = warpgroup_vocabulary(**head, best=5, rows=rows, slots=slots)
    everything = warpgroup_vocabulary(**head, best=5)
    for row, count in enumerate([1, 0, widths[1]]):
        assert np.array_equal(some[1][row, :, :count], everything[1][row, :, :count])
        assert (some[1][row, :, count:] == UNTOUCHED).all()
    np.testing.assert_allclose(some[0], everything[0], rtol=1e-6)


# Search --------------------------------------------------------------------------------------------------------------


def beam_step(
    rows: Array, slots: Array, ancestors: Array, history: Array, details: Array, ids: Array, log_probabilities: Array
) -> None:
    SEARCH_KERNELS.launch(
        "beam_step", len(rows), 128,
        (
            rows, slots, ancestors, history, details, ids, log_probabilities,
            np.int32(ids.shape[1]), np.int32(history.shape[1]),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("case", op_cases.cases("beam_step"), ids=str)
def test_beam_step_computes_what_the_cpu_does(case: Case) -> None:
    arguments = case.build()
    expected = wanted("beam_step", arguments)
    beam_step(**arguments)
    check(arguments, expected, case.outputs, case.tolerance["float32"])


def test_beam_step_takes_thirty_two_beams_with_equals() -> None:
    arguments = next(case for case in op_cases.cases("beam_step") if case.name == "one beam").build()
    arguments["rows"], arguments["slots"] = np.arange(32, dtype=np.int32)[::-1].copy(), np.zeros(32, SLOT)
    slots = arguments["slots"]
    slots["method"], slots["width"], slots["limit"], slots["end_id"] = 1, 32, 9, 5
    slots["beam"], slots["generated"], slots["length"] = np.arange(32)[::-1], 3, 4
    slots["finished"][::5], slots["log_probability"], slots["score"] = 1, -(np.arange(32) // 8), -1.5
    random = np.random.default_rng(0)
    arguments["ancestors"], arguments["history"] = random.integers(0, 32, (2, 32, 12)).astype(np.int32)
    arguments["details"] = random.standard_normal((32, 12), dtype=np.float32)
    slots["detailed"] = 1
    arguments["ids"] = random.integers(0, 99, (32, 32)).astype(np.int32)
    arguments["log_probabilities"] = -np.sort(random.integers(0, 5, (32, 32)).astype(np.float32), axis=1)
    expected = wanted("beam_step", arguments)
    beam_step(**arguments)
    check(arguments, expected, ("slots", "ancestors", "history", "details"), TOLERANCE["float32"])


def test_diverse_rounding_is_that_of_the_cpu_to_the_last_bit() -> None:
    case = next(case for case in op_cases.cases("beam_step") if case.name == "diverse")
    arguments = case.build()
    arguments["slots"]["length_penalty"] = 0  # no power, which may round apart
    expected = wanted("beam_step", arguments)
    beam_step(**arguments)
    assert np.array_equal(arguments["slots"], expected["slots"])


def tiled(logits: Array, best: int, banned: int) -> tuple[Array, Array]:
    """Statistics and choices of each tile, by sorting."""
    rows, wide = logits.shape
    tiles = -(-wide // vocabulary_launch.TILE)
    statistics, choices = np.zeros((rows, tiles, 2), np.float32), np.zeros((rows, tiles, best), np.uint64)
    for row in range(rows):
        for tile in range(tiles):
            part = logits[row, tile * vocabulary_launch.TILE : (tile + 1) * vocabulary_launch.TILE]
            most = np.fmax.reduce(part, initial=-np.inf)  # what is not a number is no choice
            statistics[row, tile] = most, np.exp(part - most).sum()
            order = [i for i in np.argsort(-part, kind="stable") if i + tile * vocabulary_launch.TILE != banned]
            order = [i for i in order if not np.isnan(part[i])][:best]
            bits = part[order].view(np.uint32)
            ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
            low = ~(np.array(order, np.uint32) + np.uint32(tile * vocabulary_launch.TILE))
            choices[row, tile, : len(order)] = ordered << np.uint64(32) | low
    return statistics, choices


@pytest.mark.parametrize("name", ["some finished", "first step", "fan out", "many"])
@pytest.mark.parametrize("wide", [130, 5000, 50000])
def test_vocabulary_beam_step_is_top_and_beam_step(name: str, wide: int) -> None:
    arguments = next(case for case in op_cases.cases("beam_step") if case.name == name).build()
    count = len(arguments["rows"])
    random = np.random.default_rng(1)
    logits = np.round(4 * random.standard_normal((count, wide), dtype=np.float32), 1)  # with equals
    logits[:, 2] += 5  # end_id
    logits[:, 7] = 30
    best = arguments["ids"].shape[1]
    arguments["ids"], arguments["log_probabilities"] = np.zeros((2, count, best), np.int32).view(np.float32)
    arguments["ids"] = arguments["ids"].view(np.int32)
    cpu.top(logits, 7, arguments["ids"], arguments["log_probabilities"])
    expected = wanted("beam_step", arguments)
    statistics, choices = tiled(logits, best, 7)
    state = [arguments[name] for name in ("rows", "slots", "ancestors", "history", "details")]
    SEARCH_KERNELS.launch(
        "vocabulary_beam_step", count, 1024,
        (*state, statistics, choices, np.int32(statistics.shape[1]), np.int32(best), np.int32(state[2].shape[1])),
    )  # fmt: skip
    check(arguments, expected, ("slots", "ancestors", "history", "details"), 5e-5)


# Whole rows of logits ------------------------------------------------------------------------------------------------


def apart(logits: Array) -> Array:
    """The same, in rows that begin at multiples of 32 bytes; what lies between is not a number."""
    room = np.full((len(logits), -(-logits.shape[1] // 8) * 8), np.nan, np.float32)
    room[:, : logits.shape[1]] = logits
    return room[:, : logits.shape[1]]


@pytest.mark.parametrize("case", op_cases.cases("top"), ids=str)
def test_top_computes_what_the_cpu_does(case: Case) -> None:
    arguments = case.build()
    few = slice(0, 7)  # the rest is more of the same
    arguments = {name: value[few] if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    arguments = copied(arguments)
    expected = wanted("top", arguments)
    logits, ids = arguments["logits"], arguments["ids"]
    top(apart(logits), None, ids, arguments["log_probabilities"], arguments["banned"])
    check(arguments, expected, case.outputs, case.tolerance["float32"])


def test_top_finds_many_best_that_one_thread_holds() -> None:
    logits = np.zeros((1, 32 * 1024), np.float32)
    logits[0, 5::1024] = np.arange(32)
    ids, log_probabilities = np.zeros((1, 32), np.int32), np.zeros((1, 32), np.float32)
    top(logits, None, ids, log_probabilities, -1)
    assert ids[0].tolist() == [*range(5 + 31 * 1024, 5, -1024), 0]  # id 5 is as good as any other


def test_top_finishes_products() -> None:
    random = np.random.default_rng(3)
    products, bias = (np.round(random.standard_normal(shape, dtype=np.float32), 1) for shape in ((3, 5000), 5000))
    found, expected = [(np.zeros((3, 4), np.int32), np.zeros((3, 4), np.float32)) for _ in range(2)]
    top(products, bias, *found, 7, 0.5)
    cpu.top(np.float32(0.5) * products + bias, 7, *expected)
    assert np.array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=TOLERANCE["float32"])


def top(
    logits: Array, bias: Array | None, ids: Array, log_probabilities: Array, banned: int, scale: float = 1.0,
    normalisations: Array | None = None,
) -> None:  # fmt: skip
    numbers = (np.int32(number) for number in (logits.shape[1], ids.shape[1], banned))
    stride = np.int32(logits.strides[0] // 4)
    arguments = (logits, stride, bias, ids, log_probabilities, *numbers, np.float32(scale), normalisations)
    SAMPLING_KERNELS.launch("top", len(logits), 1024, arguments)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("case", op_cases.cases("target_log_probabilities"), ids=str)
def test_target_log_probabilities_computes_what_the_cpu_does(case: Case, aligned: bool) -> None:
    arguments = {name: value[:7].copy() for name, value in case.build().items()}
    expected = wanted("target_log_probabilities", arguments)
    target_log_probabilities(apart(arguments["logits"]) if aligned else arguments["logits"], None, 1.0, arguments)
    check(arguments, expected, case.outputs, case.tolerance["float32"])


def test_target_log_probabilities_finishes_products() -> None:
    case = next(case for case in op_cases.cases("target_log_probabilities") if case.name == "19x1000")
    arguments = case.build()
    bias = np.random.default_rng(0).standard_normal(1000, dtype=np.float32)
    expected = wanted("target_log_probabilities", {**arguments, "logits": np.float32(0.5) * arguments["logits"] + bias})
    target_log_probabilities(arguments["logits"], bias, 0.5, arguments)
    check(arguments, expected, case.outputs, case.tolerance["float32"])


def target_log_probabilities(logits: Array, bias: Array | None, scale: float, arguments: Arguments) -> None:
    SAMPLING_KERNELS.launch(
        "target_log_probabilities", len(logits), 1024,
        (
            logits, np.int32(logits.strides[0] // 4), bias, arguments["targets"], arguments["out"],
            np.int32(logits.shape[1]), np.float32(scale),
        ),
    )  # fmt: skip


def test_finish_logits_scales_and_adds_the_bias() -> None:
    logits = apart(np.random.default_rng(0).standard_normal((3, 1030), dtype=np.float32))
    bias = np.arange(1030, dtype=np.float32)
    expected = np.float32(0.5) * logits + bias
    numbers = (np.int32(3), np.int32(1030), np.float32(0.5))
    SAMPLING_KERNELS.launch("finish_logits", (2, 2), 256, (logits, np.int32(logits.strides[0] // 4), bias, *numbers))
    assert np.allclose(logits, expected, rtol=1e-6)
    assert np.isnan(logits.base[:, 1030:]).all()


def sample_step(rows: Array, slots: Array, history: Array, details: Array, logits: Array, banned: int) -> None:
    arrivals = np.zeros(len(rows), np.int32)
    SAMPLING_KERNELS.launch(
        "sample_step", len(rows), 1024,
        (
            rows, slots, history, details, logits, np.int32(logits.strides[0] // 4), arrivals,
            *(np.int32(number) for number in (logits.shape[1], banned, history.shape[1])),
        ),
    )  # fmt: skip
    assert not arrivals.any()


@pytest.mark.parametrize("case", op_cases.cases("sample_step"), ids=str)
def test_sample_step_computes_what_the_cpu_does(case: Case) -> None:
    arguments = case.build()
    expected = wanted("sample_step", arguments)
    sample_step(**{**arguments, "logits": apart(arguments["logits"])})
    check(arguments, expected, case.outputs, case.tolerance["float32"])


def samples(logits: Array, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0, banned: int = -1) -> Arguments:
    """Every row its own sequence, its seed its number."""
    count = len(logits)
    slots = np.zeros(count, SLOT)
    slots["method"], slots["width"], slots["limit"], slots["end_id"] = SAMPLE, 1, 9, -1
    slots["seed"], slots["top_k"], slots["top_p"], slots["temperature"] = range(count), top_k, top_p, temperature
    return {
        "rows": np.arange(count, dtype=np.int32), "slots": slots, "history": np.zeros((count, 3), np.int32),
        "details": np.zeros((count, 3), np.float32),
        "logits": logits, "banned": banned,
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 3}, {"top_k": 500}, {"top_p": 0.3}, {"top_k": 40, "top_p": 0.6}, {"top_p": 0.999}, {"top_p": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["all equal", "ties", "wide"])
def test_sample_step_keeps_exactly_what_the_cpu_keeps_among_equals(kind: str, settings: dict[str, Any]) -> None:
    logits = 3 * np.random.default_rng(3).standard_normal((8, 1500), dtype=np.float32)
    if kind == "all equal":
        logits[:] = -2.5
    elif kind == "ties":
        logits = np.round(logits)
    arguments = samples(logits, **settings, banned=11)
    expected = wanted("sample_step", arguments)
    sample_step(**arguments)
    assert arguments["slots"]["token"].tolist() == expected["slots"]["token"].tolist()


def test_sample_step_with_top_k_draws_every_one_of_them_and_no_other() -> None:
    logits = np.repeat(np.eye(1, 300, 17, dtype=np.float32), 64, axis=0)  # id 17 is best, all others are equal
    arguments = samples(logits, top_k=4)
    sample_step(**arguments)
    assert set(arguments["slots"]["token"].tolist()) == {17, 0, 1, 2}
