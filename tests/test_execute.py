"""What becomes of the requests that Triton hands over together, without Triton and without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from stub_triton import inside_triton

from lightseq_backend.errors import NotUnderWay, RequestError


class Call:
    """A request of Triton's: its name, and the parameters that it gives."""

    def __init__(self, name: str, parameters: str = ""):
        self.name, self._parameters = name, parameters

    def get_response_sender(self) -> str:
        return self.name

    def parameters(self) -> str:
        if self.name == "unreadable":
            raise RuntimeError("no parameters")
        return self._parameters


class Engine:
    """Takes all but rows named "unsendable"; logs what it is given at once."""

    def __init__(self, log: list[Any]):
        self._log = log

    def submit(self, *groups: list[str]) -> None:
        self._log.append(("submit", *groups))
        if ["unsendable"] in groups:
            raise ValueError("cannot be sent")


class Replies:
    def __init__(self, log: list[Any]):
        self._log = log

    def wait_for_room(self) -> None:
        self._log.append("room")

    def refuse(self, sender: str, error: Exception) -> None:
        self._log.append(("refuse", sender, type(error)))

    def confirm(self, sender: str) -> None:
        self._log.append(("confirm", sender))


class Callers:
    def __init__(self, log: list[Any]):
        self._log = log

    def stop(self, name: str) -> int:
        return sum(["submit" in entry and [name] in entry for entry in self._log])


@pytest.fixture
def model_module() -> Iterator[ModuleType]:
    with inside_triton("model") as (module,):
        yield module


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def model(model_module: ModuleType, log: list[Any]) -> Any:
    class Model(model_module.TritonPythonModel):  # type: ignore[name-defined, misc]
        def _read(self, request: Call, *_: Any) -> list[str]:
            if request.name == "bad":
                raise RequestError("bad")
            return [request.name]

    made = Model()
    made._engine, made._replies, made._callers = Engine(log), Replies(log), Callers(log)
    return made


def test_requests_that_come_together_are_submitted_together_without_the_bad_ones(model: Any, log: list[Any]) -> None:
    model.execute([Call("a"), Call("bad"), Call("b")])
    assert log == ["room", ("refuse", "bad", RequestError), ("submit", ["a"], ["b"])]


def test_request_that_cannot_be_submitted_takes_no_others_with_it(model: Any, log: list[Any]) -> None:
    model.execute([Call("a"), Call("unsendable"), Call("b")])
    assert log[2:] == [
        ("submit", ["a"]),
        ("submit", ["unsendable"]),
        ("refuse", "unsendable", ValueError),
        ("submit", ["b"]),
    ]


def test_request_may_be_stopped_by_one_that_comes_with_it(model: Any, log: list[Any]) -> None:
    stops = [Call(f"stop {name}", f'{{"cancel_request_id": "{name}"}}') for name in ("a", "c")]
    model.execute([*stops, Call("a")])
    assert log[1:] == [("submit", ["a"]), ("confirm", "stop a"), ("refuse", "stop c", NotUnderWay)]


def test_nothing_is_submitted_where_there_is_nothing_to_submit(model: Any, log: list[Any]) -> None:
    model.execute([Call("bad"), Call("stop", '{"deadline_ms": -1}')])
    assert log == ["room", ("refuse", "bad", RequestError), ("refuse", "stop", RequestError)]


def test_a_request_whose_parameters_cannot_be_had_is_refused_alone(model: Any, log: list[Any]) -> None:
    model.execute([Call("first"), Call("unreadable"), Call("last")])
    assert log == ["room", ("refuse", "unreadable", RuntimeError), ("submit", ["first"], ["last"])]
