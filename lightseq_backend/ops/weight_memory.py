"""Device memory of a weight: what ops/cuda.py makes of it, in bytes. Apart from it, for it needs no CuPy."""

from __future__ import annotations

from lightseq_backend.ops import linear_launch, vocabulary_launch, warpgroup_launch
from lightseq_backend.ops.linear_launch import Device

ALIGNED_COLUMNS = 8
_COLUMNS = 4  # bytes of each number that a folded LayerNorm leaves for a column, and of a scale


def matrix_bytes(device: Device, inner: int, wide: int, half: bool, int8: bool) -> int:
    """Of a weight [inner, wide] and what a LayerNorm that may be folded into it leaves. int8: half is true."""
    if int8:
        return _int8(inner, wide)
    grouped = inner * wide if warpgroup_launch.can(device, inner, wide, half) else 0
    elements = _plain(inner, wide) + linear_launch.packed_elements(inner, wide, half) + grouped
    return elements * _size(half) + 2 * _COLUMNS * wide


def vocabulary_bytes(device: Device, inner: int, wide: int, half: bool, int8: bool) -> int:
    """Of a weight that only operations of the vocabulary use."""
    if int8 and vocabulary_launch.fits(device, inner, half):
        return _int8(inner, wide)
    if int8:
        return _plain(inner, wide) * _size(half)
    grouped = inner * warpgroup_launch.packed_width(wide) if warpgroup_launch.can_search(device, inner, half) else 0
    elements = _plain(inner, wide) + linear_launch.packed_elements(inner, wide, half) + grouped
    return elements * _size(half) + 2 * _COLUMNS * wide


def halves(inner: int, wide: int) -> int:
    """Elements of an int8 weight [inner, wide] made halves: transposed, its rows as long as cuBLAS likes them."""
    return wide * aligned(inner)


def vocabulary_halves(device: Device, inner: int, wide: int) -> int:
    """Of what of an int8 vocabulary is made halves at a time."""
    if not (vocabulary_launch.fits(device, inner, half=True) and warpgroup_launch.can_score(device, inner, half=True)):
        return 0
    return halves(inner, warpgroup_launch.scored_part(inner, wide))


def aligned(wide: int) -> int:
    """Columns that cuBLAS is given."""
    return -(-wide // ALIGNED_COLUMNS) * ALIGNED_COLUMNS


def _plain(inner: int, wide: int) -> int:
    return inner * aligned(wide)


def _int8(inner: int, wide: int) -> int:
    return linear_launch.packed_elements(inner, wide, half=True) + 3 * _COLUMNS * wide


def _size(half: bool) -> int:
    return 2 if half else 4
