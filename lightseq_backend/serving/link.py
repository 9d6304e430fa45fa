"""Between a model in Triton's process and its engine in one of its own: what they tell each other, and how.

Both ends are ours and of one release, started by one another: messages are pickled, the frequent ones as plain tuples
(each class and each array in a message takes pickle some microseconds).
"""

from __future__ import annotations

import pickle
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.config import Config, DecodingLimits, DecodingOptions, EngineConfig
from lightseq_backend.request import Hypothesis, Output, Timing

_LENGTH = struct.Struct("<Q")
_ROOM = 1 << 20  # bytes that either end may be behind the other before who sends has to wait
_PART = 1 << 16  # bytes that are taken at once
MOST_OPTIONS = 256  # that the engine keeps


# To the engine --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A request.Request, without what cannot leave the process. number: what its answer will bear.

    arrived: when, by time.monotonic(); followed, text: whether there is a `progress`, a `decode`
    """

    number: int
    tokens: np.ndarray
    kind: str
    stream: int
    target: np.ndarray | None
    followed: bool
    deadline: float | None
    text: bool
    priority: str
    arrived: float | None


class Told(NamedTuple):
    """Options of requests to come: most ask for the same. place: below MOST_OPTIONS; what was there is forgotten."""

    place: int
    options: DecodingOptions


class Submit(NamedTuple):
    """Rows that are taken or refused together. options: the place of theirs, which were Told before."""

    options: int
    rows: list[Row]


class Cancel(NamedTuple):
    numbers: list[int]
    error: Exception


class Ask(NamedTuple):
    """Asks for a Status. What has waited for too long is answered first."""


class Stop(NamedTuple):
    """Finish what there is within so many seconds, answer the rest, end."""

    patience: float


# From the engine ------------------------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """memory: bytes of the engine's block"""

    config: Config
    room: EngineConfig
    limits: DecodingLimits
    memory: int


class Failed(NamedTuple):
    """The engine could not be made: the error, or what Python says of one that is a bug."""

    error: Exception


class Log(NamedTuple):
    level: int
    text: str


class Soon(NamedTuple):
    """A request was taken that no other is beside: whoever waits for its answer had better not fall asleep."""


class Progress(NamedTuple):
    number: int
    texts: tuple[np.ndarray, ...]


class Reply(NamedTuple):
    number: int
    result: Output | Exception


class Fault(NamedTuple):
    """The device takes no more work; why."""

    reason: str


class Status(NamedTuple):
    """What Engine's properties of these names say. timings: of what was answered since the last one."""

    waiting: int = 0
    waiting_tokens: int = 0
    waiting_seconds: float = 0.0
    slots_in_use: int = 0
    counts: dict[str, int] = {}  # noqa: RUF012 -- read alone
    step_seconds: float = 0.0
    timings: tuple[Timing, ...] = ()


class Gone(EOFError):
    """The other end takes or sends no more."""


class Link:
    """One end of a connected pair of sockets. `send` from any thread, `receive` by one."""

    def __init__(self, end: socket.socket):
        self._end, self._lock = end, threading.Lock()
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)
        self._arrived = bytearray()
        self._part = memoryview(bytearray(_PART))

    def send(self, messages: Sequence[Any]) -> None:
        """Waits where the other end is far behind; Gone where there is none."""
        body = pickle.dumps([_plain(message) for message in messages], pickle.HIGHEST_PROTOCOL)
        with self._lock:
            try:
                self._end.sendall(_LENGTH.pack(len(body)) + body)
            except OSError as error:
                raise Gone(f"nothing can be sent: {error}") from error

    def receive(self, wait: bool = True) -> list[Any]:
        """What has arrived; with `wait`, one message at least. Gone once there is no other end."""
        messages: list[Any] = []
        while not messages:
            try:
                size = self._end.recv_into(self._part, 0, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:  # it went without reading all it was sent
                raise Gone(f"nothing can be received: {error}") from error
            if not size:
                raise Gone("the other end is gone")
            self._arrived += self._part[:size]
            messages = self._whole()
        return messages

    def close(self) -> None:
        self._end.close()

    def _whole(self) -> list[Any]:
        """Takes out of what has arrived what is complete."""
        messages: list[Any] = []
        start, arrived = 0, self._arrived
        while len(arrived) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(arrived, start)
            begin = start + _LENGTH.size
            if len(arrived) - begin < length:
                break
            messages += map(_message, pickle.loads(memoryview(arrived)[begin : begin + length]))
            start = begin + length
        del arrived[:start]
        return messages


def again(message: Any) -> Any:
    """A message as it arrives at the other end."""
    return _message(pickle.loads(pickle.dumps(_plain(message), pickle.HIGHEST_PROTOCOL)))


_SUBMIT, _PROGRESS, _OUTPUT = "submit", "progress", "output"


def _plain(message: Any) -> Any:
    """As it travels."""
    kind = type(message)
    if kind is Submit:
        return _SUBMIT, message.options, [(row.number, _bytes(row.tokens), *row[2:]) for row in message.rows]
    if kind is Progress:
        return _PROGRESS, message.number, [_bytes(text) for text in message.texts]
    if kind is Reply and type(message.result) is Output:
        texts = [(_bytes(one.tokens), *one[1:]) for one in message.result.hypotheses]
        return _OUTPUT, message.number, texts, message.result[1:]
    return message


def _message(plain: Any) -> Any:
    if type(plain) is tuple:
        kind, *fields = plain
        if kind == _SUBMIT:
            options, rows = fields
            return Submit(options, [Row(row[0], _ids(row[1]), *row[2:]) for row in rows])
        if kind == _PROGRESS:
            number, texts = fields
            return Progress(number, tuple(map(_ids, texts)))
        if kind == _OUTPUT:
            number, texts, rest = fields
            return Reply(number, Output(tuple([Hypothesis(_ids(text[0]), *text[1:]) for text in texts]), *rest))
    return plain


def _bytes(ids: np.ndarray) -> bytes | np.ndarray:
    return ids.tobytes() if ids.dtype == np.int32 and ids.ndim == 1 else ids


def _ids(sent: bytes | np.ndarray) -> np.ndarray:
    """Read-only where they were int32."""
    return np.frombuffer(sent, np.int32) if type(sent) is bytes else sent  # type: ignore[return-value, call-overload]
