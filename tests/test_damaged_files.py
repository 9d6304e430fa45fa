"""Files with random faults load or are refused, requests of any content are answered or refused; nothing else."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st

from lightseq_backend import weights
from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.errors import ConfigError, RequestError, WeightError
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops import cpu
from lightseq_backend.options import METHODS, OPTION_TYPES
from lightseq_backend.request import GENERATE, SCORE, Output, Request

# `make test-faults` asks for more.
FILES = int(os.environ.get("LIGHTSEQ_FAULT_FILES", 150))
EXAMPLES = int(os.environ.get("LIGHTSEQ_FAULT_EXAMPLES", 60))
MAKERS = {"gpt": small_models.gpt, "transformer": small_models.transformer}


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """Flipped bits, most of them near the ends, where formats have their structure; or a part of the file alone."""
    data = bytearray(whole)
    for _ in range(chance.choice((0, 1, 1, 3, 40))):
        edge = chance.choice((len(data), 64, min(len(data), 600)))
        place = chance.randrange(edge)
        data[chance.choice((place, len(data) - 1 - place))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("suffix", [".pb", ".safetensors", ".hdf5"])
def test_damaged_file_serves_or_is_refused(suffix: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}{suffix}"
    weights.save(path, *MAKERS[kind](2))
    whole, chance, refused, slowest = path.read_bytes(), random.Random(3), 0, 0.0
    for _ in range(FILES // 6):
        path.write_bytes(damaged(whole, chance))
        start = time.perf_counter()
        try:
            config, arrays = weights.load(path)
            with np.errstate(all="ignore"):  # wild weights give wild numbers
                serves(config, arrays)
        except (WeightError, ConfigError, RequestError):
            refused += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert 0 < refused < FILES // 6
    assert slowest < 5


def serves(config: Any, arrays: dict[str, np.ndarray]) -> None:
    build = Gpt if isinstance(config, GptConfig) else Transformer
    engine = Engine(build(config, arrays, cpu), EngineConfig(slots=4, max_beam_size=4, prompt_tokens=16), cpu)
    results: list[Output | Exception] = []
    engine.submit([Request(np.array([3, 4]), engine.options({"max_new_tokens": 2}), results.append)])
    while not engine.idle:
        engine.step()
    assert len(results) == 1
    assert engine.slots_in_use == 0


# Requests ----------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-2, 20), st.floats(), st.booleans(), st.text(max_size=9), st.none(),
    st.sampled_from(METHODS), st.lists(st.integers(-2, 20), max_size=4), st.just("[[3, 4], [5]]"), st.just("[3]"),
)  # fmt: skip
CHANGES = st.dictionaries(st.sampled_from([*OPTION_TYPES, "beams"]), SCALARS, max_size=4)
IDS = st.one_of(st.integers(0, 12), st.integers(-(2**63), 2**63 - 1))
ROWS = st.lists(st.one_of(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10), IDS), max_size=14)


@pytest.mark.parametrize("kind", MAKERS)
def test_request_of_any_content_is_refused_or_answered_once(kind: str) -> None:
    engine = small_models.engine(*MAKERS[kind](2), slots=8, max_beam_size=8)
    wanted = engine.answer([[3, 4]], changes={"sampling_method": "greedy"})[0].hypotheses[0].tokens.tolist()
    answered = refused = 0

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
    @given(ROWS, CHANGES, st.sampled_from([GENERATE, GENERATE, SCORE]), st.one_of(st.none(), ROWS))
    def check(row: list[int], changes: dict[str, Any], task: str, target: list[int] | None) -> None:
        nonlocal answered, refused
        results: list[Output | Exception] = []
        try:
            options = engine.options(changes)
            ids = None if target is None else np.array(target, np.int64)
            engine.submit([Request(np.array(row, np.int64), options, results.append, task, target=ids)])
        except RequestError:
            refused += 1
            return
        while not engine.idle:
            engine.step()
        (result,) = results
        assert isinstance(result, Output), result
        answered += 1

    check()
    assert answered > 0
    assert refused > 0
    assert (engine.slots_in_use, engine.waiting, engine.fault) == (0, 0, None)
    again = engine.answer([[3, 4]], changes={"sampling_method": "greedy"})[0].hypotheses[0].tokens.tolist()
    assert again == wanted
