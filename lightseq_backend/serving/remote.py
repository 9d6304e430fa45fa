"""The engine as the model in Triton's process sees it: it runs in a process of its own (engine_process.py)."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from lightseq_backend.config import DecodingOptions
from lightseq_backend.engine.engine import STEP_PATIENCE, TIMINGS
from lightseq_backend.errors import Overloaded
from lightseq_backend.request import Request, Timing
from lightseq_backend.serving import link
from lightseq_backend.serving.settings import Settings

log = logging.getLogger(__name__)

PATIENCE = 0.1  # seconds that whoever has the engine looked at waits: between two rounds it answers at once
AWAKE = 0.02  # seconds that who reads does not sleep for a request alone: after those, 0.1 ms to wake up are little
# By device, from the start. Loading and steps keep all cores of a CPU busy: what reads requests and sends answers goes
# before them, and so does what tells Triton that a model's process lives (its patience is a second).
NICE = {"cpu": 5, "cuda": 0}
PROGRAM = "lightseq_backend.serving.engine_process"


class RemoteEngine:
    """`submit` and `cancel` from any thread; requests are answered on a thread of its own.

    To be made on a thread that lasts: the process ends with the one that made it, as with all of this process.

    soon: what to call, on that thread, while an answer is on its way that nobody else waits beside.

    Raises what the engine raises when it is made: ConfigError, WeightError, RequestError; RuntimeError where its
    process ends. Its counts and what it says of its queue are as old as the last answer to `expire`.
    """

    def __init__(self, settings: Settings, program: str = PROGRAM):
        """program: a module that does what engine_process.py does."""
        self._process, self._link = _started(program)
        with suppress(ProcessLookupError):  # it has ended: `_first` says how
            nice = os.getpriority(os.PRIO_PROCESS, 0) + NICE[settings.device]
            os.setpriority(os.PRIO_PROCESS, self._process.pid, nice)
        self._numbers = count()
        self._requests: dict[int, Request] = {}  # without an answer, by number
        self._by_id: dict[int, int] = {}  # those numbers by the id() of the request
        self._submitting = threading.Lock()  # guards the options that the engine keeps, and their order on the link
        self._told: deque[DecodingOptions] = deque()
        self._places: dict[int, int] = {}  # of those, by id()
        self._show(link.Status())
        self.soon: Callable[[], None] = lambda: None
        self._latest: link.Reply | None = None
        self._awake = 0.0  # until when who reads does not sleep, by time.monotonic()
        self._looked: float | None = None  # when a look was asked for that has not come
        self._heard = threading.Event()  # that it has
        self._stopping = self._ended = False
        self.fault: str | None = None  # why there will be no answers any more
        self.counts: Counter[str] = Counter()
        self.step_seconds = 0.0
        self.timings: deque[Timing] = deque(maxlen=TIMINGS)
        try:
            self._tell(settings)
            ready = self._first()
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._link.close()
            raise
        self.model_config, self.config, self.limits, self.memory = ready
        self._reader = threading.Thread(target=self._read, name="engine", daemon=True)
        self._reader.start()

    @property
    def process(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._ended

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def ready(self) -> bool:
        """Whether answers can be expected."""
        return self.alive and self.fault is None

    @property
    def round_seconds(self) -> float:
        """How long the engine has not looked at what it is told: between two rounds it does."""
        looked = self._looked
        return 0.0 if looked is None else time.monotonic() - looked

    def options(self, changes: dict[str, object] | None = None) -> DecodingOptions:
        """As Engine.options."""
        return self.model_config.decoding.with_changes(changes or {}, self.limits)

    def submit(self, *groups: Sequence[Request]) -> None:
        """Queues of each group, whose requests have the same options, all or none; which of them, their replies say.

        Overloaded: the engine is stopping. RuntimeError: it has failed. With any error no group is queued.
        """
        if self._stopping:
            raise Overloaded("the engine is stopping")
        if self.fault:
            raise RuntimeError(self.fault)
        with self._submitting:
            messages: list[Any] = []
            for requests in groups:
                messages += self._introduced(requests[0].options)
                rows = [self._row(request) for request in requests]
                messages.append(link.Submit(self._places[id(requests[0].options)], rows))
            try:
                self._link.send(messages)
            except link.Gone:
                self._process.kill()
                self._reader.join()  # it sees how the process ended, and answers most of these
                for number in _numbers_of(messages):
                    self._answer(number, self._last())
            except BaseException:  # nothing was sent
                for number in _numbers_of(messages):
                    self._take(number)
                self._told.clear()  # what the engine has been told before, it is told again
                self._places.clear()
                raise

    def cancel(self, requests: Iterable[Request], error: Exception) -> None:
        """As Engine.cancel."""
        numbers = [self._by_id.get(id(request)) for request in requests]
        if left := [number for number in numbers if number is not None]:
            self._tell(link.Cancel(left, error))

    def expire(self) -> None:
        """Has the engine answer what has waited for too long, and tell how it is; waits a little for that."""
        if self._looked is None and not self._ended:
            self._heard.clear()
            self._looked = time.monotonic()
            self._tell_aside(link.Ask())
        self._heard.wait(PATIENCE)

    def give_up(self, reason: str) -> None:
        """Ends the process, whatever it is at; all there is gets an error, and there will be no more."""
        self.fault = self.fault or reason
        self._process.kill()

    def stop(self, patience: float = 30.0) -> None:
        """Takes no more, finishes what runs or waits within `patience` seconds, answers the rest with an error."""
        self._stopping = True
        self._tell_aside(link.Stop(patience))
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self.fault else patience + STEP_PATIENCE)
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _introduced(self, options: DecodingOptions) -> list[link.Told]:
        """What the engine has to be told first of requests with these options."""
        if id(options) in self._places:
            return []
        place = len(self._told)
        if place == link.MOST_OPTIONS:
            place = self._places.pop(id(self._told.popleft()))
        self._told.append(options)
        self._places[id(options)] = place
        return [link.Told(place, options)]

    def _row(self, request: Request) -> link.Row:
        number = next(self._numbers)
        self._requests[number] = request
        self._by_id[id(request)] = number
        return link.Row(
            number,
            request.tokens,
            request.kind,
            request.stream,
            request.target,
            request.progress is not None,
            request.deadline,
            request.decode is not None,
            request.priority,
            request.arrived,
        )

    def _take(self, number: int) -> Request | None:
        """Whoever takes a request answers it."""
        request = self._requests.pop(number, None)
        if request is not None:
            self._by_id.pop(id(request), None)
        return request

    def _tell(self, message: Any) -> None:
        with suppress(link.Gone):  # who reads sees that the process has ended
            self._link.send([message])

    def _tell_aside(self, message: Any) -> None:
        """On a thread of its own: where the engine hangs and the link is full, sending waits for ever."""
        threading.Thread(target=self._tell, args=(message,), name="tell", daemon=True).start()

    def _first(self) -> link.Ready:
        """What the process says once its engine is made, or is not."""
        found: link.Ready | None = None
        while found is None:
            try:
                messages = self._link.receive()
            except link.Gone:
                raise RuntimeError(f"the engine's process has ended: {_end(self._process.wait())}") from None
            for message in messages:
                if isinstance(message, link.Failed):
                    raise message.error
                if isinstance(message, link.Ready):
                    found = message
                else:
                    self._heed(message)
        return found

    def _read(self) -> None:
        try:
            while True:
                for message in self._messages():
                    self._heed(message)
        except link.Gone:
            pass
        except Exception as error:
            log.exception("the engine's process cannot be understood")
            self.give_up(f"{type(error).__name__}: {error}")
        self._link.close()
        code = self._process.wait()
        if not self._stopping and self.fault is None:
            self.fault = f"the engine's process has ended: {_end(code)}; the model must be loaded again"
            log.error(self.fault)
        elif code and self.fault is None:
            log.error("the engine's process has ended before its time: %s", _end(code))
        self._show(link.Status())  # nothing waits there, and nothing is in its slots
        self._ended = True
        self._heard.set()
        for number in list(self._requests):
            self._answer(number, self._last())

    def _messages(self) -> list[Any]:
        """What has come, one at least. Does not sleep for an answer that comes soon."""
        while len(self._requests) == 1 and time.monotonic() < self._awake:
            if messages := self._link.receive(wait=False):
                return messages
        return self._link.receive()

    def _last(self) -> Exception:
        """For whoever the process leaves without an answer."""
        return RuntimeError(self.fault) if self.fault else Overloaded("the engine was stopped")

    def _show(self, status: link.Status) -> None:
        """What Engine's properties of these names say."""
        self.waiting, self.waiting_tokens = status.waiting, status.waiting_tokens
        self.waiting_seconds, self.slots_in_use = status.waiting_seconds, status.slots_in_use

    def _heed(self, message: Any) -> None:
        if isinstance(message, link.Reply):
            self._latest = message
            self._answer(message.number, message.result)
        elif isinstance(message, link.Soon):
            self._awake = time.monotonic() + AWAKE
            self._rehearse()
        elif isinstance(message, link.Progress):
            request = self._requests.get(message.number)
            if request is not None and request.progress is not None:
                _guarded(request.progress, message.texts)
        elif isinstance(message, link.Status):
            self._looked = None
            self._show(message)
            self.counts, self.step_seconds = Counter(message.counts), message.step_seconds
            self.timings.extend(message.timings)
            self._heard.set()
        elif isinstance(message, link.Fault):
            self.fault = self.fault or message.reason
        elif isinstance(message, link.Log):
            log.log(message.level, message.text)

    def _rehearse(self) -> None:
        """Does with the last answer what will be to do with the next: Replies.rehearse says why."""
        try:
            if self._latest is not None:
                link.again(self._latest)
            self.soon()
        except Exception:
            log.exception("an answer could not be rehearsed")

    def _answer(self, number: int, result: Any) -> None:
        request = self._take(number)
        if request is not None:
            _guarded(request.reply, result)


def _numbers_of(messages: list[Any]) -> list[int]:
    return [row.number for message in messages if isinstance(message, link.Submit) for row in message.rows]


def _guarded(call: Any, value: Any) -> None:
    try:
        call(value)
    except Exception:
        log.exception("an answer could not be delivered")


def _started(program: str) -> tuple[subprocess.Popen[bytes], link.Link]:
    """The process, which finds the packages that this one does."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [_interpreter(), "-m", program, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    return process, link.Link(ours)


def _interpreter() -> str:
    """The program of this Python: inside Triton's stub sys.executable may be another's."""
    own = Path(sys.prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    return str(own) if own.exists() else sys.executable


def _end(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit status {code}"
