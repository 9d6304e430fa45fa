"""How kernels/vocabulary.cu is compiled and launched: constants, grid, block, shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightseq_backend.ops.linear_launch import Device, Plan, weight_bits

TILE = 128
_ROWS = 64  # of a block, at most
_RESIDENT = 16  # warps of one multiprocessor
_DEPTHS = {8: 4, 16: 4, 32: 3}  # chunks of weights under way, by the bits of one; what registers there are


def tiles(vocabulary: int) -> int:
    """Parts of the vocabulary that have their own statistics and choices."""
    return -(-vocabulary // TILE)


def fits(device: Device, inner: int, half: bool) -> bool:
    """Whether a block has room for eight rows; where it has not, the vocabulary is cuBLAS's, and not int8."""
    return _shared(8, inner, half, 8) <= device.shared


def without_norm(scales: Any) -> Any:
    """The columns of an int8 W [inner, wide] with no LayerNorm folded into it: float32 [3, wide]. scales: [wide]."""
    return np.stack((np.zeros_like(scales), np.zeros_like(scales), scales))


def plan(
    device: Device, rows: int, inner: int, vocabulary: int, half: bool, int8: bool = False, norm: bool = True
) -> Plan:
    """The launch for x [rows, inner], which no result depends on. Any number of rows; it pays up to 64. It must fit.

    int8: W is, and half true. norm: x goes through the LayerNorm that is folded into W; it has already otherwise.
    """
    assert fits(device, inner, half)
    for group in range(min(_ROWS, -(-rows // 8) * 8), 0, -8):
        warps = 8 if group <= 16 else 16
        shared = _shared(group, inner, half, warps)
        if shared <= device.shared:
            break
    span = warps // 8
    groups = -(-rows // group)
    blocks = min(-(-tiles(vocabulary) // span), max(1, _RESIDENT // warps * device.multiprocessors // groups))
    bits = weight_bits(half, int8)
    definitions = {
        "HALF": int(half),
        "INNER": inner,
        "ROWS": group,
        "WARPS": warps,
        "MOST_DEPTH": 3 if int8 and group > 32 else _DEPTHS[bits],
        "WEIGHT_BITS": bits,
        "NORM": int(norm),
    }
    return Plan(tuple(definitions.items()), (groups, blocks, 1), (1, 1, 1), shared, 32 * warps)


def _shared(rows: int, inner: int, half: bool, warps: int) -> int:
    """Bytes, region by region as the kernel lays them out."""
    chunks = -(-inner // (32 if half else 16))
    return rows * 64 * (chunks + 1 - chunks % 2) + warps // 8 * rows * (TILE + 4) * 4 + rows * 8
