"""How the kernels of kernels/warpgroup*.cu are compiled and launched: constants, grid, cluster, memory."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.ops.linear_launch import SMALL, Device, Plan
from lightseq_backend.ops.vocabulary_launch import TILE, tiles

ARCHITECTURE = "sm_90a"
_OUTPUTS, _STAGE = 64, 64  # results of a block; columns of x in a stage
_MULTIPLYING, _OBSERVING, _LOADING = 256, 128, 32  # threads
_MOST_SPLIT = 4
_PAYING = range(33, 129)  # rows
_MANY = range(129, 257)  # rows at which only narrow products pay
_SPLIT_OF_MANY, _DEPTH_OF_MANY = 2, 8
_SEARCHED_WIDTH = 1024  # of x
SCORED_BOX = 128  # rows of x or of the weight that one copy of warpgroup_scores.cu brings
_LEAST_SCORED = 256  # rows
_SCORED_IDS, _SCORING_PAIR, _SCORING_DEPTH = 256, 2, 4
_SCORED_PART = 32 << 20  # bytes
ATTENDED_BOX = 64  # rows of queries, keys or values that a block of packed attention has at a time
_HEAD, _ATTENDING = 64, 128  # numbers of a head, threads
_ATTENDING_TOGETHER = 4  # blocks for which a multiprocessor has registers
# Bytes of shared memory: of a multiprocessor where half of its memory is to be that; of a block, beside its own.
_ATTENDING_ROOM, _RESERVED = 132 << 10, 1 << 10
_HALF, _NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_128, _FILL_ZEROS = 6, 0, 3, 2, 0  # CUtensorMap*


class Shape(NamedTuple):
    """How a product is divided: rows that a block takes (64 or 128), blocks of a cluster that share a sum, stages under
    way at most."""

    rows: int
    split: int
    depth: int


# Of products so small that `linear` is as fast where nothing is said here: by the most rows that each is for, by whole
# steps of the models named on an H200. Inner, wide, whether a LayerNorm is folded in.
_SMALL_ONES: dict[tuple[int, int, bool], dict[int, Shape | None]] = {
    (1024, 1024, False): {64: Shape(64, 4, 4), 128: Shape(64, 2, 8)},  # Transformer-big: output of attention
    (512, 1536, True): {64: Shape(64, 4, 2), 128: Shape(64, 2, 4)},  # Transformer-base: queries, keys and values
    (512, 2048, True): {64: None, 128: Shape(64, 2, 4)},  # Transformer-base: FFN 1; None: `linear` is faster
}


def can(device: Device, inner: int, wide: int, half: bool) -> bool:
    """Whether there is such a kernel for a weight [inner, wide], and a use for it beside `linear`'s."""
    used = inner * wide >= SMALL or any((inner, wide, norm) in _SMALL_ONES for norm in (False, True))
    return device.capability == 90 and half and inner % _STAGE == wide % _OUTPUTS == 0 and used


def pays(device: Device, rows: int, inner: int, wide: int, norm: bool) -> bool:
    """Whether a step or an encoder is faster with this product than with others; by measurement on an H200. cuBLAS,
    which needs a kernel for the LayerNorm, has too few blocks for what is narrow. norm: there is one, folded in."""
    if rows in _PAYING and inner * wide <= SMALL:
        return _small_one(rows, inner, wide, norm) is not None
    narrow = inner * wide >= SMALL and _split(device, wide, _MOST_SPLIT) == _MOST_SPLIT
    return rows in _PAYING or (narrow and rows in _MANY)


def pays_to_search(rows: int) -> bool:
    """The same for the vocabulary, against warps or cuBLAS."""
    return rows in _PAYING


def can_search(device: Device, inner: int, half: bool) -> bool:
    """Whether there is such a kernel for a vocabulary's weight [inner, any], and a use for it: by measurement, a step
    of hidden 512 is slower with it."""
    return device.capability == 90 and half and inner % _STAGE == 0 and inner >= _SEARCHED_WIDTH


def can_score(device: Device, inner: int, half: bool) -> bool:
    """Whether there is a kernel for the targets of a vocabulary's weight [any, inner]."""
    return device.capability == 90 and half and inner % _STAGE == 0


def pays_to_score(rows: int) -> bool:
    """The same for what becomes of targets, against cuBLAS and a kernel that reads the logits."""
    return rows >= _LEAST_SCORED


