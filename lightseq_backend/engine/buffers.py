"""All device memory of an engine: planned, checked against what is free, then taken as one block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.decoding.state import DecodingState
from lightseq_backend.errors import ConfigError
from lightseq_backend.models.cache import Cache, Plan
from lightseq_backend.models.layers import Work
from lightseq_backend.models.pack import Pack
from lightseq_backend.ops.slots import MOST_ENDS, ranks

Array = Any
_ALIGNMENT = 256


@dataclass(frozen=True)
class Buffers:
    """The parts an engine works with, and the bytes they take together.

    prompt  int32: a pack (models/pack.py) of as many rows as a pass may have
    scored  float32 [prompt rows]: for perplexity
    """

    size: int
    cache: Cache
    state: DecodingState
    work: Work
    prompt: Array
    scored: Array

    @property
    def prompt_rows(self) -> int:
        """The most rows of a pass over sequences."""
        return len(self.scored)


def allocate(model: Any, config: EngineConfig, beams: int, ops: ModuleType) -> Buffers:
    """Takes the block; ConfigError says what is missing and what would fit. beams: of the widest search."""

    def plan(slots: int) -> dict[str, Plan]:
        return _plan(model, replace(config, slots=slots, max_beam_size=min(config.max_beam_size, slots)), beams, ops)

    def no_room(free: int) -> ConfigError:
        fitting = _most(config.slots - 1, lambda slots: _size(plan(slots)) <= free)
        advice = f"{fitting} slots would fit" if fitting else "not even one slot would fit"
        return ConfigError(
            f"the engine needs {size / 2**20:.0f} MiB for {config.slots} slots and {config.prompt_tokens} "
            f"prompt tokens; {free / 2**20:.0f} MiB are free: {advice}"
        )

    wanted = plan(config.slots)
    size, free = _size(wanted), ops.available_memory()
    if size > free:
        raise no_room(free)
    try:
        block = ops.allocate(size)
    except MemoryError as error:  # somebody was faster
        raise no_room(ops.available_memory()) from error
    offset = 0
    parts: dict[str, dict[str, Array]] = {}
    for part, arrays in wanted.items():
        parts[part] = {}
        for name, (shape, dtype) in arrays.items():
            parts[part][name] = ops.view(block, offset, shape, dtype)
            offset += _bytes(shape, dtype)
    parts["state"]["logits"] = parts["state"]["logits"][:, : model.config.vocabulary]
    return Buffers(
        size,
        Cache(**parts["cache"]),
        DecodingState(**parts["state"]),
        Work(**parts["work"]),
        **parts["passes"],
    )


def _plan(model: Any, config: EngineConfig, beams: int, ops: ModuleType) -> dict[str, Plan]:
    shape = model.config
    lanes = config.slots + 1
    prompt_rows = max(config.prompt_tokens, shape.max_positions)
    rows = max(buckets(config.slots))
    scores_texts = isinstance(shape, GptConfig) and config.scores  # targets make do with a step's
    logits = max(rows, min(prompt_rows, ops.SCORED_ROWS)) if scores_texts else rows
    memory_layers = 0 if isinstance(shape, GptConfig) else shape.decoder_layers
    widths = Work.widths(shape.hidden, shape.inner, memory_layers)
    vocabulary = -(-shape.vocabulary // ops.LOGITS_ALIGNMENT) * ops.LOGITS_ALIGNMENT
    return {
        "cache": model.cache_plan(lanes),
        "state": DecodingState.plan(
            lanes, rows, logits, shape.max_positions, vocabulary, beams, candidates(shape, beams, ops)
        ),
        "work": {name: ((max(prompt_rows, rows), width), ops.FLOAT) for name, width in widths.items()},
        "passes": {
            "prompt": ((Pack.elements(prompt_rows),), np.dtype(np.int32)),
            "scored": ((prompt_rows,), np.dtype(np.float32)),
        },
    }


def candidates(shape: Any, beams: int, ops: ModuleType) -> int:
    """Best next tokens of a row that the widest standard search looks at, as far as there are any."""
    return min(ranks(beams, MOST_ENDS - 1), ops.MOST_CANDIDATES, shape.vocabulary - (shape.banned_id >= 0))


def buckets(slots: int) -> list[int]:
    """Row counts that a step exists for: a step over n rows runs as the next larger one. One and four rows (a lone text
    of a greedy search or of a sample, and of a search with LightSeq's four beams) are a twentieth faster than as eight.
    """
    counts = [1, 4, *range(8, min(slots, 64), 8), *range(64, slots, 32)]
    return [*counts, -(-slots // 8) * 8]


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _size(plan: dict[str, Plan]) -> int:
    return sum(_bytes(*wanted) for part in plan.values() for wanted in part.values())


def _bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
