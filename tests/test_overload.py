"""More work than there is room for: who waits, who is refused, and that all are answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st

from lightseq_backend.config import DecodingOptions, EngineConfig
from lightseq_backend.engine import Engine
from lightseq_backend.engine.scheduler import GIVES_WAY, Scheduler
from lightseq_backend.errors import Overloaded, RequestError
from lightseq_backend.ops import cpu
from lightseq_backend.request import HIGH, LOW, NORMAL, PRIORITIES, SCORE, Output, Request, Sequence
from lightseq_backend.serving.wire import priority_of

CONFIG, _ = small_models.gpt(max_positions=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sequence(tokens: int = 1, priority: str = NORMAL, new: int = 1, width: int = 1) -> Sequence:
    options = DecodingOptions(beam_size=width, max_new_tokens=new)
    return Sequence.of(Request(np.full(tokens, 3), options, lambda result: None, priority=priority), CONFIG)


def scheduler(clock: Callable[[], float], **config: Any) -> Scheduler:
    return Scheduler(EngineConfig(**{"slots": 1, "max_beam_size": 1, "prompt_tokens": 1000, **config}), clock)


def drained(scheduler: Scheduler) -> list[Sequence]:
    """All that waits, in the order in which it gets the slots."""
    order = []
    while admitted := scheduler.admit():
        order += admitted
        for one in admitted:
            scheduler.retire(one)
    return order


# The order -----------------------------------------------------------------------------------------------------------


def test_high_priority_goes_first_and_low_last() -> None:
    scheduled = scheduler(Clock())
    low, normal, high = (sequence(priority=priority) for priority in (LOW, NORMAL, HIGH))
    for one in (low, normal, high):
        scheduled.enqueue([one])
    assert drained(scheduled) == [high, normal, low]


def test_short_request_does_not_wait_behind_long_ones() -> None:
    scheduled = scheduler(Clock(), queue=30)
    long = [sequence(new=900) for _ in range(20)]
    short = sequence(new=5)
    scheduled.enqueue(long)
    scheduled.enqueue([short])
    assert drained(scheduled) == [short, *long]


@pytest.mark.parametrize("first", [{"priority": LOW}, {"new": 900}, {"tokens": 900}], ids=str)
def test_nothing_is_overtaken_for_ever(first: dict[str, Any]) -> None:
    """A stream of urgent short requests fills the only slot, one after the other."""
    clock = Clock()
    scheduled = scheduler(clock)
    waits = sequence(**first)
    scheduled.enqueue([waits])
    came = clock.now
    for _ in range(1000):
        scheduled.enqueue([sequence(priority=HIGH)])
        (admitted,) = scheduled.admit()
        scheduled.retire(admitted)
        if admitted is waits:
            break
        clock.now += 0.05
    assert 0 < clock.now - came <= PRIORITIES[LOW] + 1000 * GIVES_WAY


ARRIVALS = st.lists(
    st.tuples(
        st.floats(0, 5), st.sampled_from(list(PRIORITIES)), st.integers(1, 400), st.integers(1, 400), st.integers(1, 4)
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ARRIVALS, st.integers(4, 9))
def test_whatever_comes_all_start_once_and_none_is_overtaken_by_much_later(arrivals: Any, slots: int) -> None:
    clock = Clock()
    scheduled = scheduler(clock, slots=slots, max_beam_size=4)
    came, started = [], []
    for pause, priority, tokens, new, width in arrivals:
        clock.now += pause
        came.append(sequence(tokens, priority, new, width))
        scheduled.enqueue(came[-1:])
        if len(came) % 3 == 0:
            admitted = scheduled.admit()
            started += admitted
            for one in admitted:
                scheduled.retire(one)
    started += drained(scheduled)
    assert sorted(map(id, started)) == sorted(map(id, came))
    for place, one in enumerate(started):
        gives_way = PRIORITIES[one.request.priority] + GIVES_WAY * (one.rows + one.limit)
        assert all(other.arrived <= one.arrived + gives_way for other in started[:place])
    assert (scheduled.waiting, scheduled.tokens, scheduled.slots_in_use) == (0, 0, 0)


# The bounds ----------------------------------------------------------------------------------------------------------


def test_full_queue_of_tokens_takes_all_of_a_batch_or_nothing() -> None:
    scheduled = scheduler(Clock(), queue_tokens=100)
    scheduled.enqueue([sequence(60)])
    with pytest.raises(Overloaded, match="holds 60 of 100 tokens and cannot take 41 more; come again in"):
        scheduled.enqueue([sequence(1), sequence(40)])
    assert (scheduled.waiting, scheduled.tokens) == (1, 60)
    scheduled.enqueue([sequence(40)])
    drained(scheduled)
    assert (scheduled.waiting, scheduled.tokens) == (0, 0)
    scheduled.enqueue([sequence(100)])


def test_low_priority_leaves_half_of_the_queue_to_others() -> None:
    scheduled = scheduler(Clock(), queue=5)
    scheduled.enqueue([sequence(priority=LOW) for _ in range(3)])
    with pytest.raises(Overloaded, match="3 of 3 places for low priority taken and cannot take 1 more"):
        scheduled.enqueue([sequence(priority=LOW)])
    scheduled.enqueue([sequence(), sequence(priority=HIGH)])
    with pytest.raises(Overloaded, match="5 of 5 places taken and cannot take 1 more"):
        scheduled.enqueue([sequence(priority=HIGH)])


def test_refused_caller_is_told_when_there_will_be_room() -> None:
    """By the pace of the queue: here one sequence leaves it every half second, after an hour without any."""
    clock = Clock()
    scheduled = scheduler(clock, queue=4)
    scheduled.enqueue([sequence()])
    drained(scheduled)
    clock.now += 3600
    scheduled.enqueue([sequence() for _ in range(4)])
    for _ in range(6):
        clock.now += 0.5
        (admitted,) = scheduled.admit()
        scheduled.retire(admitted)
        scheduled.enqueue([sequence()])
    for more, seconds in ((1, "0.5"), (3, "1.5")):
        with pytest.raises(Overloaded, match=rf"come again in {seconds} s"):
            scheduled.enqueue([sequence() for _ in range(more)])


def test_age_is_that_of_the_oldest() -> None:
    clock = Clock()
    scheduled = scheduler(clock)
    assert scheduled.age == 0
    scheduled.enqueue([sequence(priority=LOW)])
    clock.now += 3
    scheduled.enqueue([sequence(priority=HIGH)])
    assert scheduled.age == 3


def test_what_waits_too_long_is_taken_out() -> None:
    clock = Clock()
    scheduled = scheduler(clock, queue_seconds=5)
    old, young = sequence(7), sequence(2)
    scheduled.enqueue([old])
    clock.now += 4
    scheduled.enqueue([young])
    assert scheduled.remove_expired() == []
    clock.now += 2
    assert scheduled.remove_expired() == [old]
    assert (scheduled.tokens, drained(scheduled)) == (2, [young])


@pytest.mark.parametrize(
    ("parameters", "priority"), [("", NORMAL), ("{}", NORMAL), ('{"queue_priority": "low", "beam_size": 2}', LOW)]
)
def test_priority_is_a_parameter_of_the_request(parameters: str, priority: str) -> None:
    assert priority_of(parameters) == priority


@pytest.mark.parametrize("value", ['"urgent"', "1", "null", "true"])
def test_unknown_priority_is_refused(value: str) -> None:
    with pytest.raises(RequestError, match=r"queue_priority is .*; priorities are high, normal, low"):
        priority_of(f'{{"queue_priority": {value}}}')


# What waits too long --------------------------------------------------------------------------------------------------


class Held:
    """An engine whose next step stands still until `go_on`, and what came back from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **config: Any):
        self.engine = small_models.engine(*small_models.transformer(), slots=4, max_beam_size=4, **config)
        self.results: list[Output | Exception] = []
        self.stands, self._goes_on, works = threading.Event(), threading.Event(), cpu.beam_step

        def hang(*arguments: Any) -> None:
            self.stands.set()
            assert self._goes_on.wait(30)
            works(*arguments)

        monkeypatch.setattr(cpu, "beam_step", hang)

    def submit(self, count: int) -> None:
        options = self.engine.options({"max_new_tokens": 1})
        for _ in range(count):
            self.engine.submit([Request(np.array([3]), options, self.results.append)])

    def go_on(self) -> None:
        self._goes_on.set()


