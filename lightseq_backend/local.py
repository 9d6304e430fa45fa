"""Engines without a server: built from a weight file, and run on a test case as LightSeq's example programs do."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from lightseq_backend import ops, weights
from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.errors import ConfigError, RequestError
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import GENERATE, SCORE, Output
from lightseq_backend.serving.device import DEVICES, choose_device
from lightseq_backend.serving.settings import BURSTS, INT8, PRECISIONS
from lightseq_backend.weights import directory
from lightseq_backend.weights.directory import Found

INFERENCES = 10
SLOTS = 64
UNBOUNDED = 1 << 30  # rows that may wait: who feeds an engine of his own bounds them himself
_OPS = {"cpu": "cpu", "gpu": "cuda"}


def build(
    path: str | Path,
    dialect: str | None = None,
    kind: str | None = None,
    device: str = "cpu",
    precision: str | None = None,
    slots: int = SLOTS,
    scores: bool = True,
) -> Engine:
    """An engine, not started, for a weight file or a model directory. WeightError or ConfigError says what is wrong.

    dialect, kind, precision  None: what the directory says, else head, what the file is, fp32 on the CPU, fp16 on a GPU
    device     cpu, gpu or auto
    scores     whether it has to score: a GPU is made ready for that apart
    """
    name = _ops_name(device)
    found = find(path, device)
    precision = precision or found.precision or PRECISIONS[name][0]
    backend = ops.load(name, precision=precision)
    config, arrays = weights.load(
        found.weights, dialect or found.dialect, kind or found.kind, rounded=precision == INT8
    )
    model = Gpt(config, arrays, backend) if isinstance(config, GptConfig) else Transformer(config, arrays, backend)
    beams = min(max(16, config.decoding.width), slots)
    room = EngineConfig(slots, beams, queue=UNBOUNDED, burst=BURSTS[name], scores=scores)
    return Engine(model, room, backend)


def find(path: str | Path, device: str = "cpu") -> Found:
    """The weight file at a path, or in the directory there, and how it is read on that device: see directory.find."""
    return directory.find(path, gpu=_ops_name(device) == "cuda")


def _ops_name(device: str) -> str:
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}; devices are {', '.join(DEVICES)}")
    return _OPS[choose_device(device)[0]]


def read_test_case(path: str | Path) -> np.ndarray:
    """int32 [batch, length] from LightSeq's test_case text: batch size, length, then the ids, all whitespace-separated.

    RequestError where the text is something else, or has fewer ids than it promises. More are left aside, as the
    original does.
    """
    try:
        words = Path(path).read_text().split()
        numbers = [int(word) for word in words]
    except OSError as error:
        raise RequestError(f"test case {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"test case {path} holds more than integers: {error}") from None
    if len(numbers) < 2 or numbers[0] < 1 or numbers[1] < 1:
        raise RequestError(f"test case {path} must begin with a batch size and a length, both at least 1")
    batch, length = numbers[:2]
    ids = numbers[2 : 2 + batch * length]
    if len(ids) < batch * length:
        raise RequestError(f"test case {path} promises {batch} x {length} ids and holds {len(ids)}")
    return np.array(ids, np.int64).reshape(batch, length)


def run(engine: Engine, rows: np.ndarray, score: bool = False) -> list[str]:
    """The result lines of a test case, each inference timed: what LightSeq's examples print."""
    lines, outputs = [], []
    for inference in range(INFERENCES):
        start = time.perf_counter()
        outputs = engine.answer(list(rows), SCORE if score else GENERATE)
        lines.append(f"inference {inference + 1} of {INFERENCES}: {(time.perf_counter() - start) * 1e3:.2f} ms")
    if score:
        lines.append("ppl: " + " ".join(f"{output.loss:.6f}" for output in outputs))
        return lines
    for number, output in enumerate(outputs):
        lines += _result_lines(number, output)
    return lines


def _result_lines(number: int, output: Output) -> list[str]:
    return [
        f"row {number} hypothesis {rank} score {one.score:.6f}{'' if one.finished else ' (cut)'}: "
        + " ".join(map(str, one.tokens.tolist()))
        for rank, one in enumerate(output.hypotheses)
    ]
