"""Every way of choosing text, through the engine, against its definition over float64 scores."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import reference
import small_models
from reference import GptReference, Search, TransformerReference, beam_search, length_norm

from lightseq_backend.config import DIALECTS, Config
from lightseq_backend.engine import Engine
from lightseq_backend.ops import cpu as ops
from lightseq_backend.ops.philox import gumbel
from lightseq_backend.ops.slots import SLOT
from lightseq_backend.request import Output

PENALTIES = (0.6, 0.0, 1.0, 2.0, -1.0, -0.3)
TIE = 2e-4  # decisions closer than this are left out: float32 may take the other side
FAR = 1e-4  # of a score from the truth, relative to 1 + |truth|


def _agrees(output: Output, search: Search, far: float = FAR, unscored: bool = False) -> None:
    """unscored: a hypothesis that ended has LightSeq's placeholder for a score."""
    assert output.steps == search.steps
    assert output.cut == (not all(beam.finished for beam in search.beams))
    assert [one.tokens.tolist() for one in output.hypotheses] == [list(beam.tokens) for beam in search.beams]
    assert [one.finished for one in output.hypotheses] == [beam.finished for beam in search.beams]
    for one, beam in zip(output.hypotheses, search.beams):
        wanted = -1e6 if unscored and beam.finished else beam.score
        assert abs(one.score - wanted) <= far * (1 + abs(wanted))


# Beam search ---------------------------------------------------------------------------------------------------------


def _transformer_cases(seed: int, count: int, several: bool = False, **settings: Any) -> tuple[int, int]:
    """Compares `count` random searches over one random model; how many were compared and how many were ties.

    several: texts may end with any of several ids.
    """
    random = np.random.default_rng(seed)
    start = int(random.choice([1, 2]))  # 2 is the end id: BART starts with it
    extra, positions = int(random.integers(0, 8)), int(random.choice([9, 12, 20]))
    config, arrays = small_models.transformer(
        seed, start_id=start, extra_decode_length=extra, max_positions=positions, post_norm=bool(random.integers(2)),
        end_bias=random.choice([-1.0, 0.5, 2.0]), target_vocabulary=int(random.choice([16, 19, 67])), **settings,
    )  # fmt: skip
    engine = small_models.engine(config, arrays, slots=16, max_beam_size=16)
    compared = ties = 0
    for number in range(count):
        row = random.integers(0, config.source_vocabulary, random.integers(2, positions - 1)).tolist()
        row[0] = 3
        beams = int(random.choice([1, 2, 3, 4, 5, 16], p=[0.15, 0.2, 0.2, 0.2, 0.2, 0.05]))
        changes: dict[str, Any] = {"beam_size": beams, "length_penalty": PENALTIES[number % len(PENALTIES)]}
        if number % 7 == 5:
            changes["diverse_lambda"] = float(random.choice([0.3, 1.0, 2.5]))
        if number % 7 == 6:
            changes["sampling_method"] = "topk_greedy"
        if number % 3 == 2:
            changes["max_new_tokens"] = int(random.integers(1, 6))
        if several:
            changes["end_ids"] = random.integers(0, config.target_vocabulary, random.integers(1, 8)).tolist()
        output = engine.answer([row], changes=changes)[0]
        search = _search(config, arrays, row, changes)
        diverse = "diverse_lambda" in changes
        if search.gap < (2e-2 if diverse else TIE):
            ties += 1
            continue
        compared += 1
        # LightSeq sorts the beams of a diverse search 2000 apart in float32 and keeps what that rounds.
        _agrees(output, search, 5e-3 if diverse else FAR, unscored=changes.get("sampling_method") == "topk_greedy")
    return compared, ties


