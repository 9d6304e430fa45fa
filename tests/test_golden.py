"""LightSeq's own results: every golden case, its batch together and each row alone, through the engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import small_models
from reference import GptReference, TransformerReference, length_norm, log_softmax
from weight_files import golden, golden_names

from lightseq_backend import weights
from lightseq_backend.config import Config, GptConfig, TransformerConfig
from lightseq_backend.engine import Engine
from lightseq_backend.errors import RequestError
from lightseq_backend.request import SCORE, Hypothesis, Output

TOLERANCE = 1e-4
TRANSFORMERS = [name for name in golden_names() if name.startswith("t")]
GPTS = [name for name in golden_names() if name.startswith("g")] or ["g01_base.pb"]


@functools.cache
def model(name: str) -> tuple[Any, small_models.Arrays]:
    return weights.load(golden(name))


def cases(name: str, kind: str | None = None) -> Iterator[dict[str, Any]]:
    for line in golden(name.replace(".pb", ".jsonl")).read_text().splitlines():
        case = json.loads(line)
        if case.get("kind") == kind:
            yield case


def test_golden_files_are_all_there() -> None:
    numbers = ("t01", "t03", "t05", "t07", "t09", "t11", "t12", "t14", "t18", "t20", "g01", "g02")
    assert {name[:3] for name in golden_names()} >= set(numbers)


def columns(output: Output, config: Config) -> list[list[int]]:
    """The hypotheses as LightSeq returns them: filled up with the end id, which also stands last when cut."""
    width = output.steps + output.cut
    return [(one.tokens.tolist() + [config.end_id] * width)[:width] for one in output.hypotheses]


def together_and_alone(name: str, rows: list[list[int]], kind: str = "generate") -> list[Output]:
    """The outputs of a batch, which must be those of its rows alone, in bursts of three, to the last bit."""
    together = _engine(name, burst=1).answer(rows, kind)
    for row, output in zip(rows, together):
        (alone,) = _engine(name, burst=3).answer([row], kind)
        assert _seen(alone) == _seen(output)
    return together


@functools.cache
def _engine(name: str, burst: int) -> Engine:
    return small_models.engine(*model(name), slots=64, burst=burst)


def _seen(output: Output) -> object:
    hypotheses = [(one.tokens.tolist(), one.score, one.finished) for one in output.hypotheses]
    return hypotheses, output.steps, output.cut, output.loss


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_gives_the_golden_hypotheses(name: str) -> None:
    config, _ = model(name)
    compared = 0
    for case in cases(name):
        outputs = together_and_alone(name, case["source_ids"])
        for output, row in zip(outputs, case["rows"]):
            assert columns(output, config) == row["ids"], case["case"]
            assert [one.finished for one in output.hypotheses] == row["finished"], case["case"]
            assert output.steps == row["steps"], case["case"]
            for one, score in zip(output.hypotheses, row["scores"]):
                assert score is None or abs(one.score - score) <= TOLERANCE, case["case"]
            compared += 1
    assert compared >= 12


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_score_of_a_cut_hypothesis_is_its_true_normalised_log_probability(name: str) -> None:
    """Where LightSeq leaves the score uninitialised (null in the golden files)."""
    config, arrays = model(name)
    for case in cases(name):
        if all(score is not None for row in case["rows"] for score in row["scores"]):
            continue
        for source, output in zip(case["source_ids"], _engine(name, burst=1).answer(case["source_ids"])):
            reference = TransformerReference(config, arrays, source)
            for one in output.hypotheses:
                if not one.finished:
                    wanted = _normalised(reference, one, config)
                    assert one.score == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE), case["case"]


def _normalised(reference: TransformerReference, hypothesis: Hypothesis, config: TransformerConfig) -> float:
    text, penalty = hypothesis.tokens.tolist(), config.decoding.length_penalty
    scores = log_softmax(reference.logits(text))
    total = sum(scores[i, token] for i, token in enumerate(text))
    return total / len(text) if penalty < 0 else total * length_norm(len(text), penalty)


def test_golden_files_hold_cut_hypotheses() -> None:
    scores = [score for name in TRANSFORMERS for case in cases(name) for row in case["rows"] for score in row["scores"]]
    assert scores.count(None) >= 10


@pytest.mark.parametrize("name", GPTS)
def test_gpt_continues_as_golden(name: str) -> None:
    config, _ = model(name)
    compared = 0
    for case in cases(name, "gen"):
        prompts = case["token_ids"]
        outputs = together_and_alone(name, prompts)
        rows = [prompt + output.hypotheses[0].tokens.tolist() for prompt, output in zip(prompts, outputs)]
        width = max(map(len, rows))
        assert [row + [config.end_id] * (width - len(row)) for row in rows] == case["ids"], case["case"]
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("name", GPTS)
def test_gpt_scores_as_golden(name: str) -> None:
    compared = 0
    for case in cases(name, "ppl"):
        real = [row for row in range(len(case["ppl"])) if row not in case.get("quirk", [])]
        outputs = together_and_alone(name, [case["token_ids"][row] for row in real], SCORE)
        assert [output.loss for output in outputs] == pytest.approx(
            [case["ppl"][row] for row in real], abs=TOLERANCE
        ), case["case"]
        compared += len(real)
    assert compared >= 20


@pytest.mark.parametrize("name", GPTS)
def test_gpt_scores_as_the_float64_reference(name: str) -> None:
    config, arrays = model(name)
    for case in cases(name, "ppl"):
        texts = [[token for token in row if token != config.padding_id] for row in case["token_ids"]]
        texts = [text for text in texts if text]
        losses = [output.loss for output in _engine(name, burst=1).answer(texts, SCORE)]
        assert losses == pytest.approx([GptReference(config, arrays).loss(text) for text in texts], abs=TOLERANCE)


def test_rows_of_padding_alone_are_refused() -> None:
    """LightSeq sums no token and divides by minus one; ours says what is wrong."""
    quirks = 0
    for name in GPTS:
        assert isinstance(model(name)[0], GptConfig)
        for case in cases(name, "ppl"):
            for row in case.get("quirk", []):
                quirks += 1
                with pytest.raises(RequestError, match="only padding"):
                    _engine(name, burst=1).answer([case["token_ids"][row]], SCORE)
    assert quirks == 1
