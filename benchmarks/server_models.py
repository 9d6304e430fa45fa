"""What `make bench-server` serves: one model in four ways, and requests of mixed lengths for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.gpu_models import MODELS, Model, Shape, build
from lightseq_backend import weights

SERVED, STREAM, STATIC, NOOP, NOOP_LATER = NAMES = ("served", "stream", "static", "noop", "noop_later")
PROGRAMS = {
    **dict.fromkeys((SERVED, STREAM), "from lightseq_backend.serving.model import TritonPythonModel\n"),
    STATIC: "from benchmarks.served import Static as TritonPythonModel\n",
    NOOP: "from benchmarks.served import Noop as TritonPythonModel\n",
    NOOP_LATER: "from benchmarks.served import NoopLater as TritonPythonModel\n",
}
LEAST, MOST, MEDIAN, SPREAD = 4, 100, 20, 0.7  # tokens of a source; log-normal
SOURCES, SEED = 256, 1
LATER = 0.002  # seconds after which the one no-op answers
SHORT = 12  # tokens of the one source that what a server adds to a request is measured with


class Load(NamedTuple):
    """A model, and the rows that decode at once: beams of that many sequences."""

    model: Model
    slots: int


LOADS = {
    # A CPU's step costs much the same for each row, whatever the size: static batches, which shrink, lose little there.
    "cpu": Load(Model("small", "a small Transformer", Shape(128, 512, 4, 2, 4000, 128), True, (), ()), 64),
    "gpu": Load(MODELS["big"], 128),
}


def lengths() -> np.ndarray:
    """int64 [SOURCES]: tokens of the sources, and of their translations."""
    normal = np.random.default_rng(SEED).normal(np.log(MEDIAN), SPREAD, SOURCES)
    return np.clip(np.rint(np.exp(normal)), LEAST, MOST).astype(np.int64)


def sources(load: Load, counts: np.ndarray) -> list[list[int]]:
    """Ids, all sources different."""
    usable = load.model.shape.vocabulary - 4
    return [(3 + (np.arange(count) + 7 * row) % usable).tolist() for row, count in enumerate(counts)]


def write_rows(path: Path, rows: list[list[int]]) -> Path:
    """Requests for perf_analyzer, which takes them in turn."""
    path.write_text(json.dumps({"data": [{"source_ids": {"content": row, "shape": [len(row)]}} for row in rows]}))
    return path


def write_weights(path: Path, load: Load) -> Path:
    """Random weights that never choose the end: a translation is as long as its source, which is its limit."""
    config, arrays = build(load.model)
    weights.save(path, replace(config, extra_decode_length=2), arrays)
    return path


def write_repository(root: Path, weight_file: Path, load: Load, device: str) -> None:
    for name in NAMES:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.py").write_text(PROGRAMS[name])
        (root / name / "config.pbtxt").write_text(_config(name, weight_file, load, device))


def _config(name: str, weight_file: Path, load: Load, device: str) -> str:
    sequences = load.slots // load.model.beams
    parameters = {"weights": weight_file, "slots": load.slots, "queue": 1024} if name not in (NOOP, NOOP_LATER) else {}
    batching = f"dynamic_batching {{ preferred_batch_size: [ {sequences} ], max_queue_delay_microseconds: 1000 }}"
    outputs = [("target_ids", "INT32", "-1, -1"), ("target_scores", "FP32", "-1")]
    if name == STREAM:
        outputs.append(("final", "BOOL", "1"))
    given = ", ".join(f'{{ name: "{one}", data_type: TYPE_{kind}, dims: [ {dims} ] }}' for one, kind, dims in outputs)
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {sequences}",
        'input [ { name: "source_ids", data_type: TYPE_INT32, dims: [ -1 ], allow_ragged_batch: true } ]',
        f"output [ {given} ]",
        "model_transaction_policy { decoupled: true }" if name == STREAM else "",
        batching if name == STATIC else "dynamic_batching { }",
        f"instance_group [ {{ kind: KIND_{'GPU' if device == 'gpu' and name not in (NOOP, NOOP_LATER) else 'CPU'} }} ]",
        *(f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()),
    ]
    return "\n".join(lines) + "\n"
