"""kernels/attention.cu and tensor_attention.cu on the CPU against ops/cpu.py."""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import numpy as np
import op_cases
import pytest
from cuda_on_cpu import Kernels, TensorMap
from op_cases import TOLERANCE, Arguments, Array, Case

from lightseq_backend.ops import cpu, warpgroup_launch
from lightseq_backend.ops.linear_launch import Device

pytestmark = pytest.mark.skipif(not cuda_on_cpu.available(), reason="no C++ compiler")

PRECISIONS = ("float32", "float16")
KERNELS: dict[tuple[str, int, str], Kernels] = {}
HOPPER = Device(90, 132, 227 * 1024)
TENSOR_HEAD = 64  # the head size that tensor_attention.cu is for
STEP_OPERATIONS = ("decode_attention", "cross_attention")
OPERATIONS = (*STEP_OPERATIONS, "packed_attention", "store")
# Cases that take a CPU seconds: their shapes are those of others, more of them.
LONG = {"99 rows 768/12 past 40", "4x19+1x257+16x7 768/12", "99+257+3 768/12", "99+257+3 768/12 causal", "257x768"}
CASES = [case for op in OPERATIONS for case in op_cases.cases(op) if case.name not in LONG]


# precision, and whether by tensor_attention.cu
WAYS = [("float32", False), ("float16", False), ("float16", True)]


def on(ways: list[tuple[str, bool]], cases: list[Case]) -> list[Any]:
    """Parameters: each case in each of the ways it can be computed in."""
    return [
        pytest.param(case, precision, tensor, id=f"{case}-{precision}{'-tensor' * tensor}")
        for case in cases
        for precision, tensor in ways
        if not tensor or head_size(case) == TENSOR_HEAD
    ]


def head_size(case: Case) -> int:
    arguments = case.build()
    return int(arguments["out"].shape[1]) // arguments["heads"] if "heads" in arguments else 0


def kernels(head_size: int, precision: str, source: str = "attention") -> Kernels:
    """Compiled once for each head size and precision."""
    key = source, head_size, precision
    if key not in KERNELS:
        KERNELS[key] = Kernels(f"{source}.cu", HALF=int(precision == "float16"), HEAD_SIZE=head_size)
    return KERNELS[key]


def step_attention(name: str, precision: str, tensor: bool, grid: tuple[int, int], block: int, arguments: Any) -> None:
    source, suffix = ("tensor_attention", "_tensor") if tensor else ("attention", "")
    out, heads = arguments[6 if name == "decode_attention" else 5], grid[0]
    kernels(out.shape[1] // heads, precision, source).launch(f"{name}{suffix}", grid, block, arguments)


def placed(arguments: Arguments, precision: str) -> Arguments:
    """Floats in the working precision; outputs that a kernel must fill hold NaN still."""
    return {
        name: value.astype(precision) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value
        for name, value in arguments.items()
    }


def wanted(op: str, arguments: Arguments) -> Arguments:
    """What ops/cpu.py makes of them."""
    computed = copied(arguments)
    for name, value in computed.items():
        if isinstance(value, np.ndarray) and value.dtype == np.float16:
            computed[name] = value.astype(np.float32)
    getattr(cpu, op)(**computed)
    return computed


def copied(arguments: Arguments) -> Arguments:
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in arguments.items()}


def decode_attention(
    precision: str, qkv: Array, rows: Array, slots: Array, ancestors: Array, keys: Array, values: Array, heads: int,
    out: Array, block: int = 128, tensor: bool = False,
) -> None:  # fmt: skip
    step_attention(
        "decode_attention", precision, tensor, (heads, len(rows)), block,
        (qkv, rows, slots, ancestors, keys, values, out, np.int32(heads), np.int32(keys.shape[1])),
    )  # fmt: skip


def cross_attention(
    precision: str, query: Array, rows: Array, slots: Array, keys: Array, values: Array, heads: int, out: Array,
    block: int = 128, tensor: bool = False,
) -> None:  # fmt: skip
    step_attention(
        "cross_attention", precision, tensor, (heads, len(rows)), block,
        (query, rows, slots, keys, values, out, np.int32(heads), np.int32(keys.shape[1])),
    )  # fmt: skip


