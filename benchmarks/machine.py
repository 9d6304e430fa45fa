"""What a measurement was taken on: processor, versions, the BLAS kernel in use, how busy the machine was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from datetime import datetime, timezone
from typing import Any

PACKAGES = ("numpy", "torch", "transformers", "ctranslate2")


def describe() -> dict[str, Any]:
    """Processor, cores this process may use, versions, date and load, ready for JSON."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """The model, as the kernel names it; cloud machines often hide the exact one, so its numbers follow."""
    with open("/proc/cpuinfo") as lines:
        fields = dict(re.split(r"\s*:\s*", line.strip(), maxsplit=1) for line in lines if ":" in line)
    name = fields.get("model name", platform.machine())
    numbers = [f"{key} {fields[field]}" for key, field in _NUMBERS.items() if field in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


_NUMBERS = {"family": "cpu family", "model": "model"}


def file_name(gpu: str | None = None) -> str:
    """For results/: that GPU, or the processor and the cores in use, in letters a file name can hold."""
    name = f"gpu {gpu}" if gpu else f"{processor()} {len(os.sched_getaffinity(0))} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def blas() -> str:
    """The library that NumPy multiplies with in this process, and the kernel it chose."""
    import numpy as np
    from threadpoolctl import threadpool_info

    found = [pool for pool in threadpool_info() if pool["user_api"] == "blas" and _belongs_to_numpy(pool, np)]
    names = [f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')}".strip() for pool in found]
    return ", ".join(names) or "unknown"


def _belongs_to_numpy(pool: dict[str, Any], numpy: Any) -> bool:
    folder = os.path.dirname(numpy.__file__)
    return str(pool["filepath"]).startswith((folder, f"{folder}.libs")) or "site-packages" not in pool["filepath"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory() -> int:
    """Bytes of this process at its largest. ru_maxrss would do, but a new process inherits its parent's."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def busy_seconds() -> float:
    """Processor time that all cores together have spent on anything since the machine started, stolen time included."""
    with open("/proc/stat") as lines:
        ticks = [int(value) for value in lines.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(patience: float, share: float = 0.1) -> None:
    """Returns when the cores have been at most `share` busy for a tenth of a second, or after `patience` seconds."""
    cores, deadline = os.cpu_count() or 1, time.monotonic() + patience
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(0.1)
        if busy_seconds() - before <= share * 0.1 * cores:
            return
