"""Whole models on a GPU: decode steps, encoder, requests, perplexity, the loop's share, loading.

    python -m benchmarks.gpu [--quick] [--models big,gpt2] [--precision fp16] [--records FILE]

Weights are random; every search takes as many steps as the source has tokens. Times are medians: of a step, of 30
times 8 replays of its graph around the last length of such a request, on the device's clock; of the others, of 5 calls
or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import gpu_device, gpu_engine, gpu_models
from benchmarks.gpu_device import Rates
from benchmarks.gpu_engine import Decoding, Engine
from benchmarks.gpu_models import MODELS, TINY, Model
from benchmarks.gpu_records import OURS, Record, Recorder, parser, precisions
from benchmarks.gpu_timing import device_seconds, wall_seconds

REPLAYS = 8  # of a step, in one sample; the step they centre on is the last of a request
TEXTS, TEXT_LENGTH = 8, 512  # of perplexity
SAMPLES = 30
LONG = 120  # tokens of the decode in which the loop is looked at
SERVED = {"slots": 32, "max_beam_size": 16, "prompt_tokens": 1024}  # what serving takes unless it is told otherwise


def main() -> None:
    made = parser("gpu", __doc__)
    made.add_argument("--models", help="names with commas between (default: big,base,gpt2,xl)")
    options = made.parse_args()
    gpu_device.require(options.device)
    models = MODELS if options.device == "cuda" else TINY
    names = options.models.split(",") if options.models else list(models)
    wanted = precisions(options)
    rates = gpu_device.measure(options.device, wanted)
    measured = {"copy_bytes_a_second": rates.bytes, "operations_a_second": rates.operations}
    conditions = gpu_device.conditions(options.device) | measured
    with Recorder("models", options.records, conditions) as recorder:
        for name in names:
            config, arrays = gpu_models.build(models[name])
            for precision in wanted:
                subject = Subject(models[name], precision, options.device, rates, options.quick)
                for record in subject.records(config, arrays):
                    recorder.add(record)
                gpu_device.release(options.device)


class Subject:
    """One model in one precision; `records` measures it."""

    def __init__(self, model: Model, precision: str, device: str, rates: Rates, quick: bool):
        self.model, self.precision, self.device, self.rates, self.quick = model, precision, device, rates, quick
        shape = model.shape
        self.texts, self.text_length = (TEXTS, TEXT_LENGTH) if device == "cuda" else (2, shape.positions)
        self.long = LONG if device == "cuda" else 40
        self.samples = SAMPLES if device == "cuda" else 2

    def records(self, config: Any, arrays: dict[str, np.ndarray]) -> Iterator[Record]:
        model = self.model
        room = {
            "slots": max(max(model.batches) * model.beams, gpu_models.BEAMS),
            "max_beam_size": gpu_models.BEAMS,
            "prompt_tokens": max(max(model.batches) * max(model.lengths), self.texts * self.text_length),
        }
        loaded = gpu_engine.load(config, arrays, self.device, self.precision, **room)
        yield self._record(0, 0, "load: weights in memory to the device", loaded.model_seconds, "s")
        yield self._record(0, 0, "load: engine and its graphs", loaded.engine_seconds, "s")
        engine = loaded.engine
        for batch in model.batches:
            for length in model.lengths:
                if not self.quick or length in (24, gpu_models.PROMPT):
                    yield from self._generation(engine, batch, length)
        if not model.translates:
            yield self._perplexity(engine)
        if not self.quick:
            for batch in model.batches:
                yield from self._bursts(engine, batch)
            if model.name == "big":
                yield self._served(engine)

    def _generation(self, engine: Engine, batch: int, length: int) -> Iterator[Record]:
        rows, changes = gpu_models.rows(self.model, batch, length), self._changes(length)
        clock = gpu_device.clock(engine)
        step = self._step(engine, batch, length)
        yield step
        read = gpu_engine.reading(engine, rows, changes)
        wall = wall_seconds(clock, read.whole, self.samples)
        yield self._record(
            batch, length, self._reading, wall * 1e3, "ms", gpu_models.reading_bytes(self.model, self.precision),
            gpu_models.reading_operations(self.model, batch, length),
            device_ms=device_seconds(clock, read.device, 4, self.samples // 2) * 1e3,
        )  # fmt: skip
        whole = wall_seconds(clock, lambda: gpu_engine.answer(engine, rows, changes), self.samples // 2)
        parts = wall + length * step.value / 1e6
        yield self._record(batch, length, "whole requests", whole * 1e3, "ms", parts_ms=parts * 1e3)

    def _step(self, engine: Engine, batch: int, length: int, what: str = "decode step") -> Record:
        decoding = Decoding(engine, gpu_models.rows(self.model, batch, length), self._changes(length))
        last = decoding.generated - 1
        first = max(0, last - REPLAYS // 2 - 1)
        seconds = device_seconds(
            gpu_device.clock(engine), decoding.step, REPLAYS, self.samples, lambda: decoding.rewind(first)
        )
        weights, caches = gpu_models.decoder_bytes(self.model, self.precision), decoding.cache_bytes(last)
        return self._record(
            batch, length, what, seconds * 1e6, "us", weights + caches,
            weights_bytes=weights, weights_floor_us=weights / self.rates.bytes * 1e6,
        )  # fmt: skip

    def _perplexity(self, engine: Engine) -> Record:
        texts = gpu_models.rows(self.model, self.texts, self.text_length)
        scored, clock = gpu_engine.scoring(engine, texts), gpu_device.clock(engine)
        seconds = wall_seconds(clock, scored.whole, 5)
        weights = gpu_models.decoder_bytes(self.model, self.precision)
        operations = gpu_models.scoring_operations(self.model, self.texts, self.text_length)
        return self._record(
            self.texts, self.text_length, "perplexity", seconds * 1e3, "ms", weights, operations,
            device_ms=device_seconds(clock, scored.device, 1, 5) * 1e3,
        )  # fmt: skip

    def _bursts(self, engine: Engine, batch: int) -> Iterator[Record]:
        length = self.model.lengths[0]
        rows = gpu_models.rows(self.model, batch, length)
        taken = gpu_engine.bursts(engine, rows, self._changes(length), self.long)
        yield self._record(
            batch, length, "a burst in the loop", taken.loop * 1e6, "us", steps=engine.config.burst,
            device_us=taken.device * 1e6, host_us=taken.host * 1e6, busy_percent=100 * taken.device / taken.loop,
        )  # fmt: skip

    def _served(self, engine: Engine) -> Record:
        other = gpu_engine.another(engine, **SERVED)
        return self._step(other, min(8, max(self.model.batches)), 24, "decode step with the room that serving takes")

    def _changes(self, tokens: int) -> dict[str, object]:
        return {"max_new_tokens": tokens}

    @property
    def _reading(self) -> str:
        return "encoder" if self.model.translates else "prompts"

    def _record(
        self, batch: int, length: int, what: str, value: float, unit: str,
        size: int | None = None, operations: int | None = None, **more: float,
    ) -> Record:  # fmt: skip
        floor = None
        if size is not None:
            scale = {"us": 1e6, "ms": 1e3, "s": 1.0}[unit]
            floor = self.rates.floor(size, operations or 0, self.precision) * scale
        return Record(
            OURS, self.model.name, self.precision, batch, length, what, value, unit, size, operations, floor, more=more
        )


if __name__ == "__main__":
    main()
