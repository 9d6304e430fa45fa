"""The client's streams over both protocols, from the shipped models on a real Triton."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stream_cases
from test_instances import until
from test_serving import metrics_of

import lightseq_client.stream
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_client import GENERATE, TRANSLATE, Client, ModelError, RequestFailed, RowError, ServerText
from lightseq_client.__main__ import main

PROMPT = "twelve , thirteen ,"
GREEDY: dict[str, Any] = {"sampling_method": "greedy", "max_new_tokens": 8}
LONG: dict[str, Any] = {"sampling_method": "sample", "seed": 1, "max_new_tokens": 100, "min_new_tokens": 100}


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, server: EmbeddedServer) -> Iterator[Client]:
    with Client(getattr(server, request.param), request.param) as connected:
        yield connected


def test_parts_join_to_the_answer_and_the_answer_is_the_other_models(client: Client) -> None:
    *parts, last = client.stream(GENERATE, PROMPT, codec=ServerText(), **GREEDY)
    (plain,) = client.generate([PROMPT], codec=ServerText(), **GREEDY)
    assert last.answer is not None
    assert last.answer.hypotheses == plain.hypotheses
    assert PROMPT + "".join(part.texts[0] for part in parts) == plain.hypotheses[0].text
    ids = tuple(id_ for part in parts for id_ in part.ids[0])
    assert plain.hypotheses[0].ids[-len(ids) :] == ids
    assert len(ids) == 8
    assert last.first_token_ms is not None
    assert 0 < last.first_token_ms < 1e3 * last.seconds
    assert [part.seconds for part in parts] == sorted(part.seconds for part in parts)
    assert all(part.answer is None for part in parts)


def test_translation_streams_its_best_text(client: Client) -> None:
    *parts, last = client.stream(TRANSLATE, "deux cent mille un", codec=ServerText(), num_hypotheses=2)
    (plain,) = client.translate(["deux cent mille un"], codec=ServerText(), num_hypotheses=2)
    assert last.answer is not None
    assert last.answer.hypotheses == plain.hypotheses
    assert "".join(part.texts[0] for part in parts) == plain.hypotheses[0].text


def test_samples_of_ids_stream_side_by_side(client: Client) -> None:
    options = {**LONG, "num_hypotheses": 3, "max_new_tokens": 9}
    *parts, last = client.stream(GENERATE, [107, 12, 105], **{**options, "min_new_tokens": 9})
    assert last.answer is not None
    for number, found in enumerate(last.answer.hypotheses):
        assert found.ids == (107, 12, 105, *(id_ for part in parts for id_ in part.ids[number]))
        assert found.text == " ".join(["107 12 105", *(part.texts[number].strip() for part in parts)])


def test_refusals_are_raised_with_their_status(client: Client) -> None:
    with pytest.raises(RequestFailed, match="beam_size is 99") as refused:
        list(client.stream(TRANSLATE, "deux", codec=ServerText(), beam_size=99))
    assert refused.value.status == {"grpc": "UNKNOWN", "http": "INVALID_ARGUMENT"}[client.protocol]
    with pytest.raises(RequestFailed, match="the deadline passed"):
        list(client.stream(GENERATE, [107, 12], deadline_ms=0.001, **LONG))
    with pytest.raises(RowError, match="the row is empty"):
        client.stream(GENERATE, [])


def test_models_that_stream_and_those_that_do_not_are_told_apart(client: Client) -> None:
    with pytest.raises(ModelError, match="gpt_stream answers in parts"):
        client.generate([[107]], model="gpt_stream")
    with pytest.raises(ModelError, match="gpt does not stream"):
        client.stream(GENERATE, [107], model="gpt")


def test_stream_closed_early_is_stopped_on_the_server(server: EmbeddedServer, client: Client) -> None:
    outcome = 'requests_total{outcome="cancelled"}'
    before = metrics_of(server, "gpt_stream").get(outcome, 0)
    stream = client.stream(GENERATE, [107, 12, 105], request_id="left", **{**LONG, "num_hypotheses": 8})
    next(stream)
    stream.close()
    end = time.monotonic() + 10
    while (now := metrics_of(server, "gpt_stream")).get(outcome, 0) == before:
        assert time.monotonic() < end, now
    assert now["slots_in_use"] == 0


def test_command_streams(server: EmbeddedServer, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--sampling-method", "greedy", "--max-new-tokens", "4", "--url", server.grpc]
    assert main(["generate", "--stream", "--text", PROMPT, "no such words here", *options]) == 1
    captured = capfd.readouterr()
    assert captured.out == " fourteen , fifteen ,\n\n"
    assert "line 1: first token " in captured.err
    assert "line 2: " in captured.err


def test_command_streams_json(server: EmbeddedServer, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--quiet", "--url", server.http, "--protocol", "http"]
    assert main(["translate", "--stream", "--text", "mille", *options]) == 0
    *parts, last = map(json.loads, capfd.readouterr().out.splitlines())
    assert "".join(part["texts"][0] for part in parts) == last["hypotheses"][0]["text"] == "one thousand"
    assert last["first_token_ms"] > 0


def test_streams_leave_no_threads_behind(client: Client) -> None:
    """Read to the end or not."""

    def stream(parts: int) -> None:
        running = client.stream(GENERATE, PROMPT, codec=ServerText(), **LONG)
        for _ in zip(range(parts), running):
            pass
        running.close()

    stream(1)
    before = threads()
    for _ in range(5):
        stream(1)
        stream(1000)
    assert until(lambda: threads() <= before)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def long_texts(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """Of a model whose texts take a second or more."""
    stream_cases.write_models(tmp_path)
    with EmbeddedServer(tmp_path, device="cpu", models=["long_stream"], stop_timeout=20) as running:
        yield running


def cancelled(server: EmbeddedServer) -> float:
    return metrics_of(server, "long_stream").get('requests_total{outcome="cancelled"}', 0)


def long_text(client: Client, **options: Any) -> Iterator[Any]:
    return client.stream(GENERATE, [5, 6, 7], model="long_stream", **{**stream_cases.LONG, **options})


def test_triton_ends_at_once_behind_streams_that_were_read_left_or_refused(
    long_texts: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes all the time it has where streams were cancelled, and keeps some memory of each."""
    ended: list[bool] = []
    end_stream = lightseq_client.stream.end_stream

    def end(client: Any, by_itself: bool) -> None:
        ended.append(by_itself)
        end_stream(client, by_itself)

    monkeypatch.setattr(lightseq_client.stream, "end_stream", end)
    with Client(long_texts.grpc) as client:
        for number in range(200):
            *_, last = client.stream(GENERATE, [5], model="long_stream", sampling_method="greedy", max_new_tokens=4)
            assert last.answer is not None
            if number % 20 == 0:
                left = long_text(client, request_id="mine" if number else "")
                next(left)
                left.close()
                with pytest.raises(RequestFailed, match="temperature is -1"):
                    list(long_text(client, temperature=-1.0))
        assert until(lambda: cancelled(long_texts) == 10)
    assert ended == [True] * 220
    begun = time.monotonic()
    long_texts.stop()
    assert time.monotonic() - begun < 10  # half of what it has


def test_stream_is_cancelled_where_the_server_does_not_stop_it(
    long_texts: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, where another instance of the model was asked, which does not know the request."""
    stopped = lightseq_client.stream._stopped
    monkeypatch.setattr(lightseq_client.stream, "_PATIENCE", 60)

    def stop_another(client: Any, model: str, given: Any, request_id: str, *rest: Any) -> bool:
        return stopped(client, model, given, f"not {request_id}", *rest)

    monkeypatch.setattr(lightseq_client.stream, "_stopped", stop_another)
    with Client(long_texts.grpc) as client:
        stream = long_text(client)
        next(stream)
        stream.close()
        assert until(lambda: cancelled(long_texts) == 1)


def test_stream_is_closed_though_its_end_is_interrupted(
    long_texts: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a second Ctrl-C: tritonclient's thread would keep the process."""

    def interrupted(*arguments: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(lightseq_client.stream, "_stopped", interrupted)
    with Client(long_texts.grpc) as client:
        list(long_text(client, min_new_tokens=1, max_new_tokens=1))
        before = threads()
        stream = long_text(client)
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            stream.close()
        assert until(lambda: threads() <= before)
        assert until(lambda: cancelled(long_texts) == 1)