def _search(config: Any, arrays: small_models.Arrays, row: list[int], changes: Mapping[str, Any]) -> Search:
    """What LightSeq's search gives for a source (lightseq_format.md 3.5 for the limits)."""
    v0, fan_out = config.dialect.name == "v0", changes.get("sampling_method") == "topk_greedy"
    columns = min(config.max_positions, len(row) + config.extra_decode_length)
    limit = config.max_positions - 1 if fan_out else columns - (1 if v0 else 2)
    return beam_search(
        TransformerReference(config, arrays, row).next,
        changes["beam_size"],
        min(limit, changes.get("max_new_tokens", limit)),
        {config.end_id, *changes.get("end_ids", ())},
        changes["length_penalty"],
        changes.get("diverse_lambda", 0.0),
        fan_out,
        config.target_vocabulary - 3 if v0 else -1,
        reference.HANDICAP[config.dialect.name],
    )


@pytest.mark.parametrize("seed", range(12))
def test_beam_search_equals_lists_and_loops(seed: int) -> None:
    compared, ties = _transformer_cases(seed, 25)
    assert ties <= 6, f"{ties} of {compared + ties} cases were too close to call"


@pytest.mark.parametrize("seed", range(20, 23))
def test_beam_search_of_v0_equals_lists_and_loops(seed: int) -> None:
    compared, _ = _transformer_cases(seed, 12, dialect=DIALECTS["v0"])
    assert compared >= 8


@pytest.mark.parametrize("seed", range(30, 36))
def test_beam_search_with_several_end_ids_equals_lists_and_loops(seed: int) -> None:
    compared, ties = _transformer_cases(seed, 21, several=True)
    assert ties <= 6, f"{ties} of {compared + ties} cases were too close to call"


@pytest.mark.parametrize("seed", range(6))
def test_gpt_beam_search_equals_lists_and_loops(seed: int) -> None:
    random = np.random.default_rng(seed)
    config, arrays = small_models.gpt(
        seed, vocabulary=int(random.choice([16, 40])), padding_id=99, extra_decode_length=int(random.choice([0, 3, 6])),
        max_positions=int(random.choice([9, 14])),
    )  # fmt: skip
    engine = small_models.engine(config, arrays, slots=16, max_beam_size=16)
    compared = 0
    for number in range(12):
        prompt = random.integers(3, config.vocabulary, random.integers(1, 8)).tolist()
        beams, penalty = int(random.choice([1, 2, 3, 4, 5, 16])), PENALTIES[number % len(PENALTIES)]
        changes = {"sampling_method": "beam_search", "beam_size": beams, "length_penalty": penalty}
        extra = config.extra_decode_length or config.max_positions
        limit = min(config.max_positions, len(prompt) + extra) - len(prompt)
        ends = random.integers(0, config.vocabulary, 3 if number % 3 == 2 else 0).tolist()
        if ends:
            changes["end_ids"] = ends
        search = beam_search(GptReference(config, arrays, prompt).next, beams, limit, {config.end_id, *ends}, penalty)
        if search.gap >= TIE:
            compared += 1
            _agrees(engine.answer([prompt], changes=changes)[0], search)
    assert compared >= 8


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_beam_search_with_a_beam_for_every_prefix_finds_the_best_of_all_texts(seed: int, penalty: float) -> None:
    config, arrays = small_models.transformer(
        seed, target_vocabulary=17, max_positions=20, extra_decode_length=4, start_id=5, end_id=2
    )
    # Three ids are possible at all: then there are 15 texts of up to four tokens at any step, and 16 beams.
    possible = (2, 7, 11)
    for token in range(config.target_vocabulary):
        arrays["output.bias"][token] -= 0 if token in possible else 200
    row, limit = [3, 4], 4
    source = TransformerReference(config, arrays, row)
    best: tuple[float, tuple[int, ...]] = (-math.inf, ())
    for text in _texts(possible, config.end_id, limit):
        total = sum(source.next(text[:i])[token] for i, token in enumerate(text))
        best = max(best, (total * length_norm(len(text), penalty), text))
    engine = small_models.engine(config, arrays, slots=16)
    changes = {"beam_size": 16, "length_penalty": penalty, "num_hypotheses": 1}
    found = engine.answer([row], changes=changes)[0].hypotheses[0]
    assert found.tokens.tolist() == list(best[1])
    assert found.score == pytest.approx(best[0], abs=1e-4)


