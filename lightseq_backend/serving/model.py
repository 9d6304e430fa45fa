"""The model class that Triton's Python backend runs, one object a model instance."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from lightseq_backend import ops, weights
from lightseq_backend.config import Config, DecodingOptions, TransformerConfig
from lightseq_backend.engine.engine import Engine
from lightseq_backend.errors import ConfigError, RequestError, WeightError
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import SCORE, Request, Sequence
from lightseq_backend.serving.metrics import Metrics
from lightseq_backend.serving.replies import Replies
from lightseq_backend.serving.settings import Settings, read_settings
from lightseq_backend.serving.tensors import to_numpy

log = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds that an unloading model gives to what is under way

METRICS_PERIOD = 1.0  # seconds


class TritonPythonModel:
    """Serves one weight file. `execute` reads and submits; the engine's thread computes; a reply thread answers."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads weights, takes the engine's memory, starts the threads. Fails with every fault that was found."""
        _log_through_triton()
        started = time.monotonic()
        try:
            settings = read_settings(args)
            self._wire = settings.wire
            self._engine = _engine(settings)
            if self._wire.form.task != SCORE:
                self._options(self._wire.changes(""))  # what the file asks for by default must be possible
        except (ConfigError, WeightError, RequestError) as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        labels = {"model": settings.model, "version": settings.version, "instance": settings.instance}
        self._replies = Replies(self._wire, self._engine.model.config)
        self._replies.start(Metrics(self._engine, self._replies.outcomes, labels).update, METRICS_PERIOD)
        self._engine.start()
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
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:
                self._replies.refuse(sender, error)

    def is_ready(self) -> bool:
        """Whether answers can be expected."""
        return self._engine.ready and self._replies.alive

    def finalize(self) -> None:
        """Finishes what is under way, within PATIENCE seconds; the rest is answered with an error."""
        self._engine.stop(PATIENCE)
        self._replies.close()

    def _submit(self, request: Any, sender: Any) -> None:
        if not self._engine.alive:
            raise RuntimeError("the engine's thread has ended; the model must be loaded again")
        tensor = pb_utils.get_input_tensor_by_name(request, self._wire.input)
        if tensor is None:
            raise RequestError(f"input {self._wire.input} is missing")
        rows = self._wire.rows(np.array(to_numpy(tensor)))  # a copy: Triton's memory is ours only until we return
        options = self._options(self._wire.changes(request.parameters()))
        kind = self._wire.form.task
        replies = self._replies.expect(sender, rows)
        wanted = [Request(row, options, reply, kind, i) for i, (row, reply) in enumerate(zip(rows, replies))]
        try:
            self._engine.submit(wanted)
        except RequestError as error:
            raise _naming_the_row(wanted, self._engine.model.config, error) from None

    def _options(self, changes: dict[str, object]) -> DecodingOptions:
        if self._wire.form.task == SCORE:
            return self._engine.model.config.decoding
        return self._engine.options(changes)


def _engine(settings: Settings) -> Engine:
    module = ops.load(settings.device, settings.device_id, settings.precision)
    config, arrays = weights.load(settings.weights, dialect=settings.dialect, kind=settings.wire.form.kind)
    if isinstance(config, TransformerConfig):
        return Engine(Transformer(config, arrays, module), settings.engine_config(config), module)
    return Engine(Gpt(config, arrays, module), settings.engine_config(config), module)


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
