"""The engine on the GPU: LightSeq's golden cases, and what the engine on the CPU gives."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import small_models
from weight_files import golden

from lightseq_backend import ops, weights
from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import SCORE, Output

TRANSLATION = (
    *("t01_base", "t03_beam2_pad1", "t05_postln_bart", "t07_diverse", "t09_topk_greedy", "t11_enc3_dec1"),
    *("t12_enc1_dec3", "t14_postln_relu", "t18_short_cap", "t20_beam16"),
)


def engine(config: Any, arrays: dict[str, np.ndarray], device: str, precision: str = "fp32", **room: int) -> Engine:
    backend = ops.load(device, 0, precision)
    model = Gpt if isinstance(config, GptConfig) else Transformer
    return Engine(model(config, arrays, backend), EngineConfig(**{"slots": 64, "burst": 4, **room}), backend)


def texts(outputs: list[Output]) -> list[list[list[int]]]:
    return [[hypothesis.tokens.tolist() for hypothesis in output.hypotheses] for output in outputs]


@pytest.mark.parametrize("name", TRANSLATION)
def test_golden_translations(name: str) -> None:
    config, arrays = weights.load(golden(f"{name}.pb"))
    gpu = engine(config, arrays, "cuda")
    for line in golden(f"{name}.jsonl").read_text().splitlines():
        case = json.loads(line)
        for output, row in zip(gpu.answer(case["source_ids"]), case["rows"], strict=True):
            width = output.steps + output.cut
            ids = [(one.tokens.tolist() + [config.end_id] * width)[:width] for one in output.hypotheses]
            assert (case["case"], ids) == (case["case"], row["ids"])
            for one, score in zip(output.hypotheses, row["scores"], strict=True):
                assert score is None or abs(one.score - score) <= 1e-4


@pytest.mark.parametrize("name", ["g01_base", "g02_pad_out"])
def test_golden_texts(name: str) -> None:
    config, arrays = weights.load(golden(f"{name}.pb"))
    gpu = engine(config, arrays, "cuda")
    for line in golden(f"{name}.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case["kind"] == "ppl":
            rows = [
                (ids, p)
                for i, (ids, p) in enumerate(zip(case["token_ids"], case["ppl"]))
                if i not in case.get("quirk", [])
            ]
            losses = [output.loss for output in gpu.answer([ids for ids, _ in rows], SCORE)]
            np.testing.assert_allclose(losses, [p for _, p in rows], atol=1e-4)
            continue
        found = [
            ids + output.hypotheses[0].tokens.tolist()
            for ids, output in zip(case["token_ids"], gpu.answer(case["token_ids"]))
        ]
        width = max(map(len, found))
        assert [(ids + [config.end_id] * width)[:width] for ids in found] == case["ids"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["transformer", "gpt"])
def test_random_requests_equal_the_cpu(kind: str, precision: str) -> None:
    """Texts of the first hypothesis; half precision may decide near ties otherwise, in one of a hundred."""
    random = np.random.default_rng(7)
    config, arrays = getattr(small_models, kind)()
    gpu, cpu = engine(config, arrays, "cuda", precision), engine(config, arrays, "cpu")
    rows = [
        random.integers(3, config.input_vocabulary, random.integers(1, config.max_positions // 2)) for _ in range(250)
    ]
    differing = 0
    for changes in ({"sampling_method": "beam_search", "beam_size": 4}, {"sampling_method": "greedy"}):
        expected, found = texts(cpu.answer(rows, changes=changes)), texts(gpu.answer(rows, changes=changes))
        differing += sum(one[0] != other[0] for one, other in zip(expected, found, strict=True))
    print(f"{kind} {precision}: {differing} of {2 * len(rows)} differ")
    assert differing <= (0 if precision == "fp32" else 0.03 * 2 * len(rows))


def test_samples_do_not_depend_on_the_batch() -> None:
    config, arrays = small_models.gpt()
    gpu = engine(config, arrays, "cuda")
    changes = {"sampling_method": "topp", "top_p": 0.9, "temperature": 1.3, "seed": 11}
    rows = [[5, 6, 7], [8], [9, 10]]
    together = texts(gpu.answer([rows[0], *[[3 + i % 6] for i in range(20)]], changes=changes))[0]
    assert texts(gpu.answer([rows[0]], changes=changes))[0] == together
