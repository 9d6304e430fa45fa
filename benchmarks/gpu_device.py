"""The GPU itself: its name and versions, and what it does at best, which floors are computed from."""

from __future__ import annotations

import gc
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine
from benchmarks.gpu_records import versions
from benchmarks.gpu_timing import Clock, CupyClock, HostClock, device_seconds
from lightseq_backend import ops
from lightseq_backend.serving.device import gpu_obstacle

COPIED = 1 << 30  # bytes of the device copy that bandwidth is measured with; it reads and writes as many
_ARITHMETIC = {"int8": "fp16"}  # of precisions whose products are another's
_FACTORS = {"fp16": 8192, "fp32": 4096}  # side of the square product that arithmetic is measured with


class Rates(NamedTuple):
    """Measured: bytes a second of a copy, operations a second of a large product."""

    bytes: float
    operations: dict[str, float]  # by precision

    def floor(self, size: int, operations: int, precision: str) -> float:
        """Seconds that so many bytes and operations take at least."""
        rate = self.operations.get(precision, 0.0)
        return max(size / self.bytes, operations / rate if rate else 0.0)


def require(device: str) -> None:
    """SystemExit, in one line, where that device cannot be measured."""
    obstacle = gpu_obstacle() if device == "cuda" else None
    if obstacle:
        raise SystemExit(f"nothing to measure: {obstacle}")


def conditions(device: str) -> dict[str, Any]:
    """GPU and versions."""
    if device == "cpu":
        return {"gpu": "no GPU", **versions("numpy")}
    import cupy

    runtime = cupy.cuda.runtime
    name = runtime.getDeviceProperties(0)["name"]
    return {
        "gpu": name.decode() if isinstance(name, bytes) else str(name),
        "driver": driver(),
        "CUDA": _dotted(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
        **versions("numpy"),
    }


def machine_with(device: str) -> dict[str, Any]:
    """machine.describe(), and of a device that is not "cpu" its conditions too."""
    return {**machine.describe(), **({} if device == "cpu" else conditions("cuda"))}


def measure(device: str, precisions: Sequence[str]) -> Rates:
    """The rates that floors are computed from; takes a few tenths of a second."""
    if device == "cpu":
        source, destination = np.ones(1 << 26, np.uint8), np.zeros(1 << 26, np.uint8)
        seconds = device_seconds(HostClock(), lambda: np.copyto(destination, source), 1, 5)
        return Rates(2 * source.nbytes / seconds, {})
    rates = Rates(_copy_rate(), {each: _product_rate(_ARITHMETIC.get(each, each)) for each in precisions})
    release(device)
    return rates


def clock(engine: Any) -> Clock:
    """That of the device an engine works on."""
    return clock_of(engine._ops)


def clock_of(backend: Any) -> Clock:
    """backend: what ops.load returns."""
    return HostClock() if backend.NAME == "cpu" else CupyClock(backend._stream)


def release(device: str) -> None:
    """Gives back the device memory of engines that nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()


def cache_size(device: str) -> int:
    """Bytes of the device's last cache; 0 for a CPU."""
    if device == "cpu":
        return 0
    import cupy

    return int(cupy.cuda.Device().attributes["L2CacheSize"])


def driver() -> str:
    """The NVIDIA driver's version."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
        if found:
            return found.group(1)
    except OSError:
        pass
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.splitlines()[0].strip() if answer.strip() else "unknown"


def _copy_rate() -> float:
    import cupy

    runtime = cupy.cuda.runtime
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        source, destination = cupy.ones(COPIED, cupy.uint8), cupy.zeros(COPIED, cupy.uint8)

    def copy() -> None:
        runtime.memcpyAsync(destination.data.ptr, source.data.ptr, COPIED, runtime.memcpyDeviceToDevice, stream.ptr)

    return 2 * COPIED / device_seconds(CupyClock(stream), copy, 4, 10)


def _product_rate(precision: str) -> float:
    """cuBLAS through the engine's own call: float32 sums, no TF32."""
    import cupy

    backend, side = ops.load("cuda", 0, precision), _FACTORS[precision]
    block = np.random.default_rng(0).standard_normal((64, side), dtype=np.float32)
    with backend._stream:
        x = cupy.asarray(np.tile(block, (side // 64, 1))).astype(backend.FLOAT)
        out = cupy.empty_like(x)
    seconds = device_seconds(clock_of(backend), lambda: backend._cublas.product(x, x, False, out), 4, 10)
    return 2.0 * side**3 / seconds


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
