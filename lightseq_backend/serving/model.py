"""The model class that Triton's Python backend runs, one object a model instance."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from lightseq_backend import text
from lightseq_backend.config import Config, DecodingOptions
from lightseq_backend.errors import ConfigError, NotUnderWay, RequestError, WeightError
from lightseq_backend.request import SCORE, Request
from lightseq_backend.serving import loading, remote
from lightseq_backend.serving.callers import Callers
from lightseq_backend.serving.control import Control, read_control
from lightseq_backend.serving.guard import Guard
from lightseq_backend.serving.metrics import Metrics
from lightseq_backend.serving.parts import Parts
from lightseq_backend.serving.remote import RemoteEngine
from lightseq_backend.serving.replies import Replies, Ticket
from lightseq_backend.serving.settings import Settings, read_settings
from lightseq_backend.serving.tensors import strings_arrive, survive_strings, to_numpy
from lightseq_backend.serving.texts import Texts
from lightseq_backend.serving.watch import Watch
from lightseq_backend.serving.wire import TARGET_IDS, TARGET_TEXT, TEXT_INPUT, priority_of

log = logging.getLogger(__name__)


class _Call(NamedTuple):
    sender: Any
    wanted: list[Request]


class TritonPythonModel:
    """Serves one weight file. `execute` reads and submits; the engine's process computes; reply threads answer."""

    ENGINE = remote.PROGRAM  # of that process

    def initialize(self, args: dict[str, str]) -> None:
        """Starts the engine's process, which loads the weights, and the threads; fails with every fault there is."""
        _log_through_triton()
        self._guard = Guard()
        started = time.monotonic()
        try:
            settings = read_settings(args)
            self._wire = settings.wire
            self._engine = RemoteEngine(settings, self.ENGINE)
            try:
                self._texts = _texts(settings, self._engine.model_config)
                self._options = lru_cache(maxsize=256)(self._read_options)  # most requests give the same parameters
                if self._wire.form.task != SCORE:
                    self._options("")  # what the file asks for by default must be possible
            except BaseException:
                self._engine.stop(0)
                raise
        except (ConfigError, WeightError, RequestError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        labels = {"model": settings.model, "version": settings.version, "instance": settings.instance}
        self._drain_seconds = settings.times["drain_seconds"]
        self._callers = Callers(self._engine.cancel)
        self._replies = Replies(self._wire, self._engine.model_config, self._callers.leave, self._callers.alone)
        self._engine.soon = self._replies.rehearse
        self._replies.start()
        self._callers.start()
        metrics = Metrics(self._engine, self._replies.outcomes, labels)
        self._watch = Watch(self._engine, settings.times["step_seconds"], metrics.update)
        self._watch.start()
        log.info(
            "%s: %s on %s, %s, %d slots in %.1f MiB, loaded in %.2f s",
            settings.instance,
            settings.weights,
            settings.device,
            settings.precision,
            self._engine.config.slots,
            self._engine.memory / 2**20,
            time.monotonic() - started,
        )

    def execute(self, requests: list[Any]) -> None:
        """Submits each request, or has it refused by itself; the answers are sent later."""
        self._replies.wait_for_room()
        calls, stops = [], []
        for request in requests:
            sender = request.get_response_sender()
            try:
                parameters = request.parameters()
                control = read_control(parameters)
                if control.cancel is not None:
                    stops.append((control.cancel, sender))
                else:
                    calls.append(_Call(sender, self._read(request, parameters, control, sender)))
            except Exception as error:
                self._replies.refuse(sender, error)
        if calls:
            self._submit(calls)
        for name, sender in stops:  # one of those just submitted may be meant
            self._stop(name, sender)

    def is_ready(self) -> bool:
        """Whether answers can be expected."""
        return self._engine.ready and self._replies.alive and self._watch.alive

    def finalize(self) -> None:
        """Finishes what is under way, within `drain_seconds`; the rest is answered with an error."""
        self._engine.stop(self._drain_seconds)
        self._watch.close()
        self._callers.close()
        self._replies.close()
        self._guard.close()

    def _submit(self, calls: list[_Call]) -> None:
        """All with one message, which is cheaper; should that fail, each by itself."""
        try:
            self._engine.submit(*[call.wanted for call in calls])
        except Exception as error:
            if len(calls) == 1:
                self._replies.refuse(calls[0].sender, error)
            else:
                for call in calls:
                    self._submit([call])

    def _read(self, request: Any, parameters: str, control: Control, sender: Any) -> list[Request]:
        """What the engine is to do, a row each."""
        arrived = time.monotonic()
        rows, from_text = self._given(request, self._wire.input, TEXT_INPUT, self._wire.text_input, self._texts.rows)
        if self._wire.streams and len(rows) > 1:
            raise RequestError(f"the request has {len(rows)} rows; a stream has one: send a request for each")
        targets: list[Any] = [None] * len(rows)
        if self._wire.form.takes_targets:
            targets, _ = self._given(request, TARGET_IDS, TARGET_TEXT, self._wire.target_text, self._texts.targets)
            if len(targets) != len(rows):
                raise RequestError(f"there are {len(targets)} targets for {len(rows)} sources; each needs one")
        options = self._options(parameters)
        kind, priority = self._wire.form.task, priority_of(parameters)
        wants_text = self._texts.written and self._wire.wants_text(from_text, request.requested_output_names())
        ticket = Ticket(sender, rows, self._texts.decode if wants_text else None)
        if self._wire.streams:
            ticket.parts = Parts(self._wire, self._engine.model_config, rows[0], options, ticket.decode)
        deadline = None if control.patience is None else arrived + control.patience
        progress, decode = self._replies.progress(ticket), self._texts.decode if self._texts.written else None
        wanted = [
            Request(row, options, reply, kind, i, target, progress, deadline, decode, priority, arrived)
            for i, (row, reply, target) in enumerate(zip(rows, self._replies.expect(ticket), targets))
        ]
        self._callers.watch(sender, control.name or request.request_id(), wanted, arrived)
        return wanted

    def _stop(self, name: str, sender: Any) -> None:
        """Stops the requests with that id; the answer to whoever asks for it has no tensors."""
        if self._callers.stop(name):
            self._replies.confirm(sender)
        else:
            self._replies.refuse(sender, NotUnderWay(f"no request with the id {name!r} is under way here"))

    def _given(
        self, request: Any, ids_name: str, text_name: str, takes_text: bool, rows_of: Callable[..., list[np.ndarray]]
    ) -> tuple[list[np.ndarray], bool]:
        """The rows of a request's input, and whether it gave them as text."""
        ids = pb_utils.get_input_tensor_by_name(request, ids_name)
        given = pb_utils.get_input_tensor_by_name(request, text_name) if takes_text else None
        if given is None:
            if ids is None:
                raise RequestError(f"input {f'{ids_name} or {text_name}' if takes_text else ids_name} is missing")
            return self._wire.rows(to_numpy(ids), ids_name), False  # copies: the memory is ours until we return
        if ids is not None:
            raise RequestError(f"the request gives both {ids_name} and {text_name}; it takes one of them")
        return rows_of(given.as_numpy()), True

    def _read_options(self, parameters: str) -> DecodingOptions:
        changes = self._wire.changes(parameters)
        if self._wire.form.task == SCORE:
            return self._engine.model_config.decoding
        return self._engine.options(self._texts.with_language(changes))


def _texts(settings: Settings, config: Config) -> Texts:
    """The model's tokenizer, where config.pbtxt asks for one. A model without is served, and refuses text."""
    wire = settings.wire
    if not loading.takes_text(settings):
        return Texts(wire, config, None, "")
    if not strings_arrive():
        survive_strings()
        obstacle = f"Triton's Python stub takes no strings under NumPy {np.__version__}; NumPy 1 works, and ids do"
        log.warning("%s: no text: %s", settings.instance, obstacle)
        return Texts(settings.wire, config, None, obstacle)
    tokenizer = loading.load_tokenizer(settings, config)
    obstacle = f"no tokenizer in {' or '.join(map(str, settings.tokenizer))}; it may be {text.FILE_SETS}"
    if tokenizer is None:
        log.warning("%s: no text: %s", settings.instance, obstacle)
    return Texts(settings.wire, config, tokenizer, obstacle)


class _TritonLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logger = pb_utils.Logger
        try:
            if record.levelno >= logging.ERROR:
                logger.log_error(self.format(record))
            elif record.levelno >= logging.WARNING:
                logger.log_warn(self.format(record))
            else:
                logger.log_info(self.format(record))
        except Exception:
            self.handleError(record)


def _log_through_triton() -> None:
    """What this package logs goes to Triton's log and follows its settings."""
    package = logging.getLogger("lightseq_backend")
    package.handlers, package.propagate = [_TritonLog()], False
    package.setLevel(logging.INFO)
