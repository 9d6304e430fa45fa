"""What is done once more while nobody waits for it, so that it is quick when somebody does, leaves nothing behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stub_triton import inside_triton

from lightseq_backend.errors import RequestError
from lightseq_backend.request import Hypothesis, Output
from lightseq_backend.serving import link

ROW = np.array([5, 9, 2], np.int32)


@pytest.fixture
def module() -> Iterator[ModuleType]:
    with inside_triton("replies") as (module,):
        yield module


class Wire:
    """Writes what it is given of, each time it is asked to."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    def answer(self, rows: Any, outputs: Any, config: Any, decode: Any) -> dict[str, np.ndarray]:
        self.written.append((rows, outputs))
        return {"ids": np.arange(3)}


class Sender:
    def __init__(self) -> None:
        self.sent = 0

    def send(self, *response: Any, **flags: Any) -> None:
        self.sent += 1


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def replies(module: ModuleType, wire: Wire) -> Any:
    return module.Replies(wire, None, lambda sender: None, lambda: True)


def answer(module: ModuleType, replies: Any, rows: int = 1, result: Any = None, parts: Any = None) -> Sender:
    """A request of so many rows, all of which get that result; the only one there is."""
    sender = Sender()
    replies.start()
    for reply in replies.expect(module.Ticket(sender, [ROW] * rows, parts=parts)):
        reply(Output() if result is None else result)
    replies.close()
    return sender


def test_last_answer_is_written_again_and_sent_to_nobody(module: ModuleType, replies: Any, wire: Wire) -> None:
    replies.rehearse()
    assert wire.written == []
    sender = answer(module, replies, result=Output((Hypothesis(ROW, -1.0, True),)))
    replies.rehearse()
    replies.rehearse()
    assert wire.written == [wire.written[0]] * 3
    assert sender.sent == 1
    assert replies.outcomes == {**dict.fromkeys(module.OUTCOMES, 0), "answered": 1}


def test_senders_are_not_kept(module: ModuleType, replies: Any) -> None:
    answer(module, replies)
    assert replies._last.sender is None


LONG = Output((Hypothesis(np.zeros(513, np.int32), -1.0, True),))
STREAM = SimpleNamespace(rest=lambda output: None, closing=lambda output: {})


@pytest.mark.parametrize("more", [{"rows": 2}, {"result": RequestError("bad")}, {"result": LONG}, {"parts": STREAM}])
def test_only_short_answers_of_one_row_are_rehearsed(
    more: dict[str, Any], module: ModuleType, replies: Any, wire: Wire
) -> None:
    answer(module, replies, **more)
    written = list(wire.written)
    replies.rehearse()
    assert wire.written == written


SUBMIT = link.Submit(3, [link.Row(7, ROW, "generate", 0, None, False, None, False, "normal", None)])
REPLY = link.Reply(4, Output((Hypothesis(ROW, -2.5, False),)))


@pytest.mark.parametrize("message", [SUBMIT, REPLY])
def test_a_message_again_is_what_arrives(message: Any) -> None:
    ours, theirs = map(link.Link, socket.socketpair())
    ours.send([message])
    (arrived,) = theirs.receive()
    assert repr(link.again(message)) == repr(arrived)
    ours.close()
    theirs.close()
