"""Progress, stop words, deadlines and cancellation in the engine, without a server."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models

from lightseq_backend.engine import Engine
from lightseq_backend.engine.follow import Look
from lightseq_backend.errors import Cancelled, DeadlineExceeded, Overloaded, RequestError
from lightseq_backend.ops import cpu
from lightseq_backend.request import Output, Request

ROW = [4, 5, 6]
SAMPLED: dict[str, object] = {"sampling_method": "sample", "seed": 3, "num_hypotheses": 3}
LETTERS = " abcdefghij"  # of small_models' eleven ids


def gpt(**settings: Any) -> Engine:
    config = {"max_positions": 64, "end_id": 2}
    return small_models.engine(*small_models.gpt(1, **config), **{"slots": 8, "max_beam_size": 4, **settings})


def transformer(**settings: Any) -> Engine:
    config = {"max_positions": 40, "extra_decode_length": 30}
    return small_models.engine(*small_models.transformer(2, **config), **{"slots": 8, "max_beam_size": 4, **settings})


MODELS = {"gpt": gpt, "transformer": transformer}


class Caller:
    """One request, and what came back for it."""

    def __init__(self, engine: Engine, changes: dict[str, object] | None = None, row: Any = ROW, **more: Any) -> None:
        self.parts: list[list[list[int]]] = []
        self.results: list[Output | Exception] = []
        options = engine.options(changes)
        self.request = Request(np.array(row), options, self.results.append, progress=self.progress, **more)
        engine.submit([self.request])

    def progress(self, texts: tuple[np.ndarray, ...]) -> None:
        assert not self.results
        self.parts.append([text.tolist() for text in texts])

    @property
    def output(self) -> Output:
        (result,) = self.results
        assert isinstance(result, Output), result
        return result

    @property
    def texts(self) -> list[list[int]]:
        return [one.tokens.tolist() for one in self.output.hypotheses]


def run(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def letters(ids: Any) -> str:
    return "".join(LETTERS[id_] for id_ in ids)


# Progress ------------------------------------------------------------------------------------------------------------

METHODS: list[dict[str, object]] = [
    SAMPLED,
    {"sampling_method": "greedy", "max_new_tokens": 20},
    {"sampling_method": "greedy", "max_new_tokens": 20, "repetition_penalty": 1.3},
    {"sampling_method": "beam_search", "beam_size": 3},
    {"sampling_method": "beam_search", "beam_size": 3, "length_penalty": -1.0},
    {"sampling_method": "topk_greedy", "beam_size": 3, "max_new_tokens": 12},
    {"sampling_method": "standard_beam", "beam_size": 3, "max_new_tokens": 20},
    {"sampling_method": "standard_beam", "beam_size": 3, "early_stopping": "never", "max_new_tokens": 20},
]


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("changes", METHODS, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_part_begins_the_answer_and_none_is_taken_back(
    model: str, changes: dict[str, object], ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BURSTS_AHEAD", ahead)
    engine = MODELS[model](burst=2)
    alone = Caller(engine, changes)
    other = Caller(engine, {"sampling_method": "beam_search", "beam_size": 4, "max_new_tokens": 5}, row=[7, 8])
    run(engine)
    for caller in (alone, other):
        final = caller.texts
        before: list[list[int]] = [[] for _ in final]
        for part in caller.parts:
            for text, whole, shorter in zip(part, final, before):
                assert whole[: len(text)] == text
                assert text[: len(shorter)] == shorter
            before = part
    assert alone.output.first_token is not None
    assert 0 < alone.output.first_token < 60


@pytest.mark.parametrize("model", MODELS)
def test_answer_is_the_same_with_and_without_progress(model: str) -> None:
    for changes in METHODS:
        engine = MODELS[model](burst=3)
        caller = Caller(engine, changes)
        run(engine)
        (plain,) = MODELS[model]().answer([ROW], changes=changes)
        assert caller.texts == [one.tokens.tolist() for one in plain.hypotheses]
        assert [one.score for one in caller.output.hypotheses] == [one.score for one in plain.hypotheses]


def test_samples_come_burst_by_burst() -> None:
    engine = gpt(burst=2)
    caller = Caller(engine, {**SAMPLED, "num_hypotheses": 1, "max_new_tokens": 9, "min_new_tokens": 9})
    run(engine)
    assert [len(part[0]) for part in caller.parts] == [2, 4, 6, 8]
    assert len(caller.texts[0]) == 9


def test_beams_show_what_they_have_in_common_before_they_are_done() -> None:
    engine = gpt()
    caller = Caller(engine, {"sampling_method": "beam_search", "beam_size": 2, "max_new_tokens": 40})
    run(engine)
    assert any(part[0] for part in caller.parts)


def test_nothing_is_copied_where_nobody_is_followed() -> None:
    fetched: list[int] = []
    backend = small_models.cpu_but(fetch=lambda array: fetched.append(array.nbytes) or cpu.fetch(array))
    engine = small_models.engine(*small_models.gpt(1), backend=backend, slots=4, max_beam_size=4)
    fetched.clear()
    engine.answer([ROW], changes={"sampling_method": "greedy", "max_new_tokens": 4})
    state = engine._buffers.state
    assert fetched == [state.slots.nbytes] * 4 + [state.history[:1].nbytes]  # that is its answer


@pytest.mark.parametrize(
    ("slots", "names", "covered"),
    [
        ([[4, 5]], ["history"], True),
        ([[4, 5], [6, 7]], ["history", "pool"], True),
        ([[3, 4]], ["history"], False),
        ([[7, 8]], ["history"], False),
        ([[4, 5], [8]], ["history"], False),
        ([[4, 5]], ["details"], False),
        ([[4, 5]], ["history", "details"], False),
    ],
)
def test_look_covers_what_is_in_it_alone(slots: list[list[int]], names: list[str], covered: bool) -> None:
    look = Look(range(4, 8), dict.fromkeys(["history", "pool"], lambda: np.zeros(0)))
    assert look.covers([SimpleNamespace(slots=each) for each in slots], names) == covered  # type: ignore[arg-type]


# Stop words ----------------------------------------------------------------------------------------------------------


def ended_at(text: list[int], words: list[list[int]], include: bool = False) -> list[int]:
    """The text before its first stop word, by trying every place."""
    for end in range(1, len(text) + 1):
        for word in sorted(words, key=len, reverse=True):
            if text[:end][-len(word) :] == word:
                return text[:end] if include else text[: end - len(word)]
    return text


@pytest.mark.parametrize("burst", [1, 3, 7])
@pytest.mark.parametrize("include", [False, True])
def test_samples_end_before_their_first_stop_word(burst: int, include: bool) -> None:
    changes = {**SAMPLED, "max_new_tokens": 50}
    (free,) = gpt().answer([ROW], changes=changes)
    whole = [one.tokens.tolist() for one in free.hypotheses]
    words = [whole[0][4:6], whole[1][7:8], whole[2][2:5]]
    engine = gpt(burst=burst)
    caller = Caller(engine, {**changes, "stop": words, **({"include_stop": True} if include else {})})
    run(engine)
    assert caller.texts == [ended_at(text, words, include) for text in whole]
    assert all(one.finished for one in caller.output.hypotheses)
    for part in caller.parts:
        assert all(final[: len(text)] == text for text, final in zip(part, caller.texts))
    assert engine.slots_in_use == 0


@pytest.mark.parametrize("ruled", [{}, {"repetition_penalty": 1.2}], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_text_ends_with_any_of_several_end_ids(model: str, ruled: dict[str, object]) -> None:
    changes = {"sampling_method": "greedy", "max_new_tokens": 30, **ruled}
    (free,) = MODELS[model]().answer([ROW], changes=changes)
    whole = free.hypotheses[0].tokens.tolist()
    ends = [whole[min(3, len(whole) - 1)], 9]
    engine = MODELS[model](burst=2)
    caller = Caller(engine, {**changes, "end_ids": ends})
    run(engine)
    end = next(place for place, id_ in enumerate(whole) if id_ in ends)
    (one,) = caller.output.hypotheses
    assert (one.tokens.tolist(), one.finished, one.silent) == (whole[: end + 1], True, 1)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("burst", [1, 4])
def test_stop_word_is_not_found_in_an_end_id(burst: int, include: bool) -> None:
    """Which is no text: an answer that ends with one ends there, whatever the stop word."""
    changes = {"sampling_method": "greedy", "max_new_tokens": 30}
    (free,) = gpt().answer([ROW], changes=changes)
    whole = free.hypotheses[0].tokens.tolist()
    end = whole[3]
    more: dict[str, object] = {"stop": [[end]], "end_ids": [end], **({"include_stop": True} if include else {})}
    engine = gpt(burst=burst)
    caller = Caller(engine, {**changes, **more})
    run(engine)
    (one,) = caller.output.hypotheses
    assert (one.tokens.tolist(), one.silent) == (whole[: whole.index(end) + 1], 1)


def test_score_of_a_stopped_text_is_that_of_its_tokens() -> None:
    """As if the limit had cut the text there: the sum and the length norm are those of the tokens up to the stop."""
    for changes in ({**SAMPLED, "num_hypotheses": 1}, {"sampling_method": "greedy"}):
        (free,) = gpt().answer([ROW], changes={**changes, "max_new_tokens": 30})
        whole = free.hypotheses[0].tokens.tolist()
        word, places = whole[5:7], len(ended_at(whole, [whole[5:7]], include=True))
        (short,) = gpt().answer([ROW], changes={**changes, "max_new_tokens": places})
        (stopped,) = gpt(burst=4).answer([ROW], changes={**changes, "max_new_tokens": 30, "stop": [word]})
        assert stopped.hypotheses[0].score == pytest.approx(short.hypotheses[0].score, rel=1e-5)


def test_stop_does_not_count_before_the_least_tokens() -> None:
    changes = {**SAMPLED, "num_hypotheses": 1, "max_new_tokens": 40, "min_new_tokens": 10}
    (free,) = gpt().answer([ROW], changes=changes)
    whole = free.hypotheses[0].tokens.tolist()
    word = [whole[2]]
    (stopped,) = gpt().answer([ROW], changes={**changes, "stop": [word], "include_stop": True})
    later = [place for place, id_ in enumerate(whole) if id_ == word[0] and place >= 9]
    assert stopped.hypotheses[0].tokens.tolist() == (whole[: later[0] + 1] if later else whole)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("burst", [1, 5])
def test_stop_word_of_text_may_lie_across_tokens(burst: int, include: bool) -> None:
    changes = {**SAMPLED, "num_hypotheses": 1, "max_new_tokens": 50}
    (free,) = gpt().answer([ROW], changes=changes)
    whole = letters(free.hypotheses[0].tokens)
    words = [whole[8:11], "no such word"]
    engine = gpt(burst=burst)
    more: dict[str, object] = {"stop": words, "include_stop": True} if include else {"stop": words}
    caller = Caller(engine, {**changes, **more}, decode=letters)
    run(engine)
    place = whole.index(words[0])
    expected = whole[: place + 3] if include else whole[:place]
    (one,) = caller.output.hypotheses
    assert (letters(one.tokens), one.text) == (expected, letters(ROW) + expected)
    assert all(expected.startswith(letters(part[0])) for part in caller.parts)


def test_stop_word_may_end_inside_a_token() -> None:
    def pairs(ids: Any) -> str:
        return "".join(LETTERS[id_] + LETTERS[id_] + "." for id_ in ids)

    changes = {**SAMPLED, "num_hypotheses": 1, "max_new_tokens": 30}
    (free,) = gpt().answer([ROW], changes=changes)
    letter = LETTERS[int(free.hypotheses[0].tokens[6])]
    engine = gpt(burst=4)
    caller = Caller(engine, {**changes, "stop": letter + "."}, decode=pairs)
    run(engine)
    whole = pairs([*ROW, *free.hypotheses[0].tokens.tolist()])
    (one,) = caller.output.hypotheses
    start = len(pairs(ROW))
    assert one.text == whole[: whole.index(letter + ".", start)]
    assert pairs([*ROW, *one.tokens.tolist()]) == one.text[:-1]  # half of the last token is left out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_method": "beam_search", "stop": [[4]]}, "stop needs greedy or a sampling method"),
        ({"sampling_method": "greedy", "end_ids": [3] * 9}, "end_ids has 9 ids; there may be 8 beside the model's own"),
        ({"sampling_method": "greedy", "stop": [[]]}, "stop has an empty word"),
        ({"sampling_method": "greedy", "stop": [[99]]}, "stop has id 99; ids are 0 to 10"),
        ({"sampling_method": "greedy", "end_ids": [-1]}, "end_ids has id -1"),
        ({"sampling_method": "greedy", "stop": [[3]] * 65}, "stop has 65 words; there may be 64"),
        ({"sampling_method": "greedy", "include_stop": True}, "include_stop needs stop"),
        ({"sampling_method": "greedy", "stop": 1.5}, "stop is 1.5"),
    ],
    ids=str,
)
def test_stop_that_cannot_be_honoured_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        gpt().options(changes)


def test_stop_words_of_text_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="without a tokenizer"):
        Caller(gpt(), {"sampling_method": "greedy", "stop": "."})


@pytest.mark.parametrize(
    ("given", "expected"),
    [(".", (".",)), ('["a", [3, 4], 5]', ("a", (3, 4), (5,))), ([[7]], ((7,),)), ("[", ("[",)), ("7", ("7",))],
)
def test_stop_words_are_texts_ids_or_words_of_ids(given: object, expected: object) -> None:
    assert gpt().options({"sampling_method": "greedy", "stop": given}).stop == expected


# Leaving early -------------------------------------------------------------------------------------------------------

LONG: dict[str, object] = {**SAMPLED, "num_hypotheses": 4, "min_new_tokens": 60}


@pytest.mark.parametrize("ahead", [1, 2])
def test_slots_of_a_cancelled_request_are_free_within_two_bursts(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "BURSTS_AHEAD", ahead)
    engine = gpt(burst=3)
    caller, other = Caller(engine, LONG), Caller(engine, {**LONG, "seed": 5})
    waits = Caller(engine, LONG)
    for _ in range(3):
        engine.step()
    assert (engine.slots_in_use, engine.waiting) == (8, 1)
    steps = engine.counts["steps"]
    engine.cancel([caller.request], Cancelled("enough"))
    engine.step()
    assert [type(result) for result in caller.results] == [Cancelled]
    assert (engine.slots_in_use, engine.waiting) == (8, 0)  # the next one has them already
    assert engine.counts["steps"] - steps <= 2 * engine.config.burst
    run(engine)
    for one, seed in ((other, 5), (waits, 3)):
        (plain,) = gpt().answer([ROW], changes={**LONG, "seed": seed})
        assert one.texts == [text.tokens.tolist() for text in plain.hypotheses]
    assert (len(caller.results), engine.slots_in_use) == (1, 0)


def test_a_waiting_request_can_be_cancelled() -> None:
    engine = gpt(slots=4)
    first, second = Caller(engine, LONG), Caller(engine, LONG)
    engine.step()
    engine.cancel([second.request], Cancelled("enough"))
    engine.step()
    assert [type(result) for result in second.results] == [Cancelled]
    run(engine)
    assert len(first.texts) == 4


def test_cancelling_the_only_request_leaves_the_engine_idle() -> None:
    engine = gpt()
    caller = Caller(engine, LONG)
    engine.step()
    engine.cancel([caller.request], Cancelled("enough"))
    engine.step()
    assert (engine.idle, engine.slots_in_use, len(caller.results)) == (True, 0, 1)


def test_cancelling_what_was_answered_changes_nothing() -> None:
    engine = gpt()
    caller = Caller(engine, {"sampling_method": "greedy", "max_new_tokens": 3})
    run(engine)
    engine.cancel([caller.request], Cancelled("too late"))
    other = Caller(engine, {"sampling_method": "greedy", "max_new_tokens": 3})
    run(engine)
    assert caller.texts == other.texts


def test_deadline_counts_while_a_request_waits_and_while_it_runs() -> None:
    engine = gpt(slots=4)
    passed = time.monotonic() - 1
    runs, waits = Caller(engine, LONG, deadline=time.monotonic() + 1000), Caller(engine, LONG, deadline=passed)
    engine.step()
    assert [type(result) for result in waits.results] == [DeadlineExceeded]
    object.__setattr__(runs.request, "deadline", passed)
    engine.step()
    assert [type(result) for result in runs.results] == [DeadlineExceeded]
    assert (engine.idle, engine.slots_in_use, engine._departures._timed) == (True, 0, {})


def test_deadline_is_forgotten_of_what_is_answered_before_submit_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = gpt()
    enqueue = engine._scheduler.enqueue

    def answered_at_once(sequences: list[Any]) -> None:
        enqueue(sequences)
        run(engine)

    monkeypatch.setattr(engine._scheduler, "enqueue", answered_at_once)
    assert Caller(engine, {"sampling_method": "greedy"}, deadline=time.monotonic() + 1).output
    time.sleep(1.05)
    assert engine._departures.due() == {}


def test_deadline_is_forgotten_of_what_is_refused() -> None:
    engine = gpt(queue=1)
    Caller(engine, LONG)
    with pytest.raises(Overloaded):
        Caller(engine, LONG, deadline=time.monotonic() - 1)
    assert engine._departures.due() == {}


def test_deadline_in_time_changes_nothing() -> None:
    engine = gpt()
    caller = Caller(engine, {"sampling_method": "greedy"}, deadline=time.monotonic() + 1000)
    run(engine)
    assert caller.output.hypotheses
    assert engine._departures._timed == {}
