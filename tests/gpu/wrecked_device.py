"""An engine whose GPU a kernel wrecks while requests are under way; prints what became of them as JSON.

A program of its own, because nothing else in its process can use that GPU any more: see test_cuda_faults.py.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cupy
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import small_models

from lightseq_backend import ops
from lightseq_backend.config import EngineConfig
from lightseq_backend.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import Request

SOURCE = 'extern "C" __global__ void wreck(int* nowhere) { *nowhere = 1; }'
ENDLESS = {"sampling_method": "sample", "temperature": 1000.0, "seed": 1}
REQUESTS = 200  # most of them wait
PATIENCE = 60.0  # seconds


def main(kind: str) -> None:
    # Among so many tokens of equal chances the end id hardly ever comes.
    wide = {"target_vocabulary": 5000} if kind == "transformer" else {"vocabulary": 5000, "padding_id": 5000}
    config, arrays = getattr(small_models, kind)(3, max_positions=2000, **wide)
    gpu = ops.load("cuda", 0, "fp16")
    model: Any = (Transformer if kind == "transformer" else Gpt)(config, arrays, gpu)
    engine = Engine(model, EngineConfig(slots=8, max_beam_size=4, queue=REQUESTS), gpu)
    wreck = cupy.RawKernel(SOURCE, "wreck")
    with gpu._stream:
        wreck((1,), (1,), (cupy.zeros(1, np.int32),))  # compiled, and harmless so far
    engine.answer([[3, 4]], changes={"max_new_tokens": 3})

    results: dict[int, list[str]] = {}
    done = threading.Condition()

    def reply_to(number: int) -> Any:
        def reply(result: Any) -> None:
            with done:
                text = f"{type(result).__name__}: {result}" if isinstance(result, Exception) else "answered"
                results.setdefault(number, []).append(text)
                done.notify()

        return reply

    def requests(first: int, count: int) -> list[Request]:
        options = engine.options(ENDLESS)
        return [Request(np.array([3, 4]), options, reply_to(number)) for number in range(first, first + count)]

    engine.submit(requests(0, REQUESTS))
    engine.start()
    deadline = time.monotonic() + PATIENCE
    while (engine.slots_in_use < 8 or engine.counts["steps"] < 20) and time.monotonic() < deadline:
        time.sleep(0.001)
    with gpu._stream:
        wreck((1,), (1,), (np.uint64(16),))
    started = time.monotonic()
    with done:
        in_time = done.wait_for(lambda: len(results) == REQUESTS, PATIENCE)
    answered_after = time.monotonic() - started
    try:
        engine.submit(requests(REQUESTS, 1))
        later = "taken"
    except Exception as error:
        later = f"{type(error).__name__}: {error}"
    started = time.monotonic()
    ready, alive, slots_in_use = engine.ready, engine.alive, engine.slots_in_use
    engine.stop()
    report = {
        "in_time": in_time,
        "answered_after": answered_after,
        "fault": engine.fault,
        "ready": ready,
        "alive": alive,
        "slots_in_use": slots_in_use,
        "later": later,
        "stopped_after": time.monotonic() - started,
        "results": results,
    }
    print("REPORT", json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