def _texts(possible: Iterable[int], end_id: int, limit: int) -> list[tuple[int, ...]]:
    """All texts that end with end_id, or are cut at `limit` tokens."""
    texts = []
    for length in range(1, limit + 1):
        for text in itertools.product(possible, repeat=length):
            ends = text[-1] == end_id
            if end_id not in text[:-1] and (ends or length == limit):
                texts.append(text)
    return texts


def test_num_hypotheses_returns_the_best_of_all_beams() -> None:
    config, arrays = small_models.transformer(3)
    engine = small_models.engine(config, arrays)
    row = [3, 4, 5]
    every = engine.answer([row], changes={"beam_size": 5})[0].hypotheses
    some = engine.answer([row], changes={"beam_size": 5, "num_hypotheses": 2})[0].hypotheses
    assert [(one.tokens.tolist(), one.score) for one in some] == [(one.tokens.tolist(), one.score) for one in every[:2]]


def test_greedy_equals_beam_search_with_one_beam() -> None:
    config, arrays = small_models.transformer(4)
    engine = small_models.engine(config, arrays)
    rows = [[3, 4, 5], [7], [12, 11, 10, 9, 8]]
    one = engine.answer(rows, changes={"beam_size": 1})
    greedy = engine.answer(rows, changes={"sampling_method": "greedy"})
    assert _texts_of(one) == _texts_of(greedy)


@pytest.mark.parametrize("changes", [{"beam_size": 3}, {"sampling_method": "topk", "top_k": 3}])
def test_source_too_short_for_a_token_gives_an_empty_cut_answer(changes: dict[str, Any]) -> None:
    # M = 1 + 1: a search of HEAD generates M - 2 = 0 tokens, sampling max_step - 1.
    config, arrays = small_models.transformer(0, extra_decode_length=1)
    output = small_models.engine(config, arrays).answer([[3]], changes=changes)[0]
    if "beam_size" in changes:
        assert (output.steps, output.cut) == (0, True)
        assert [(one.tokens.tolist(), one.finished) for one in output.hypotheses] == [([], False)] * 3
    else:
        assert output.steps > 0


@pytest.mark.parametrize(
    ("dialect", "changes", "tokens"),
    # Source of 3 columns, 4 extra, 12 positions; no text ever ends.
    [
        ("head", {}, 5),
        ("v0", {}, 6),
        ("head", {"sampling_method": "topk_greedy"}, 11),
        ("head", {"sampling_method": "sample"}, 11),
        ("head", {"sampling_method": "greedy"}, 5),
        ("head", {"max_new_tokens": 2}, 2),
        ("head", {"max_new_tokens": 100}, 5),
    ],
)
def test_transformer_generates_at_most(dialect: str, changes: dict[str, Any], tokens: int) -> None:
    config, arrays = small_models.transformer(0, end_bias=-100.0, dialect=DIALECTS[dialect])
    output = small_models.engine(config, arrays).answer([[3, 4, 0]], changes=changes)[0]
    assert (output.steps, output.cut) == (tokens, True)
    assert {len(one.tokens) for one in output.hypotheses} == {tokens}


def test_v0_never_generates_the_unknown_id() -> None:
    config, arrays = small_models.transformer(5, dialect=DIALECTS["v0"], end_bias=-4.0)
    unknown = config.target_vocabulary - 3
    arrays["output.bias"][unknown] += 50
    engine = small_models.engine(config, arrays)
    rows = [[3, 4], [5, 6, 7]]
    for changes in ({"beam_size": 4}, {"sampling_method": "topk_greedy"}, {"sampling_method": "sample", "seed": 1}):
        for text, _ in itertools.chain(*_texts_of(engine.answer(rows, changes=changes))):
            assert unknown not in text, changes
    head, _ = small_models.transformer(5, end_bias=-4.0)
    assert unknown in small_models.engine(head, arrays).answer(rows)[0].hypotheses[0].tokens


