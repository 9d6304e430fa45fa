"""Answers on their way back to Triton. Sending is a round trip to the server, so a thread of its own does it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from lightseq_backend.config import Config
from lightseq_backend.errors import Overloaded, RequestError
from lightseq_backend.request import Output
from lightseq_backend.serving.tensors import to_tensor
from lightseq_backend.serving.wire import Decode, Wire

log = logging.getLogger(__name__)

ANSWERED, REFUSED, OVERLOADED, FAILED = OUTCOMES = ("answered", "refused", "overloaded", "failed")
MOST_UNSENT = 4096  # results of rows; beside them there are those that wait and those that decode
Result = Output | Exception


@dataclass
class Ticket:
    """One Triton request under way: its rows, what writes their text if it wants any, and what came back so far."""

    sender: Any
    rows: Sequence[np.ndarray]
    decode: Decode | None = None
    results: dict[int, Result] = field(default_factory=dict)


class Replies:
    """Gives every Triton request its one final answer: when all its rows are done, or when it is refused.

    outcomes  requests by outcome, so far
    """

    def __init__(self, wire: Wire, config: Config):
        self._wire, self._config = wire, config
        self._arrived: SimpleQueue[tuple[Ticket, int, Result] | None] = SimpleQueue()
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self._thread = threading.Thread(target=self._loop, name="replies", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def expect(
        self, sender: Any, rows: Sequence[np.ndarray], decode: Decode | None = None
    ) -> list[Callable[[Result], None]]:
        """What to call with each row's result, in the order of the rows; from any thread, never blocks.

        decode  turns a hypothesis's ids into text, on this object's thread; None sends none
        """
        ticket = Ticket(sender, rows, decode)

        def arrives_at(row: int) -> Callable[[Result], None]:
            return lambda result: self._arrived.put((ticket, row, result))

        return [arrives_at(row) for row in range(len(rows))]

    def wait_for_room(self) -> None:
        """Blocks while very many results wait to be sent: who asks faster than that waits, in Triton's own queue."""
        while self._arrived.qsize() >= MOST_UNSENT and self.alive:
            time.sleep(0.001)

    def refuse(self, sender: Any, error: Exception) -> None:
        """Answers with an error, soon. Nothing else may come for that sender."""
        self._arrived.put((Ticket(sender, [np.empty(0)]), 0, error))

    def close(self) -> None:
        """Sends what has arrived, then ends the thread."""
        self._arrived.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (arrival := self._arrived.get()) is not None:
            ticket, row, result = arrival
            ticket.results[row] = result
            if len(ticket.results) == len(ticket.rows):
                self._send(ticket)

    def _send(self, ticket: Ticket) -> None:
        try:
            outcome, response = self._response(ticket)
        except Exception as error:  # a bug of ours must not leave a caller waiting
            log.exception("an answer could not be written")
            outcome, response = _error_response(error)
        self.outcomes[outcome] += 1
        try:
            ticket.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:
            log.exception("an answer could not be sent")

    def _response(self, ticket: Ticket) -> tuple[str, Any]:
        outputs = []
        for row in range(len(ticket.rows)):
            result = ticket.results[row]
            if isinstance(result, Exception):
                return _error_response(result)
            outputs.append(result)
        tensors = self._wire.answer(ticket.rows, outputs, self._config, ticket.decode)
        return ANSWERED, pb_utils.InferenceResponse(
            output_tensors=[to_tensor(name, tensor) for name, tensor in tensors.items()]
        )


def _error_response(error: Exception) -> tuple[str, Any]:
    if isinstance(error, RequestError):
        outcome, code, message = REFUSED, pb_utils.TritonError.INVALID_ARG, str(error)
    elif isinstance(error, Overloaded):
        outcome, code, message = OVERLOADED, pb_utils.TritonError.UNAVAILABLE, str(error)
    else:
        outcome, code, message = FAILED, pb_utils.TritonError.INTERNAL, f"{type(error).__name__}: {error}"
    return outcome, pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
