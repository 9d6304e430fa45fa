"""How kernels/vocabulary.cu is compiled and launched: constants, grid, block, shared memory."""

from __future__ import annotations

from lightseq_backend.ops.linear_launch import Device, Plan

TILE = 128
SUMMARISING = 32  # tiles that a block of vocabulary_tiles takes
_HALF_ROWS, _FLOAT_ROWS = 64, 32  # of a block, at most
_RESIDENT = 16  # warps of one multiprocessor
_DEPTH = 4


def tiles(vocabulary: int) -> int:
    """Parts of the vocabulary that have their own statistics and choices."""
    return -(-vocabulary // TILE)


def best_threads(tiles: int) -> int:
    """Of a block of kernels/search.cu vocabulary_best: a warp for 32 tiles, and one more."""
    return 32 * (min(16, -(-tiles // 32)) + 1)


def threads(plan: Plan) -> int:
    """Of a block."""
    return 32 * dict(plan.definitions)["WARPS"]


def plan(device: Device, rows: int, inner: int, vocabulary: int, half: bool) -> Plan:
    """The launch for x [rows, inner], which no result depends on. Any number of rows; it pays up to 128."""
    for warps, stages, group in _choices(rows, half):
        shared = _shared(group, inner, half, warps, stages)
        if shared <= device.shared:
            break
    else:
        raise ValueError(f"a norm over {inner} needs {shared} bytes of shared memory; a block has {device.shared}")
    groups = -(-rows // group)
    span = warps // 8
    blocks = min(-(-tiles(vocabulary) // span), max(1, _RESIDENT // warps * device.multiprocessors // groups))
    definitions = {"HALF": int(half), "INNER": inner, "ROWS": group, "WARPS": warps}
    definitions |= {"MOST_DEPTH": _DEPTH} if half else {"STAGES": stages}
    return Plan(tuple(definitions.items()), (groups, blocks, 1), (1, 1, 1), shared)


def _choices(rows: int, half: bool) -> list[tuple[int, int, int]]:
    """Warps, stages and rows of a block, the best first."""
    most = min(_HALF_ROWS if half else _FLOAT_ROWS, -(-rows // 8) * 8)
    groups = range(most, 0, -8)
    if half:
        return [(8 if group <= 16 else 16, 0, group) for group in groups]
    return [(8, stages, group) for stages in (3, 2) for group in groups]


def _shared(rows: int, inner: int, half: bool, warps: int, stages: int) -> int:
    """Bytes, region by region as the kernel lays them out."""
    logits = warps // 8 * rows * (TILE + 4) * 4
    if half:
        chunks = -(-inner // 32)
        normed = rows * 2 * (32 * chunks + (0 if chunks % 2 else 32))
        return normed + logits + 2 * 2 * (-(-inner // 8) * 8)
    return stages * 32 * TILE * 4 + 2 * rows * (32 + 4) * 4 + logits + rows * 8
