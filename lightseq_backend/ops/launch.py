"""CUDA sources into kernels: joined, compiled once by CuPy's RawKernel (which keeps the result on disk), launched.

Launch arithmetic is in ops/cuda.py; this module only knows how source text becomes something callable. Launches go
through cuLaunchKernelEx, because RawKernel's own call knows neither clusters nor programmatic dependent launch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_*
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class Kernel:
    """One __global__ function, for one set of defines."""

    def __init__(self, family: str, name: str, defines: tuple[tuple[str, int], ...]):
        import cupy

        options = ("-std=c++17", *(f"-D{key}={value}" for key, value in defines))
        self.name = name
        self._kernel = cupy.RawKernel(_source(family), name, options=options)
        self._shared = 48 * 1024

    def __call__(
        self,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
        *,
        stream: int,
        shared: int = 0,
        cluster: int = 1,
        early: bool = False,
    ) -> None:
        """Queues the kernel.

        arguments  arrays, None (a null pointer), ints (int32), numpy.int64 or floats (float32)
        stream     cudaStream_t
        cluster    blocks in x that form a cluster (sm_90 and later)
        early      may begin before the kernel in front has ended: it waits for it itself (sm_90 and later)
        """
        if shared > self._shared:
            self._kernel.max_dynamic_shared_size_bytes = self._shared = shared
        values = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            attributes[count].id = _CLUSTER_DIMENSION
            attributes[count].value[0:3] = [cluster, 1, 1]
            count += 1
        if early:
            attributes[count].id = _PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[count].value[0] = 1
            count += 1
        whole_grid = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        config = _Config(whole_grid, (ctypes.c_uint * 3)(block, 1, 1), shared, stream, attributes, count)
        status = _driver().cuLaunchKernelEx(
            ctypes.byref(config), ctypes.c_void_p(self._kernel.kernel.ptr), pointers, None
        )
        if status:
            raise RuntimeError(f"launching {self.name} failed with CUDA error {status}; grid {grid}, shared {shared}")


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    if hasattr(value, "data") and hasattr(value.data, "ptr"):
        return ctypes.c_void_p(value.data.ptr)
    if isinstance(value, np.int64):
        return ctypes.c_int64(int(value))
    if isinstance(value, int):
        return ctypes.c_int32(value)
    return ctypes.c_float(value)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _source(family: str) -> str:
    """common.cuh and kernels/<family>.cu as one text: CuPy's cache does not look into what a source includes."""
    kernels = resources.files("lightseq_kernels")
    return (kernels / "common.cuh").read_text() + (kernels / f"{family}.cu").read_text()
