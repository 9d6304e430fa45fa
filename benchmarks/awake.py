"""Cores that do not fall asleep while something is measured: what waking them up costs shows."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

LATENCY = Path("/dev/cpu_dma_latency")  # microseconds that waking up may take, while the file is open
_SPIN = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"


@contextmanager
def cores_awake() -> Iterator[str]:
    """How it is done: by what Linux has for it, or, where that cannot be had, by a process for each core that spins
    whenever nobody else wants it."""
    with ExitStack() as opened:
        if _holds(opened):
            yield f"a 0 held in {LATENCY}"
            return
        cores = os.sched_getaffinity(0)
        for _ in cores:
            opened.callback(_end, subprocess.Popen([sys.executable, "-c", _SPIN]))
        yield f"{len(cores)} processes of SCHED_IDLE that spin"


def _holds(opened: ExitStack) -> bool:
    try:
        opened.enter_context(LATENCY.open("r+b", buffering=0)).write(struct.pack("=i", 0))
    except OSError:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
