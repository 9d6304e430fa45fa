"""How kernels/linear.cu is compiled and launched for a product: constants, grid, cluster, shared memory."""

from __future__ import annotations

from dataclasses import dataclass

THREADS = 256
_WARPS = 8
_PORTABLE_CLUSTER = 8
_HALF_OUTPUTS = 32
_FLOAT_OUTPUTS = 64


@dataclass(frozen=True)
class Plan:
    """One way to launch `linear` or `norm_linear`; the block is THREADS threads, `shared` is bytes."""

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


def plan(device: Device, rows: int, inner: int, wide: int, half: bool, norm: bool, aligned: bool) -> Plan:
    """The launch for x [rows, inner] . W [inner, wide]. Any number of rows; it pays up to 64.

    half: fp16 storage, else float. norm: norm_linear, else linear. aligned: rows of x begin at, and consist of,
    pieces of sixteen bytes. How the sum over `inner` is split depends on the weight and the device, not on `rows`.
    """
    outputs = _HALF_OUTPUTS if half else _FLOAT_OUTPUTS
    split = _split(device, inner, wide, outputs, half)
    most = 64 if half else 32
    fitting = (count for count in (64, 32, 16, 8) if count <= most and (count == 8 or count < 2 * rows))
    for count in fitting:
        steps = _steps(inner, split)
        while True:
            shared = _shared(count, inner, outputs, split, half, norm, steps)
            if shared <= device.shared or half or steps == 1:
                break
            steps -= 1
        if shared <= device.shared:
            break
    else:
        raise ValueError(f"a norm over {inner} needs {shared} bytes of shared memory; a block has {device.shared}")
    definitions = {
        "HALF": int(half),
        "NORM": int(norm),
        "ROWS": count,
        "INNER": inner,
        "OUTPUTS": outputs,
        "SPLIT": split,
        "ALIGNED": int(aligned),
        **({} if half else {"TILE_STEPS": steps}),
    }
    grid = (split * _up(wide, outputs), _up(rows, count), 1)
    return Plan(tuple(definitions.items()), grid, (split, 1, 1), shared)


def _split(device: Device, inner: int, wide: int, outputs: int, half: bool) -> int:
    """Blocks that share a sum: as many as there are multiprocessors for, with work for half their warps at least."""
    if device.capability < 90:
        return 1
    useful = _up(inner, 32) // (_WARPS // 2) if half else _up(inner, 64)
    return max(1, min(_PORTABLE_CLUSTER, useful, device.multiprocessors // _up(wide, outputs)))


def _steps(inner: int, split: int) -> int:
    return _up(_up(inner, 64), split)


def _shared(rows: int, inner: int, outputs: int, split: int, half: bool, norm: bool, steps: int) -> int:
    """Bytes, region by region as the kernels lay them out."""
    partial = _WARPS * rows * (outputs + 4) * 4
    inbox = split * _up(rows * outputs // 4, split) * 16 if split > 1 else 0
    vectors = 2 * _up(inner, 8) * 8 * (2 if half else 4) if norm else 0
    if not half:
        held = rows * (64 * steps + 4) * 4
    elif norm:
        chunks = _up(inner, 32)
        held = rows * 2 * (32 * chunks + (0 if chunks % 2 else 32))
    else:
        share = _up(_up(_up(inner, 32), split), _WARPS)
        held = _WARPS * min(share, 2 if rows > 32 else 4) * (rows // 8) * 512
    return max(held, partial) + inbox + vectors


def _up(x: int, y: int) -> int:
    return -(-x // y)
