"""A server under mixed load: right answers, and memory that does not grow. MINUTES of `make test-faults`."""

from __future__ import annotations

import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from repositories import GPT, grpc, write_model
from stream_cases import DECOUPLED, Stream, streamed
from test_operations import (
    Crowd,
    answers_alone,
    engine_process,
    model_process,
    resident,
    wait_until_idle,
    write_crowded,
)
from weight_files import golden

from lightseq_backend.serving.embedded import EmbeddedServer

MINUTES = float(os.environ.get("LIGHTSEQ_SOAK_MINUTES", 0.25))
CALLERS, STREAMS = 12, 4
# A quarter of a minute tells of leaks of every request alone: allocators and Triton's shared memory still settle.
GROWTH = 0.02 if MINUTES >= 5 else 0.2
# A call whose client gives up is cancelled, in the end as a stream is: see go_on_streaming.
KINDS = {kind: often for kind, often in Crowd.KINDS.items() if kind != "timeout"}
NOT_UNDER_WAY = "no request with the id '{}' is under way here"  # of one that ended just before
MODELS = ("translate", "generate", "text_stream")


class Clock:
    """Turns, until an end that an error brings forward."""

    def __init__(self, seconds: float):
        self._over, self._deadline = threading.Event(), time.monotonic() + seconds

    def turns(self) -> Iterator[None]:
        while not self._over.is_set() and time.monotonic() < self._deadline:
            yield

    def stop(self) -> None:
        self._over.set()


def go_on_streaming(address: str, texts: int, clock: Clock, counts: list[int]) -> None:
    """So many texts to a gRPC stream, read to their end, every third stopped by its id under way. None is cancelled:
    Triton 24.10 does not live long with that under load (docs/operate.md)."""
    options = {"sampling_method": "sample", "seed": 3, "min_new_tokens": 20}
    numbers = (number for number, _ in enumerate(clock.turns()))
    with grpc(address) as client:
        for first in numbers:
            with Stream(client) as stream:
                for number in itertools.chain([first], itertools.islice(numbers, texts - 1)):
                    name = f"{threading.get_ident()} {number}"
                    stream.send("text_stream", "token_ids", [[5, 6, 7]], request_id=name, **options)
                    assert not stream.next()["final"].all()
                    if number % 3:
                        stream.end()
                    else:
                        stream.send("text_stream", "token_ids", [[5]], cancel_request_id=name)
                        errors = {f"the request was stopped by its id, {name}", NOT_UNDER_WAY.format(name)}
                        assert stream.ends(2) <= errors
                    counts.append(1)


@pytest.mark.timeout(120 + 80 * MINUTES)
@pytest.mark.parametrize("texts", [100, 1], ids=["streams that stay open", "a stream for each text"])
def test_memory_is_flat_and_answers_stay_right(tmp_path: Path, texts: int) -> None:
    write_crowded(tmp_path)
    write_model(tmp_path, "text_stream", golden("g01_base.pb"), streamed(GPT), more=DECOUPLED)
    with EmbeddedServer(tmp_path, device="cpu", stop_timeout=5) as server:
        with grpc(server.grpc) as client:
            crowd = Crowd(server, answers_alone(client), KINDS)
        processes = {name: model_process(server, name) for name in MODELS}
        processes |= {f"{name}'s engine": engine_process(server, name) for name in MODELS}
        processes["triton"] = server.pid
        memory: dict[str, list[int]] = {name: [] for name in processes}
        clock, streams = Clock(60 * MINUTES), []
        with ThreadPoolExecutor(CALLERS + STREAMS) as pool:
            tasks = [pool.submit(crowd.connection, number, clock.turns()) for number in range(CALLERS)]
            tasks += [pool.submit(go_on_streaming, server.grpc, texts, clock, streams) for _ in range(STREAMS)]
            for _ in clock.turns():
                for name, process in processes.items():
                    memory[name].append(resident(process))
                time.sleep(0.25)
                if any(task.done() and task.exception() for task in tasks):
                    clock.stop()
        print(server.log_end())  # of a server that has ended, why
        for task in tasks:
            task.result()
        for name in MODELS:
            wait_until_idle(server, name)
    print(f"\n{sum(crowd.outcomes.values())} requests and {len(streams)} streamed texts in {MINUTES:g} minutes")
    assert crowd.wrong == []
    assert crowd.unexpected() == []
    for name, samples in memory.items():
        print(f"{name}, MiB by fifths: " + ", ".join(f"{each / 2**20:.2f}" for each in fifths(samples)))
    grown = {name: growth(samples) for name, samples in memory.items()}
    assert {name: share for name, share in grown.items() if share > GROWTH} == {}


def fifths(samples: list[int]) -> list[float]:
    """Medians of the five parts of the time."""
    size = len(samples) // 5
    return [statistics.median(samples[size * part : size * (part + 1)]) for part in range(5)]


def growth(samples: list[int]) -> float:
    """From the second fifth, after warm-up, to the last."""
    _, early, _, _, late = fifths(samples)
    return late / early - 1


def test_growth_is_that_after_warm_up() -> None:
    assert growth([*range(10), *[100] * 30, *[102] * 10]) == pytest.approx(0.02)
