"""Configuration: every setting that cannot be is refused, by name, with its value and the limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import small_models

from lightseq_backend.config import (
    DIALECTS,
    MAX_SEED,
    METHODS,
    OPTION_TYPES,
    DecodingLimits,
    DecodingOptions,
    EngineConfig,
    GptConfig,
    TransformerConfig,
    dialect_named,
)
from lightseq_backend.errors import ConfigError, RequestError

LIMITS = DecodingLimits(max_beam_size=8, vocabulary=100, candidates=12)
FILE = DecodingOptions(beam_size=4, length_penalty=0.6)
NAN, INFINITY = math.nan, math.inf

STANDARD = {"sampling_method": "standard_beam"}
GREEDY = {"sampling_method": "greedy"}

# Option, value, what else the request says, and the words the message must hold.
OUT_OF_RANGE: list[tuple[str, Any, dict[str, Any], str]] = [
    ("beam_size", 0, {}, "beam_size is 0; it must be from 1 to 8"),
    ("beam_size", 9, {}, "beam_size is 9; it must be from 1 to 8"),
    ("beam_size", -1, {}, "beam_size is -1; it must be from 1 to 8"),
    ("beam_size", 2**40, {}, f"beam_size is {2**40}; it must be from 1 to 8"),
    ("length_penalty", 10.5, {}, "length_penalty is 10.5; it must be from -10 to 10"),
    ("length_penalty", -11, {}, "length_penalty is -11.0; it must be from -10 to 10"),
    ("length_penalty", NAN, {}, "length_penalty is nan"),
    ("length_penalty", INFINITY, {}, "length_penalty is inf"),
    ("diverse_lambda", -0.1, {}, "diverse_lambda is -0.1; it must be a number from 0 up"),
    ("diverse_lambda", INFINITY, {}, "diverse_lambda is inf"),
    ("diverse_lambda", NAN, {}, "diverse_lambda is nan"),
    ("top_k", 0, {"sampling_method": "topk"}, "top_k is 0; it must be from 1 to 100"),
    ("top_k", 101, {"sampling_method": "topk"}, "top_k is 101; it must be from 1 to 100, the vocabulary"),
    ("top_k", -3, {"sampling_method": "sample"}, "top_k is -3; it must be from 1 to 100"),
    ("top_p", 2, {"sampling_method": "topp"}, "top_p is 2.0; it must be over 0 and at most 1"),
    ("top_p", 0.0, {"sampling_method": "topp"}, "top_p is 0.0; it must be over 0 and at most 1"),
    ("top_p", NAN, {"sampling_method": "sample"}, "top_p is nan; it must be over 0 and at most 1"),
    ("temperature", 0, {"sampling_method": "sample"}, "temperature is 0.0; it must be from 0.001 to 1000"),
    ("temperature", -1.0, {"sampling_method": "topk", "top_k": 2}, "temperature is -1.0"),
    ("temperature", NAN, {"sampling_method": "sample"}, "temperature is nan; it must be from 0.001 to 1000"),
    ("temperature", INFINITY, {"sampling_method": "sample"}, "temperature is inf"),
    ("seed", -1, {"sampling_method": "sample"}, "seed is -1; it must be from 0"),
    ("seed", MAX_SEED + 1, {"sampling_method": "sample"}, f"seed is {2**63}; it must be from 0 to {2**63 - 1}"),
    ("max_new_tokens", 0, {}, "max_new_tokens is 0; it must be at least 1"),
    ("max_new_tokens", -5, {}, "max_new_tokens is -5; it must be at least 1"),
    ("num_hypotheses", 0, {}, "num_hypotheses is 0; it must be from 1 to 4, the beam size"),
    ("num_hypotheses", 5, {}, "num_hypotheses is 5; it must be from 1 to 4, the beam size"),
    ("num_hypotheses", 3, {"beam_size": 2}, "num_hypotheses is 3; it must be from 1 to 2, the beam size"),
    ("num_hypotheses", 9, {"sampling_method": "sample"}, "num_hypotheses is 9; it must be from 1 to 8"),
    ("num_hypotheses", 2, {"sampling_method": "greedy"}, "num_hypotheses is 2; it must be from 1 to 1"),
    ("beam_size", 7, {"sampling_method": "standard_beam"}, "beam_size is 7; it must be from 1 to 6"),
    ("max_length", 0, {}, "max_length is 0; it must be at least 1"),
    ("min_length", -1, STANDARD, "min_length is -1; it must be from 0 to 2147483647"),
    ("min_new_tokens", 2**31, STANDARD, "min_new_tokens is 2147483648; it must be from 0 to 2147483647"),
    ("no_repeat_ngram_size", -2, STANDARD, "no_repeat_ngram_size is -2; it must be from 0"),
    ("repetition_penalty", 0, STANDARD, "repetition_penalty is 0.0; it must be from 0.01 to 100"),
    ("repetition_penalty", NAN, STANDARD, "repetition_penalty is nan; it must be from 0.01 to 100"),
    ("suppress_tokens", [3, 100], STANDARD, "suppress_tokens has id 100; ids are 0 to 99"),
    ("suppress_tokens", [1] * 1025, STANDARD, "take 1025 numbers (an id one, a word one more); there is room for 1024"),
    ("begin_suppress_tokens", "[-1]", STANDARD, "begin_suppress_tokens has id -1; ids are 0 to 99"),
    ("bad_words_ids", [[1, 2], [100]], STANDARD, "bad_words_ids has id 100; ids are 0 to 99"),
    ("bad_words_ids", "[[1], []]", STANDARD, "bad_words_ids has a word without ids; it needs at least one"),
    ("bad_words_ids", [[1] * 512] * 2, STANDARD, "take 1026 numbers"),
    ("decoder_prefix", "[101]", {}, "decoder_prefix has id 101; ids are 0 to 99"),
    ("forced_bos_token_id", 100, {}, "forced_bos_token_id has id 100; ids are 0 to 99"),
    ("stop", [[1, 2], [100]], GREEDY, "stop has id 100; ids are 0 to 99"),
    ("stop", ["a" * 257], GREEDY, "stop has a word of 257 ids or characters; there may be 256"),
    ("end_ids", [100], GREEDY, "end_ids has id 100; ids are 0 to 99"),
    ("forced_eos_token_id", -1, STANDARD, "forced_eos_token_id has id -1; ids are 0 to 99"),
]


@pytest.mark.parametrize(("name", "value", "others", "message"), OUT_OF_RANGE, ids=lambda value: str(value)[:30])
def test_option_out_of_range_is_refused_with_its_limit(
    name: str, value: Any, others: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as refused:
        FILE.with_changes({name: value, **others}, LIMITS)
    assert message in str(refused.value)


def test_table_has_every_option_of_numbers() -> None:
    assert {name for name, *_ in OUT_OF_RANGE} == {
        name for name, kind in OPTION_TYPES.items() if kind in (int, float, list)
    }


def _wrong_types() -> list[tuple[str, Any]]:
    wrong: dict[type, list[Any]] = {
        int: [True, False, "4", 1.5, NAN, INFINITY, None, [4], b"4"],
        float: [True, "0.5", None, [0.5], {}],
        str: [1, True, None, 0.5, ["topk"], b"topk"],
        bool: [1, 0, "yes", None, "True", [True]],
        list: [3, "3", "[1", "[1.0]", [True], ["1"], [[[1]]], {"1": 1}, None, '["a"]'],
    }
    stop = [3, None, [True], [[[1]]], [1.0], {"1": 1}]  # a text is a stop word
    return [(name, value) for name, kind in OPTION_TYPES.items() for value in (stop if name == "stop" else wrong[kind])]


@pytest.mark.parametrize(("name", "value"), _wrong_types(), ids=str)
def test_option_of_a_wrong_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        FILE.with_changes({name: value}, LIMITS)
    assert str(refused.value) == f"{name} is {value!r}; it takes a value of type {OPTION_TYPES[name].__name__}"


def test_number_too_large_for_a_float_is_refused_by_name() -> None:
    with pytest.raises(RequestError, match="length_penalty is 1000"):
        FILE.with_changes({"length_penalty": 10**400}, LIMITS)


@pytest.mark.parametrize("method", ["", "beam", "TOPK", "ppl"])
def test_unknown_method_is_refused_with_those_that_are_known(method: str) -> None:
    with pytest.raises(RequestError) as refused:
        FILE.with_changes({"sampling_method": method}, LIMITS)
    assert repr(method) in str(refused.value)
    assert all(known in str(refused.value) for known in METHODS)


def test_unknown_options_are_all_named_with_those_that_are_known() -> None:
    with pytest.raises(RequestError) as refused:
        FILE.with_changes({"topk": 3, "beam_size": 2, "BeamSize": 1}, LIMITS)
    assert str(refused.value).startswith("unknown option BeamSize, topk; options are sampling_method, beam_size")


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(RequestError) as refused:
        FILE.with_changes({"sampling_method": "topp", "top_p": 2.0, "temperature": 0.0, "max_new_tokens": 0}, LIMITS)
    assert all(name in str(refused.value) for name in ("top_p is 2.0", "temperature is 0.0", "max_new_tokens is 0"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 3}, "top_k needs a sampling method"),
        ({"top_p": 0.5}, "top_p needs a sampling method"),
        ({"temperature": 0.5}, "temperature needs a sampling method"),
        ({"sampling_method": "greedy", "temperature": 0.5}, "this request uses greedy"),
        ({"sampling_method": "topk_greedy", "top_k": 2}, "this request uses topk_greedy"),
        ({"sampling_method": "topk", "top_k": 2, "beam_size": 4}, "beam_size needs a search"),
        ({"sampling_method": "greedy", "beam_size": 4}, "beam_size is 4; greedy has one beam"),
        ({"sampling_method": "sample", "diverse_lambda": 0.5}, "diverse_lambda needs beam_search"),
        ({"sampling_method": "topk_greedy", "diverse_lambda": 0.5}, "diverse_lambda needs beam_search"),
        ({**STANDARD, "diverse_lambda": 0.5}, "diverse_lambda needs beam_search"),
        ({**STANDARD, "top_k": 3}, "top_k needs a sampling method"),
        ({"early_stopping": True}, "early_stopping needs standard_beam; this request uses beam_search"),
        ({"early_stopping": "never", "sampling_method": "sample"}, "early_stopping needs standard_beam"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size needs standard_beam, greedy or a sampling method"),
        ({"sampling_method": "topk_greedy", "suppress_tokens": [3]}, "suppress_tokens needs standard_beam"),
        ({"decoder_prefix": [3], "forced_bos_token_id": 4}, "both say what comes first"),
    ],
)
def test_options_that_the_method_would_ignore_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        FILE.with_changes(changes, LIMITS)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"beam_size": 1},
        {"beam_size": 8},
        {"beam_size": 4.0},
        {"length_penalty": 0},
        {"length_penalty": -10},
        {"length_penalty": 10},
        {"diverse_lambda": 0},
        {"sampling_method": "topk", "top_k": 1},
        {"sampling_method": "topk", "top_k": 100},
        {"sampling_method": "topp", "top_p": 1},
        {"sampling_method": "topp", "top_p": 1e-6},
        {"sampling_method": "sample", "temperature": 0.001},
        {"sampling_method": "sample", "temperature": 1000},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"max_new_tokens": 1},
        {"num_hypotheses": 4},
        {"sampling_method": "sample", "num_hypotheses": 8},
        {"sampling_method": "greedy", "beam_size": 1},
    ],
    ids=str,
)
def test_option_at_its_limit_is_taken(changes: dict[str, Any]) -> None:
    options = FILE.with_changes(changes, LIMITS)
    assert {name: getattr(options, name) for name in changes} == changes


def test_options_take_their_declared_types() -> None:
    options = FILE.with_changes({"beam_size": 4.0, "length_penalty": 1}, LIMITS)
    assert (type(options.beam_size), type(options.length_penalty)) == (int, float)


# What the file says --------------------------------------------------------------------------------------------------


def test_no_changes_give_what_the_file_says() -> None:
    for options in (
        FILE,
        DecodingOptions("topk", top_k=7),
        DecodingOptions("topp", top_p=0.75),
        DecodingOptions(diverse_lambda=0.5),
    ):
        assert options.with_changes({}, LIMITS) == options


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "file",
    [
        DecodingOptions("topk", beam_size=4, top_k=7, top_p=0.75, diverse_lambda=0.5),
        DecodingOptions("topp", beam_size=4, top_k=7, top_p=0.75, diverse_lambda=0.5),
        DecodingOptions("beam_search", beam_size=4, top_k=7, top_p=0.75, diverse_lambda=0.5),
    ],
    ids=lambda file: f"file {file.sampling_method}",
)
def test_files_defaults_of_one_method_do_not_leak_into_another(file: DecodingOptions, method: str) -> None:
    options = file.with_changes({"sampling_method": method}, LIMITS)
    assert options.top_k == (7 if method == "topk" else 0)
    assert options.top_p == (0.75 if method == "topp" else 1.0)
    assert options.diverse_lambda == (0.5 if method == "beam_search" else 0.0)
    assert options.temperature == 1.0


def test_what_the_file_says_is_checked_where_it_is_used() -> None:
    file = DecodingOptions("beam_search", beam_size=32, top_k=0)
    with pytest.raises(RequestError, match="beam_size is 32; it must be from 1 to 8"):
        file.with_changes({}, LIMITS)
    with pytest.raises(RequestError, match="top_k is 0; it must be from 1 to 100"):
        file.with_changes({"sampling_method": "topk"}, LIMITS)
    assert file.with_changes({"sampling_method": "sample"}, LIMITS).width == 1


@pytest.mark.parametrize(
    ("changes", "width", "hypotheses"),
    [
        ({}, 4, 4),
        ({"num_hypotheses": 2}, 4, 2),
        ({"beam_size": 7}, 7, 7),
        ({"sampling_method": "greedy"}, 1, 1),
        ({"sampling_method": "topk_greedy"}, 4, 4),
        ({"sampling_method": "sample"}, 1, 1),
        ({"sampling_method": "sample", "num_hypotheses": 6}, 6, 6),
    ],
)
def test_sequence_has_as_many_rows_and_hypotheses_as(changes: dict[str, Any], width: int, hypotheses: int) -> None:
    options = FILE.with_changes(changes, LIMITS)
    assert (options.width, options.hypotheses) == (width, hypotheses)


# Models and engines --------------------------------------------------------------------------------------------------


def _transformer(**settings: Any) -> TransformerConfig:
    return small_models.transformer(0, **settings)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "hidden is 0; it must be at least 1"),
        ({"decoder_layers": -1}, "decoder_layers is -1; it must be at least 1"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"heads": 3}, "hidden size 16 does not divide into 3 heads"),
        ({"activation": "mish"}, "activation is 'mish'; known activations are relu, gelu, gelu_erf, silu"),
        ({"start_id": 11}, "start_id is 11; the target vocabulary has 11"),
        ({"end_id": -1}, "end_id is -1; the target vocabulary has 11"),
    ],
)
def test_transformer_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(_transformer(), **settings)
    assert message in str(refused.value)


def test_transformers_faults_are_all_named() -> None:
    with pytest.raises(ConfigError) as refused:
        replace(_transformer(), heads=0, activation="x", start_id=99)
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"layers": 0}, "layers is 0"), ({"heads": 5}, "into 5 heads"), ({"activation": ""}, "activation is ''")],
)
def test_gpt_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        replace(small_models.gpt(0)[0], **settings)
    assert message in str(refused.value)


def test_gpt_whose_end_id_is_outside_its_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="end_id is 11; the vocabulary has 11"):
        replace(small_models.gpt(0)[0], end_id=11)


@pytest.mark.parametrize("name", ["slots", "max_beam_size", "queue", "prompt_tokens", "burst"])
def test_engine_without_room_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        EngineConfig(**{name: 0})


def test_engine_with_fewer_slots_than_beams_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_beam_size is 16; there are 8 slots"):
        EngineConfig(slots=8)


@pytest.mark.parametrize(
    ("source", "extra", "positions", "head", "v0"),
    # Worked examples of lightseq_format.md 3.5: M = min(max_step, L + extra); M - 2 tokens, M - 1 in V0.
    [(10, 50, 300, 58, 59), (10, 50, 40, 38, 39), (7, 0, 300, 5, 6), (1, 0, 300, 0, 0), (2, 0, 300, 0, 1)],
)
def test_beam_search_generates_at_most(source: int, extra: int, positions: int, head: int, v0: int) -> None:
    config = _transformer(extra_decode_length=extra, max_positions=positions)
    assert config.new_tokens(source, DecodingOptions()) == head
    assert replace(config, dialect=DIALECTS["v0"]).new_tokens(source, DecodingOptions()) == v0


@pytest.mark.parametrize("method", ["topk_greedy", "topk", "topp", "sample"])
def test_other_methods_generate_at_most_all_positions_but_one(method: str) -> None:
    assert _transformer(max_positions=40).new_tokens(3, DecodingOptions(method)) == 39


@pytest.mark.parametrize(
    ("prompt", "extra", "tokens"), [(1, 0, 11), (1, -1, 11), (11, 0, 1), (12, 0, 1), (5, 3, 3), (10, 3, 2), (12, 3, 1)]
)
def test_gpt_generates_at_most(prompt: int, extra: int, tokens: int) -> None:
    config: GptConfig = replace(small_models.gpt(0)[0], extra_decode_length=extra)
    assert config.new_tokens(prompt, DecodingOptions("sample")) == tokens
    assert config.new_tokens(prompt, DecodingOptions("sample", max_new_tokens=1)) == 1


def test_unknown_dialect_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="dialect is 'v1'; known dialects are head, v0"):
        dialect_named("v1")


def test_v0_dialect_is_that_of_2019() -> None:
    config = _transformer(dialect=dialect_named("v0"))
    assert (config.banned_id, config.dialect.norm_epsilon) == (8, 1e-6)
    assert (_transformer().banned_id, _transformer().dialect.norm_epsilon) == (-1, 1e-12)


def test_logit_scale_undoes_what_the_embeddings_hold() -> None:
    assert _transformer().logit_scale == pytest.approx(0.25)
    assert _transformer(scaled_embedding=False).logit_scale == 1


def test_lists_come_as_lists_or_as_json() -> None:
    for given in ([[1, 2], [3]], ((1, 2), (3,)), "[[1, 2], [3]]"):
        assert FILE.with_changes({**STANDARD, "bad_words_ids": given}, LIMITS).bad_words_ids == ((1, 2), (3,))
    assert FILE.with_changes({**STANDARD, "suppress_tokens": "[]"}, LIMITS).suppress_tokens == ()


@pytest.mark.parametrize(("given", "taken"), [(True, True), ("true", True), ("false", False), ("never", "never")])
def test_early_stopping_takes_truth_and_never(given: Any, taken: Any) -> None:
    assert FILE.with_changes({**STANDARD, "early_stopping": given}, LIMITS).early_stopping is taken or taken == "never"


def test_length_penalty_of_one_search_is_not_the_others() -> None:
    assert FILE.with_changes(STANDARD, LIMITS).length_penalty == 1.0
    assert FILE.with_changes({**STANDARD, "length_penalty": 0.3}, LIMITS).length_penalty == 0.3
    converted = DecodingOptions("standard_beam", 4, 2.0, early_stopping=True, no_repeat_ngram_size=3)
    assert converted.with_changes({}, LIMITS) == converted
    lightseq = converted.with_changes({"sampling_method": "beam_search"}, LIMITS)
    assert (lightseq.length_penalty, lightseq.early_stopping, lightseq.no_repeat_ngram_size) == (0.6, False, 0)
    greedy = converted.with_changes({"sampling_method": "greedy"}, LIMITS)
    assert (greedy.standard, greedy.width, greedy.no_repeat_ngram_size) == (True, 1, 3)


def test_limit_of_a_request_stands_for_the_files_own() -> None:
    file = DecodingOptions(max_length=20)
    config, _ = small_models.gpt(max_positions=99)
    assert config.new_tokens(3, file.with_changes({"max_new_tokens": 30}, LIMITS)) == 30
    assert config.new_tokens(3, file.with_changes({}, LIMITS)) == 17
    least = DecodingOptions(STANDARD["sampling_method"], min_new_tokens=5)
    assert least.with_changes({"min_length": 3}, LIMITS).min_new_tokens == 0
    assert DecodingOptions(max_new_tokens=5).with_changes({"max_length": 30}, LIMITS).max_new_tokens is None
    assert file.with_changes({}, LIMITS).max_length == 20


def test_max_length_counts_what_is_fed() -> None:
    config, _ = small_models.transformer(forced_id=4)
    assert config.new_tokens(3, DecodingOptions("standard_beam", max_length=7)) == 5
    assert config.new_tokens(3, DecodingOptions("standard_beam")) == config.max_positions - 2
    assert config.new_tokens(3, DecodingOptions("standard_beam", decoder_prefix=(1, 2, 3), max_length=7)) == 3
    gpt, _ = small_models.gpt()
    assert gpt.new_tokens(3, DecodingOptions("standard_beam", max_length=7)) == 4
