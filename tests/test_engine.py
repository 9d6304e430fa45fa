"""The engine: what a request gets never depends on the others, every reply comes once, nothing leaks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
import small_models

from lightseq_backend.config import DecodingOptions, EngineConfig
from lightseq_backend.engine import Engine
from lightseq_backend.engine.buffers import buckets
from lightseq_backend.engine.follow import Look
from lightseq_backend.engine.graphs import ANY, STANDARD_SEARCHING
from lightseq_backend.errors import ConfigError, Overloaded, RequestError
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops import cpu
from lightseq_backend.ops.slots import SLOT
from lightseq_backend.request import GENERATE, SCORE, Output, Request, Sequence

Rows = list[list[int]]
TRANSFORMER: dict[str, Any] = {
    "hidden": 48, "inner": 104, "heads": 4, "decoder_layers": 2, "source_vocabulary": 50, "target_vocabulary": 67,
    "max_positions": 24, "extra_decode_length": 8, "end_bias": 1.5,
}  # fmt: skip
GPT: dict[str, Any] = {"hidden": 48, "inner": 104, "heads": 4, "vocabulary": 67, "padding_id": 67, "max_positions": 24}


def transformer(**settings: Any) -> Engine:
    return small_models.engine(*small_models.transformer(21, **TRANSFORMER), **settings)


def gpt(**settings: Any) -> Engine:
    return small_models.engine(*small_models.gpt(22, **GPT), **settings)


MODELS = {"transformer": transformer, "gpt": gpt}


class Replies:
    """What came back, by request; a second reply to one request is a failure of its own."""

    def __init__(self) -> None:
        self.results: dict[int, Output | Exception] = {}
        self.twice: list[int] = []

    def to(self, number: int) -> Callable[[Output | Exception], None]:
        def reply(result: Output | Exception) -> None:
            if number in self.results:
                self.twice.append(number)
            self.results[number] = result

        return reply


def request(
    engine: Engine,
    row: list[int],
    reply: Callable[[Output | Exception], None],
    changes: dict[str, object] | None = None,
    kind: str = GENERATE,
    stream: int = 0,
) -> Request:
    return Request(np.array(row, np.int32), engine.options(changes), reply, kind, stream)


def run(engine: Engine, most: int = 2000) -> None:
    for _ in range(most):
        if engine.idle:
            return
        engine.step()
    pytest.fail(f"the engine is not idle after {most} steps")


def exactly(result: Output | Exception) -> object:
    """Everything a caller sees, to the last bit."""
    assert isinstance(result, Output), result
    hypotheses = [(one.tokens.tolist(), one.score, one.finished) for one in result.hypotheses]
    return hypotheses, result.steps, result.cut, result.loss


# Continuous batching -------------------------------------------------------------------------------------------------

CHANGES: list[dict[str, object]] = [
    {"sampling_method": "beam_search", "beam_size": 4},
    {"sampling_method": "beam_search", "beam_size": 1},
    {"sampling_method": "beam_search", "beam_size": 3, "length_penalty": -1.0, "num_hypotheses": 2},
    {"sampling_method": "beam_search", "beam_size": 2, "diverse_lambda": 0.5, "max_new_tokens": 3},
    {"sampling_method": "topk_greedy", "beam_size": 3, "max_new_tokens": 9},
    {"sampling_method": "greedy"},
    {"sampling_method": "topk", "top_k": 5, "seed": 11},
    {"sampling_method": "topp", "top_p": 0.8, "seed": 12, "num_hypotheses": 3},
    {"sampling_method": "sample", "seed": 13, "temperature": 1.5, "max_new_tokens": 6},
    {"sampling_method": "standard_beam", "beam_size": 3, "early_stopping": True},
    {"sampling_method": "standard_beam", "beam_size": 4, "early_stopping": "never", "repetition_penalty": 1.3},
    {"sampling_method": "standard_beam", "beam_size": 2, "no_repeat_ngram_size": 2, "bad_words_ids": [[4], [5, 6]]},
    {"sampling_method": "greedy", "suppress_tokens": [5, 7], "min_new_tokens": 4, "forced_eos_token_id": 9},
    {"sampling_method": "topk", "top_k": 9, "seed": 14, "repetition_penalty": 2.0, "begin_suppress_tokens": [3]},
]


def mixed_requests(engine: Engine, count: int, seed: int) -> list[tuple[list[int], dict[str, object] | None, str, int]]:
    """Rows of all lengths, every method, and texts to score where the model can."""
    choose = random.Random(seed)
    config = engine.model.config
    requests = []
    for _ in range(count):
        length = choose.choice([1, 1, 2, 3, 5, 8, 13, config.max_positions - 4, config.max_positions])
        row = [choose.randrange(3, config.input_vocabulary) for _ in range(length)]
        if choose.random() < 0.3 and length > 2:
            row[choose.randrange(1, length - 1)] = config.padding_id
        scores = isinstance(engine.model, Gpt) and choose.random() < 0.25
        if scores:
            row = [token for token in row if token != config.padding_id]
        changes = None if scores else choose.choice(CHANGES)
        requests.append((row, changes, SCORE if scores else GENERATE, choose.randrange(4)))
    return requests


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 4, "max_beam_size": 4, "prompt_tokens": 24},
        {"slots": 13, "max_beam_size": 4, "burst": 3, "prompt_tokens": 30},
        {"slots": 64, "burst": 8},
        {"slots": 40, "burst": 1, "prompt_tokens": 100},
    ],
    ids=str,
)
def test_result_is_the_same_to_the_last_bit_whatever_else_is_in_the_batch(model: str, settings: dict[str, Any]) -> None:
    alone, together = MODELS[model](slots=4, max_beam_size=4), MODELS[model](**settings)
    requests = mixed_requests(alone, 50, seed=settings["slots"])
    wanted, replies, moments = Replies(), Replies(), random.Random(1)
    for number, (row, changes, kind, stream) in enumerate(requests):
        alone.submit([request(alone, row, wanted.to(number), changes, kind, stream)])
        run(alone)
    waiting = list(enumerate(requests))
    while waiting or not together.idle:
        for number, (row, changes, kind, stream) in waiting[: moments.choice([0, 0, 1, 2, 7])]:
            together.submit([request(together, row, replies.to(number), changes, kind, stream)])
            waiting.pop(0)
        together.step()
    for number, asked in enumerate(requests):
        assert exactly(replies.results[number]) == exactly(wanted.results[number]), asked
    assert (replies.twice, together.slots_in_use, together.waiting) == ([], 0, 0)


@pytest.mark.parametrize("ahead", [2, 5])
@pytest.mark.parametrize("model", MODELS)
def test_result_is_the_same_however_far_the_host_looks_behind(
    model: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's host looks at a burst's end only after it has queued others; slots change hands meanwhile."""
    settings = {"slots": 8, "max_beam_size": 4, "burst": 2}
    requests = mixed_requests(MODELS[model](**settings), 40, seed=ahead)
    results = []
    for bursts in (1, ahead):
        monkeypatch.setattr(cpu, "BURSTS_AHEAD", bursts)
        engine, replies = MODELS[model](**settings), Replies()
        for number, (row, changes, kind, stream) in enumerate(requests):
            engine.submit([request(engine, row, replies.to(number), changes, kind, stream)])
            if number % 3:
                engine.step()
        run(engine)
        assert (replies.twice, engine.slots_in_use) == ([], 0)
        results.append([exactly(replies.results[number]) for number in range(len(requests))])
    assert results[0] == results[1]


