"""Answers, and parts of them, on their way back to Triton: round trips to the server, for which there are threads."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from lightseq_backend.config import Config
from lightseq_backend.errors import Cancelled, DeadlineExceeded, NotUnderWay, Overloaded, RequestError
from lightseq_backend.request import Decode, Output, Progress
from lightseq_backend.serving.parts import Parts
from lightseq_backend.serving.tensors import to_tensor
from lightseq_backend.serving.wire import Wire

log = logging.getLogger(__name__)

ANSWERED, REFUSED, OVERLOADED, FAILED, CANCELLED, LATE = OUTCOMES = (
    *("answered", "refused", "overloaded", "failed", "cancelled", "deadline_exceeded"),
)
MOST_UNSENT = 4096  # requests with results; beside them there are those that wait and those that decode
# A round trip takes a good half of a millisecond, nearly all of it waiting: one thread sends 1,400 answers a second.
COURIERS = 8
REHEARSED = 512  # ids of an answer that is rehearsed: the next one must not have to wait for that
Result = Output | Exception


@dataclass
class Ticket:
    """One Triton request under way: its rows, what writes their text if it wants any, and what came back so far.

    arrived  what is to be handled, in order: a row and its result, None for a part; taken: by a courier, or for one
    answer   how it ended, and what is to be sent of that, where that is written before it is sent
    parts    of a stream; latest: what it has come to; waiting: whether a part is to be sent of that. A caller who is
             slow, or whoever carries the parts, gets fewer and longer ones: no more than the latest is kept
    """

    sender: Any
    rows: Sequence[np.ndarray]
    decode: Decode | None = None
    parts: Parts | None = None
    results: dict[int, Result] = field(default_factory=dict)
    answer: tuple[str, Any] | None = None
    latest: tuple[np.ndarray, ...] = ()
    waiting: bool = False
    arrived: deque[tuple[int, Result | None]] = field(default_factory=deque)
    taken: bool = False


class Replies:
    """Gives every Triton request its one final answer: when all its rows are done, or when it is refused.

    outcomes  requests by outcome, so far
    leave     called with a request's sender before its final answer
    alone     whether no other request is under way
    """

    def __init__(
        self, wire: Wire, config: Config, leave: Callable[[Any], None], alone: Callable[[], bool] = lambda: False
    ):
        self._wire, self._config, self._leave, self._alone = wire, config, leave, alone
        self._arrived: SimpleQueue[Ticket | None] = SimpleQueue()  # each of them once
        self._couriers = [threading.Thread(target=self._deliver, name="replies", daemon=True) for _ in range(COURIERS)]
        self._lock = threading.Lock()  # guards outcomes, and which tickets are taken
        self._last: Ticket | None = None  # that was answered and can be written again
        self.outcomes = dict.fromkeys(OUTCOMES, 0)

    def start(self) -> None:
        for courier in self._couriers:
            courier.start()

    @property
    def alive(self) -> bool:
        return all(courier.is_alive() for courier in self._couriers)

    def expect(self, ticket: Ticket) -> list[Callable[[Result], None]]:
        """What to call with each row's result, in the order of the rows; by one thread at a time, which writes most
        answers. Where nobody else waits for one, it is sent, too; else the call does not block.
        """
        return [partial(self._take, ticket, row) for row in range(len(ticket.rows))]

    def progress(self, ticket: Ticket) -> Progress | None:
        """What to call with what a stream has come to; one thread, never blocks. None where nothing is streamed."""

        def report(texts: tuple[np.ndarray, ...]) -> None:
            ticket.latest = texts
            if not ticket.waiting:
                ticket.waiting = True
                self._put(ticket, 0, None)

        return None if ticket.parts is None else report

    def wait_for_room(self) -> None:
        """Blocks while very many results wait to be sent: who asks faster than that waits, in Triton's own queue."""
        while self._arrived.qsize() >= MOST_UNSENT and self.alive:
            time.sleep(0.001)

    def refuse(self, sender: Any, error: Exception) -> None:
        """Answers with an error, soon. Nothing else may come for that sender."""
        self._put(Ticket(sender, [np.empty(0)]), 0, error)

    def confirm(self, sender: Any) -> None:
        """Answers that what was asked for is done, without any tensors, soon."""
        self._put(Ticket(sender, []), 0, Output())

    def rehearse(self) -> None:
        """Writes the last short answer of one row once more, for nobody: what has not run for some milliseconds has
        left the processor's caches, and takes some times as long."""
        if self._last is not None:
            self._response(self._last)

    def close(self) -> None:
        """Sends what has arrived, then ends the threads."""
        for _ in self._couriers:
            self._arrived.put(None)
        for courier in self._couriers:
            courier.join()

    def _take(self, ticket: Ticket, row: int, result: Result) -> None:
        """The answer is written here, not by a courier: each would wait for Python's lock while this thread has it, and
        to wake them up for that took more than the writing. But the texts of many rows others should not wait for."""
        if ticket.parts is None:
            ticket.results[row] = result
            if len(ticket.results) < len(ticket.rows):
                return
            if len(ticket.rows) == 1 or ticket.decode is None:
                ticket.answer = self._written(ticket)
            if len(ticket.rows) == 1 and self._alone():  # waking a thread up takes 0.1 ms
                self._send(ticket)
                return
        self._put(ticket, row, result)

    def _put(self, ticket: Ticket, row: int, result: Result | None) -> None:
        """For any courier, but one at a time, which keeps what is of a ticket in order."""
        ticket.arrived.append((row, result))
        with self._lock:
            taken, ticket.taken = ticket.taken, True
        if not taken:
            self._arrived.put(ticket)

    def _deliver(self) -> None:
        while (ticket := self._arrived.get()) is not None:
            while (arrival := self._next(ticket)) is not None:
                try:
                    self._handle(ticket, *arrival)
                except Exception:  # a bug of ours must not leave all the others waiting
                    log.exception("an answer was lost")

    def _next(self, ticket: Ticket) -> tuple[int, Result | None] | None:
        with self._lock:
            ticket.taken = bool(ticket.arrived)
            return ticket.arrived.popleft() if ticket.taken else None

    def _handle(self, ticket: Ticket, row: int, result: Result | None) -> None:
        if result is None:
            self._send_part(ticket)
            return
        ticket.results[row] = result
        self._send(ticket)

    def _send_part(self, ticket: Ticket) -> None:
        assert ticket.parts is not None
        ticket.waiting = False  # before the latest is read: what comes from now on gets a part of its own
        try:
            self._send_tensors(ticket, ticket.parts.part(ticket.latest))
        except Exception:  # the answer itself comes all the same
            log.exception("a part could not be sent")

    def _send_tensors(self, ticket: Ticket, tensors: dict[str, np.ndarray] | None) -> None:
        if tensors is not None:
            ticket.sender.send(_response_of(tensors))

    def _written(self, ticket: Ticket) -> tuple[str, Any]:
        try:
            return self._response(ticket)
        except Exception as error:  # a bug of ours must not leave a caller waiting
            log.exception("an answer could not be written")
            return _error_response(error)

    def _send(self, ticket: Ticket) -> None:
        outcome, response = ticket.answer or self._written(ticket)
        ticket.answer = None
        with self._lock:
            self.outcomes[outcome] += 1
        self._leave(ticket.sender)
        try:
            ticket.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:
            log.exception("an answer could not be sent")
        if outcome == ANSWERED and _is_short(ticket):
            ticket.sender = None  # Triton's memory goes with it
            self._last = ticket

    def _response(self, ticket: Ticket) -> tuple[str, Any]:
        outputs = []
        for row in range(len(ticket.rows)):
            result = ticket.results[row]
            if isinstance(result, Exception):
                return _error_response(result)
            outputs.append(result)
        if not outputs:
            return ANSWERED, _response_of({})
        tensors = self._wire.answer(ticket.rows, outputs, self._config, ticket.decode)
        if ticket.parts is not None:
            self._send_tensors(ticket, ticket.parts.rest(outputs[0]))
            tensors |= ticket.parts.closing(outputs[0])
        return ANSWERED, _response_of(tensors)


