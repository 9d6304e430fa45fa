"""Kernels that begin before the one in front has ended read nothing too early: the same bits, however often."""

from __future__ import annotations

from functools import partial
from typing import Any

import cupy
import numpy as np
import pytest
import small_models

from lightseq_backend import ops
from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.engine import Engine, graphs
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import SCORE, Request

REPLAYS, PASSES = 10_000, 1_000
POISON = 0xFF  # in every byte: not a number, of whatever size, and -1
BEAMS = 4
KINDS = ("transformer", "gpt")


# Wide enough that a kernel has more blocks than one or two.
NARROW: dict[str, Any] = {"hidden": 512, "heads": 8, "inner": 2048, "max_positions": 64}
# For products of warpgroups, which begin at 33 rows of this size.
WIDE: dict[str, Any] = {"hidden": 1024, "heads": 16, "inner": 4096, "max_positions": 192}
CASES = [
    *((kind, precision, rows, NARROW) for kind in KINDS for precision in ("fp16", "fp32") for rows in (8, 32, 64, 128)),
    *((kind, "fp16", rows, WIDE) for kind in KINDS for rows in (32, 64, 128)),
]


@pytest.mark.parametrize(("kind", "precision", "rows", "sizes"), CASES)
def test_step_is_the_same_ten_thousand_times(kind: str, precision: str, rows: int, sizes: dict[str, Any]) -> None:
    """A replay finds what kernels found that wait for each other, though all it works with is poisoned before."""
    device = ops.load("cuda", 0, precision)
    engine = decoding(kind, device, rows, sizes)
    state, cache, work = engine._buffers.state, engine._buffers.cache, engine._buffers.work.first(rows)
    step = graphs._step(engine.model, engine._buffers, rows, graphs.SEARCHING, device)

    advanced = [state.slots, state.history, cache.ancestors]
    poisoned = [work.x, work.context, work.query, work.qkv, work.inner, state.ids, state.log_probabilities]
    with device._stream:
        before = [array.copy() for array in advanced]

    def prepare() -> None:
        for array, copy in zip(advanced, before, strict=True):
            array[...] = copy
        poison(device, poisoned)

    expected = check_replays(device, step, prepare, [*advanced, work.x, work.inner], REPLAYS)
    with device._stream:
        assert any((array != copy).any() for array, copy in zip(expected, before))


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_pass_is_the_same_a_thousand_times(kind: str, precision: str) -> None:
    """The same of texts that are scored and of sources that are read, 600 tokens: with products of cuBLAS between our
    own kernels, and int8 weights that are made halves for it."""
    device = ops.load("cuda", 0, precision)
    engine = idle(kind, device)
    texts = [[3 + (7 * i + j) % 500 for j in range(60)] for i in range(10)]
    scores = kind == "gpt"
    greedy = {"sampling_method": "greedy", "max_new_tokens": 1}
    engine.answer(texts, **({"kind": SCORE} if scores else {"changes": greedy}))
    buffers, rows = engine._buffers, engine._passes.size(600)
    read = partial(graphs._score, ops=device) if scores else graphs._prefill

    work, cache = buffers.work.first(rows), buffers.cache
    found = [buffers.scored[:600]]
    if not scores:  # the last lane is nobody's
        found = [of_layer[:-1] for array in (cache.memory_keys, cache.memory_values) for of_layer in array]
    rooms = [device._rooms[name] for name in ("scored statistics", "scored targets") if name in device._rooms]
    rooms += [device._rooms["bias of halves"], device._halves] if precision == "int8" else []
    poisoned = [work.x, work.normed, work.context, work.qkv, work.inner, *rooms, *(found if scores else [])]
    prepare = partial(poison, device, poisoned)
    expected = check_replays(device, partial(read, engine.model, buffers, rows), prepare, found, PASSES)
    with device._stream:
        assert all(bool(cupy.isfinite(array).all()) for array in expected)


def check_replays(device: Any, run: Any, prepare: Any, found: list[Any], times: int) -> list[Any]:
    """What `run` leaves in `found` with kernels that wait for each other, and that it leaves the same bits with kernels
    that begin early, so many times, each behind `prepare`."""
    assert device._early, "this GPU begins no kernel early"
    early = device.capture(run)
    device._early = False
    in_turn = device.capture(run)
    device._early = True
    with device._stream:
        prepare()
        in_turn()
        expected = [array.copy() for array in found]
        differences = cupy.zeros((), np.int64)
        for _ in range(times):
            prepare()
            early()
            for array, wanted in zip(found, expected, strict=True):
                differences += cupy.count_nonzero(array.view(np.uint8) != wanted.view(np.uint8))
    assert int(differences) == 0
    return expected


def poison(device: Any, arrays: list[Any]) -> None:
    for array in arrays:
        array.data.memset_async(POISON, array.nbytes, device._stream)


def idle(kind: str, device: Any) -> Engine:
    vocabularies: dict[str, Any] = {"source_vocabulary": 600, "target_vocabulary": 601}
    if kind == "gpt":
        vocabularies = {"vocabulary": 601, "padding_id": 601}
    config, arrays = getattr(small_models, kind)(4, **NARROW, **vocabularies)
    return small_models.engine(config, arrays, device, slots=16, max_beam_size=BEAMS, prompt_tokens=768)


def decoding(kind: str, device: Any, rows: int, sizes: dict[str, Any]) -> Engine:
    """In the middle of texts that fill all rows. Of those of a wide model, past and source are longer than 64 tokens:
    a warp of an attention kernel looks at so many in turn."""
    long = sizes is WIDE
    vocabularies: dict[str, Any] = {
        "source_vocabulary": 600,
        "target_vocabulary": 601,
        "end_bias": -100.0,
        "extra_decode_length": 100,
    }
    if kind == "gpt":
        vocabularies = {"vocabulary": 601, "padding_id": 601}
    config, arrays = getattr(small_models, kind)(4, **sizes, **vocabularies)
    model: Any = (Gpt if isinstance(config, GptConfig) else Transformer)(config, arrays, device)
    room = {"slots": rows, "max_beam_size": BEAMS, "prompt_tokens": 4096, "burst": 1}
    engine = Engine(model, EngineConfig(**room), device)
    options = engine.options({"sampling_method": "beam_search", "beam_size": BEAMS, "max_new_tokens": 110})
    random, answers = np.random.default_rng(rows), []
    for _ in range(rows // BEAMS):
        text = random.integers(3, config.input_vocabulary, random.integers(5, 20) + 60 * long)
        engine.submit([Request(text, options, answers.append)])
    for _ in range(80 if long else 8):
        engine.step()
    device._stream.synchronize()
    assert not answers
    return engine
