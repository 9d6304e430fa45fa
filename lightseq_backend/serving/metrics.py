"""What Triton's /metrics shows of an engine. A change is a round trip to the server: never on the engine's thread."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from lightseq_backend.engine.engine import Engine

log = logging.getLogger(__name__)

GAUGES = {
    "lightseq_slots": "Rows that can decode at the same time",
    "lightseq_slots_in_use": "Rows that hold a slot",
    "lightseq_queue_rows": "Sequences that wait for slots",
    "lightseq_engine_bytes": "Memory of the engine, weights not included",
}
COUNTERS = {
    "lightseq_prompt_tokens_total": "Source and prompt tokens read",
    "lightseq_generated_tokens_total": "Tokens of the hypotheses that were returned",
    "lightseq_scored_tokens_total": "Tokens of texts that were scored",
    "lightseq_steps_total": "Decode steps",
}
REQUESTS = ("lightseq_requests_total", "Requests by outcome")


class Metrics:
    """Gauges and counters of one model instance; `update` brings Triton up to date where something changed.

    outcomes  requests by outcome, a live count
    labels    tell this instance from others
    """

    def __init__(self, engine: Engine, outcomes: Mapping[str, int], labels: Mapping[str, str]):
        self._engine, self._outcomes = engine, outcomes
        self._metrics: dict[str, Any] = {}
        self._shown: dict[str, int] = {}
        family = pb_utils.MetricFamily
        try:
            self._families = [
                *(self._family(name, text, family.GAUGE, {name: dict(labels)}) for name, text in GAUGES.items()),
                *(self._family(name, text, family.COUNTER, {name: dict(labels)}) for name, text in COUNTERS.items()),
                self._family(*REQUESTS, family.COUNTER, {kind: {**labels, "outcome": kind} for kind in outcomes}),
            ]
        except Exception as error:  # a server started with --allow-metrics=false serves all the same
            log.warning("no metrics: %s", error)
            self._metrics.clear()

    def update(self) -> None:
        """Sets gauges and raises counters. To be called by one thread."""
        engine = self._engine
        gauges = (engine.config.slots, engine.slots_in_use, engine.waiting, engine.memory)
        values = dict(zip(GAUGES, gauges, strict=True))
        counts = {name: engine.counts[name.removeprefix("lightseq_").removesuffix("_total")] for name in COUNTERS}
        for key, value in {**values, **counts, **self._outcomes}.items():
            shown = self._shown.get(key, 0)
            if key not in self._metrics or value == shown:
                continue
            if key in values:
                self._metrics[key].set(value)
            else:
                self._metrics[key].increment(value - shown)
            self._shown[key] = value

    def _family(self, name: str, description: str, kind: Any, labels: Mapping[str, Mapping[str, str]]) -> Any:
        family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
        for key, own in labels.items():
            self._metrics[key] = family.Metric(labels=dict(own))
        return family