def test_what_waits_too_long_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, queue_seconds=5)
    held.submit(1)
    held.engine.start()
    assert held.stands.wait(30)
    held.submit(3)
    later = time.monotonic() + 6
    monkeypatch.setattr(held.engine._scheduler, "_clock", lambda: later)
    held.engine.expire()
    assert [type(result) for result in held.results] == [Overloaded] * 3
    assert "has waited for 5 s, the limit; come again later" in str(held.results[0])
    held.go_on()
    held.engine.stop(30)
    assert isinstance(held.results[3], Output)


# What is told of it ---------------------------------------------------------------------------------------------------


def test_timings_are_in_order_and_of_each_answer() -> None:
    engine = small_models.engine(*small_models.gpt(), slots=4, max_beam_size=4, burst=2)
    changes = {"sampling_method": "sample", "seed": 1, "temperature": 50.0, "max_new_tokens": 7}
    outputs = engine.answer([[3], [4], [5]], changes=changes)
    engine.answer([[3, 4]], SCORE)
    assert len(engine.timings) == 4
    for timing in engine.timings:
        assert 0 <= timing.queue <= timing.first_token <= timing.total
    by_steps = [timing.token is not None for timing in engine.timings]
    assert sum(by_steps) == sum(output.steps > 2 for output in outputs)


def test_rows_of_steps_are_counted() -> None:
    engine = small_models.engine(*small_models.transformer(end_bias=-1e4), slots=8, max_beam_size=4)
    engine.answer([[3], [4]], changes={"beam_size": 3, "max_new_tokens": 4})
    assert engine.counts["step_rows"] == 6 * engine.counts["steps"] > 0
    assert engine.step_seconds > 0


@pytest.mark.parametrize("build", [small_models.gpt, small_models.transformer])
@pytest.mark.parametrize("scores", [True, False])
def test_warm_up_runs_and_leaves_no_trace(build: Any, scores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = small_models.engine(*build(), scores=scores), []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: calls.append(1) or step())
    engine.warm_up()
    assert calls
    assert (dict(engine.counts), len(engine.timings), engine.step_seconds) == ({}, 0, 0.0)
    assert (engine.idle, engine.slots_in_use) == (True, 0)


def test_warm_up_shows_what_is_wrong_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Engine = small_models.engine(*small_models.transformer())

    def fail(*arguments: Any, **named: Any) -> None:
        raise FloatingPointError("the device computes nonsense")

    monkeypatch.setattr(cpu, "cross_attention", fail)
    with pytest.raises(FloatingPointError, match="nonsense"):
        engine.warm_up()
