"""Matrix products in which a row's result, to the last bit, is its own affair.

A BLAS may round a row differently by where it stands among the others and by how many they are. So each shape of
weight is tried once, with rows that are all the same: where they come out all the same, at any number of rows, the
BLAS is used as it is. Where they do not, the product is arranged so that they do (`_fenced`).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

Array = np.ndarray[Any, Any]
Finish = Callable[[Array, slice], None]

_FLOAT = np.dtype(np.float32)
_EIGHT = 8  # rows come in whole eights: below that a BLAS has kernels of its own for every number


def product(x: Array, weight: Array, out: Array, finish: Finish) -> None:
    """out = x . weight, then finish(out[:, columns], columns) for slices that cover the columns.

    x: [rows, in]; weight: [in, out], a transposed view will do; out: [rows, out], not contiguous perhaps. All float32.
    """
    if not _whole(*weight.shape, weight.flags.f_contiguous):
        _fenced(x, weight, out, finish)
        return
    rows = -(-len(x) // _EIGHT) * _EIGHT
    if rows == len(x):
        np.matmul(x, weight, out=out)
    else:
        filled, result = scratch("filled", (rows, x.shape[1])), scratch("result", (rows, out.shape[1]))
        filled[: len(x)], filled[len(x) :] = x, 0
        out[...] = np.matmul(filled, weight, out=result)[: len(x)]
    finish(out, slice(0, out.shape[1]))


def divide(share: Callable[[slice], None], count: int, threads: int | None = None) -> None:
    """Calls share with slices that cover range(count), one a thread; returns when all have."""
    threads = usable_threads() if threads is None else threads
    bounds = [count * i // threads for i in range(threads + 1)]
    others = [_pool().submit(share, slice(bounds[i], bounds[i + 1])) for i in range(1, threads)]
    share(slice(bounds[0], bounds[1]))
    for other in others:
        other.result()


def scratch(name: str, shape: tuple[int, ...]) -> Array:
    """This thread's scratch memory of that name, kept between calls: fresh pages cost more than the arithmetic."""
    kept: dict[str, Array] = _local.__dict__.setdefault("kept", {})
    size = int(np.prod(shape))
    if name not in kept or kept[name].size < size:
        kept[name] = np.empty(size, _FLOAT)
    return kept[name][:size].reshape(shape)


@functools.cache
def usable_threads() -> int:
    return max(1, int(os.environ.get("OMP_NUM_THREADS") or 0) or len(os.sched_getaffinity(0)))


@functools.cache
def choose_threads() -> bool:
    """Whether BLAS keeps its own threads. They must not move a row's bits in the shapes that are worth threads;
    otherwise BLAS gets one, and products that are arranged here divide their columns among ours."""
    if all(_alike(narrow, wide, transposed) for narrow, wide in _TRIED_SHAPES for transposed in (False, True)):
        return True
    threadpool_limits(1, user_api="blas")
    return False


_TRIED_SHAPES = ((256, 512), (512, 512), (512, 2048), (2048, 512))
_TRIED_ROWS = (8, 16, 24, 32, 40, 48, 64, 96, 120, 200, 240, 256, 504, 1024)
_MOST_PRODUCTS = 1 << 32  # multiplications that trying one number of rows may cost


@functools.cache
def _whole(narrow: int, wide: int, transposed: bool) -> bool:
    """Whether BLAS may be given whole products with weights of that shape."""
    # OpenBLAS with AVX-512 has another kernel for small products: whether one is small depends on the rows as well.
    return choose_threads() and narrow * wide >= _SMALL and _alike(narrow, wide, transposed)


def _alike(narrow: int, wide: int, transposed: bool) -> bool:
    """Whether equal rows come out equal, in products of many sizes with a weight of that shape."""
    random = np.random.default_rng(0)
    shape = (wide, narrow) if transposed else (narrow, wide)
    weight = random.standard_normal(shape, dtype=_FLOAT)
    row = random.standard_normal((1, narrow), dtype=_FLOAT)
    first = None
    for rows in _TRIED_ROWS:
        if rows * narrow * wide > _MOST_PRODUCTS:
            break
        result = np.matmul(np.repeat(row, rows, axis=0), weight.T if transposed else weight)
        first = result[0] if first is None else first
        if not (result == first).all():
            return False
    return True


# OpenBLAS's AVX2 kernel treats the first and last eight of the operand's long side apart, and any kernel has a tail. So
# the rows are made the long side (BLAS's m) and are fenced by eight rows of zeros at either end, in whole eights, at
# most _CHUNK a call, which is below the size where OpenBLAS cuts a call in two. OpenBLAS with AVX-512 also chooses its
# kernel by the size of the whole product (below m * n * k = 10^6, and by m * n): where the smallest call could fall
# below that, every call has the same number of rows. Who computes which columns depends on the weight's shape only.
_FENCE = 8
_CHUNK = 240
_SMALL = 1 << 16  # elements of a share of a weight; with 8 + 2 * 8 rows that is 1.5 * 10^6
_SMALL_CHUNK = 32
_WORTH_THREADS = 1 << 17  # elements of a weight below which handing out work costs more than it saves


def _fenced(x: Array, weight: Array, out: Array, finish: Finish) -> None:
    narrow, width = weight.shape
    threads = usable_threads() if weight.size >= _WORTH_THREADS else 1
    small = narrow * (width // threads) < _SMALL
    chunk, multiple = (_SMALL_CHUNK, _SMALL_CHUNK) if small else (_CHUNK, _EIGHT)
    starts = range(0, len(x), chunk)
    panels = [_panel(x[start : start + chunk], start, multiple) for start in starts]

    def share(columns: slice) -> None:
        for start, panel in zip(starts, panels, strict=True):
            transposed = scratch("transposed", (columns.stop - columns.start, len(panel)))
            np.matmul(weight.T[columns], panel.T, out=transposed)
            part = out[start : start + chunk, columns]
            part[...] = transposed[:, _FENCE : _FENCE + len(part)].T
            finish(part, columns)

    divide(share, width, threads)


def _panel(x: Array, start: int, multiple: int) -> Array:
    """The rows between two fences, filled up to a multiple of so many."""
    rows = -(-len(x) // multiple) * multiple
    panel = scratch(f"panel {start}", (_FENCE + rows + _FENCE, x.shape[1]))
    panel[:_FENCE] = 0
    panel[_FENCE : _FENCE + len(x)] = x
    panel[_FENCE + len(x) :] = 0
    return panel


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, usable_threads() - 1), thread_name_prefix="product")


_local = threading.local()
