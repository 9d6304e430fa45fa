"""Serving compiles nothing, loads nothing, captures nothing and takes no memory: all of that is over at load."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np
import pytest
import small_models

from lightseq_backend import ops
from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops import launch
from lightseq_backend.ops.cuda import Cuda
from lightseq_backend.request import GENERATE, SCORE, Request

ROOM = {"slots": 72, "max_beam_size": 8, "queue": 600, "prompt_tokens": 700, "burst": 4}
CUBLAS_CODE = 64 << 20  # bytes; the library loads a kernel of its own when it first chooses it
CHANGES: tuple[dict[str, Any], ...] = (
    {"sampling_method": "beam_search", "beam_size": 4},
    {"sampling_method": "beam_search", "beam_size": 8, "length_penalty": -1.0},
    {"sampling_method": "beam_search", "beam_size": 3, "diverse_lambda": 0.5, "max_new_tokens": 3},
    {"sampling_method": "topk_greedy", "beam_size": 3},
    {"sampling_method": "greedy"},
    {"sampling_method": "topk", "top_k": 5, "seed": 1},
    {"sampling_method": "topp", "top_p": 0.8, "seed": 2, "num_hypotheses": 3},
    {"sampling_method": "sample", "seed": 3, "temperature": 1.5},
    {"sampling_method": "standard_beam", "beam_size": 4, "early_stopping": True},
    {"sampling_method": "standard_beam", "beam_size": 3, "no_repeat_ngram_size": 2, "bad_words_ids": [[4], [5, 6]]},
    {"sampling_method": "greedy", "repetition_penalty": 1.3, "token_log_probabilities": True},
)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What of the forbidden happened, by name, wherever in this process; cleared by a test when its engine is there."""
    happened: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            happened[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(launch.Kernel, "__init__", counted("kernels", launch.Kernel.__init__))
    handle = functools.cached_property(counted("compilations", launch.Kernel._handle.func))
    handle.__set_name__(launch.Kernel, "_handle")
    monkeypatch.setattr(launch.Kernel, "_handle", handle)
    monkeypatch.setattr(Cuda, "capture", counted("captures", Cuda.capture))
    # CuPy's own kernels (arithmetic, conversions) come through here, and so do ours.
    compiler = cupy.cuda.compiler
    loads = counted("modules", compiler._compile_module_with_cache)
    monkeypatch.setattr(compiler, "_compile_module_with_cache", loads)
    pool, pinned = cupy.get_default_memory_pool(), cupy.get_default_pinned_memory_pool()
    cupy.cuda.set_allocator(counted("allocations", pool.malloc))
    cupy.cuda.set_pinned_memory_allocator(counted("pinned allocations", pinned.malloc))
    yield happened
    cupy.cuda.set_allocator(pool.malloc)
    cupy.cuda.set_pinned_memory_allocator(pinned.malloc)


def build(kind: str, precision: str, inner: int = 128) -> Engine:
    config, arrays = getattr(small_models, kind)(4, hidden=64, heads=4, inner=inner, max_positions=160)
    backend = ops.load("cuda", 0, precision)
    model = Gpt if isinstance(config, GptConfig) else Transformer
    return Engine(model(config, arrays, backend), EngineConfig(**ROOM), backend)


def load(engine: Engine, seed: int) -> None:
    """Single rows and batches of many, lengths from one to the most, each method by itself and all at once."""
    random, config = np.random.default_rng(seed), engine.model.config
    lengths = [1, 2, 5, 17, 33, 64, 65, 100, 130, config.max_positions - 1, config.max_positions]

    def rows(count: int, longest: int) -> list[np.ndarray]:
        chosen = random.choice([length for length in lengths if length <= longest], count)
        return [random.integers(3, config.input_vocabulary, length) for length in chosen]

    for number, changes in enumerate(CHANGES):
        for count in (1, 3, 9, 40):
            engine.answer(rows(count, 160 if count < 9 else 33), GENERATE, changes)
        if isinstance(config, GptConfig):
            engine.answer(rows(1 + 7 * number, 160), SCORE)
    answers = []
    for row, kind in zip(rows(120, 100), (GENERATE, GENERATE, SCORE) * 40):
        scores = kind == SCORE and isinstance(config, GptConfig)
        changes = None if scores else CHANGES[random.integers(len(CHANGES))]
        answers.append(_submitted(engine, row, SCORE if scores else GENERATE, changes))
    while not engine.idle:
        engine.step()
    assert [type(answer[0]).__name__ for answer in answers] == ["Output"] * 120


def _submitted(engine: Engine, row: np.ndarray, kind: str, changes: dict[str, Any] | None) -> list[Any]:
    answer: list[Any] = []
    engine.submit([Request(row, engine.options(changes), answer.append, kind)])
    return answer


def test_counters_count(counts: Counter[str]) -> None:
    """Each of them sees what it is there for: a load does all of it, also where other engines have been."""
    build("gpt", "fp16", inner=136)
    missed = {"kernels", "compilations", "modules", "captures", "allocations"} - {
        name for name, n in counts.items() if n
    }
    assert missed == set()
    cupy.asarray(np.arange(1000))
    assert counts["pinned allocations"]


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("kind", ["transformer", "gpt"])
def test_mixed_load_compiles_captures_and_allocates_nothing(kind: str, precision: str, counts: Counter[str]) -> None:
    engine = build(kind, precision)
    free = cupy.cuda.runtime.memGetInfo()[0]
    counts.clear()
    for seed in range(2):
        load(engine, seed)
    assert dict(counts) == {}
    taken = free - cupy.cuda.runtime.memGetInfo()[0]
    print(f"{kind} {precision}: {taken} bytes of the device's memory taken by libraries")
    assert taken <= CUBLAS_CODE


def test_load_from_the_engines_own_thread_does_not_either(counts: Counter[str]) -> None:
    engine = build("transformer", "fp16")
    counts.clear()
    engine.start()
    for changes in CHANGES:
        engine.answer([[3] * length for length in (1, 7, 60, 100)], GENERATE, changes)
    engine.stop()
    assert dict(counts) == {}