def filled_up(model: str, sizes: tuple[int, ...], **settings: Any) -> tuple[Engine, list[tuple[int, int]]]:
    """An engine whose device has passes for these numbers of rows and the most there may be; and, as they come, the
    rows of each pass and those it was filled up to. What it finds in its work space are no numbers."""
    backend = small_models.cpu_but(pass_sizes=lambda most: [*(size for size in sizes if size < most), most])
    engine = MODELS[model](backend=backend, **settings)
    for array in vars(engine._buffers.work).values():
        array[...] = np.nan
    passes: list[tuple[int, int]] = []
    size = engine._passes.size

    def seen(rows: int) -> int:
        passes.append((rows, size(rows)))
        return passes[-1][1]

    engine._passes.size = seen  # type: ignore[method-assign]
    return engine, passes


@pytest.mark.parametrize("sizes", [(), (4, 8, 16, 32), (1, 7, 33)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_result_is_the_same_in_passes_that_are_filled_up(model: str, sizes: tuple[int, ...]) -> None:
    """Translations, prompts and scores, several in one pass; a device has passes for a few numbers of rows alone."""
    alone = MODELS[model](slots=4, max_beam_size=4)
    together, passes = filled_up(model, sizes, slots=16, max_beam_size=4, prompt_tokens=50, burst=2)
    requests = mixed_requests(alone, 40, seed=len(sizes))
    wanted, replies = Replies(), Replies()
    for number, (row, changes, kind, stream) in enumerate(requests):
        alone.submit([request(alone, row, wanted.to(number), changes, kind, stream)])
        run(alone)
        together.submit([request(together, row, replies.to(number), changes, kind, stream)])
        if number % 4 == 3:
            together.step()
    run(together)
    for number, asked in enumerate(requests):
        assert exactly(replies.results[number]) == exactly(wanted.results[number]), asked
    assert {size for _, size in passes} <= {*sizes, 50}
    assert sum(rows < size for rows, size in passes) > len(passes) // 2
    for read in ("prompt_tokens", "scored_tokens"):
        assert together.counts[read] == alone.counts[read]


@pytest.mark.parametrize("sizes", [(), (2, 4, 8)], ids=str)
@pytest.mark.parametrize(
    "prompts",
    [[[5]], [[5], [6], [7]], [[5], [6, 7, 8], [9], [10, 11]], [[5, 6, 7, 8, 9], [10]], [[10], [5, 6, 7, 8, 9]]],
    ids=str,
)
def test_prompts_of_one_token_are_read_with_longer_ones(prompts: Rows, sizes: tuple[int, ...]) -> None:
    """Of a prompt of one token a pass reads nothing: its only token is the first step's."""
    engine, passes = filled_up("gpt", sizes, slots=16, max_beam_size=4, prompt_tokens=24)
    for changes in (CHANGES[0], CHANGES[7]):
        alone = [exactly(gpt().answer([prompt], changes=changes)[0]) for prompt in prompts]
        replies, passes[:] = Replies(), []
        engine.submit([request(engine, prompt, replies.to(i), changes) for i, prompt in enumerate(prompts)])
        run(engine)
        assert [exactly(replies.results[i]) for i in range(len(prompts))] == alone
        read = sum(len(prompt) - 1 for prompt in prompts)
        assert [rows for rows, _ in passes] == ([read] if read else [])


@pytest.mark.parametrize("model", MODELS)
def test_admitting_takes_few_copies(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is queued behind the burst under way, and a device takes but some of them before the host must wait."""
    engine, replies, put, copies = MODELS[model](slots=32, max_beam_size=4), Replies(), cpu.put, 0

    def counted(destination: Any, source: Any) -> None:
        nonlocal copies
        copies += 1
        put(destination, source)

    engine.submit([request(engine, [3 + i, 4], replies.to(i), CHANGES[0]) for i in range(8)])
    monkeypatch.setattr(cpu, "put", counted)
    engine._begin(engine._scheduler.admit())
    assert engine._rows == 32
    assert copies <= 4  # the pack, records, pasts, rows


# Steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("burst", [1, 3, 4, 8])
@pytest.mark.parametrize(
    ("limits", "staggered"),
    [([1], False), ([4], False), ([13], False), ([2, 9, 9], False), ([9, 2, 5, 12], True), ([3, 1, 4, 1, 5], True)],
)
def test_no_step_is_queued_that_no_sequence_can_use(
    limits: list[int], staggered: bool, burst: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end id never comes, so a sequence takes as many steps as it may, and bursts are no shorter than they need be.
    staggered: bursts are under way when the next is admitted."""
    monkeypatch.setattr(cpu, "BURSTS_AHEAD", ahead)
    never_ends = small_models.transformer(21, **{**TRANSFORMER, "end_bias": -1e4})
    engine, replies = small_models.engine(*never_ends, slots=8, max_beam_size=4, burst=burst), Replies()
    run_step, useful = engine._steps.run, []

    def seen(rows: int, mix: str) -> None:
        generated = engine._buffers.state.slots["generated"]
        useful.append(any(generated[one.slots[0]] < one.limit for one in engine._active))
        run_step(rows, mix)

    engine._steps.run = seen  # type: ignore[method-assign]
    bursts, fetch = [], cpu.fetch
    monkeypatch.setattr(cpu, "fetch", lambda one: (one.dtype == SLOT and bursts.append(len(useful))) or fetch(one))
    for number, limit in enumerate(limits):
        changes = {"beam_size": 2, "max_new_tokens": limit} if number % 2 else {**CHANGES[6], "max_new_tokens": limit}
        engine.submit([request(engine, [3 + number] * 12, replies.to(number), changes)])
        if staggered:
            engine.step()
    run(engine)
    outputs = [replies.results[number] for number in range(len(limits))]
    assert [(output.steps, output.cut) for output in outputs] == [(limit, True) for limit in limits]  # type: ignore[union-attr]
    assert useful == [True] * engine.counts["steps"]
    if not staggered:
        assert bursts == [*range(burst, max(limits), burst), max(limits)]


@pytest.mark.parametrize(
    ("rules", "ruled"),
    [
        ({}, []),
        ({"no_repeat_ngram_size": 2}, [0, 1, 2, 3, 4, 5]),
        ({"forced_eos_token_id": 5}, [5]),
        ({"min_new_tokens": 3}, [0, 1]),
        ({"begin_suppress_tokens": [4], "forced_eos_token_id": 5}, [0, 5]),
    ],
)
def test_steps_have_rules_where_they_act_alone(rules: dict[str, object], ruled: list[int]) -> None:
    """Bursts of two steps, of a text of twelve tokens that never ends."""
    engine = small_models.engine(*small_models.transformer(21, **{**TRANSFORMER, "end_bias": -1e4}), burst=2)
    mixes, run_step = [], engine._steps.run
    engine._steps.run = lambda rows, mix: (mixes.append(mix), run_step(rows, mix))  # type: ignore[method-assign]
    changes = {"sampling_method": "standard_beam", "beam_size": 2, "max_new_tokens": 12, **rules}
    found = engine.answer([[3, 4]], changes=changes)[0]
    assert mixes == [ANY if burst in ruled else STANDARD_SEARCHING for burst in range(6) for _ in range(2)]
    always = {**changes, "suppress_tokens": [engine.model.config.end_id]}  # which never comes: the rules act throughout
    assert exactly(found) == exactly(engine.answer([[3, 4]], changes=always)[0])


@pytest.mark.parametrize("model", MODELS)
def test_result_does_not_depend_on_what_ran_before(model: str) -> None:
    engine = MODELS[model](slots=8, max_beam_size=4)
    row = [5, 6, 7]
    first = exactly(engine.answer([row], changes=CHANGES[0])[0])
    engine.answer([[9] * 20, [8], [7] * 13], changes=CHANGES[6])
    assert exactly(engine.answer([row], changes=CHANGES[0])[0]) == first


@pytest.mark.parametrize("final_norm", [True, False])
def test_scores_equal_recomputation_with_prompts_cut_into_small_passes(final_norm: bool) -> None:
    config, arrays = small_models.gpt(23, **GPT, final_norm=final_norm)
    engine = small_models.engine(config, arrays, slots=4, max_beam_size=4, prompt_tokens=1)
    texts = [[4], [5, 6], list(range(3, 27)), [9, 9, 9, 9]]
    losses = [output.loss for output in engine.answer(texts, kind=SCORE)]
    np.testing.assert_allclose(losses, [reference.GptReference(config, arrays).loss(text) for text in texts], atol=1e-5)


def test_short_prompt_does_not_wait_for_a_long_text() -> None:
    engine = gpt(slots=8, max_beam_size=4)
    replies, changes = Replies(), {"sampling_method": "topk", "top_k": 3, "seed": 1}
    never_ends = {"sampling_method": "sample", "temperature": 1e3, "seed": 1}
    engine.submit([request(engine, [5], replies.to(0), never_ends)])
    engine.step()
    engine.submit([request(engine, [6], replies.to(1), {**changes, "max_new_tokens": 1})])
    engine.step()
    assert list(replies.results) == [1]


# Edges of requests ---------------------------------------------------------------------------------------------------


def test_prompt_that_fills_the_context_gets_one_token() -> None:
    engine = gpt()
    prompt = [3 + i % 40 for i in range(24)]
    for changes in CHANGES:
        output = engine.answer([prompt], changes=changes)[0]
        assert {len(one.tokens) for one in output.hypotheses} == {1}, changes


def test_prompt_that_fills_the_context_gets_the_most_probable_token() -> None:
    config, arrays = small_models.gpt(22, **GPT)
    prompt = [3 + i % 40 for i in range(24)]
    output = small_models.engine(config, arrays).answer([prompt], changes={"sampling_method": "greedy"})[0]
    wanted = int(np.argmax(reference.GptReference(config, arrays, prompt).next(())))
    assert output.hypotheses[0].tokens.tolist() == [wanted]


@pytest.mark.parametrize("changes", CHANGES[:9], ids=str)  # as in LightSeq; the standard search goes on
def test_prompt_that_ends_with_the_end_id_gets_the_end_id(changes: dict[str, object]) -> None:
    engine = gpt()
    output = engine.answer([[5, 6, 2], [5]], changes=changes)[0]
    assert [(one.tokens.tolist(), one.finished) for one in output.hypotheses] == [([2], True)] * engine.options(
        changes
    ).hypotheses
    assert (output.steps, engine.slots_in_use) == (1, 0)


def test_source_that_fills_the_context_is_translated() -> None:
    engine = transformer()
    assert engine.answer([list(range(3, 27))], changes=CHANGES[0])[0].hypotheses


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "empty": (np.zeros(0, np.int32), "the row is empty"),
    "only padding": ([0, 0], r"only padding \(id 0\)"),
    "negative": ([3, -5], "id -5 at column 1 is outside the vocabulary \\(0 to 49\\)"),
    "beyond the vocabulary": ([3, 4, 50], "id 50 at column 2 is outside the vocabulary \\(0 to 49\\)"),
    "beyond int32": ([2**40], f"id {2**40} at column 0"),
    "too long": ([3] * 25, "25 ids; this model takes 24"),
    "two dimensions": ([[3, 4]], r"one-dimensional and integer; this one is int64 \[1, 2\]"),
    "fractions": ([1.5], "one-dimensional and integer; this one is float64"),
    "strings": (["a"], "one-dimensional and integer"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_refused_and_nothing_of_its_batch_is_queued(row: Any, message: str) -> None:
    engine, replies = transformer(), Replies()
    bad = np.asarray(row)
    good = np.array([3], bad.dtype if bad.dtype.kind == "i" else np.int32)  # rows of one type are read together
    with pytest.raises(RequestError, match=message):
        engine.submit([Request(ids, engine.options(), replies.to(i)) for i, ids in enumerate((good, bad))])
    assert (engine.waiting, replies.results) == (0, {})


@pytest.mark.parametrize("padding_id", [67, -1, 0, 30, 66])
@pytest.mark.parametrize("there", [(), (0, 150, 199), (199,)])
def test_padding_of_a_long_row_is_dropped_wherever_its_id_is(padding_id: int, there: tuple[int, ...]) -> None:
    config, arrays = small_models.gpt(22, **{**GPT, "padding_id": padding_id, "max_positions": 256})
    row = np.random.default_rng(1).choice([i for i in range(67) if i != padding_id], 200)
    row[list(there)] = padding_id
    options = small_models.engine(config, arrays).options()

    def sequence(ids: np.ndarray) -> Sequence:
        return Sequence.of(Request(ids, options, lambda result: None), config)

    first, last = (1, 199) if len(there) == 3 else (0, 199) if there else (0, 200)
    expected = [-1 if i in there else int(row[i]) for i in range(first, last)]
    assert sequence(row).tokens.tolist() == expected
    row[7] = 68
    with pytest.raises(RequestError, match=r"id 68 at column 7 is outside the vocabulary \(0 to 66\)"):
        sequence(row)


AMONG_OTHERS: dict[str, Any] = {
    "as they are": [5, 6, 7],
    "long": [*range(3, 27)],
    "padding at the end": [5, 0, 0],
    "padding between": [5, 0, 6],
    "another type": np.array([5, 6, 66], np.uint8),
    "every second of an array": np.array([5, 1, 6, 1, 7, 1])[::2],
    "a list": ...,
}


@pytest.mark.parametrize("row", AMONG_OTHERS.values(), ids=AMONG_OTHERS)
@pytest.mark.parametrize("kind", [GENERATE, SCORE])
@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_rows_that_come_together_are_what_each_is_alone(row: Any, kind: str, integer: Any) -> None:
    config, arrays = small_models.gpt(22, **{**GPT, "padding_id": 0})
    options = small_models.engine(config, arrays).options({"seed": 7})
    rows: list[Any] = [np.array(ids, integer) for ids in ([3, 4, 5, 6], [66], [1] * 23)]
    rows.insert(1, [5, 6, 7] if row is ... else np.asarray(row, None if isinstance(row, np.ndarray) else integer))
    requests = [Request(ids, options, lambda result: None, kind) for ids in rows]
    for one, alone in zip(Sequence.all_of(requests, config), (Sequence.of(each, config) for each in requests)):
        for name in ("tokens", "positions", "scored"):
            found, expected = getattr(one, name), getattr(alone, name)
            assert (found.dtype, found.tolist()) == (np.int32, expected.tolist())
        for name in ("request", "limit", "seed", "rows", "given", "followed"):
            assert getattr(one, name) == getattr(alone, name)
        assert not np.shares_memory(one.tokens, one.request.tokens), "whoever asked may change it"


def test_no_rows_are_no_sequences() -> None:
    engine = gpt()
    engine.submit([])
    assert (engine.answer([]), engine.idle) == ([], True)


@pytest.mark.parametrize("padding_id", [67, -1])
def test_padding_outside_the_vocabulary_cannot_stand_between_scored_tokens(padding_id: int) -> None:
    engine = small_models.engine(*small_models.gpt(22, **{**GPT, "padding_id": padding_id}))
    with pytest.raises(RequestError, match=rf"padding \(id {padding_id}\) stands between tokens"):
        engine.answer([[3, padding_id, 4]], kind=SCORE)


@pytest.mark.parametrize("kind", [GENERATE, SCORE])
@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.uint16, np.uint32, np.uint64])
def test_ids_may_be_integers_of_any_type(integer: Any, kind: str) -> None:
    engine, replies = small_models.engine(*small_models.gpt(22, **{**GPT, "padding_id": 0})), Replies()
    rows = [np.array([3, 0, 5, 0, 0, 60], kind_of_row) for kind_of_row in (np.int64, integer)]
    options = engine.options({"sampling_method": "greedy"})
    engine.submit([Request(row, options, replies.to(number), kind) for number, row in enumerate(rows)])
    run(engine)
    assert exactly(replies.results[1]) == exactly(replies.results[0])


def test_text_of_one_token_costs_nothing() -> None:
    assert [str(output.loss) for output in gpt().answer([[4], [67, 5]], kind=SCORE)] == ["0.0", "0.0"]


def test_text_that_begins_with_padding_harms_no_other() -> None:
    texts = [[3, 4], [67, 5], [6, 7]]  # padding, outside the vocabulary, is what comes after the first
    alone = [gpt().answer([text], kind=SCORE)[0].loss for text in texts]
    assert [output.loss for output in gpt().answer(texts, kind=SCORE)] == alone


# The queue -----------------------------------------------------------------------------------------------------------


def test_full_queue_takes_all_of_a_batch_or_nothing() -> None:
    engine, replies = transformer(queue=3), Replies()

    def some(first: int, count: int) -> list[Request]:
        return [request(engine, [3 + number], replies.to(number)) for number in range(first, first + count)]

    engine.submit(some(0, 2))
    with pytest.raises(Overloaded, match="2 of 3 places taken and cannot take 2 more"):
        engine.submit(some(2, 2))
    assert engine.waiting == 2
    engine.submit(some(2, 1))
    with pytest.raises(Overloaded, match="3 of 3 places"):
        engine.submit(some(3, 1))
    run(engine)
    assert sorted(replies.results) == [0, 1, 2]
    engine.submit(some(3, 3))
    run(engine)
    assert sorted(replies.results) == [0, 1, 2, 3, 4, 5]


def test_requests_start_in_the_order_they_came() -> None:
    engine, replies = transformer(slots=8, max_beam_size=8), Replies()
    for number, beams in enumerate((2, 8, 1, 1)):
        changes = {"beam_size": beams, "max_new_tokens": 1}
        engine.submit([request(engine, [3], replies.to(number), changes)])
    run(engine)
    # The wide one does not starve: the narrow ones behind it wait although they would fit.
    assert list(replies.results) == [0, 1, 2, 3]


def test_answer_takes_more_rows_than_the_queue_holds() -> None:
    engine = transformer(queue=2)
    rows = [[3 + i] for i in range(7)]
    wanted = [exactly(transformer().answer([row])[0]) for row in rows]
    assert [exactly(output) for output in engine.answer(rows)] == wanted


# Failures ------------------------------------------------------------------------------------------------------------


def broken_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The operation raises when it is next called, and works again after that."""
    works = getattr(cpu, name)

    def breaks(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr(cpu, name, works)
        raise FloatingPointError(f"{name} broke")

    monkeypatch.setattr(cpu, name, breaks)


@pytest.mark.parametrize(
    ("model", "operation", "steps_before"),
    [
        ("transformer", "embed_tokens", 0),
        ("transformer", "store", 0),
        ("transformer", "cross_attention", 0),
        ("transformer", "vocabulary_search", 2),
        ("transformer", "beam_step", 2),
        ("gpt", "packed_attention", 0),
        ("gpt", "put", 0),
        ("gpt", "decode_attention", 2),
        ("gpt", "vocabulary_search", 2),
        ("gpt", "get", 2),
        ("gpt", "fetch", 2),
    ],
)
def test_failed_step_fails_what_is_in_flight_with_the_reason_and_nothing_after_it(
    model: str, operation: str, steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, replies = MODELS[model](slots=8, max_beam_size=4), Replies()
    changes = {"sampling_method": "beam_search", "beam_size": 4, "max_new_tokens": 6}
    wanted = exactly(engine.answer([[5, 6, 7]], changes=changes)[0])
    engine.submit([request(engine, [5 + number, 6], replies.to(number), changes) for number in range(2)])
    for _ in range(steps_before):
        engine.step()
    in_flight = 2
    engine.submit([request(engine, [9, 9], replies.to(2), changes)])  # no slots left: it waits
    if operation == "get":  # as for texts that end before their limit
        monkeypatch.setattr(Look, "covers", lambda *_: False)
    broken_once(monkeypatch, operation)
    while len(replies.results) < in_flight:
        engine.step()
    for number in range(in_flight):
        assert isinstance(replies.results[number], FloatingPointError), replies.results[number]
        assert f"{operation} broke" in str(replies.results[number])
    assert engine.slots_in_use == 0
    run(engine)
    assert isinstance(replies.results[2], Output)
    assert exactly(engine.answer([[5, 6, 7]], changes=changes)[0]) == wanted
    assert (replies.twice, engine.counts["failed"]) == ([], in_flight)


def test_reply_that_raises_harms_nobody() -> None:
    engine, replies = transformer(slots=8, max_beam_size=4), Replies()
    calls = []

    def raises(result: Output | Exception) -> None:
        calls.append(result)
        raise OSError("the caller has gone")

    engine.submit([request(engine, [3], raises), request(engine, [3], replies.to(0)), request(engine, [4], raises)])
    run(engine)
    assert (len(calls), len(replies.results), engine.slots_in_use) == (2, 1, 0)
    assert exactly(replies.results[0]) == exactly(transformer().answer([[3]])[0])


def test_reply_may_submit_the_next_request() -> None:
    engine, replies = gpt(), Replies()

    def then(result: Output | Exception) -> None:
        engine.submit([request(engine, [8], replies.to(1), CHANGES[6])])

    engine.submit([request(engine, [7], then, CHANGES[6])])
    run(engine)
    assert exactly(replies.results[1]) == exactly(gpt().answer([[8]], changes=CHANGES[6])[0])


# Memory --------------------------------------------------------------------------------------------------------------


def with_memory(size: int) -> Any:
    """The CPU's operations on a machine with so many bytes left."""
    return small_models.cpu_but(available_memory=lambda: size)


@pytest.mark.parametrize("model", MODELS)
def test_engine_that_does_not_fit_says_what_would(model: str) -> None:
    build: Any = {"transformer": Transformer, "gpt": Gpt}[model]
    arguments = small_models.transformer(21, **TRANSFORMER) if model == "transformer" else small_models.gpt(22, **GPT)
    config = EngineConfig(slots=200, max_beam_size=4)
    size = Engine(build(*arguments, cpu), config, cpu).memory
    Engine(build(*arguments, cpu), config, with_memory(size))
    message = "for 200 slots and 1024 prompt tokens; .* are free: ([0-9]+) slots would fit"
    with pytest.raises(ConfigError, match=message) as failed:
        Engine(build(*arguments, cpu), config, with_memory(size - 1))
    fitting = int(str(failed.value).split("free: ")[1].split()[0])
    assert 4 <= fitting < 200
    Engine(build(*arguments, cpu), EngineConfig(slots=fitting, max_beam_size=4), with_memory(size - 1))
    with pytest.raises(ConfigError):
        Engine(build(*arguments, cpu), EngineConfig(slots=fitting + 1, max_beam_size=4), with_memory(size - 1))
    with pytest.raises(ConfigError, match="not even one slot would fit"):
        Engine(build(*arguments, cpu), config, with_memory(1000))


@pytest.mark.parametrize("model", MODELS)
def test_engine_takes_one_block_and_no_more(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    allocate = cpu.allocate
    monkeypatch.setattr(cpu, "allocate", lambda size: sizes.append(size) or allocate(size))
    engine = MODELS[model](slots=13, max_beam_size=4, burst=3)
    assert sizes == [engine.memory]
    for changes in CHANGES:
        engine.answer([[5, 6], [7]], changes=changes)
    assert sizes == [engine.memory]


def test_engines_arrays_do_not_overlap() -> None:
    buffers = transformer(slots=5, max_beam_size=3)._buffers
    parts = (buffers.cache, buffers.state, buffers.work)
    arrays = [array for part in parts for array in vars(part).values()] + [buffers.prompt, buffers.scored]
    places = sorted((array.ctypes.data, array.ctypes.data + array.nbytes) for array in arrays)
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
    assert all(start % 64 == 0 for start, _ in places)
    assert places[-1][1] - places[0][0] <= buffers.size


@pytest.mark.parametrize("slots", [1, 3, 8, 13, 64, 65, 100, 257])
def test_buckets_cover_every_number_of_rows(slots: int) -> None:
    counts = buckets(slots)
    assert counts == sorted(set(counts))
    assert counts[0] == 1
    assert counts[-1] >= slots
    for rows in range(1, slots + 1):
        assert next(count for count in counts if count >= rows) - rows < (8 if rows <= 64 else 32)


# The thread ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_four_threads_get_what_each_request_gives_alone(model: str) -> None:
    alone, engine = MODELS[model](), MODELS[model](slots=16, max_beam_size=4, burst=3)
    requests = mixed_requests(alone, 48, seed=3)
    results: dict[int, Output] = {}

    def ask(first: int) -> None:
        for number in range(first, 48, 4):
            row, changes, kind, _ = requests[number]
            results[number] = engine.answer([row], kind, changes)[0]

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    engine.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.stop()
    for number, (row, changes, kind, _) in enumerate(requests):
        assert exactly(results[number]) == exactly(alone.answer([row], kind, changes)[0])
    assert (engine.alive, engine.slots_in_use) == (False, 0)


def test_stop_finishes_what_runs_and_waits() -> None:
    engine, replies = transformer(slots=4, max_beam_size=4), Replies()
    engine.start()
    engine.submit([request(engine, [3 + number], replies.to(number)) for number in range(12)])
    engine.stop()
    assert sorted(replies.results) == list(range(12))
    assert all(isinstance(result, Output) for result in replies.results.values())


def test_stop_without_patience_answers_everything_once() -> None:
    """What had its answer before patience ran out keeps it, the rest get an error. The engine is held in a step until
    `stop` has lost patience, and let go then."""
    engine, replies = transformer(slots=4, max_beam_size=4), Replies()
    answered, lost, step = threading.Event(), threading.Event(), engine.step

    def held() -> None:
        step()
        if replies.results:
            answered.set()
            assert lost.wait(30)

    engine.step = held  # type: ignore[method-assign]
    engine.submit([request(engine, [3 + number % 40], replies.to(number)) for number in range(200)])
    engine.start()
    assert answered.wait(30)
    assert engine._thread is not None
    join = engine._thread.join

    def joined(timeout: float) -> None:
        if engine._abandoned:
            lost.set()
            join(30)
        else:
            join(timeout)

    engine._thread.join = joined  # type: ignore[method-assign, assignment]
    engine.stop(patience=0.02)
    assert sorted(replies.results) == list(range(200))
    assert replies.twice == []
    kinds = {type(result) for result in replies.results.values()}
    assert kinds == {Output, Overloaded}
    assert (engine.alive, engine.slots_in_use) == (False, 0)


def test_stop_of_an_engine_that_never_started_answers_what_waits() -> None:
    engine, replies = transformer(), Replies()
    engine.submit([request(engine, [3], replies.to(0))])
    engine.step()
    engine.submit([request(engine, [4], replies.to(1))])
    engine.stop()
    assert [str(replies.results[number]) for number in (0, 1)] == ["the engine was stopped"] * 2
    assert (engine.idle, engine.slots_in_use) == (True, 0)


def test_request_wider_than_the_engine_is_refused() -> None:
    engine = transformer(slots=8, max_beam_size=4)
    wide = Request(np.array([3]), DecodingOptions(beam_size=5), lambda result: None)
    with pytest.raises(RequestError, match="5 rows wide; this model takes 4"):
        engine.submit([wide])
    assert engine.waiting == 0


def test_stopped_engine_takes_no_more() -> None:
    engine = transformer()
    engine.start()
    engine.stop()
    with pytest.raises(Overloaded, match="stopping"):
        engine.submit([request(engine, [3], lambda result: None)])


def test_request_that_races_with_stop_is_refused_or_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, replies = transformer(), Replies()
    asked = request(engine, [3], replies.to(0))
    enqueue = engine._scheduler.enqueue

    def stopped_just_before(sequences: Any) -> None:
        engine.stop()
        enqueue(sequences)

    monkeypatch.setattr(engine._scheduler, "enqueue", stopped_just_before)
    with pytest.raises(Overloaded, match="stopping"):
        engine.submit([asked])
    assert (engine.waiting, replies.results) == (0, {})


def test_stop_answers_once_what_hangs_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, replies = transformer(slots=8, max_beam_size=4), Replies()
    hangs, goes_on, works = threading.Event(), threading.Event(), cpu.beam_step

    def hang(*arguments: Any) -> None:
        hangs.set()
        assert goes_on.wait(30)
        works(*arguments)

    monkeypatch.setattr(cpu, "beam_step", hang)
    engine.submit([request(engine, [3], replies.to(number), {"max_new_tokens": 1}) for number in range(5)])
    engine.start()
    assert hangs.wait(30)
    engine.stop(patience=0.01)
    assert [str(replies.results[number]) for number in range(5)] == ["the engine was stopped"] * 5
    goes_on.set()
    assert engine._thread is not None
    engine._thread.join(30)
    assert (engine.alive, replies.twice, engine.slots_in_use) == (False, [], 0)


def test_idle_engine_sleeps_until_a_request_comes() -> None:
    engine = transformer()
    steps = 0
    step = engine.step

    def counted() -> None:
        nonlocal steps
        steps += 1
        step()

    engine.step = counted  # type: ignore[method-assign]
    engine.start()
    output = engine.answer([[3]], changes={"max_new_tokens": 2})[0]
    engine.stop()
    assert steps <= output.steps + 1


def test_counts_say_what_was_done() -> None:
    engine = gpt(slots=8, max_beam_size=4)
    changes = {"sampling_method": "sample", "temperature": 50.0, "seed": 1, "max_new_tokens": 3}
    engine.answer([[3, 4, 5], [6]], changes=changes)
    engine.answer([[3, 4, 5]], kind=SCORE)
    assert engine.counts["answered"] == 3
    assert engine.counts["prompt_tokens"] == 2  # a prompt's last token is the first step's
    assert engine.counts["scored_tokens"] == 2
    assert engine.counts["generated_tokens"] in range(2, 7)


def test_failed_device_takes_no_more_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, replies = transformer(), Replies()

    def fail(*arguments: Any) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(cpu, "beam_step", fail)
    monkeypatch.setattr(cpu, "fault", lambda: "GPU 0 has failed: illegal memory access")
    engine.submit([request(engine, [3], replies.to(number)) for number in range(3)])
    while not engine.idle:
        engine.step()
    assert [str(replies.results[number]) for number in range(3)] == ["illegal memory access"] * 3
    assert not engine.ready
    with pytest.raises(RuntimeError, match="GPU 0 has failed: illegal memory access"):
        engine.submit([request(engine, [3], replies.to(3))])


FORCED = 5


def forced_search(config: Any, arrays: Any, row: list[int], beams: int, limit: int) -> list[tuple[int, ...]]:
    """What beam search by recomputation finds when every text starts with FORCED, without that token."""
    model = reference.TransformerReference(config, arrays, row)
    search = reference.beam_search(
        lambda tokens: model.next((FORCED, *tokens)), beams, limit, {config.end_id}, config.decoding.length_penalty
    )
    return [beam.tokens for beam in search.beams]


def test_forced_first_token_is_fed_and_not_answered() -> None:
    """Sequences that join while others run included."""
    config, arrays = small_models.transformer(7, forced_id=FORCED, extra_decode_length=12, max_positions=16)
    rows = [[3, 4, 5], [6, 7], [3], [8, 9, 10, 11], [4, 4, 4, 4]]
    engine = small_models.engine(config, arrays, slots=6, max_beam_size=3)
    outputs = engine.answer(rows, changes={"beam_size": 3})
    for row, output in zip(rows, outputs):
        limit = config.new_tokens(len(row), config.decoding)
        wanted = forced_search(config, arrays, row, 3, limit)
        assert [tuple(one.tokens.tolist()) for one in output.hypotheses] == wanted


def test_forced_first_token_takes_a_position() -> None:
    config, _ = small_models.transformer()
    forced, _ = small_models.transformer(forced_id=FORCED)
    for method in ("beam_search", "topk_greedy", "sample"):
        options = DecodingOptions(method)
        assert forced.new_tokens(5, options) == config.new_tokens(5, options) - 1


def test_ids_of_a_strided_array_are_taken_and_kept() -> None:
    engine, results = gpt(), Replies()
    row = np.array([3, 4, 5, 6, 7, 8], np.int32)[::2]
    engine.submit([Request(row, engine.options(), results.to(0), SCORE)])
    row[:] = 9
    while not engine.idle:
        engine.step()
    assert results.results[0].loss == engine.answer([[3, 5, 7]], SCORE)[0].loss