def _texts_of(outputs: Iterable[Output]) -> list[list[tuple[list[int], float]]]:
    return [[(one.tokens.tolist(), one.score) for one in output.hypotheses] for output in outputs]


# Sampling ------------------------------------------------------------------------------------------------------------


def _chi_square_holds(counts: Mapping[Any, int], shares: Mapping[Any, float]) -> None:
    """Counts follow the shares; what has no share never occurs. Fails by chance once in 10,000 for a random seed."""
    assert set(counts) <= {key for key, share in shares.items() if share > 0}
    draws = sum(counts.values())
    # What is expected less than five times is counted together.
    rare = [key for key, share in shares.items() if share * draws < 5]
    groups = [[key] for key in shares if key not in rare] + ([rare] if rare else [])
    expected = [draws * sum(shares[key] for key in group) for group in groups]
    seen = [sum(counts.get(key, 0) for key in group) for group in groups]
    statistic = sum((o - e) ** 2 / e for o, e in zip(seen, expected) if e > 0)
    freedom = max(1, len(groups) - 1)
    # Wilson and Hilferty's approximation of the quantile at 0.9999.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f}, limit {limit:.1f}: {seen} for {expected}"


def _samples(engine: Engine, prompt: list[int], draws: int, **changes: Any) -> list[tuple[int, ...]]:
    """Texts of `draws` samples, as many a request as it may have but an even number, one seed a request."""
    texts: list[tuple[int, ...]] = []
    width = engine.limits.max_beam_size // 2 * 2
    for seed in range(draws // width):
        output = engine.answer([prompt], changes={"num_hypotheses": width, "seed": seed, **changes})[0]
        texts += [tuple(one.tokens.tolist()) for one in output.hypotheses]
    return texts


NARROWINGS: list[dict[str, Any]] = [
    {"sampling_method": "sample"},
    {"sampling_method": "topk", "top_k": 5},
    {"sampling_method": "topp", "top_p": 0.7},
    {"sampling_method": "sample", "top_k": 8, "top_p": 0.8},
    {"sampling_method": "sample", "temperature": 2.5},
    {"sampling_method": "topk", "top_k": 6, "temperature": 0.5},
    {"sampling_method": "topp", "top_p": 0.9, "temperature": 3.0, "top_k": 12},
]


@pytest.mark.parametrize("changes", NARROWINGS, ids=str)
def test_samples_follow_the_textbook_distribution(changes: dict[str, Any]) -> None:
    config, arrays = small_models.gpt(7, vocabulary=23, padding_id=99, end_id=0)
    prompt = [3, 4, 5]
    scores = GptReference(config, arrays).logits(prompt)[-1]
    settings = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, **changes}
    shares = reference.distribution(scores, settings["top_k"], settings["top_p"], settings["temperature"])
    engine = small_models.engine(config, arrays, slots=16)
    texts = _samples(engine, prompt, 3200, max_new_tokens=1, **changes)
    _chi_square_holds(Counter(token for (token,) in texts), dict(enumerate(shares.tolist())))


def test_samples_of_two_tokens_follow_the_joint_distribution() -> None:
    config, arrays = small_models.gpt(8, vocabulary=6, padding_id=99, end_id=0)
    prompt = [3, 4]
    source = GptReference(config, arrays, prompt)
    shares = {}
    for first in range(6):
        before = math.exp(source.next(())[first])
        if first == config.end_id:
            shares[first,] = before
        else:
            shares |= {(first, then): before * math.exp(source.next((first,))[then]) for then in range(6)}
    engine = small_models.engine(config, arrays, slots=16)
    _chi_square_holds(Counter(_samples(engine, prompt, 3200, max_new_tokens=2, sampling_method="sample")), shares)


