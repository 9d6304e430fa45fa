"""The processor's cores: how many there are for us, and keeping them from falling asleep."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightseq_backend.errors import ConfigError

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
# Ends by SIGKILL with the thread that started it (PR_SET_PDEATHSIG), or at once if that has happened already.
_SPIN = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
if os.getppid() != int(sys.argv[1]): sys.exit()
while True: pass
"""


def usable_cpus() -> int:
    """Cores this process may really use: its affinity, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


@contextmanager
def cores_awake() -> Iterator[str]:
    """A process for each core that spins whenever nobody else wants it; says so.

    A core with nothing to do is halted, and a virtual machine's is then given away: to wake it up takes a tenth of a
    millisecond, and an answer goes through four or five threads that wait. (A 0 in /dev/cpu_dma_latency, which is for
    this, does not reach the host's cores.) ConfigError: a CPU quota, which they would use up.
    """
    cores = len(os.sched_getaffinity(0))
    if usable_cpus() < cores:
        raise ConfigError(
            f"cores cannot be kept awake: there is a CPU quota of {usable_cpus()} for {cores} cores, which processes "
            "that spin would use up; give cores by affinity instead (cpuset)"
        )
    with ExitStack() as opened:
        for _ in range(cores):
            opened.callback(_end, subprocess.Popen([sys.executable, "-c", _SPIN, str(os.getpid())]))
        yield f"{cores} processes of SCHED_IDLE that spin"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
