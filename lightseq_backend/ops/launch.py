"""CUDA sources into kernels: joined, compiled once by CuPy's RawKernel (which keeps the result on disk), launched.

Launch arithmetic is in ops/cuda.py; this module only knows how source text becomes something callable. Launches go
through cuLaunchKernelEx, because RawKernel's own call knows neither clusters nor programmatic dependent launch.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Sequence
from importlib import resources
from typing import Any

_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_*
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_SHARED_MEMORY_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_*
_MOST_ARGUMENTS = 24
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_FLOAT, _FLOAT_BYTES = struct.Struct("<I"), struct.Struct("<f")


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

    def __init__(self, family: str, name: str, defines: tuple[tuple[str, int], ...], architecture: str | None = None):
        """architecture: for instructions of one generation alone (sm_90a); else the device's own is compiled for."""
        import cupy

        target = (f"-arch={architecture}",) if architecture else ()  # NVRTC heeds the first, CuPy adds its own behind
        options = (*target, "-std=c++17", *(f"-D{key}={value}" for key, value in defines))
        self.name = name
        self._kernel = cupy.RawKernel(source(family), name, options=options)
        self._shared, self._carveout = 48 * 1024, -1
        # Written anew for every launch, made once: a prefill pass makes hundreds of launches.
        self._values = (ctypes.c_uint64 * _MOST_ARGUMENTS)()
        address, size = ctypes.addressof(self._values), ctypes.sizeof(ctypes.c_uint64)
        self._pointers = (ctypes.c_void_p * _MOST_ARGUMENTS)(*range(address, address + size * _MOST_ARGUMENTS, size))
        self._attributes = (_Attribute * 2)()
        self._config = _Config(attributes=self._attributes)
        self._address = ctypes.byref(self._config)

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
        carveout: int = -1,
    ) -> None:
        """Queues the kernel. One thread at a time.

        arguments  arrays, None (a null pointer), ints (int32), floats (float32) or structures as ctypes arrays
        stream     cudaStream_t
        cluster    blocks in x that form a cluster (sm_90 and later)
        early      may begin before the kernel in front has ended: it waits for it itself (sm_90 and later)
        carveout   per cent of a multiprocessor's memory that are to be shared memory, the rest is L1; -1: as the driver
                   thinks. It stays with the kernel.
        """
        if carveout != self._carveout:
            status = driver().cuFuncSetAttribute(self._handle, _SHARED_MEMORY_CARVEOUT, carveout)
            if status:
                raise RuntimeError(f"{self.name} cannot have {carveout} % shared memory: {_explained(status)}")
            self._carveout = carveout
        if shared > self._shared:
            self._kernel.max_dynamic_shared_size_bytes = self._shared = shared
        values = self._values
        for i, value in enumerate(arguments):
            if isinstance(value, ctypes.Array):  # the launch copies it
                self._pointers[i] = ctypes.addressof(value)
            else:
                values[i] = _bits(value)
        config, count = self._config, 0
        if cluster > 1:
            self._attributes[count].id = _CLUSTER_DIMENSION
            self._attributes[count].value[0:3] = [cluster, 1, 1]
            count += 1
        if early:
            self._attributes[count].id = _PROGRAMMATIC_STREAM_SERIALIZATION
            self._attributes[count].value[0] = 1
            count += 1
        config.grid[0:3] = [*grid, 1, 1][:3]
        config.block[0:3] = [block, 1, 1]
        config.shared, config.stream, config.attribute_count = shared, stream, count
        status = driver().cuLaunchKernelEx(self._address, self._handle, self._pointers, None)
        if status:
            launch = f"grid {tuple(grid)}, block {block}, shared {shared}"
            raise RuntimeError(f"{self.name} was not launched: {_explained(status)}; {launch}")

    @functools.cached_property
    def _handle(self) -> ctypes.c_void_p:
        """CUfunction; compiles the source, or finds it compiled."""
        return ctypes.c_void_p(self._kernel.kernel.ptr)


def _bits(value: Any) -> int:
    """An argument as the eight bytes that its one to eight bytes are read from; the machine is little-endian."""
    if isinstance(value, int):
        return value & 0xFFFFFFFF
    if value is None:
        return 0
    if isinstance(value, float):
        return int(_FLOAT.unpack(_FLOAT_BYTES.pack(value))[0])
    return int(value.data.ptr)


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _explained(status: int) -> str:
    """A CUresult as the driver names and explains it."""
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    driver().cuGetErrorName(status, ctypes.byref(name))
    driver().cuGetErrorString(status, ctypes.byref(text))
    known = f"{name.value.decode()}: {text.value.decode()}" if name.value and text.value else "no such error is known"
    return f"CUDA error {status} ({known})"


@functools.cache
def source(family: str) -> str:
    """common.cuh, what kernels/<family>.cu includes of kernels/, and that file itself as one text, with lines that keep
    their numbers in messages: CuPy's cache does not look into what a source includes."""
    kernels = resources.files("lightseq_kernels")
    own = (kernels / f"{family}.cu").read_text()
    names = ["common.cuh", *_INCLUDE.findall(own), f"{family}.cu"]
    texts = [_INCLUDE.sub("", (kernels / name).read_text()) for name in names]
    return "\n".join(f'#line 1 "{name}"\n{text}' for name, text in zip(names, texts))