def test_hypotheses_of_one_request_are_independent_of_each_other() -> None:
    config, arrays = small_models.gpt(9, vocabulary=5, padding_id=99, end_id=0)
    prompt = [3, 4]
    shares = np.exp(GptReference(config, arrays, prompt).next(())).tolist()
    engine = small_models.engine(config, arrays, slots=16)
    tokens = [token for (token,) in _samples(engine, prompt, 6400, max_new_tokens=1, sampling_method="sample")]
    pairs = Counter(zip(tokens[::2], tokens[1::2]))
    _chi_square_holds(pairs, {(a, b): shares[a] * shares[b] for a in range(5) for b in range(5)})


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, [4]),
        (0.39, [4]),
        (0.41, [4, 1]),
        (0.6, [4, 1]),
        (0.62, [4, 1, 0]),
        (0.91, [0, 1, 2, 3, 4]),
        (1.0, range(5)),
    ],
)
def test_top_p_keeps_the_fewest_that_hold_it(top_p: float, kept: Iterable[int]) -> None:
    shares = np.array([0.15, 0.21, 0.14, 0.1, 0.4])
    seen = {_draw(np.log(shares), stream, top_p=top_p) for stream in range(300)}
    assert seen == set(kept)


def test_top_p_breaks_ties_by_the_lower_id() -> None:
    assert {_draw(np.zeros(4), stream, top_p=0.5) for stream in range(200)} == {0, 1}


def test_top_k_keeps_the_lower_ids_among_equals() -> None:
    assert {_draw(np.zeros(9), stream, top_k=3) for stream in range(200)} == {0, 1, 2}


def test_top_k_comes_before_top_p() -> None:
    # Of the two best, the better holds 0.4 / 0.7 > 0.5; of all four it holds 0.4 < 0.5.
    scores = np.log([0.4, 0.3, 0.2, 0.1])
    assert {_draw(scores, stream, top_k=2, top_p=0.5) for stream in range(200)} == {0}
    assert {_draw(scores, stream, top_p=0.5) for stream in range(200)} == {0, 1}


def test_a_banned_id_does_not_take_a_place_in_top_k() -> None:
    scores = np.log([0.4, 0.3, 0.2, 0.1])
    assert {_draw(scores, stream, banned=0, top_k=2) for stream in range(200)} == {1, 2}


def test_drawn_token_is_the_winner_of_the_gumbel_race() -> None:
    scores = np.random.default_rng(0).standard_normal(40).astype(np.float32)
    for stream in range(30):
        assert _draw(scores, stream) == np.argmax(scores + gumbel(12, stream, 0, np.arange(40)))


def _draw(scores: np.ndarray, stream: int, banned: int = -1, **settings: Any) -> int:
    slots = np.zeros(1, SLOT)
    slots["method"], slots["width"], slots["limit"], slots["end_id"] = 3, 1, 9, -1
    slots["seed"], slots["stream"], slots["temperature"], slots["top_p"] = 12, stream, 1, 1
    for name, value in settings.items():
        slots[name] = value
    history, details = np.zeros((1, 9), np.int32), np.zeros((1, 9), np.float32)
    ops.sample_step(np.zeros(1, np.int32), slots, history, details, np.asarray(scores, np.float32)[None], banned)
    return int(history[0, 0])


def _gpt(seed: int = 10, **settings: Any) -> tuple[Config, small_models.Arrays]:
    return small_models.gpt(seed, **{"vocabulary": 40, "padding_id": 99, "max_positions": 30, "end_id": 0, **settings})


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [13, 14]]


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling_method": "topk", "top_k": 1},
        {"sampling_method": "topp", "top_p": 1e-9},
        {"sampling_method": "sample", "temperature": 0.001},
        {"sampling_method": "greedy"},
        {"sampling_method": "beam_search", "beam_size": 1},
    ],
    ids=str,
)
def test_narrowest_sampling_takes_the_most_probable_token(changes: dict[str, Any]) -> None:
    config, arrays = _gpt()
    outputs = small_models.engine(config, arrays).answer(PROMPTS, changes={**changes, "max_new_tokens": 12})
    for prompt, output in zip(PROMPTS, outputs):
        source, text = GptReference(config, arrays, prompt), ()
        while len(text) < 12 and config.end_id not in text:
            text += (int(np.argmax(source.next(text))),)
        assert output.hypotheses[0].tokens.tolist() == list(text)


