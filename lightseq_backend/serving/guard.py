"""Ends a model's process when the server that started it is gone: Triton 24.10's stub would go on for ever.

A process of its own, run from this file, looks after it. A thread of the model's could be kept from running for ever:
calls into Triton's library wait, Python's lock in hand, for locks that a killed server held. The kernel's own
means (PR_SET_PDEATHSIG) comes too early: when the server's thread ends that loaded the model.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

log = logging.getLogger(__name__)

PERIOD = 1.0  # seconds


class Guard:
    """Watches over this process, a child of the server's, until `close`. Where it cannot, it says so in the log."""

    def __init__(self) -> None:
        program = [sys.executable, "-I", "-S", __file__, str(os.getppid()), str(os.getpid())]
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(program, stdin=subprocess.DEVNULL)
        except OSError as error:
            log.warning("this process will outlive a server that is killed: no guard: %s", error)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def watch(server: int, model: int) -> None:
    """Kills the process `model`, whose child this one is, once it is not a child of `server` any more; returns when it
    has ended."""
    while os.getppid() == model:
        if _parent_of(model) not in (server, None):
            os.kill(model, signal.SIGKILL)
            return
        time.sleep(PERIOD)


def _parent_of(process: int) -> int | None:
    try:
        with open(f"/proc/{process}/stat") as fields:
            return int(fields.read().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    watch(int(sys.argv[1]), int(sys.argv[2]))
