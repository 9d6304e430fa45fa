"""The engine without a server, as many sequences always under way as are asked for: a process of its own.

    python -m benchmarks.server_engine WEIGHTS DEVICE SLOTS     (lines of JSON in, lines of JSON out)

Each line it reads is {"rows": [[ids]], "concurrency": n, "seconds": s}; each it writes is a Run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.server_run import Run, summary
from lightseq_backend import local
from lightseq_backend.engine import Engine
from lightseq_backend.request import Output, Request

PATIENCE = 120  # seconds


class EngineAlone:
    """The other end of such a process; environment: its variables."""

    def __init__(self, weights: Path, device: str, slots: int, environment: dict[str, str]):
        command = [sys.executable, "-m", "benchmarks.server_engine", str(weights), device, str(slots)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def measure(self, rows: Sequence[Sequence[int]], concurrency: int, seconds: float) -> Run:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"rows": rows, "concurrency": concurrency, "seconds": seconds}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return Run(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> EngineAlone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    weights, device, slots = sys.argv[1:]
    engine = local.build(weights, device=device, slots=int(slots))
    engine.start()
    for line in sys.stdin:
        print(json.dumps(closed_loop(engine, **json.loads(line))._asdict()), flush=True)


def closed_loop(engine: Engine, rows: list[list[int]], concurrency: int, seconds: float) -> Run:
    """`concurrency` sequences, each followed by the next of the rows as soon as it is answered; for so long once as
    many were answered, or for as long as that took."""
    turn, options = cycle([np.array(row, np.int64) for row in rows]), engine.options({"num_hypotheses": 1})
    lock, over, done = threading.Lock(), threading.Event(), threading.Event()
    requests: list[tuple[float, list[float], int]] = []
    under_way = concurrency

    def submit() -> None:
        began = time.monotonic()

        def reply(result: Any) -> None:  # on the engine's thread
            nonlocal under_way
            assert isinstance(result, Output), result
            requests.append((began, [time.monotonic()], len(result.hypotheses[0].tokens)))
            if not over.is_set():
                submit()
                return
            under_way -= 1
            if not under_way:
                done.set()

        with lock:
            row = next(turn)
        engine.submit([Request(row, options, reply)])

    for _ in range(concurrency):
        submit()
    began = time.monotonic()
    while len(requests) < concurrency and time.monotonic() < began + PATIENCE:
        time.sleep(0.01)
    start, used = time.monotonic(), time.process_time()
    time.sleep(max(seconds, start - began))
    end, used = time.monotonic(), time.process_time() - used
    over.set()
    assert done.wait(PATIENCE)
    return summary(requests, start, end, {"engine": used / (end - start)})


if __name__ == "__main__":
    main()