def packed_width(wide: int) -> int:
    """Columns that `packed_vocabulary` has for so many."""
    return -(-wide // TILE) * TILE


def packed(weight: Any) -> Any:
    """W [inner, wide], NumPy or CuPy, in the order that warpgroup.cu reads it: [wide / 64][inner / 8][64][8]."""
    return _packed(weight, _OUTPUTS)


def packed_vocabulary(weight: Any) -> Any:
    """The same for warpgroup_vocabulary.cu: [ceil(wide / 128)][inner / 8][128][8]."""
    wide = weight.shape[1]
    return _packed(np.pad(weight, ((0, 0), (0, -wide % TILE))) if wide % TILE else weight, TILE)


def _packed(weight: Any, outputs: int) -> Any:
    return weight.reshape(len(weight) // 8, 8, -1, outputs).transpose(2, 0, 3, 1).copy().reshape(-1)


def plan(device: Device, rows: int, inner: int, wide: int, norm: bool) -> Plan:
    """The launch for x [rows, inner] . W [inner, wide], of a weight that `can`. Any number of rows.

    norm: x goes through the LayerNorm that W was packed with. The order of a sum depends on the weight, and on whether
    there are more than 64 rows (of small ones) or more than 128.
    """
    count, split, depth = _small_one(rows, inner, wide, norm) or _rule(device, rows, wide)
    depth = min(-(-(inner // _STAGE) // split), depth)
    while _shared(count, split, depth, norm) > device.shared:
        depth -= 1
    definitions = {"HALF": 1, "NORM": int(norm), "ROWS": count, "INNER": inner, "SPLIT": split, "DEPTH": depth}
    threads = _MULTIPLYING + norm * _OBSERVING + _LOADING
    grid = (split * wide // _OUTPUTS, -(-rows // count), 1)
    return Plan(tuple(definitions.items()), grid, (split, 1, 1), _shared(count, split, depth, norm), threads)


def _small_one(rows: int, inner: int, wide: int, norm: bool) -> Shape | None:
    shapes = _SMALL_ONES.get((inner, wide, norm), {})
    return next((shapes[most] for most in sorted(shapes) if rows <= most), None)


def _rule(device: Device, rows: int, wide: int) -> Shape:
    """By whole steps on an H200: few stages leave shared memory to the next kernel, whose blocks then begin early; only
    the longest sums are worth deep rings and blocks of many rows."""
    if rows >= _MANY.start:
        return Shape(64, _split(device, wide, _SPLIT_OF_MANY), _DEPTH_OF_MANY)
    split = _split(device, wide, _MOST_SPLIT)
    long = split == _MOST_SPLIT
    return Shape(128 if long and rows > 64 else 64, split, 8 if long else 4 if rows <= 64 else 3)


def _split(device: Device, wide: int, most: int) -> int:
    """Blocks that share a sum, so that there are enough of them for the device."""
    split = 1
    while split < most and 2 * split * wide // _OUTPUTS <= device.multiprocessors:
        split *= 2
    return split


def vocabulary_plan(device: Device, rows: int, inner: int, vocabulary: int) -> Plan:
    """The launch for x [rows, inner] and a weight that `can_search`, which no result depends on. Any number of rows.

    Up to 64 rows two blocks share a multiprocessor, so that one multiplies while the other looks for its best.
    """
    count, span, depth, blocks_each = (64, 1, 3, 2) if rows <= 64 else (128, 2, 4, 1)
    depth = min(depth, inner // _STAGE)
    groups = -(-rows // count)
    blocks = min(-(-tiles(vocabulary) // span), max(1, blocks_each * device.multiprocessors // groups))
    definitions = {"HALF": 1, "ROWS": count, "INNER": inner, "SPAN": span, "DEPTH": depth}
    threads = 2 * span * count + min(64, max(32, count)) + _LOADING
    shared = _vocabulary_shared(count, span, depth)
    return Plan(tuple(definitions.items()), (groups, blocks, 1), (1, 1, 1), shared, threads)


def scored_tiles(vocabulary: int) -> int:
    """Parts of the vocabulary that have statistics of their own in warpgroup_scores.cu."""
    return -(-vocabulary // _SCORED_IDS)


def scored_part(inner: int, vocabulary: int) -> int:
    """Ids of an int8 vocabulary that are made halves at a time, a multiple of a tile's: more would not stay in L2."""
    most = max(1, _SCORED_PART // (_SCORED_IDS * inner * 2))
    return min(most, scored_tiles(vocabulary)) * _SCORED_IDS


def scores_plan(device: Device, rows: int, inner: int, vocabulary: int) -> Plan:
    """The launch for x [rows, inner] and a weight [vocabulary, inner] that `can_score`; no result depends on it."""
    depth = _SCORING_DEPTH
    pairs = min(-(-rows // (_SCORING_PAIR * SCORED_BOX)) * scored_tiles(vocabulary), device.multiprocessors // 2)
    shared = depth * ((SCORED_BOX + _SCORED_IDS) * _STAGE * 2 + 16)
    definitions = {"HALF": 1, "INNER": inner, "DEPTH": depth}
    grid, cluster = (_SCORING_PAIR * pairs, 1, 1), (_SCORING_PAIR, 1, 1)
    return Plan(tuple(definitions.items()), grid, cluster, shared, 2 * SCORED_BOX + _LOADING)


def can_attend(device: Device, head: int, half: bool) -> bool:
    """Whether there is a kernel for packed sequences with heads of that many numbers."""
    return device.capability == 90 and half and head == _HEAD


def takes_pairs(device: Device, rows: int, heads: int, causal: bool) -> bool:
    """Whether blocks of attention take two tiles of queries each, a short and a long one: where that leaves enough."""
    return causal and rows // ATTENDED_BOX * heads >= 4 * device.multiprocessors


def attention_plan(device: Device, rows: int, sequences: int, heads: int, causal: bool) -> tuple[Plan, bool]:
    """The launch for packed sequences, which no result depends on, and whether it `takes_pairs`. sequences: at most;
    some may be empty.

    All pairs have as much to do, so that multiprocessors should have as many of them, too: where those are few, no more
    have room together. Blocks that may find nothing to do are launched only as far as they have room beside the others:
    else they queue up for the few places that are free, one after another.
    """
    paired = takes_pairs(device, rows, heads, causal)
    queries = ATTENDED_BOX << paired
    least = -(-rows // queries)
    shared, together = 3 * (ATTENDED_BOX * _HEAD * 2 + 8), _ATTENDING_TOGETHER
    if paired:
        together = min(together, -(-least * heads // device.multiprocessors))
        shared = max(shared, _ATTENDING_ROOM // (together + 1) - _RESERVED + 1)
    blocks = max(least, min(rows // queries + sequences, together * device.multiprocessors // heads))
    definitions = (("HALF", 1), ("HEAD_SIZE", _HEAD))
    return Plan(definitions, (heads, blocks, 1), (1, 1, 1), shared, _ATTENDING), paired


def tensor_map(
    library: ctypes.CDLL, address: int, rows: int, inner: int, stride: int, box_rows: int
) -> ctypes.Array[ctypes.c_char]:
    """A CUtensorMap of half [rows, inner], rows `stride` numbers apart, for boxes of so many rows.

    library: the CUDA driver. address and stride in bytes are multiples of 16.
    """
    room = (ctypes.c_char * 192)()  # 128 bytes that begin at a multiple of 64
    made = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
    sizes, strides = (ctypes.c_uint64 * 2)(inner, rows), (ctypes.c_uint64 * 1)(2 * stride)
    box, steps = (ctypes.c_uint32 * 2)(_STAGE, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    status = library.cuTensorMapEncodeTiled(
        made, _HALF, 2, ctypes.c_void_p(address), sizes, strides, box, steps,
        _NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_128, _FILL_ZEROS,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed with status {status} for [{rows}, {inner}], {stride} apart")
    return made


def _shared(rows: int, split: int, depth: int, norm: bool) -> int:
    """Bytes, region by region as the kernel lays them out."""
    stages = depth * (_OUTPUTS + rows) * _STAGE * 2
    row = (_OUTPUTS + 4) * 4
    own, sharers = rows // split, 128 // rows
    return max(stages, rows * row) + (split - 1) * own * row + norm * split * sharers * own * 8 + (2 * depth + 1) * 8


def _vocabulary_shared(rows: int, span: int, depth: int) -> int:
    stages = depth * (span * TILE + rows) * _STAGE * 2
    logits = span * rows * (TILE + 8) * 4
    beside = span * TILE * 16 + rows * 8 + (2 * depth + 1) * 8
    return (max(stages, logits) if rows > 64 else stages + logits) + beside
