"""How kernels/linear.cu is compiled and launched for a product: constants, grid, cluster, shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

THREADS = 256
_WARPS = 8
_PORTABLE_CLUSTER = 8
_FLOAT_OUTPUTS = 64


@dataclass(frozen=True)
class Plan:
    """One way to launch `linear`; the block is THREADS threads, `shared` is bytes."""

    definitions: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared: int


@dataclass(frozen=True)
class Device:
    """What a plan depends on of a GPU: compute capability (90 for 9.0), multiprocessors, most shared bytes a block."""

    capability: int
    multiprocessors: int
    shared: int


def packed_elements(inner: int, wide: int, half: bool) -> int:
    """Elements that pack_weight writes; its grid is this / (8 if half else 4) / 256, rounded up."""
    if half:
        return _up(wide, 16) * 16 * _up(inner, 32) * 32
    return _up(wide, 64) * 64 * _up(inner, 64) * 64


def fold(weight: Any, gain: Any, bias: Any, dtype: Any) -> tuple[Any, Any]:
    """What a product with a LayerNorm in front reads: W with each row times its gain, and the columns it needs besides.

    layer_norm(x) . W = (x . V - mean(x) * sums) / deviation(x) + offsets, where V = gain * W, sums = V's columns added
    up and offsets = bias . W. weight: [inner, wide]; gain, bias: [inner]; float32, NumPy or CuPy. Returns V as dtype,
    in W's order of axes, and float32 [2, wide]: sums (of V as rounded, so that a mean cancels exactly) and offsets.
    """
    folded = (weight * gain[:, None]).astype(dtype)
    return folded, np.stack((folded.sum(0, dtype=np.float32), (weight * bias[:, None]).sum(0)))


def pays(device: Device, rows: int, inner: int, wide: int, half: bool) -> bool:
    """Whether `linear` is faster than cuBLAS and a kernel for what goes with it."""
    if rows <= 64:
        return True
    outputs, split, _ = _half_shape(device, rows, inner, wide)
    # Two groups of rows: while all blocks run at once, the second reads the weights from L2. A long sum is cuBLAS's.
    return half and rows <= 128 and split <= 2 and 2 * split * _up(wide, outputs) <= device.multiprocessors


def plan(device: Device, rows: int, inner: int, wide: int, half: bool, norm: bool, aligned: bool) -> Plan:
    """The launch for x [rows, inner] . W [inner, wide]. Any number of rows; it pays up to 64.

    half: fp16 storage, else float. norm: x goes through the LayerNorm that W was packed with (half only). aligned: rows
    of x begin at, and consist of, pieces of sixteen bytes. The order of a sum over `inner` depends on the weight and
    the device, not on `rows`.
    """
    assert half or not norm
    outputs, split, late = _half_shape(device, rows, inner, wide) if half else _float_shape(device, inner, wide)
    most = 64 if half else 32 if split <= 2 else 16
    for count in (count for count in (64, 32, 16, 8) if count <= most and (count == 8 or count < 2 * rows)):
        steps = _steps(inner, split)
        while True:
            shared = _shared(count, outputs, split, norm, 0 if half else steps)
            if shared <= device.shared or half or steps == 1:
                break
            steps -= 1
        if shared <= device.shared:
            break
    definitions = {
        "HALF": int(half),
        "NORM": int(norm),
        "ROWS": count,
        "INNER": inner,
        "OUTPUTS": outputs,
        "SPLIT": split,
        "LATE": late,
        "ALIGNED": int(aligned),
        **({} if half else {"TILE_STEPS": steps}),
    }
    grid = (split * _up(wide, outputs), _up(rows, count), 1)
    return Plan(tuple(definitions.items()), grid, (split, 1, 1), shared)


def _half_shape(device: Device, rows: int, inner: int, wide: int) -> tuple[int, int, int]:
    """OUTPUTS, SPLIT and whether to launch the next kernel late; all by measurement on an H200.

    A sum is split where few blocks would have long ones. Every multiprocessor gets one block at most: a second
    one would be in the place of the next kernel's, which waits there with its weights. With many rows, x (which every
    block reads) is worth wider blocks, and is on its way first before the next kernel's weights crowd the memory.
    """
    split = 1
    if device.capability >= 90:
        split = 4 if inner > 2048 else 2 if 2 * _up(wide, 64) <= device.multiprocessors else 1
    many = rows > 16
    wider = split * _up(wide, 32) > device.multiprocessors or (many and split * _up(wide, 64) >= 64)
    return 64 if wider else 32, split, int(many)


def _float_shape(device: Device, inner: int, wide: int) -> tuple[int, int, int]:
    """As _half_shape: as many blocks share a sum as there are multiprocessors for."""
    split = 1
    if device.capability >= 90:
        blocks = device.multiprocessors // _up(wide, _FLOAT_OUTPUTS)
        split = max(1, min(_PORTABLE_CLUSTER, _up(inner, 64), blocks))
    return _FLOAT_OUTPUTS, split, 0


def _steps(inner: int, split: int) -> int:
    return _up(_up(inner, 64), split)


def _shared(rows: int, outputs: int, split: int, norm: bool, steps: int) -> int:
    """Bytes, region by region as the kernels lay them out."""
    partial = _WARPS * rows * (outputs + 4) * 4
    held = rows * (64 * steps + 4) * 4 if steps else 0
    inbox = split * _up(rows, split) * (outputs // 4 + norm) * 16 if split > 1 else 0
    return max(held, partial) + inbox


def _up(x: int, y: int) -> int:
    return -(-x // y)