def _is_short(ticket: Ticket) -> bool:
    if len(ticket.rows) != 1 or ticket.parts is not None:
        return False
    result = ticket.results[0]
    return isinstance(result, Output) and sum(len(one.tokens) for one in result.hypotheses) <= REHEARSED


def _response_of(tensors: dict[str, np.ndarray]) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[to_tensor(name, tensor) for name, tensor in tensors.items()])


def _error_response(error: Exception) -> tuple[str, Any]:
    if isinstance(error, RequestError):
        outcome, code, message = REFUSED, pb_utils.TritonError.INVALID_ARG, str(error)
    elif isinstance(error, Overloaded):
        outcome, code, message = OVERLOADED, pb_utils.TritonError.UNAVAILABLE, str(error)
    elif isinstance(error, Cancelled):
        outcome, code, message = CANCELLED, pb_utils.TritonError.CANCELLED, str(error)
    elif isinstance(error, DeadlineExceeded):  # Triton has no code of that name
        outcome, code, message = LATE, pb_utils.TritonError.CANCELLED, str(error)
    elif isinstance(error, NotUnderWay):
        outcome, code, message = REFUSED, pb_utils.TritonError.NOT_FOUND, str(error)
    else:
        outcome, code, message = FAILED, pb_utils.TritonError.INTERNAL, f"{type(error).__name__}: {error}"
    return outcome, pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