def test_seed_gives_the_same_text_whatever_else_is_in_the_batch() -> None:
    config, arrays = _gpt()
    engine, changes = small_models.engine(config, arrays), {"sampling_method": "sample", "seed": 77}
    alone = [_texts_of(engine.answer([prompt], changes=changes))[0] for prompt in PROMPTS]
    again = small_models.engine(config, arrays, slots=16, burst=3)
    for stream, prompt in enumerate(PROMPTS):
        # A row's stream is its number in the batch: the same row at place 0 draws what it drew alone.
        batch = [prompt, *PROMPTS[stream:], *PROMPTS]
        assert _texts_of(again.answer(batch, changes=changes))[0] == alone[stream]


def test_seeds_rows_and_hypotheses_draw_differently() -> None:
    config, arrays = _gpt()
    engine, changes = small_models.engine(config, arrays), {"sampling_method": "sample", "temperature": 3.0}
    texts = _texts_of(engine.answer([PROMPTS[0]] * 4, changes={**changes, "seed": 1, "num_hypotheses": 3}))
    texts += _texts_of(engine.answer([PROMPTS[0]], changes={**changes, "seed": 2, "num_hypotheses": 3}))
    texts += _texts_of(engine.answer([PROMPTS[0]], changes={**changes, "seed": 2 + 2**32, "num_hypotheses": 3}))
    assert len({tuple(text) for output in texts for text, _ in output}) == 18


def test_no_seed_means_any_seed() -> None:
    config, arrays = _gpt()
    engine, changes = small_models.engine(config, arrays), {"sampling_method": "sample", "temperature": 3.0}
    texts = [_texts_of(engine.answer([PROMPTS[0]], changes=changes))[0][0][0] for _ in range(5)]
    assert len({tuple(text) for text in texts}) == 5


def test_first_samples_do_not_depend_on_how_many_are_asked_for() -> None:
    config, arrays = _gpt()
    engine, changes = small_models.engine(config, arrays), {"sampling_method": "sample", "seed": 5}
    two, five = (_texts_of(engine.answer([[3]], changes={**changes, "num_hypotheses": n}))[0] for n in (2, 5))
    assert two == five[:2]


@pytest.mark.parametrize("penalty", [0.6, 0.0, 1.5])
def test_sample_score_is_the_models_own_normalised_log_probability(penalty: float) -> None:
    config, arrays = _gpt(end_id=4)
    changes = {
        "sampling_method": "sample", "top_k": 9, "temperature": 2.0, "seed": 3, "num_hypotheses": 8,
        "length_penalty": penalty,
    }  # fmt: skip
    output = small_models.engine(config, arrays).answer([[3, 5]], changes=changes)[0]
    source = GptReference(config, arrays, [3, 5])
    for one in output.hypotheses:
        text = tuple(one.tokens.tolist())
        total = sum(source.next(text[:i])[token] for i, token in enumerate(text))
        assert one.finished == (text[-1] == config.end_id)
        assert one.score == pytest.approx(total * length_norm(len(text), penalty), rel=1e-4)


def test_sampling_a_transformer_follows_the_textbook_distribution() -> None:
    config, arrays = small_models.transformer(11)
    row = [3, 0, 5]
    shares = np.exp(TransformerReference(config, arrays, row).next(())).tolist()
    engine = small_models.engine(config, arrays, slots=16)
    texts = _samples(engine, row, 3200, max_new_tokens=1, sampling_method="sample")
    _chi_square_holds(Counter(token for (token,) in texts), dict(enumerate(shares)))
