"""How kernels/vocabulary.cu is compiled and launched: constants, grid, shared memory."""

from __future__ import annotations

from lightseq_backend.ops.linear_launch import Device, Plan

THREADS = 256
TILE = 128
_MOST_ROWS = 32
_BLOCKS = 2  # a multiprocessor has room for


def tiles(vocabulary: int) -> int:
    """Parts of the vocabulary that have their own statistics and choices."""
    return -(-vocabulary // TILE)


def plan(device: Device, rows: int, inner: int, vocabulary: int, half: bool) -> Plan:
    """The launch for x [rows, inner], which no result depends on. Any number of rows; it pays up to 64."""
    for stages, group in _choices(rows, half):
        shared = _shared(group, inner, half, stages)
        if shared <= device.shared:
            break
    else:
        raise ValueError(f"a norm over {inner} needs {shared} bytes of shared memory; a block has {device.shared}")
    groups = -(-rows // group)
    blocks = min(tiles(vocabulary), max(1, _BLOCKS * device.multiprocessors // groups))
    definitions = {"HALF": int(half), "INNER": inner, "ROWS": group, **({} if half else {"STAGES": stages})}
    return Plan(tuple(definitions.items()), (groups, blocks, 1), (1, 1, 1), shared)


def _choices(rows: int, half: bool) -> list[tuple[int, int]]:
    """Stages and rows of a block, the best first."""
    most = min(_MOST_ROWS, -(-rows // 8) * 8)
    return [(stages, group) for stages in ((3,) if half else (3, 2)) for group in range(most, 0, -8)]


def _shared(rows: int, inner: int, half: bool, stages: int) -> int:
    """Bytes, region by region as the kernel lays them out."""
    logits = rows * (TILE + 4) * 4
    if half:
        chunks = -(-inner // 32)
        normed = rows * 2 * (32 * chunks + (0 if chunks % 2 else 32))
        return normed + logits + 2 * 2 * (-(-inner // 8) * 8)
    return stages * 32 * TILE * 4 + 2 * rows * (32 + 4) * 4 + logits + rows * 8
