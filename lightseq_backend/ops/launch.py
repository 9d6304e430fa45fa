"""CUDA sources into kernels: joined, compiled once by CuPy's RawKernel (which keeps the result on disk), launched.

Launch arithmetic is in ops/cuda.py; this module only knows how source text becomes something callable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

Dimensions = tuple[int, ...]


class Kernel:
    """One __global__ function, for one set of defines.

    Arguments are checked and typed here, because RawKernel would hand a Python int to the device as eight bytes and a
    float as a double, and takes strided views without a word.
    """

    def __init__(self, family: str, name: str, defines: tuple[tuple[str, int], ...]):
        import cupy

        options = ("-std=c++17", *(f"-D{key}={value}" for key, value in defines))
        self._kernel = cupy.RawKernel(_source(family), name, options=options)
        self._shared = 48 * 1024

    def __call__(self, grid: Dimensions, block: Dimensions, arguments: Sequence[Any], shared: int = 0) -> None:
        """Queues the kernel on the current stream. Python ints become int32, floats float32."""
        if shared > self._shared:
            self._kernel.max_dynamic_shared_size_bytes = self._shared = shared
        self._kernel(grid, block, tuple(map(_argument, arguments)), shared_mem=shared)


def _argument(value: Any) -> Any:
    if isinstance(value, bool | int):
        return np.int32(value)
    if isinstance(value, float):
        return np.float32(value)
    return value


@functools.cache
def _source(family: str) -> str:
    """common.cuh and kernels/<family>.cu as one text: CuPy's cache does not look into what a source includes."""
    kernels = resources.files("lightseq_kernels")
    return (kernels / "common.cuh").read_text() + (kernels / f"{family}.cu").read_text()