def packed_attention(
    precision: str, qkv: Array, starts: Array, heads: int, causal: bool, out: Array, tensor: bool = False,
    blocks: int = 0, paired: bool = False, hopper: bool = False,
) -> None:  # fmt: skip
    """hopper: by the kernel for it alone."""
    sequences = len(starts) - 1
    if hopper:
        warpgroup_attention(qkv, starts, heads, causal, out, blocks, paired)
        return
    kernels(out.shape[1] // heads, precision).launch(
        "packed_attention_tensor" if tensor else "packed_attention",
        (heads, blocks or len(out) // (64 << paired) + sequences), 128 if tensor else 256,
        (qkv, starts, out, *(np.int32(value) for value in (sequences, heads, causal, paired))),
    )  # fmt: skip


def warpgroup_attention(
    qkv: Array, starts: Array, heads: int, causal: bool, out: Array, blocks: int, paired: bool
) -> None:
    sequences, box = len(starts) - 1, warpgroup_launch.ATTENDED_BOX
    plan, _ = warpgroup_launch.attention_plan(HOPPER, len(out), sequences, heads, causal)
    Kernels("warpgroup_attention.cu", **dict(plan.definitions)).launch(
        "warpgroup_attention", (heads, blocks or len(out) // (box << paired) + sequences), plan.threads,
        (TensorMap(qkv, (64, box)), qkv, starts, out, *map(np.int32, (sequences, heads, causal, paired))), plan.shared,
    )  # fmt: skip


def store(precision: str, key_values: Array, lanes: Array, steps: Array, keys: Array, values: Array) -> None:
    layers, lane_count, most_steps, hidden = keys.shape
    stride = key_values.strides[0] // key_values.itemsize
    kernels(64, precision).launch(
        "store", (len(lanes), layers), 256,
        (
            key_values, np.int32(stride), lanes, steps, keys, values,
            *(np.int32(size) for size in (hidden, most_steps, lane_count)),
        ),
    )  # fmt: skip


def check(case: Case, arguments: Arguments, expected: Arguments, precision: str) -> None:
    for name in case.outputs:
        result = case.meaningful(name, np.asarray(arguments[name], np.float64))
        truth = case.meaningful(name, np.asarray(expected[name], np.float64))
        assert not np.isnan(result).any(), name
        error = np.abs(result - truth) / (1 + np.abs(truth))
        assert error.max() <= case.tolerance[precision], name


def without_races(arguments: Arguments) -> Arguments:
    """The past of a row never lies where another row writes in the same step: such steps go to a lane of no row."""
    rows, slots, ancestors = (arguments[name] for name in ("rows", "slots", "ancestors"))
    written = np.full(len(slots), -1)
    written[rows] = slots["length"][rows]
    unused = np.setdiff1d(np.arange(len(slots)), rows)[0]
    ancestors[written[ancestors] == np.arange(ancestors.shape[1])] = unused
    return arguments


@pytest.mark.parametrize(
    ("case", "precision", "tensor"),
    [
        *on(WAYS, [case for case in CASES if case.op in STEP_OPERATIONS]),
        *on(WAYS[:2], [case for case in CASES if case.op not in STEP_OPERATIONS]),
    ],
)
def test_attention_kernels_compute_what_the_cpu_does(case: Case, precision: str, tensor: bool) -> None:
    arguments = placed(case.build(), precision)
    if case.op == "decode_attention":
        arguments = without_races(arguments)
    expected = wanted(case.op, arguments)
    globals()[case.op](precision, **arguments, **({"tensor": True} if tensor else {}))
    check(case, arguments, expected, precision)


PACKED = [case for case in CASES if case.op == "packed_attention" and case.build()["out"].shape[1] % 64 == 0]


def of_head_size(case: Case, head_size: int) -> Arguments:
    """The arguments of a case of 64 columns, as heads of another size."""
    arguments = case.build()
    arguments["heads"] = max(1, arguments["out"].shape[1] // head_size)
    hidden = arguments["heads"] * head_size
    arguments["qkv"] = np.resize(arguments["qkv"], (len(arguments["qkv"]), 3 * hidden))
    arguments["out"] = np.full((len(arguments["out"]), hidden), np.nan, np.float32)
    return arguments


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("head_size", [16, 64, 104])
def test_packed_attention_on_tensor_cores_computes_what_the_cpu_does(case: Case, head_size: int) -> None:
    arguments = placed(of_head_size(case, head_size), "float16")
    expected = wanted("packed_attention", arguments)
    packed_attention("float16", **arguments, tensor=True)
    check(case, arguments, expected, "float16")


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_attention_by_warpgroups_computes_what_the_cpu_does(case: Case, paired: bool) -> None:
    arguments = placed(of_head_size(case, 64), "float16")
    expected = wanted("packed_attention", arguments)
    packed_attention("float16", **arguments, hopper=True, paired=paired and arguments["causal"])
    check(case, arguments, expected, "float16")


PACKED_WAYS: list[dict[str, Any]] = [{}, {"tensor": True}, {"hopper": True}]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("way", PACKED_WAYS, ids=str)
def test_packed_attention_of_a_sequence_does_not_depend_on_the_others(way: dict[str, Any], paired: bool) -> None:
    random = np.random.default_rng(2)
    own = random.standard_normal((150, 3 * 64)).astype(np.float16)
    alone, out = np.empty((150, 64), np.float16), np.empty((150 + 33 + 5, 64), np.float16)
    packed_attention("float16", own, np.array([0, 150], np.int32), 1, True, alone, **way)
    rest = random.standard_normal((33 + 5, 3 * 64)).astype(np.float16)
    together = np.concatenate([rest[:33], own, rest[33:]])
    starts = np.array([0, 33, 183, 188], np.int32)
    packed_attention("float16", together, starts, 1, True, out, paired=paired, **way)
    assert np.array_equal(out[33:183], alone)


@pytest.mark.parametrize("way", PACKED_WAYS, ids=str)
def test_packed_attention_heeds_no_number_of_other_sequences(way: dict[str, Any]) -> None:
    """Not even what is none: a text whose model overflowed must not spoil the next one in memory."""
    starts = np.array([0, 40, 110, 150], np.int32)
    qkv = np.random.default_rng(6).standard_normal((150, 3 * 64)).astype(np.float16)
    alone, out = np.empty((70, 64), np.float16), np.empty((150, 64), np.float16)
    packed_attention("float16", qkv[40:110].copy(), np.array([0, 70], np.int32), 1, False, alone, **way)
    qkv[:40] = qkv[110:] = np.nan
    packed_attention("float16", qkv, starts, 1, False, out, **way)
    assert np.array_equal(out[40:110], alone)


@pytest.mark.parametrize("way", PACKED_WAYS[1:], ids=str)
@pytest.mark.parametrize(("causal", "paired"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize(
    "sequences",
    [[0], [0, 0, 64, 1], [63, 65, 0, 129, 64], [128], [200, 0, 300], [1] * 70, [3] * 140 + [0] * 400, [70] + [0] * 300],
)
def test_packed_attention_has_a_block_for_every_query_of_every_sequence(
    sequences: list[int], blocks: int, causal: bool, paired: bool, way: dict[str, Any]
) -> None:
    starts, size = np.cumsum([0, *sequences]).astype(np.int32), 64 if "hopper" in way else 16
    qkv = np.random.default_rng(0).standard_normal((starts[-1], 3 * size)).astype(np.float16)
    arguments: Arguments = {
        "qkv": qkv,
        "starts": starts,
        "heads": 1,
        "causal": causal,
        "out": np.full_like(qkv[:, :size], np.nan),
    }
    if len(arguments["out"]) == 0:
        arguments["qkv"], arguments["out"] = np.zeros((1, 3 * size), np.float16), np.zeros((1, size), np.float16)
    expected = wanted("packed_attention", arguments)
    packed_attention("float16", **arguments, blocks=blocks, paired=paired, **way)
    assert np.abs(arguments["out"].astype(np.float32) - expected["out"]).max() < TOLERANCE["float16"]


@pytest.mark.parametrize(
    ("rows", "sequences", "heads", "causal", "paired", "blocks", "together"),
    [(4096, 4096, 12, True, True, 33, 3), (4096, 4096, 25, True, True, 32, 4), (2816, 4, 12, True, True, 22, 2),
     (4096, 8, 12, False, False, 64, 5), (512, 1, 12, True, False, 9, 5), (512, 512, 12, True, False, 44, 5),
     (192, 8, 16, False, False, 11, 5), (192, 192, 16, False, False, 33, 5), (100, 100, 12, True, False, 44, 5)],
)  # fmt: skip
def test_blocks_of_attention_have_enough_to_do_and_room(
    rows: int, sequences: int, heads: int, causal: bool, paired: bool, blocks: int, together: int
) -> None:
    """together: blocks that have room on a multiprocessor, of 132 KiB of which each block takes one more."""
    plan, in_pairs = warpgroup_launch.attention_plan(HOPPER, rows, sequences, heads, causal)
    assert (in_pairs, plan.grid) == (paired, (heads, blocks, 1))
    assert 132 * 1024 // (plan.shared + 1024) == together


def a_row_alone(case: Case, arguments: Arguments, row: int) -> Arguments:
    """That row (or sequence) of a decode_attention or cross_attention, without the others."""
    query = "qkv" if "qkv" in arguments else "query"
    width = 1 if case.op == "decode_attention" else int(arguments["slots"][arguments["rows"][row]]["width"])
    members = slice(row, row + width)
    return {**arguments, **{name: arguments[name][members].copy() for name in (query, "rows", "out")}}


APART = [  # row 3 is the first of a sequence, but of the last
    case
    for case in CASES
    if str(case)
    in {
        *("decode_attention 7 rows 64/64 past 19", "cross_attention 3x99+5x1+1x40 1000/8"),
        *("decode_attention 33 rows 128/2 past 70", "cross_attention 9x33+17x64+1x200 128/2"),
    }
]


@pytest.mark.parametrize(("case", "precision", "tensor"), on(WAYS, APART))
def test_attention_of_a_sequence_does_not_depend_on_the_others(case: Case, precision: str, tensor: bool) -> None:
    together = placed(case.build(), precision)
    if case.op == "decode_attention":
        together = without_races(together)
    before = copied(together)
    globals()[case.op](precision, **together, tensor=tensor)
    row = 9 if "9x33" in case.name else 3
    alone = a_row_alone(case, before, row)
    globals()[case.op](precision, **alone, tensor=tensor)
    assert np.array_equal(together["out"][row : row + len(alone["out"])], alone["out"])


LONG_PAST = [case for case in CASES if case.name == "8 rows 64/1 past 257"]


@pytest.mark.parametrize(("case", "precision", "tensor"), on(WAYS, LONG_PAST))
def test_decode_attention_takes_any_number_of_warps(case: Case, precision: str, tensor: bool) -> None:
    results = []
    for block in (32, 128, 512):
        arguments = without_races(placed(case.build(), precision))
        expected = wanted(case.op, arguments)
        decode_attention(precision, **arguments, block=block, tensor=tensor)
        check(case, arguments, expected, precision)
        results.append(arguments["out"])
    assert all(np.array_equal(result, results[0]) for result in results)


CROSS = [case for case in CASES if case.op == "cross_attention"]


@pytest.mark.parametrize(("case", "precision", "tensor"), on(WAYS, CROSS))
def test_cross_attention_takes_any_number_of_warps(case: Case, precision: str, tensor: bool) -> None:
    results = []
    for block in (32, 64, 128):
        arguments = placed(case.build(), precision)
        cross_attention(precision, **arguments, block=block, tensor=tensor)
        results.append(arguments["out"])
    assert all(np.array_equal(result, results[0]) for result in results)


NOBODY = [case for case in CASES if case.name in ("7 rows 64/64 past 19", "33 rows 128/2 past 70")]


@pytest.mark.parametrize(("case", "precision", "tensor"), on(WAYS, NOBODY))
def test_attention_of_nobody_is_zero_and_touches_no_lane(case: Case, precision: str, tensor: bool) -> None:
    arguments = without_races(placed(case.build(), precision))
    keys, own = arguments["keys"].copy(), arguments["slots"]["width"][arguments["rows"]] > 0
    decode_attention(precision, **arguments, tensor=tensor)
    assert not arguments["out"][~own].any()
    assert not own.all()
    assert np.array_equal(arguments["keys"][-1], keys[-1])


def in_use(case: Case, arguments: Arguments) -> Array:
    """[lanes, steps]: whether a row attends to that step of a lane."""
    used = np.zeros(arguments["keys"].shape[:2], bool)
    for row in arguments["rows"]:
        slot = arguments["slots"][row]
        if case.op == "cross_attention":
            used[slot["memory"], : slot["memory_length"]] |= slot["width"] > 0
        else:
            steps = np.arange(slot["length"])
            used[arguments["ancestors"][row, steps], steps] = True
    return used


LEFT = [case for case in CASES if case.op in STEP_OPERATIONS and not case.name.startswith("targets")]


@pytest.mark.parametrize(("case", "precision", "tensor"), on(WAYS, LEFT))
def test_attention_heeds_nothing_that_an_earlier_sequence_left_behind(case: Case, precision: str, tensor: bool) -> None:
    """Not even numbers that are none: a model that overflowed once must not go on in the texts that come after."""
    results = []
    for left in (0, np.nan):
        arguments = placed(case.build(), precision)
        if case.op == "decode_attention":
            arguments = without_races(arguments)
        unused = ~in_use(case, arguments)
        assert unused.any()
        arguments["keys"][unused], arguments["values"][unused] = left, left
        globals()[case.op](precision, **arguments, tensor=tensor)
        live = arguments["slots"]["width"][arguments["rows"]] > 0
        results.append(arguments["out"][live])
    assert not np.isnan(results[0]).any()
    assert np.array_equal(results[0], results[1])


BEYOND = [case for case in CROSS if case.name in ("3x99+5x1+1x40 1000/8", "9x33+17x64+1x200 128/2")]


@pytest.mark.parametrize(("case", "precision", "tensor"), on(WAYS, BEYOND))
def test_cross_attention_reads_the_lane_of_the_first_beam_for_later_ones(
    case: Case, precision: str, tensor: bool
) -> None:
    arguments = placed(case.build(), precision)
    later = arguments["rows"][arguments["slots"]["beam"][arguments["rows"]] > 0]
    arguments["slots"]["memory"][later], arguments["slots"]["memory_length"][later] = 0, 0
    expected = wanted(case.op, arguments)
    cross_attention(precision, **arguments, tensor=tensor)
    check(case, arguments, expected, precision)


@pytest.mark.parametrize(("hidden", "skipped"), [(64, 64), (64, 3), (19, 0)])
def test_store_takes_columns_of_a_wider_matrix(hidden: int, skipped: int) -> None:
    matrix = np.arange(3 * (skipped + 2 * hidden), dtype=np.float32).reshape(3, -1)
    keys, values = np.zeros((2, 1, 2, 5, hidden), np.float32)
    lanes, steps = np.array([1, 0, 1], np.int32), np.array([4, 0, 2], np.int32)
    store("float32", matrix[:, skipped:], lanes, steps, keys, values)
    assert np.array_equal(keys[0, lanes, steps], matrix[:, skipped : skipped + hidden])
    assert np.array_equal(values[0, lanes, steps], matrix[:, skipped + hidden :])
    assert not keys[0, 0, 1:].any()
