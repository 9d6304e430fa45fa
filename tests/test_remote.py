"""An engine in a process of its own: it answers as one in this process does; whatever ends it, all are answered."""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repositories import golden_cases
from test_embedded import group_of
from test_golden import columns
from test_instances import until
from test_serving import settings
from weight_files import golden

from lightseq_backend.config import DecodingOptions
from lightseq_backend.engine import Engine
from lightseq_backend.errors import Cancelled, ConfigError, DeadlineExceeded, Overloaded, RequestError, WeightError
from lightseq_backend.request import Hypothesis, Output, Request
from lightseq_backend.serving import remote as module
from lightseq_backend.serving.link import MOST_OPTIONS, Gone, Link, Progress, Reply, Row, Soon, Submit
from lightseq_backend.serving.loading import load_engine
from lightseq_backend.serving.remote import PATIENCE, RemoteEngine
from lightseq_backend.serving.settings import Settings
from lightseq_backend.serving.watch import Watch

CASES = golden_cases("t01_base")
ROW = CASES[2]["source_ids"][0]  # takes 32 steps
QUEUE = 256
STOPPED = "the engine was stopped"
KILLED = "the engine's process has ended: signal 9; the model must be loaded again"


def of(weights: Path) -> Settings:
    return settings(weights.parent, parameters={"weights": weights, "slots": 32, "queue": QUEUE})


@pytest.fixture(scope="module")
def engine() -> Iterator[RemoteEngine]:
    made = RemoteEngine(of(golden("t01_base.pb")))
    yield made
    made.stop(5)


@pytest.fixture(scope="module")
def local() -> Engine:
    return load_engine(of(golden("t01_base.pb")))


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., RemoteEngine]]:
    """start() -> an engine of the test's own; given code, it runs before each round once the engine is made.

    awake: AWAKE, as beside a GPU
    """
    started = []

    def made(code: str = "", awake: float = 0.0) -> RemoteEngine:
        started.append(RemoteEngine(of(golden("t01_base.pb")), program(code, tmp_path, monkeypatch, awake)))
        return started[-1]

    yield made
    for one in started:
        one.give_up("the test is over")
        one.stop()


