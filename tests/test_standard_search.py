"""The standard beam search and its rules against Hugging Face's generate: the same ids and scores."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import small_checkpoints
import small_models
import standard_cases
from standard_cases import ENDS, FAMILIES, MOST, RULES, SEARCHES, Settings

from lightseq_backend.config import GptConfig
from lightseq_backend.engine import Engine
from lightseq_backend.errors import RequestError
from lightseq_backend.export import huggingface
from lightseq_backend.request import Output

needs_torch = pytest.mark.skipif(
    not (find_spec("torch") and find_spec("transformers")), reason="torch or transformers is not installed"
)
INPUTS = 150  # of either model of a family, for each of the first three searches; the others have fewer
NEAR = 2e-4  # of a score, relative to 1 + |score|: both compute in float32
TIE = 3e-5  # the same, of hypotheses at the same rank, where another text may stand there


@cache
def pair(family: str, trained: bool, folder: Path) -> tuple[Any, Engine]:
    """A model as transformers has it, and our engine for it; both from one directory."""
    source = folder / f"{family}-{trained}"
    model = small_checkpoints.build(family)
    if trained:
        train(model, family)
    model.save_pretrained(source)
    read = huggingface.read(source)
    arrays = {name: np.array(array) for name, array in read.arrays.items()}
    engine = small_models.engine(read.config, arrays, slots=64, max_beam_size=16, queue=512)
    return standard_cases.original(source), engine


def train(model: Any, family: str) -> None:
    """A few seconds of learning to repeat a text of a few words and to end it; texts then have ends of their own."""
    import torch

    random, end = np.random.default_rng(0), model.config.eos_token_id
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for _ in range(60):
        length = int(random.integers(1, 6))
        words = random.integers(6, 16, (32, length))
        text = torch.tensor(np.concatenate([words, np.full((32, 1), end)], axis=1))
        loss = model(input_ids=text, labels=text).loss
        if family == "gpt2":
            text = torch.cat([text[:, :-1], text], dim=1)
            loss = model(input_ids=text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("originals")


def compare(model: Any, engine: Engine, settings: Settings, count: int, prefix: list[int] | None = None) -> int:
    """Asserts that both give the same, but for a tie or one in a hundred rows; how many rows were compared.

    A tie is another text at the same rank with as good as the same score, or what generate does too in float64.
    """
    changes = standard_cases.options(settings, MOST)
    if prefix:
        changes["decoder_prefix"] = prefix[1:]
    faults, compared, ties = [], 0, 0
    for block in standard_cases.blocks(engine.model.config, count):
        theirs = standard_cases.generated(model, block, settings, prefix or [])
        for row, output, wanted in zip(block, engine.answer(block.tolist(), changes=changes), theirs):
            compared += 1
            same, off = agreement(output, wanted)
            if same and off <= NEAR:
                continue
            exact = standard_cases.generated(model.double(), row[None], settings, prefix or [])[0]
            model.float()
            same, apart = agreement(output, exact)
            if 0 < off <= TIE or (same and apart <= NEAR):
                ties += 1
            else:
                faults.append(f"{row.tolist()}: {output.hypotheses} for {wanted}, scores off by {off}")
    assert not faults, f"{len(faults)} of {compared} differ\n" + "\n".join(faults[:3])
    assert ties <= max(1, compared / 100)
    return compared


def agreement(output: Output, wanted: list[tuple[list[int], float]]) -> tuple[bool, float]:
    """Whether the texts are the same, and how far the scores are apart; with one beam generate gives none."""
    ours = [one.tokens.tolist() for one in output.hypotheses]
    pairs = zip(output.hypotheses, wanted, strict=True)
    off = max(0 if np.isnan(score) else abs(one.score - score) / (1 + abs(score)) for one, (_, score) in pairs)
    return ours == [text for text, _ in wanted], off


@pytest.mark.parametrize("family", FAMILIES)
def test_search_gives_what_generate_gave(family: str) -> None:
    """What it gave was written down by make_convert_fixtures.py."""
    folder = small_checkpoints.FOLDER / family
    read, wanted = huggingface.read(folder), np.load(folder / "standard.npz")
    arrays = {name: np.array(array) for name, array in read.arrays.items()}
    engine = small_models.engine(read.config, arrays, slots=64)
    rows = standard_cases.committed_rows(read.config)
    for number, (name, settings) in enumerate({**SEARCHES, **RULES}.items()):
        outputs = engine.answer(rows, changes=standard_cases.options(settings, MOST))
        for output, tokens, scores in zip(outputs, wanted["tokens"][number], wanted["scores"][number], strict=True):
            for one, text, score in zip(output.hypotheses, tokens.tolist(), scores.tolist()):
                assert one.tokens.tolist() == [token for token in text if token >= 0], name
                assert np.isnan(score) or abs(one.score - score) <= NEAR * (1 + abs(score)), name


METHODS: list[dict[str, Any]] = [
    {"sampling_method": "beam_search", "beam_size": 4},
    {"sampling_method": "beam_search", "beam_size": 3, "diverse_lambda": 0.5, "length_penalty": 0.0},
    {"sampling_method": "topk_greedy", "beam_size": 3},
    {"sampling_method": "greedy"},
    {"sampling_method": "topk", "top_k": 4, "num_hypotheses": 2, "seed": 1},
    {"sampling_method": "standard_beam", "beam_size": 4},
    {"sampling_method": "standard_beam", "beam_size": 3, "early_stopping": True, "length_penalty": 2.0},
]


@pytest.mark.parametrize("changes", METHODS, ids=str)
def test_every_token_has_the_log_probability_that_the_model_gives_it(changes: dict[str, Any]) -> None:
    config, arrays = small_models.transformer(3, target_vocabulary=37, max_positions=20, end_bias=1.5)
    engine = small_models.engine(config, arrays, slots=16)
    rows = [[3, 4, 5], [7, 8], [12]]
    plain = engine.answer(rows, changes=changes)
    detailed = engine.answer(rows, changes={**changes, "token_log_probabilities": True})
    for row, output, other in zip(rows, detailed, plain):
        source = reference.TransformerReference(config, arrays, row)
        for one, same in zip(output.hypotheses, other.hypotheses, strict=True):
            text = tuple(one.tokens.tolist())
            assert (text, one.score, same.token_log_probabilities) == (tuple(same.tokens.tolist()), same.score, None)
            wanted = [source.next(text[:i])[token] for i, token in enumerate(text)]
            np.testing.assert_allclose(one.token_log_probabilities, wanted, atol=1e-4)


def test_greedy_with_rules_is_the_standard_search_with_one_beam() -> None:
    config, arrays = small_models.transformer(3, target_vocabulary=37, max_positions=20)
    engine, rows = small_models.engine(config, arrays), [[3, 4, 5], [7, 8]]
    rules: dict[str, Any] = {"no_repeat_ngram_size": 1, "min_new_tokens": 3}
    greedy = engine.answer(rows, changes={"sampling_method": "greedy", **rules})
    standard = engine.answer(rows, changes={"sampling_method": "standard_beam", "beam_size": 1, **rules})
    for one, other in zip(greedy, standard):
        assert one.hypotheses[0].tokens.tolist() == other.hypotheses[0].tokens.tolist()
        total, n = other.hypotheses[0].score * len(other.hypotheses[0].tokens), len(one.hypotheses[0].tokens)
        assert one.hypotheses[0].score == pytest.approx(total * reference.length_norm(n, 0.6), rel=1e-5)


def test_search_without_enough_possible_texts_fills_up_with_empty_ones() -> None:
    config, arrays = small_models.transformer(3, target_vocabulary=9)
    changes = {"sampling_method": "standard_beam", "beam_size": 4, "max_new_tokens": 1, "suppress_tokens": [0, 1, 3, 4]}
    output = small_models.engine(config, arrays).answer([[3, 4]], changes={**changes, "bad_words_ids": [[5], [6]]})[0]
    assert sorted(one.tokens.tolist() for one in output.hypotheses) == [[], [2], [7], [8]]
    assert (output.hypotheses[3].score, output.hypotheses[3].finished, output.steps) == (-1e9, False, 1)


def test_prefix_of_a_gpt_is_refused_and_so_is_a_prompt_beyond_the_length() -> None:
    config, arrays = small_models.gpt(3)
    engine = small_models.engine(config, arrays)
    with pytest.raises(RequestError, match="this model continues texts: its prompt is all that comes first"):
        engine.answer([[3]], changes={"decoder_prefix": [4]})
    with pytest.raises(RequestError, match="the prompt has 3 tokens; max_length 3 leaves none to add"):
        engine.answer([[3, 4, 5]], changes={"max_length": 3})


@needs_torch
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SEARCHES)
def test_search_gives_what_generate_gives(name: str, family: str, trained: bool, folder: Path) -> None:
    count = INPUTS if name in list(SEARCHES)[:3] else 30
    assert compare(*pair(family, trained, folder), SEARCHES[name], count) >= count


@needs_torch
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RULES)
def test_rules_are_those_of_generate(name: str, family: str, folder: Path) -> None:
    for trained in (False, True):
        compare(*pair(family, trained, folder), RULES[name], 30)


@needs_torch
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ENDS)
def test_texts_end_with_any_of_several_ids_as_generates(name: str, family: str, folder: Path) -> None:
    for trained in (False, True):
        compare(*pair(family, trained, folder), ENDS[name], 30)


@needs_torch
@pytest.mark.parametrize("family", ["marian", "m2m_100"])
@pytest.mark.parametrize("beams", [1, 4])
def test_prefix_and_forced_first_token_are_those_of_generate(family: str, beams: int, folder: Path) -> None:
    model, engine = pair(family, False, folder)
    start, rules = model.config.decoder_start_token_id, {"repetition_penalty": 1.3, "min_length": 8}
    for settings in ({"num_beams": beams}, {"num_beams": beams, **rules, "no_repeat_ngram_size": 2}):
        compare(model, engine, settings, 12, [start, 7, 9, 11])
        compare(model, engine, {**settings, "forced_bos_token_id": 8}, 12)


@needs_torch
@pytest.mark.parametrize("name", ["four beams", "all together"])
@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_log_probabilities_are_the_transition_scores_of_transformers(family: str, name: str, folder: Path) -> None:
    import torch

    model, engine = pair(family, True, folder)
    settings, compared = {**SEARCHES, **RULES}[name], 0
    for block in standard_cases.blocks(engine.model.config, 12):
        rows = torch.tensor(block)
        with torch.no_grad():
            found = model.generate(
                rows, attention_mask=torch.ones_like(rows), num_return_sequences=4, max_length=MOST,
                return_dict_in_generate=True, output_scores=True, output_logits=True,  # for the indices of the beams
                pad_token_id=model.config.pad_token_id or model.config.eos_token_id, **settings,
            )  # fmt: skip
        wanted = model.compute_transition_scores(found.sequences, found.scores, found.beam_indices).numpy()
        changes = {**standard_cases.options(settings, MOST), "token_log_probabilities": True}
        outputs = engine.answer(block.tolist(), changes=changes)
        for one, scores in zip([one for output in outputs for one in output.hypotheses], wanted, strict=True):
            np.testing.assert_allclose(one.token_log_probabilities, scores[: len(one.tokens)], rtol=NEAR, atol=NEAR)
            compared += 1
    assert compared >= 48


@needs_torch
def test_trained_texts_end_by_themselves(folder: Path) -> None:
    """Else a comparison would say little of the pool of finished hypotheses."""
    for family in FAMILIES:
        _, engine = pair(family, True, folder)
        (block, *_) = standard_cases.blocks(engine.model.config, 60)
        outputs = engine.answer(block.tolist(), changes=standard_cases.options({"num_beams": 4}, MOST))
        ended = [one.finished for output in outputs for one in output.hypotheses]
        assert sum(ended) > len(ended) / 2, family
        assert isinstance(engine.model.config, GptConfig) == (family == "gpt2")
