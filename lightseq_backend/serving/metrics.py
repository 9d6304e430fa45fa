"""What Triton's /metrics shows of an engine. A change is a round trip to the server: never on the engine's thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from lightseq_backend.serving.remote import RemoteEngine

log = logging.getLogger(__name__)

GAUGES: dict[str, tuple[str, Callable[[RemoteEngine], float]]] = {
    "lightseq_ready": ("1 while answers can be expected", lambda engine: int(engine.ready)),
    "lightseq_slots": ("Rows that can decode at the same time", lambda engine: engine.config.slots),
    "lightseq_slots_in_use": ("Rows that hold a slot", lambda engine: engine.slots_in_use),
    "lightseq_queue_rows": ("Sequences that wait for slots", lambda engine: engine.waiting),
    "lightseq_queue_places": ("Sequences that may wait", lambda engine: engine.config.queue),
    "lightseq_queue_tokens": ("Tokens of the sequences that wait", lambda engine: engine.waiting_tokens),
    "lightseq_queue_age_seconds": ("Wait so far of the longest waiting", lambda engine: engine.waiting_seconds),
    "lightseq_engine_bytes": ("Memory of the engine, weights not included", lambda engine: engine.memory),
}
COUNTERS: dict[str, tuple[str, Callable[[RemoteEngine], float]]] = {
    "lightseq_prompt_tokens_total": ("Source and prompt tokens read", lambda engine: engine.counts["prompt_tokens"]),
    "lightseq_generated_tokens_total": (
        "Tokens of the hypotheses that were returned",
        lambda engine: engine.counts["generated_tokens"],
    ),
    "lightseq_scored_tokens_total": ("Tokens of scored texts", lambda engine: engine.counts["scored_tokens"]),
    "lightseq_steps_total": ("Decode steps", lambda engine: engine.counts["steps"]),
    "lightseq_step_rows_total": ("Rows in use, summed over decode steps", lambda engine: engine.counts["step_rows"]),
    "lightseq_step_seconds_total": ("Time that decode steps took", lambda engine: engine.step_seconds),
}
REQUESTS = ("lightseq_requests_total", "Requests by outcome")
# By the fields of request.Timing; the bounds are in seconds.
_LONG = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_SHORT = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
HISTOGRAMS = {
    "lightseq_queue_seconds": ("Time in the queue", "queue", _LONG),
    "lightseq_first_token_seconds": ("Time until the first tokens were seen", "first_token", _LONG),
    "lightseq_token_seconds": ("Time a token after those", "token", _SHORT),
    "lightseq_sequence_seconds": ("Time until a sequence was done", "total", _LONG),
}
READ_AT_ONCE = 10_000  # timings; an observation takes 15 us (two cores of an EPYC), the next look takes the rest


class Metrics:
    """Metrics of one model instance; `update` brings Triton up to date where something changed.

    outcomes  requests by outcome, a live count
    labels    tell this instance from others
    """

    def __init__(self, engine: RemoteEngine, outcomes: Mapping[str, int], labels: Mapping[str, str]):
        self._engine, self._outcomes, self._labels = engine, outcomes, dict(labels)
        self._metrics: dict[str, Any] = {}
        self._histograms: dict[str, Any] = {}  # by field of Timing
        self._shown: dict[str, float] = {}
        family = pb_utils.MetricFamily
        try:
            self._families = [
                *(self._family(name, text, family.GAUGE, name) for name, (text, _) in GAUGES.items()),
                *(self._family(name, text, family.COUNTER, name) for name, (text, _) in COUNTERS.items()),
                self._family(*REQUESTS, family.COUNTER, *outcomes),
                *(self._histogram(name, *what) for name, what in HISTOGRAMS.items()),
            ]
        except Exception as error:  # a server started with --allow-metrics=false serves all the same
            log.warning("no metrics: %s", error)
            self._metrics.clear()
            self._histograms.clear()

    def update(self) -> None:
        """Sets gauges, raises counters, takes the engine's timings. To be called by one thread."""
        engine = self._engine
        values = {name: read(engine) for name, (_, read) in [*GAUGES.items(), *COUNTERS.items()]}
        for key, value in {**values, **self._outcomes}.items():
            shown = self._shown.get(key, 0)
            if key not in self._metrics or value == shown:
                continue
            if key in GAUGES:
                self._metrics[key].set(value)
            else:
                self._metrics[key].increment(value - shown)
            self._shown[key] = value
        for _ in range(min(len(engine.timings), READ_AT_ONCE)):
            timing = engine.timings.popleft()._asdict()
            for field, metric in self._histograms.items():
                if timing[field] is not None:
                    metric.observe(timing[field])

    def _family(self, name: str, description: str, kind: Any, *keys: str) -> Any:
        """A family of one metric, or of one for each outcome."""
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        for key in keys:
            labels = self._labels if key == name else {**self._labels, "outcome": key}
            self._metrics[key] = family.Metric(labels=dict(labels))
        return family

    def _histogram(self, name: str, description: str, field: str, bounds: tuple[float, ...]) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.HISTOGRAM)
        self._histograms[field] = family.Metric(labels=dict(self._labels), buckets=list(bounds))
        return family
