"""How kernels/linear.cu is compiled and launched for a product: constants, grid, cluster, shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_backend.ops.int8 import quantise
from lightseq_backend.ops.linear_shapes import Shape, measured

_WARPS = 8  # of a block, where none were measured
SMALL = 1 << 20  # elements of a weight that is too little for others at up to 128 rows
_PACKED_ROWS = 192


@dataclass(frozen=True)
class Plan:
    """One way to launch a kernel. shared: bytes of dynamic shared memory."""

    definitions: tuple[tuple[str, int], ...]
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared: int
    threads: int = 32 * _WARPS

    @property
    def holds_weights(self) -> bool:
        """Whether some wait in shared memory for their rows."""
        return dict(self.definitions).get("AHEAD", 0) > 0


@dataclass(frozen=True)
class Device:
    """What a plan depends on of a GPU: compute capability (90 for 9.0), multiprocessors, most shared bytes a block."""

    capability: int
    multiprocessors: int
    shared: int


def packed_elements(inner: int, wide: int, half: bool) -> int:
    """Elements that pack_weight writes, sixteen bytes a thread."""
    chunk = _chunk(half)
    return _up(wide, 16) * 16 * _up(inner, chunk) * chunk


def fold(weight: Any, gain: Any, bias: Any, dtype: Any) -> tuple[Any, Any]:
    """What a product with a LayerNorm in front reads: W with each row times its gain, and the columns it needs besides.

    layer_norm(x) . W = (x . V - mean(x) * sums) / deviation(x) + offsets, where V = gain * W, sums = V's columns added
    up and offsets = bias . W. weight: [inner, wide]; gain, bias: [inner]; float32, NumPy or CuPy. Returns V as dtype,
    in W's order of axes, and float32 [2, wide]: sums (of V as rounded, so that a mean cancels exactly) and offsets.
    """
    folded = (weight * gain[:, None]).astype(dtype)
    return folded, np.stack((folded.sum(0, dtype=np.float32), (weight * bias[:, None]).sum(0)))


def fold_int8(weight: Any, gain: Any, bias: Any) -> tuple[Any, Any]:
    """`fold` into int8: as rounded, the numbers [inner, wide] and float32 [3, wide]: sums (of the numbers, which are
    without the scale), offsets and scales."""
    numbers, scales = quantise(weight * gain[:, None])
    return numbers, np.stack((numbers.sum(0, dtype=np.float32), (weight * bias[:, None]).sum(0), scales))


def pays(device: Device, rows: int, inner: int, wide: int, half: bool) -> bool:
    """Whether `linear` is faster than cuBLAS and a kernel for the LayerNorm in front; by measurement on an H200."""
    if device.capability < (75 if half else 80):  # the tensor cores' instructions
        return False
    if half:
        return rows <= (128 if inner * wide <= SMALL else 32)
    return rows <= 64


def unpacks(rows: int) -> bool:
    """Whether int8 weights are made halves for cuBLAS, which reads them once; `linear` does for every 32 rows. By
    whole passes on an H200: Transformer-big gains from 192 rows on, GPT-2 from 256, Transformer-base from 384."""
    return rows > _PACKED_ROWS


def plan(
    device: Device, rows: int, inner: int, wide: int, half: bool, norm: bool, aligned: bool, int8: bool = False
) -> Plan:
    """The launch for x [rows, inner] . W [inner, wide]. Any number of rows; it pays where `pays` says so.

    half: fp16 storage, else float. norm: x goes through the LayerNorm that W was packed with. aligned: rows of x begin
    at, and consist of, pieces of sixteen bytes. int8: W is, and half true. The order of a sum over `inner` depends on
    the weight and the device, not on `rows`.
    """
    bits = weight_bits(half, int8)
    known = measured(device.capability, device.multiprocessors, bits, (inner, wide, norm))
    shape = next((known[most] for most in sorted(known) if rows <= most), None)
    if shape is None:
        order = next(((one.split, one.warps) for one in known.values()), None)
        shape = _rule(device, rows, inner, wide, half, norm, int8, order)
    return build(device, shape, rows, inner, wide, half, norm, aligned, int8)


def build(
    device: Device, shape: Shape, rows: int, inner: int, wide: int, half: bool, norm: bool, aligned: bool, int8: bool
) -> Plan:
    """The launch of that shape; other arguments are those of `plan`."""
    count = _rows(device, shape, rows, norm)
    definitions = {
        "HALF": int(half),
        "NORM": int(norm),
        "ROWS": count,
        "INNER": inner,
        "OUTPUTS": shape.outputs,
        "SPLIT": shape.split,
        "WARPS": shape.warps,
        "DEPTH": shape.depth,
        "AHEAD": shape.ahead,
        "LATE": int(shape.late),
        "ALIGNED": int(aligned),
        "WEIGHT_BITS": weight_bits(half, int8),
    }
    grid = (shape.split * _up(wide, shape.outputs), _up(rows, count), 1)
    return Plan(tuple(definitions.items()), grid, (shape.split, 1, 1), _shared(shape, count, norm), 32 * shape.warps)


def chunks(inner: int, half: bool) -> int:
    """Of a sum."""
    return _up(inner, _chunk(half))


def share(shape: Shape, inner: int, half: bool) -> int:
    """Chunks of the sum that a warp has."""
    return _up(_up(chunks(inner, half), shape.split), shape.warps)


def in_fours(wide: int, *rows: tuple[int, int, int] | None) -> bool:
    """Whether what a product reads and writes at its end is made of, and begins at, fours.

    wide: columns of the result. rows: of each array its address, the size of a number and how many its rows are apart.
    """
    given = (one for one in rows if one is not None)
    return wide % 4 == 0 and all(start % (4 * size) == 0 and apart % 4 == 0 for start, size, apart in given)


def weight_bits(half: bool, int8: bool) -> int:
    """What kernels are compiled with: bits of a weight."""
    return 8 if int8 else 16 if half else 32


def _rule(
    device: Device, rows: int, inner: int, wide: int, half: bool, norm: bool, int8: bool,
    order: tuple[int, int] | None,
) -> Shape:  # fmt: skip
    """By measurement on an H200, for products of any shape. order: split and warps, where they are given."""
    split, warps = order or (_split(device, chunks(inner, half), wide), _WARPS)
    outputs = _outputs(device, rows, wide, half, split)
    shape = Shape(outputs, split, warps, 0, rows > 16)
    count, each = _rows(device, shape, rows, norm), share(shape, inner, half)
    # Up to 64 registers of weights, or 96 where a block has 48 outputs of eight rows.
    depth = min(each, (24 if outputs == 48 and count == 8 else 16) // (1 if int8 else 2) // (outputs // 16))
    ahead = _ahead(device, shape, count, norm, each - depth) if half and not int8 else 0
    return shape._replace(depth=depth, ahead=ahead)


def _split(device: Device, chunks: int, wide: int) -> int:
    """A sum is split where few blocks would have long ones."""
    if device.capability < 90:
        return 1
    split = 8 if chunks > 128 else 4 if chunks > 64 else 2
    while split > 1 and split * _up(wide, 64) > _most_blocks(device, split):
        split //= 2
    return split


def _outputs(device: Device, rows: int, wide: int, half: bool, split: int) -> int:
    """Every multiprocessor gets one block at most: a second one would be in the place of the next kernel's, which waits
    there with its weights. With many rows, x (which every block reads) is worth wider blocks, and is on its way first
    before the next kernel's weights crowd the memory. Sixteen rows of halves want blocks of 32 outputs even where they
    do not all begin together. Where sums are whole, blocks of 48 have all of a sum of 1600 under way at once; a few
    more blocks than multiprocessors still begin together, beside those of the kernel in front.
    """
    if rows > 16 and split * _up(wide, 64) >= 64:
        return 64
    most = {32: device.multiprocessors}  # blocks, by their outputs
    if split > 2 and (rows <= 8 or not half):
        most = dict.fromkeys((32, 48), _most_blocks(device, split))
    elif device.capability >= 90 and split == 1 and half and rows <= 8:
        most[48] = device.multiprocessors * 21 // 20
    return next((size for size, blocks in most.items() if split * _up(wide, size) <= blocks), 64)


def _most_blocks(device: Device, split: int) -> int:
    """Blocks that begin together, one on each multiprocessor, in clusters of `split`. The parts of the device that
    clusters may not span have no multiple of eight multiprocessors: of an H200's 132, clusters of four or eight get 120
    (cuOccupancyMaxActiveClusters), and what is left over begins when others end."""
    return device.multiprocessors * 10 // 11 if split > 2 else device.multiprocessors


def _ahead(device: Device, shape: Shape, rows: int, norm: bool, most: int) -> int:
    """`most`, which is all that registers do not hold, or what the shared memory of two blocks allows: the next
    kernel's waits beside this one's. GPT-2 XL 1190 -> 1070 us a step of one row on an H200; for 32 rows, and in float,
    it was slower (Transformer-big 183 -> 195, 225 -> 240)."""
    if device.capability < 90 or rows > 8:
        return 0
    fitting = (n for n in range(most, 0, -1) if _shared(shape._replace(ahead=n), rows, norm) <= device.shared // 2)
    return next(fitting, 0)


def _rows(device: Device, shape: Shape, rows: int, norm: bool) -> int:
    """Rows of a block: as many as there are, up to 32, where shared memory has room for them."""
    for count in (count for count in (32, 16, 8) if count == 8 or count < 2 * rows):
        if _shared(shape._replace(ahead=0), count, norm) <= device.shared:
            break
    return count


def _chunk(half: bool) -> int:
    """Columns of x that a chunk has: 64 bytes."""
    return 32 if half else 16


def _shared(shape: Shape, rows: int, norm: bool) -> int:
    """Bytes, region by region as the kernel lays them out: two pieces of sixteen bytes for each lane and sixteen
    outputs of a chunk that is ahead, in the place of the sums later."""
    outputs, split, warps = shape.outputs, shape.split, shape.warps
    weights = shape.ahead * warps * 32 * 2 * 16 * (outputs // 16)
    partial = warps * rows * (outputs + 4) * 4
    inbox = split * _up(rows, split) * (outputs // 4 + norm) * 16 + 8 if split > 1 else 0  # and its barrier
    return max(weights, partial) + inbox


def _up(x: int, y: int) -> int:
    return -(-x // y)
