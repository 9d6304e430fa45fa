"""What `make bench-server` compares the served model with, as models of Triton's Python backend themselves."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from benchmarks.server_models import LATER
from lightseq_backend.serving.loading import load_engine
from lightseq_backend.serving.replies import _response_of
from lightseq_backend.serving.settings import read_settings
from lightseq_backend.serving.tensors import to_numpy

SOURCE, BEAMS = "source_ids", 4


class Noop:
    """Answers at once, with as many ids as it was given: what Triton, its Python stub and the caller cost."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(to_numpy(pb_utils.get_input_tensor_by_name(request, SOURCE))) for request in requests]

    @staticmethod
    def _answer(ids: np.ndarray) -> Any:
        beams = np.repeat(ids[:, None], BEAMS, axis=1)
        return _response_of({"target_ids": beams, "target_scores": np.zeros(beams.shape[:2], np.float32)})


class NoopLater(Noop):
    """The same, LATER, as models answer that take new requests meanwhile: a round trip to the server more, and all that
    a request passes has fallen asleep before its answer comes."""

    def initialize(self, _: dict[str, str]) -> None:
        self._arrived: SimpleQueue[tuple[float, Any, Any]] = SimpleQueue()
        threading.Thread(target=self._answers, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:  # type: ignore[override]
        for request in requests:
            self._arrived.put((time.monotonic(), request.get_response_sender(), super().execute([request])[0]))

    def _answers(self) -> None:
        while True:
            arrived, sender, answer = self._arrived.get()
            time.sleep(max(0.0, arrived + LATER - time.monotonic()))
            sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class Static:
    """The same engine behind Triton's dynamic batching: a batch is answered when its longest is done, and only then
    the next begins."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = read_settings(args)
        self._wire, self._engine = settings.wire, load_engine(settings)
        self._engine.warm_up()

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [to_numpy(pb_utils.get_input_tensor_by_name(request, SOURCE)) for request in requests]
        rows = [self._wire.rows(ids, SOURCE) for ids in given]
        outputs = iter(self._engine.answer([row for each in rows for row in each]))
        config = self._engine.model.config
        return [_response_of(self._wire.answer(each, [next(outputs) for _ in each], config)) for each in rows]
