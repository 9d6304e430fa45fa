"""Log-probabilities of given tokens: targets of translations and texts of a GPT, each token's and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import make_scores
import numpy as np
import pytest
import reference
import small_checkpoints
import small_models

from lightseq_backend.config import EngineConfig
from lightseq_backend.engine import Engine
from lightseq_backend.errors import RequestError
from lightseq_backend.export import huggingface
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops import cpu
from lightseq_backend.request import SCORE, Request

SIZES: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "target_vocabulary": 23, "max_positions": 16}
KINDS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"post_norm": True, "activation": "gelu"},
    "norm behind the embeddings": {"embedding_norm": True, "scaled_embedding": False},
    "no first norm": {"first_norm": False, "post_norm": True},
    "decoder post-norm": {"decoder_post_norm": True, "decoder_first_norm": False, "encoder_final_norm": False},
}
SOURCES = [[3, 4, 5], [6], [7, 0, 8, 9, 0, 0], list(range(1, 13))]
TARGETS = [[5, 2], [4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 2], [2], [9, 0, 9, 22]]


def translator(**settings: Any) -> Engine:
    return small_models.engine(*small_models.transformer(3, **{**SIZES, **settings}))


def expected(source: Sequence[int], target: Sequence[int], before: Sequence[int] = (), **settings: Any) -> np.ndarray:
    """By the reference, token after token, everything computed anew each time."""
    config, arrays = small_models.transformer(3, **{**SIZES, **settings})
    model = reference.TransformerReference(config, arrays, source)
    return np.array([model.next((*before, *target[:i]))[token] for i, token in enumerate(target)])


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_targets_score_as_the_model_would_generate_them(settings: dict[str, Any]) -> None:
    outputs = translator(**settings).answer(SOURCES, SCORE, targets=TARGETS)
    for output, source, target in zip(outputs, SOURCES, TARGETS, strict=True):
        wanted = expected(source, target, **settings)
        np.testing.assert_allclose(output.target_log_probabilities, wanted, atol=2e-5)
        assert output.loss == pytest.approx(-wanted.mean(), abs=2e-5)


def test_forced_token_is_read_and_not_scored() -> None:
    outputs = translator(forced_id=7).answer(SOURCES[:2], SCORE, targets=TARGETS[:2])
    for output, source, target in zip(outputs, SOURCES, TARGETS):
        wanted = expected(source, target, before=[7])
        np.testing.assert_allclose(output.target_log_probabilities, wanted, atol=2e-5)


@pytest.mark.parametrize("rows", [{"slots": 1, "max_beam_size": 1}, {"prompt_tokens": 16}, {}], ids=str)
def test_score_depends_on_no_other_row(rows: dict[str, int]) -> None:
    engine = small_models.engine(*small_models.transformer(3, **SIZES), **rows)
    together = engine.answer(SOURCES, SCORE, targets=TARGETS)
    for output, source, target in zip(together, SOURCES, TARGETS, strict=True):
        (alone,) = translator().answer([source], SCORE, targets=[target])
        assert alone.target_log_probabilities.tolist() == output.target_log_probabilities.tolist()
    assert engine.slots_in_use == 0


def test_scoring_and_translating_at_once_leave_each_other_alone() -> None:
    engine, results = small_models.engine(*small_models.transformer(3, **SIZES), slots=4, max_beam_size=2), {}
    options = engine.options({"beam_size": 2})
    requests = []
    for number, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        for kind, given in (("generate", None), (SCORE, np.array(target))):
            keep = lambda result, key=(kind, number): results.update({key: result})  # noqa: E731
            requests.append(Request(np.array(source), options, keep, kind, number, given))
    engine.submit(requests)
    while not engine.idle:
        engine.step()
    scored = translator().answer(SOURCES, SCORE, targets=TARGETS)
    translated = translator().answer(SOURCES, changes={"beam_size": 2})
    for number in range(len(SOURCES)):
        assert results[SCORE, number].loss == scored[number].loss
        ours = [(one.tokens.tolist(), one.score) for one in results["generate", number].hypotheses]
        assert ours == [(one.tokens.tolist(), one.score) for one in translated[number].hypotheses]


def test_answer_of_greedy_search_scores_what_search_says() -> None:
    engine = translator()
    for source in SOURCES:
        (found,) = engine.answer([source], changes={"sampling_method": "greedy", "length_penalty": 0.0})
        (scored,) = engine.answer([source], SCORE, targets=[found.hypotheses[0].tokens])
        assert scored.target_log_probabilities.sum() == pytest.approx(found.hypotheses[0].score, abs=1e-4)


@pytest.mark.parametrize(
    "filled", [[5, 2, 2, 2], [5, 2, 0, 0], [5, 2, 0, 2], np.array([5, 2, 2], np.uint8), np.array([5, 2], np.uint64)]
)
def test_what_fills_a_target_up_is_not_scored(filled: Any) -> None:
    whole, plain = translator().answer([[3, 4]] * 2, SCORE, targets=[filled, [5, 2]])
    assert whole.target_log_probabilities.tolist() == plain.target_log_probabilities.tolist()
    assert len(plain.target_log_probabilities) == 2


BAD_TARGETS: dict[str, tuple[Any, str]] = {
    "none": (None, "it scores a target that is given with its source"),
    "empty": (np.zeros(0, np.int32), "the target is empty"),
    "only padding": (np.array([0, 0]), "the target is empty"),
    "beyond the vocabulary": (np.array([4, 23]), r"id 23 at column 1 of the target is outside .*\(0 to 22\)"),
    "negative": (np.array([-1]), "id -1 at column 0 of the target"),
    "too long": (np.full(16, 5), r"the target has 16 ids; this model takes 15 \(max_step\)"),
    "fractions": (np.array([1.5]), "one-dimensional and integer; this one is float64"),
}


@pytest.mark.parametrize(("target", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_bad_target_is_refused(target: Any, message: str) -> None:
    engine = translator()
    with pytest.raises(RequestError, match=message):
        engine.submit([Request(np.array([3]), engine.options(), lambda result: None, SCORE, 0, target)])


def test_longest_target_fits() -> None:
    (output,) = translator().answer([[3]], SCORE, targets=[[5] * 15])
    np.testing.assert_allclose(output.target_log_probabilities, expected([3], [5] * 15), atol=2e-5)


def test_target_has_no_place_elsewhere() -> None:
    gpt = small_models.engine(*small_models.gpt())
    for engine, kind in ((gpt, SCORE), (translator(), "generate")):
        with pytest.raises(RequestError, match="a target is for scoring a translation"):
            engine.answer([[3]], kind, targets=[[3]])


def test_engine_for_generation_alone_refuses_to_score() -> None:
    for config, arrays in (small_models.transformer(), small_models.gpt()):
        engine = small_models.engine(config, arrays, scores=False)
        with pytest.raises(RequestError, match="loaded for generation alone"):
            engine.answer([[3]], SCORE)


def test_text_scores_each_token_after_the_first() -> None:
    config, arrays = small_models.gpt(4)
    texts = [[3, 4, 5, 6], [7, 8], [9], [1, 0, 2, 10, 5, 5, 5]]
    outputs = small_models.engine(config, arrays).answer(texts, SCORE)
    for output, text in zip(outputs, texts, strict=True):
        rows = reference.log_softmax(reference.GptReference(config, arrays).logits(text))
        wanted = [rows[i, token] for i, token in enumerate(text[1:])]
        np.testing.assert_allclose(output.target_log_probabilities, wanted, atol=2e-5)
        assert output.loss == pytest.approx(-np.mean(wanted) if wanted else 0.0, abs=2e-5)


@pytest.mark.parametrize("family", make_scores.FAMILIES)
def test_scores_are_those_of_transformers(family: str) -> None:
    found = np.concatenate(scores(family, make_scores.cases(family)))
    np.testing.assert_allclose(found, np.load(make_scores.SCORES)[family], atol=1e-4)


@pytest.mark.parametrize("family", make_scores.FAMILIES)
def test_scores_are_those_of_the_original_here(family: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    cases = [([*range(6, 30)], [9, 9, 30, 8, 7]), ([8], [35, 6, 6, 20])]
    if family == "gpt2":
        cases = [([5, *target], target) for _, target in cases]
    forced = {} if family == "gpt2" else {"forced": 11}
    for own in ({}, forced):
        wanted = [make_scores.log_probabilities(family, *case, **own) for case in cases]
        found = scores(family, cases, own.get("forced"))
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(wanted), atol=1e-4)


def scores(family: str, cases: list[tuple[list[int], list[int]]], forced: int | None = None) -> list[np.ndarray]:
    model = huggingface.read(small_checkpoints.FOLDER / family, forced)
    kind = Gpt if family == "gpt2" else Transformer
    engine = Engine(kind(model.config, model.arrays, cpu), EngineConfig(slots=4, max_beam_size=4), cpu)
    targets = None if family == "gpt2" else [target for _, target in cases]
    outputs = engine.answer([ids for ids, _ in cases], SCORE, targets=targets)
    return [output.target_log_probabilities for output in outputs]
