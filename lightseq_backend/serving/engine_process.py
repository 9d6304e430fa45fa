"""A model's engine in a process of its own: python -m lightseq_backend.serving.engine_process SOCKET PARENT

Triton's stub runs Python for every request and every answer. In one process with it the engine's thread waits for that
at each call of the device, and the device waits for the engine. Here one thread does it all, in turn: it reads what has
come, runs a round of the engine, sends what that has found.
"""

from __future__ import annotations

import builtins
import ctypes
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lightseq_backend import errors
from lightseq_backend.config import Config, DecodingOptions
from lightseq_backend.engine.engine import Engine
from lightseq_backend.errors import ConfigError, RequestError, WeightError
from lightseq_backend.request import Decode, Output, Request, Sequence
from lightseq_backend.serving import link, loading
from lightseq_backend.serving.settings import Settings

log = logging.getLogger(__name__)
# Seconds, by device. Waking up takes 0.1 ms and more; beside a GPU there are cores to spare, here and at the other end.
AWAKE = {"cpu": 0.0, "cuda": 0.002}
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def main() -> None:
    number, parent = map(int, sys.argv[1:])
    _end_with(parent)
    channel = link.Link(socket.socket(fileno=number))
    _log_to(channel)
    with suppress(link.Gone):  # who asks for answers
        (settings,) = channel.receive()
        try:
            host = Host(*_made(settings), channel, AWAKE[settings.device])
        except (ConfigError, WeightError, RequestError) as error:
            channel.send([link.Failed(error)])
        except link.Gone:
            raise
        except Exception:
            channel.send([link.Failed(RuntimeError(traceback.format_exc()))])
        else:
            host.run()


def _made(settings: Settings) -> tuple[Engine, Decode | None]:
    """The engine, ready for the first request, and what turns ids into text."""
    engine = loading.load_engine(settings)
    engine.warm_up()
    tokenizer = loading.load_tokenizer(settings, engine.model.config) if loading.takes_text(settings) else None
    return engine, None if tokenizer is None else tokenizer.decode


class Host:
    """Runs an engine for who is at the other end of a link, until that is gone or has it stop."""

    def __init__(self, engine: Engine, decode: Decode | None, channel: link.Link, awake: float = 0.0):
        """awake: seconds for which it does not sleep when there is nothing to do."""
        self._engine, self._decode, self._link, self._awake = engine, decode, channel, awake
        self._requests: dict[int, Request] = {}  # without an answer, by number
        self._options: dict[int, DecodingOptions] = {}  # by the place they were told for
        self._found: list[Any] = []  # messages to be sent
        self._told = False  # of a fault
        self._until: float | None = None  # when it ends, by time.monotonic(), once it is to stop

    def run(self) -> None:
        engine = self._engine
        self._link.send([link.Ready(engine.model.config, engine.config, engine.limits, engine.memory)])
        while self._until is None or (not engine.idle and time.monotonic() < self._until):
            alone = engine.idle
            messages = self._messages()
            for message in messages:
                self._take(message)
            if messages or not engine.idle:  # who leaves is answered, though nobody decodes
                engine.step()
            if alone and self._awake and len(self._requests) == 1:  # the device is at it
                self._found.append(link.Soon())
            if engine.fault and not self._told:
                self._told = True
                self._found.append(link.Fault(engine.fault))
            self._send()
        engine.stop(0)
        self._found.append(self._status())
        self._send()

    def _messages(self) -> list[Any]:
        """What has come; where nobody decodes, it waits for something."""
        idle = self._engine.idle
        awake = time.monotonic() + self._awake if idle else 0.0
        while time.monotonic() < awake:
            if messages := self._link.receive(wait=False):
                return messages
        return self._link.receive(wait=idle)

    def _send(self) -> None:
        if self._found:
            found, self._found = self._found, []
            self._link.send(found)

    def _take(self, message: Any) -> None:
        engine = self._engine
        if isinstance(message, link.Submit):
            options = self._options[message.options]
            self._submit([self._request(row, options) for row in message.rows])
        elif isinstance(message, link.Told):
            self._options[message.place] = message.options
        elif isinstance(message, link.Cancel):
            wanted = [self._requests[number] for number in message.numbers if number in self._requests]
            engine.cancel(wanted, message.error)
        elif isinstance(message, link.Ask):
            engine.expire()
            self._found.append(self._status())
        elif isinstance(message, link.Stop):
            engine.close()
            self._until = time.monotonic() + message.patience

    def _submit(self, requests: list[Request]) -> None:
        try:
            self._engine.submit(requests)
        except RequestError as error:
            self._refuse(requests, _naming_the_row(requests, self._engine.model.config, error))
        except Exception as error:
            self._refuse(requests, error)

    @staticmethod
    def _refuse(requests: list[Request], error: Exception) -> None:
        for request in requests:
            request.reply(error)

    def _request(self, row: link.Row, options: DecodingOptions) -> Request:
        request = Request(
            row.tokens,
            options,
            self._reply_to(row.number),
            row.kind,
            row.stream,
            row.target,
            self._progress_of(row.number) if row.followed else None,
            row.deadline,
            self._decode if row.text else None,
            row.priority,
            row.arrived,
        )
        self._requests[row.number] = request
        return request

    def _reply_to(self, number: int) -> Callable[[Output | Exception], None]:
        def reply(result: Output | Exception) -> None:
            del self._requests[number]
            self._found.append(link.Reply(number, _portable(result) if isinstance(result, Exception) else result))

        return reply

    def _progress_of(self, number: int) -> Callable[[Any], None]:
        return lambda texts: self._found.append(link.Progress(number, texts))

    def _status(self) -> link.Status:
        engine = self._engine
        timings = tuple(engine.timings)
        engine.timings.clear()
        return link.Status(
            engine.waiting,
            engine.waiting_tokens,
            engine.waiting_seconds,
            engine.slots_in_use,
            dict(engine.counts),
            engine.step_seconds,
            timings,
        )


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same and needs no library at the other end."""
    kind = type(error)
    if getattr(errors, kind.__name__, None) is kind or getattr(builtins, kind.__name__, None) is kind:
        return error
    return RuntimeError(f"{kind.__name__}: {error}")


def _naming_the_row(requests: list[Request], config: Config, error: RequestError) -> RequestError:
    """The error with the number of the first bad row, where there are several rows."""
    if len(requests) == 1:
        return error
    faults = []
    for number, request in enumerate(requests):
        try:
            Sequence.of(request, config)
        except RequestError as fault:
            faults.append(f"row {number}: {fault}")
    others = f" (and {len(faults) - 1} more of the {len(requests)} rows cannot be taken)" if len(faults) > 1 else ""
    return RequestError(f"{faults[0]}{others}") if faults else error


class _LinkLog(logging.Handler):
    def __init__(self, channel: link.Link):
        super().__init__()
        self._link = channel

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._link.send([link.Log(record.levelno, self.format(record))])
        except Exception:
            self.handleError(record)


def _log_to(channel: link.Link) -> None:
    """What this package logs is logged at the other end."""
    package = logging.getLogger("lightseq_backend")
    package.handlers, package.propagate = [_LinkLog(channel)], False
    package.setLevel(logging.INFO)


def _end_with(parent: int) -> None:
    """However that ends: a step that hangs reads no link. Signals to the server's group are the server's to heed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)


if __name__ == "__main__":
    main()