def program(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch, awake: float = 0.0) -> str:
    if not code:
        return module.PROGRAM
    lines = [
        "import time",
        "from lightseq_backend.engine.engine import Engine",
        "from lightseq_backend.serving.engine_process import AWAKE, Host, main",
        "run, step = Host.run, Engine.step",
        "def changed_step(self):",
        f"    {code}",
        "    step(self)",
        "def changed_run(self):",
        "    Engine.step = changed_step",
        "    run(self)",
        "Host.run = changed_run",
        f"AWAKE['cpu'] = {awake}",
        "main()",
    ]
    (directory / "changed_engine.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(directory)
    return "changed_engine"


HANGS = "if self.waiting: time.sleep(60)"


class Asked:
    """Rows that were submitted together, and what came for each."""

    def __init__(
        self, engine: RemoteEngine | Engine, rows: Sequence[Any], options: DecodingOptions | None = None, **more: Any
    ):
        self.results: list[list[Output | Exception]] = [[] for _ in rows]
        self.requests = [
            Request(np.asarray(row, np.int32), options or engine.options(), results.append, **more)
            for row, results in zip(rows, self.results)
        ]
        engine.submit(self.requests)

    def answers(self) -> list[Any]:
        assert until(lambda: all(self.results))
        return [result for (result,) in self.results]

    def error(self) -> tuple[type[Exception], str]:
        (answer,) = {(type(answer), str(answer)) for answer in self.answers()}
        return answer


def seen(output: Output) -> object:
    hypotheses = [(one.tokens.tolist(), one.score, one.finished) for one in output.hypotheses]
    return hypotheses, output.steps, output.cut


def run(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def looked_at(engine: RemoteEngine) -> None:
    """What the engine had sent by now has arrived."""
    engine.expire()
    assert until(lambda: engine.round_seconds == 0)


# The link -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link, socket.socket]]:
    """A link's two ends, and the second one's socket."""
    one, other = socket.socketpair()
    yield Link(one), Link(other), other
    one.close()
    other.close()


def test_messages_of_all_sizes_arrive_whole_and_in_order_whoever_sends_at_the_same_time(ends: Any) -> None:
    here, there, _ = ends
    sizes = [*range(2000), 1 << 16, 3 << 20, 0, (1 << 16) - 1, 3 << 20, 1, 1 << 20, *range(2000)]

    def send(sender: int) -> None:
        for number, size in enumerate(sizes):
            there.send([(sender, np.full(size, number % 251, np.uint8))])

    senders = [threading.Thread(target=send, args=(sender,)) for sender in range(2)]
    for sender in senders:
        sender.start()
    arrived: list[Any] = []
    while len(arrived) < 2 * len(sizes):
        arrived += here.receive()
    for sender in senders:
        sender.join()
    for own in ([array for number, array in arrived if number == sender] for sender in range(2)):
        for number, (array, size) in enumerate(zip(own, sizes, strict=True)):
            assert len(array) == size
            assert (array == number % 251).all()


def test_messages_may_come_in_pieces_or_several_at_once(ends: Any) -> None:
    here, _, wire = ends
    bodies = [pickle.dumps([number, "x" * 10]) for number in range(3)]
    stream = b"".join(struct.pack("<Q", len(body)) + body for body in bodies)
    assert here.receive(wait=False) == []
    arrived: list[Any] = []
    for start in range(0, len(stream), 7):
        wire.sendall(stream[start : start + 7])
        arrived += here.receive(wait=False)
        assert len(arrived) == 2 * ((start + 7) // (len(stream) // 3))
    assert arrived == [0, "x" * 10, 1, "x" * 10, 2, "x" * 10]
    wire.sendall(stream)
    assert here.receive() == arrived


def test_end_of_the_other_end_is_told_after_all_it_had_sent(ends: Any) -> None:
    here, there, wire = ends
    here.send(["unread"])
    there.send(["last"])
    wire.close()
    assert here.receive() == ["last"]
    for wait in (False, True):
        with pytest.raises(EOFError):
            here.receive(wait)
    with pytest.raises(Gone):
        here.send(["more"])


def test_requests_answers_and_progress_arrive_as_they_were_sent(ends: Any) -> None:
    here, there, _ = ends
    ids, wide = np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int64)
    details = np.linspace(-1, 0, 5, dtype=np.float32)
    rows = [
        Row(1, ids, "generate", 2, None, True, 7.5, True, "high", 1.25),
        Row(2, wide, "score", 0, ids, False, None, False, "normal", None),
    ]
    sent: list[Any] = [
        Submit(3, rows),
        Progress(4, (ids, ids[:0], wide)),
        Reply(5, Output((Hypothesis(ids, -1.5, True, details, 1, "five"), Hypothesis(ids[::2], -2.0, False)), 6, True)),
        Reply(6, Output(loss=2.5, target_log_probabilities=details)),
        Reply(7, RequestError("no")),
        Soon(),
    ]
    there.send(sent)
    arrived = here.receive()
    assert [type(one) for one in arrived] == [type(one) for one in sent]
    assert list(map(told, arrived)) == list(map(told, sent))


def told(value: Any) -> Any:
    """What can be compared: arrays as their types and numbers."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.tolist()
    if isinstance(value, Exception):
        return type(value), str(value)
    return [told(one) for one in value] if isinstance(value, list | tuple) else value


# Answers --------------------------------------------------------------------------------------------------------------


def test_answers_are_the_golden_ones_whoever_asks_at_the_same_time(engine: RemoteEngine, local: Engine) -> None:
    def ask(caller: int) -> list[Asked]:
        return [Asked(engine, case["source_ids"]) for case in CASES[caller:] + CASES[:caller]]

    with ThreadPoolExecutor(3) as pool:
        asked = list(pool.map(ask, range(3)))
    answers = [[one.answers() for one in each] for each in asked]
    looked_at(engine)
    assert all(len(results) == 1 for each in asked for one in each for results in one.results)
    assert not engine._requests
    assert not engine._by_id
    for number, case in enumerate(CASES):
        alone = [seen(output) for output in local.answer(case["source_ids"])]
        for caller in range(3):
            outputs = answers[caller][(number - caller) % len(CASES)]
            assert [seen(output) for output in outputs] == alone
            assert [columns(output, local.model.config) for output in outputs] == [row["ids"] for row in case["rows"]]


def test_more_options_than_are_kept_are_not_mixed_up(engine: RemoteEngine, local: Engine) -> None:
    kinds = MOST_OPTIONS + 44
    changes = [{"sampling_method": "sample", "seed": seed, "max_new_tokens": 1 + seed % 5} for seed in range(kinds)]
    options = [local.options(one) for one in changes]
    expected = [Asked(local, [ROW], one) for one in options[:150]]
    run(local)
    expected += [Asked(local, [ROW], one) for one in options[150:]]
    run(local)
    alone = [seen(one.answers()[0]) for one in expected]
    assert len(set(map(repr, alone))) > kinds // 2
    order = [*range(kinds), *range(kinds), *random.Random(0).choices(range(kinds), k=kinds)]
    for begin in range(0, len(order), 100):
        part = order[begin : begin + 100]
        asked = [Asked(engine, [ROW], options[number]) for number in part]
        assert [seen(one.answers()[0]) for one in asked] == [alone[number] for number in part]


def test_groups_are_sent_with_one_message_and_answered_each_by_its_own_options(
    engine: RemoteEngine, local: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    send = engine._link.send
    monkeypatch.setattr(engine._link, "send", lambda messages: sent.append(messages) or send(messages))
    rows, changes = [case["source_ids"][0] for case in CASES[:3]], [{"beam_size": size} for size in (1, 3, 4)]
    results: list[list[Any]] = [[] for _ in rows]
    engine.submit(
        *[
            [Request(np.asarray(row, np.int32), engine.options(change), found.append)]
            for row, change, found in zip(rows, changes, results)
        ]
    )
    assert until(lambda: all(results))
    wanted = [Asked(local, [row], local.options(change)) for row, change in zip(rows, changes)]
    run(local)
    assert [seen(found[0]) for found in results] == [seen(one.answers()[0]) for one in wanted]
    submits = [messages for messages in sent if any(isinstance(message, Submit) for message in messages)]
    assert len(submits) == 1


def test_rows_of_one_submit_are_answered_each_by_its_own(engine: RemoteEngine, local: Engine) -> None:
    options = engine.options({"sampling_method": "sample", "seed": 5})
    rows = [case["source_ids"][0] for case in CASES]
    expected = Asked(local, rows, options)
    run(local)
    answers = Asked(engine, rows, options).answers()
    assert [seen(output) for output in answers] == [seen(output) for output in expected.answers()]


# Errors ---------------------------------------------------------------------------------------------------------------


def test_bad_rows_are_named_where_there_are_several(engine: RemoteEngine) -> None:
    (alone,) = Asked(engine, [[500]]).answers()
    assert type(alone) is RequestError
    assert "row" not in str(alone)
    assert Asked(engine, [ROW, [500], ROW]).error() == (RequestError, f"row 1: {alone}")
    others = " (and 1 more of the 3 rows cannot be taken)"
    assert Asked(engine, [[500], ROW, [600]]).error() == (RequestError, f"row 0: {alone}{others}")


def test_full_queue_refuses_all_rows_of_a_submit(engine: RemoteEngine) -> None:
    kind, message = Asked(engine, [ROW] * (QUEUE + 1)).error()
    assert kind is Overloaded
    assert f"of {QUEUE} places taken and cannot take {QUEUE + 1} more; come again in" in message
    short = engine.options({"sampling_method": "greedy", "max_new_tokens": 1})
    assert all(isinstance(answer, Output) for answer in Asked(engine, [ROW] * QUEUE, short).answers())


def test_error_of_a_class_that_only_the_engines_process_has_arrives_under_its_name(
    start: Callable[..., RemoteEngine],
) -> None:
    engine = start("if self.waiting: self._begin = lambda _: 1 / __import__('decimal').Decimal(0)")
    assert Asked(engine, [ROW]).error() == (RuntimeError, "DivisionByZero: [<class 'decimal.DivisionByZero'>]")
    assert engine.ready


# On the way -----------------------------------------------------------------------------------------------------------


def test_progress_comes_before_the_reply_and_is_what_the_answer_begins_with(engine: RemoteEngine) -> None:
    came: list[Any] = []
    options = engine.options({"sampling_method": "greedy", "min_new_tokens": 12})
    request = Request(np.array(ROW), options, came.append, progress=came.append)
    engine.submit([request])
    assert until(lambda: came and isinstance(came[-1], Output))
    looked_at(engine)
    *parts, answer = came
    assert len(parts) >= 5
    whole = answer.hypotheses[0].tokens.tolist()
    lengths = [len(text) for (text,) in parts]
    assert lengths == sorted(set(lengths))
    assert [text.tolist() for (text,) in parts] == [whole[:length] for length in lengths]
    assert answer.first_token > 0


def test_cancelled_request_gets_the_given_error_and_others_their_answers(engine: RemoteEngine) -> None:
    crowd = Asked(engine, [ROW] * 100)
    last, after = Asked(engine, [ROW]), Asked(engine, CASES[0]["source_ids"])
    engine.cancel(last.requests, Cancelled("enough"))
    assert last.error() == (Cancelled, "enough")
    assert not all(crowd.results)
    assert all(isinstance(answer, Output) for answer in crowd.answers() + after.answers())
    engine.cancel(crowd.requests, Cancelled("too late"))
    looked_at(engine)
    assert [len(results) for results in crowd.results] == [1] * 100


class Fleeting(dict[int, int]):
    """Whoever looks at something is the last to see it."""

    def __contains__(self, key: object) -> bool:
        return self.get(key) is not None  # type: ignore[arg-type]

    def get(self, key: int, default: Any = None) -> Any:
        return self.pop(key, default)


def test_request_may_be_answered_while_it_is_cancelled(engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_by_id", Fleeting())
    asked = Asked(engine, [ROW])
    engine.cancel(asked.requests, Cancelled("enough"))
    assert isinstance(asked.answers()[0], Cancelled | Output)


def test_deadline_counts_in_the_engines_process(engine: RemoteEngine) -> None:
    past, ahead = time.monotonic() - 1, time.monotonic() + 1000
    late, soon = Asked(engine, [ROW], deadline=past), Asked(engine, [ROW], deadline=ahead)
    kind, message = late.error()
    assert kind is DeadlineExceeded
    assert "before the text was done" in message
    assert isinstance(soon.answers()[0], Output)


def test_steps_on_a_cpu_go_behind_what_reads_and_answers(engine: RemoteEngine) -> None:
    assert os.getpriority(os.PRIO_PROCESS, engine.process) == os.getpriority(os.PRIO_PROCESS, 0) + 5


def test_who_reads_stays_awake_for_a_request_that_is_alone(
    start: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As beside a GPU: there the engine's process says when."""
    monkeypatch.setattr(module, "AWAKE", 60.0)
    engine = start("pass", awake=0.001)
    looks: list[bool] = []
    receive = engine._link.receive

    def counted(wait: bool = True) -> list[Any]:
        looks.append(wait)
        return receive(wait)

    monkeypatch.setattr(engine._link, "receive", counted)
    Asked(engine, [ROW, ROW]).answers()
    looked_at(engine)  # it waited for those as before
    assert False not in looks
    Asked(engine, [ROW]).answers()
    assert looks.count(False) > 10
    looked_at(engine)
    before = len(looks)
    time.sleep(0.2)  # nobody waits for an answer now: it sleeps, though not all of the 60 s are over
    assert len(looks) - before <= 1


def test_answer_of_a_request_alone_is_announced(start: Callable[..., RemoteEngine]) -> None:
    """So that whoever sends it can rehearse; an error there harms nobody."""
    engine, told = start("pass", awake=0.001), []

    def soon() -> None:
        told.append(len(engine._requests))
        raise RuntimeError("not now")

    engine.soon = soon
    Asked(engine, [ROW, ROW]).answers()
    assert told == []
    assert isinstance(Asked(engine, [ROW]).answers()[0], Output)
    assert isinstance(Asked(engine, [ROW]).answers()[0], Output)
    assert told == [1, 1]


def test_answer_that_cannot_be_rehearsed_ends_nothing(
    start: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(message: Any) -> None:
        tried.append(message)
        raise ValueError("cannot be pickled")

    engine, tried = start("pass", awake=0.001), []  # type: RemoteEngine, list[Any]
    monkeypatch.setattr(module.link, "again", broken)
    for _ in range(3):
        assert isinstance(Asked(engine, [ROW]).answers()[0], Output)
    assert len(tried) == 2
    assert engine.fault is None


def test_waiting_counts_from_a_requests_own_arrival(engine: RemoteEngine) -> None:
    looked_at(engine)
    engine.timings.clear()
    Asked(engine, [ROW], arrived=time.monotonic() - 5).answers()
    looked_at(engine)
    (timing,) = engine.timings
    assert timing.queue >= 5
    assert timing.total >= timing.first_token >= 5


def test_request_that_cannot_be_sent_is_refused_alone(engine: RemoteEngine) -> None:
    options = engine.options({"beam_size": 3, "length_penalty": 0.25})
    ids = np.asarray(ROW, np.int32)
    unsendable = [Request(ids, options, lambda result: None, target=lambda: None)]  # type: ignore[arg-type]
    others = [Request(ids, engine.options({"beam_size": 2, "length_penalty": 0.5}), lambda result: None)]
    with pytest.raises(Exception, match="pickle"):
        engine.submit(others, unsendable)
    assert not engine._requests
    assert len(engine._told) == len(engine._places)
    assert isinstance(Asked(engine, [ROW], options).answers()[0], Output)
    assert isinstance(Asked(engine, [ROW], others[0].options).answers()[0], Output)
    assert not engine._requests


def test_counts_are_those_of_the_process(engine: RemoteEngine) -> None:
    looked_at(engine)
    before, timings = engine.counts["answered"], len(engine.timings)
    Asked(engine, [ROW] * 3).answers()
    looked_at(engine)
    assert (engine.counts["answered"], len(engine.timings)) == (before + 3, timings + 3)
    assert (engine.waiting, engine.waiting_tokens, engine.slots_in_use) == (0, 0, 0)


# Loading --------------------------------------------------------------------------------------------------------------


def children() -> set[str]:
    """Zombies too."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("content", [None, b"\x0a\xff no weights"], ids=["missing", "damaged"])
def test_weights_that_cannot_be_loaded_are_the_makers_error_and_leave_no_process(
    tmp_path: Path, content: bytes | None
) -> None:
    path, before = tmp_path / "transformer.pb", children()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((WeightError, ConfigError), match=r"transformer\.pb"):
        RemoteEngine(replace(of(golden("t01_base.pb")), weights=path))
    assert children() == before


@pytest.mark.parametrize("at_once", [True, False])
def test_process_that_ends_while_it_loads_is_told_with_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """At once: before it has been told what to load."""
    (tmp_path / "dying_engine.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.syspath_prepend(tmp_path)
    started, before = module._started, children()

    def started_and_ended(program: str) -> Any:
        process, link = started(program)
        process.wait()
        return process, link

    if at_once:
        monkeypatch.setattr(module, "_started", started_and_ended)
    with pytest.raises(RuntimeError, match="the engine's process has ended: signal 9"):
        RemoteEngine(of(golden("t01_base.pb")), "dying_engine")
    assert children() == before


# Its end --------------------------------------------------------------------------------------------------------------


def refuses(engine: RemoteEngine, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Asked(engine, [ROW])
    assert not engine.ready or error is Overloaded


def test_killed_process_answers_every_request_once(start: Callable[..., RemoteEngine]) -> None:
    engine = start()
    with ThreadPoolExecutor(4) as pool:
        asked = list(pool.map(lambda _: Asked(engine, [ROW]), range(200)))
        assert until(lambda: any(one.results[0] for one in asked))
        looked_at(engine)
        assert engine.waiting > 0
        os.kill(engine.process, signal.SIGKILL)
    answers = [one.answers()[0] for one in asked]
    errors = [(type(answer), str(answer)) for answer in answers if not isinstance(answer, Output)]
    assert len(errors) > 50
    assert set(errors) == {(RuntimeError, KILLED)}
    assert (engine.ready, engine.alive, engine.fault) == (False, False, KILLED)
    assert (engine.waiting, engine.waiting_tokens, engine.waiting_seconds, engine.slots_in_use) == (0, 0, 0, 0)
    refuses(engine, RuntimeError, KILLED)
    began = time.monotonic()
    engine.stop()
    assert time.monotonic() - began < 2
    assert all(len(one.results[0]) == 1 for one in asked)


def test_requests_that_come_while_the_process_dies_are_answered_or_refused(start: Callable[..., RemoteEngine]) -> None:
    engine = start()
    asked: list[Asked] = []
    refused: list[str] = []

    def go_on_asking() -> None:
        while not refused:
            try:
                asked.append(Asked(engine, CASES[0]["source_ids"]))
            except RuntimeError as error:
                refused.append(str(error))

    callers = [threading.Thread(target=go_on_asking) for _ in range(3)]
    for caller in callers:
        caller.start()
    time.sleep(0.1)
    os.kill(engine.process, signal.SIGKILL)
    for caller in callers:
        caller.join(20)
    assert set(refused) == {KILLED}
    engine.stop()
    assert {len(results) for one in asked for results in one.results} == {1}


def looked_at_until_given_up(engine: RemoteEngine) -> float:
    """By a watch with a limit of 0.3 s; seconds that it took."""
    watch, began = Watch(engine, limit=0.3, update=lambda: None), time.monotonic()

    def look() -> None:
        while engine.fault is None:
            watch.look()

    looks = threading.Thread(target=look, daemon=True)
    looks.start()
    looks.join(10)
    assert engine.fault is not None
    return time.monotonic() - began


REASON = r"a step has taken \d\.\d s; the limit is 0\.3 s \(step_seconds\); the model must be loaded again"


def test_hung_round_is_given_up_with_the_reason_and_its_process_ended(start: Callable[..., RemoteEngine]) -> None:
    engine = start(HANGS)
    looked_at(engine)
    asked = Asked(engine, [ROW, ROW])
    assert engine.round_seconds == 0
    engine.expire()
    first = engine.round_seconds
    engine.expire()
    assert PATIENCE / 2 < first < engine.round_seconds - PATIENCE / 2
    assert looked_at_until_given_up(engine) < 5
    kind, message = asked.error()
    assert (kind, message) == (RuntimeError, engine.fault)
    refuses(engine, RuntimeError, REASON)
    assert until(lambda: not engine.alive)
    with pytest.raises(ProcessLookupError):
        os.kill(engine.process, 0)


def test_engine_is_left_alone_that_has_nothing_to_do_or_whose_step_is_within_the_limit(
    start: Callable[..., RemoteEngine],
) -> None:
    engine = start(HANGS)
    watch = Watch(engine, limit=0.3, update=lambda: None)
    for _ in range(5):
        watch.look()
        time.sleep(0.1)
    assert engine.ready
    asked = Asked(engine, [ROW])
    patient = Watch(engine, limit=60.0, update=lambda: None)
    for _ in range(5):
        patient.look()
    assert engine.round_seconds > 0.3
    assert (engine.ready, asked.results) == (True, [[]])


def test_engine_that_was_stopped_is_not_given_up(start: Callable[..., RemoteEngine]) -> None:
    engine = start()
    engine.stop(5)
    Watch(engine, limit=0.3, update=lambda: None).look()
    assert (engine.alive, engine.fault) == (False, None)


def test_look_that_fails_is_not_the_last(engine: RemoteEngine) -> None:
    seen, updates = threading.Event(), []

    def update() -> None:
        updates.append(1)
        if len(updates) == 3:
            seen.set()
        raise OSError("the server does not answer")

    watch = Watch(engine, limit=60.0, update=update, period=0.001)
    watch.start()
    assert seen.wait(30)
    watch.close()
    assert not watch.alive


@pytest.mark.parametrize("stops", [False, True], ids=["watch", "stop"])
def test_hung_round_holds_nobody_up_though_nothing_more_can_be_sent(
    start: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    engine, asked, refused = start(HANGS), [], []
    monkeypatch.setattr(module, "STEP_PATIENCE", 0.3)

    def ask_until_refused() -> None:
        try:
            while True:
                asked.append(Asked(engine, [ROW] * 50))
        except RuntimeError as error:
            refused.append((type(error), str(error)))

    caller = threading.Thread(target=ask_until_refused, daemon=True)
    caller.start()
    before = -1
    while before < len(asked):  # until it waits
        before = len(asked)
        time.sleep(0.3)
    if stops:
        stopper = threading.Thread(target=engine.stop, args=(0,), daemon=True)
        stopper.start()
        stopper.join(5)
        assert not stopper.is_alive()
    else:
        assert looked_at_until_given_up(engine) < 5
    caller.join(5)
    last = (Overloaded, STOPPED) if stops else (RuntimeError, engine.fault)
    assert len(refused) == 1
    assert set(refused) <= {last, (Overloaded, "the engine is stopping")}
    for one in asked:
        assert one.error() == last


# Its stop -------------------------------------------------------------------------------------------------------------


def test_stop_finishes_what_is_under_way(start: Callable[..., RemoteEngine]) -> None:
    engine = start()
    asked = Asked(engine, [ROW] * 40)
    engine.stop(20)
    outputs: list[Any] = [result for (result,) in asked.results]
    expected = CASES[2]["rows"][0]["ids"]
    assert all(columns(output, engine.model_config) == expected for output in outputs)
    refuses(engine, Overloaded, "the engine is stopping")
    assert (engine.alive, engine.fault) == (False, None)
    assert (engine.counts["answered"], len(engine.timings)) == (40, 40)  # though nobody looked meanwhile


def test_stop_without_patience_answers_the_rest(start: Callable[..., RemoteEngine]) -> None:
    engine = start()
    asked = Asked(engine, [ROW] * 200)
    assert until(lambda: any(asked.results))
    began = time.monotonic()
    engine.stop(0)
    assert time.monotonic() - began < 2
    answers = [result for (result,) in asked.results]
    errors = {(type(answer), str(answer)) for answer in answers if not isinstance(answer, Output)}
    assert errors == {(Overloaded, STOPPED)}
    refuses(engine, Overloaded, "the engine is stopping")


def test_process_of_another_parent_ends_before_it_loads() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = [sys.executable, "-m", module.PROGRAM, str(theirs.fileno()), str(os.getpid() + 1)]
        assert subprocess.run(program, pass_fds=[theirs.fileno()], timeout=30).returncode == 1


# The end of its owner -------------------------------------------------------------------------------------------------

OWNER = f"""
import pickle, sys, time
import numpy as np
from lightseq_backend.request import Request
from lightseq_backend.serving.remote import RemoteEngine

with open(sys.argv[1], "rb") as file:
    engine = RemoteEngine(pickle.load(file), sys.argv[2])
engine.submit([Request(np.array({ROW}), engine.options(), print)])
while "changed" in sys.argv[2] and engine.round_seconds < 0.3:
    engine.expire()
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("code", ["", HANGS], ids=["idle", "hangs"])
def test_process_ends_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (tmp_path / "settings").write_bytes(pickle.dumps(of(golden("t01_base.pb"))))
    command = [sys.executable, "-c", OWNER, str(tmp_path / "settings"), program(code, tmp_path, monkeypatch)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        both = group_of(owner.pid)
        owner.kill()
        owner.wait()
    assert len(both) == 2
    began = time.monotonic()
    try:
        assert until(lambda: not group_of(owner.pid))
        assert time.monotonic() - began < 5
    finally:
        with suppress(ProcessLookupError):
            os.killpg(owner.pid, signal.SIGKILL)
