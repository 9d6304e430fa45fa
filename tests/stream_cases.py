"""Streams, stops and cancellation through a real Triton, one body of cases for the CPU and a GPU.

Each case takes a server over what `write_models` writes, and a stream of it that is its own.
"""

from __future__ import annotations

import json
import queue
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import tritonclient.grpc
from repositories import GPT, TIMEOUT, TRANSFORMER, ask, grpc, tensor, write_model
from test_serving import metrics_of
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend import weights
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_client.stream import end_stream

DECOUPLED = "model_transaction_policy { decoupled: true }"
LONGEST = 4000  # tokens of a text that takes seconds
LONG = {"sampling_method": "sample", "seed": 1, "min_new_tokens": LONGEST - 10, "num_hypotheses": 4}


def streamed(tensors: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {**tensors, "outputs": {**tensors["outputs"], "final": "BOOL", "first_token_ms": "FP32"}}


MODELS = ("text", "text_stream", "head", "head_stream", "long", "long_stream")


def write_models(root: Path, kind: str = "KIND_CPU", layers: int = 2) -> None:
    """layers: of the model whose texts are to take a second or more."""
    t01, g01 = golden("t01_base.pb"), golden("g01_base.pb")
    weights.save(root / "long.pb", *small_models.gpt(3, max_positions=LONGEST + 8, layers=layers))
    write_model(root, "text", g01, GPT, kind=kind)
    write_model(root, "text_stream", g01, streamed(GPT), more=DECOUPLED, kind=kind)
    write_model(root, "head", t01, TRANSFORMER, kind=kind)
    write_model(root, "head_stream", t01, streamed(TRANSFORMER), more=DECOUPLED, parameters={"burst": 2}, kind=kind)
    for name, more in (("long", ""), ("long_stream", DECOUPLED)):
        sizes = {"slots": 8, "max_beam_size": 4}
        tensors = streamed(GPT) if more else GPT
        write_model(root, name, root / "long.pb", tensors, more=more, parameters=sizes, kind=kind)


class Stream:
    """One gRPC stream: what came, an array or more each, until the final response.

    where: an address, or a client that goes on afterwards: each takes memory for good
    """

    def __init__(self, where: Any, slow: float = 0.0) -> None:
        self._lent = not isinstance(where, str)
        self.client = where if self._lent else grpc(where)
        self._arrived: queue.Queue[Any] = queue.Queue()
        self._under_way = 0

        def arrives(result: Any, error: Any) -> None:
            time.sleep(slow)
            self._arrived.put(error or result)

        self.client.start_stream(arrives)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        end_stream(self.client, ended=not self._under_way)
        if not self._lent:
            self.client.close()

    def send(self, model: str, name: str, ids: Any, request_id: str = "", **options: Any) -> None:
        given = [tensor(tritonclient.grpc, name, ids)]
        self._under_way += 1
        self.client.async_stream_infer(model, given, request_id=request_id, parameters=options or None)

    def _get(self) -> Any:
        arrived = self._arrived.get(timeout=TIMEOUT)
        error = isinstance(arrived, InferenceServerException)
        self._under_way -= error or arrived.get_response().parameters["triton_final_response"].bool_param
        return arrived

    def next(self) -> dict[str, np.ndarray]:
        arrived = self._get()
        if isinstance(arrived, Exception):
            raise arrived
        response = arrived.get_response()
        found = {output.name: arrived.as_numpy(output.name) for output in response.outputs}
        assert response.parameters["triton_final_response"].bool_param == bool(found["final"].all())
        return found

    def end(self) -> None:
        """Reads to the final response."""
        while not self.next()["final"].all():
            pass

    def ends(self, count: int) -> set[str]:
        """Reads to the final responses of so many requests; the errors among them."""
        errors: set[str] = set()
        left = self._under_way - count
        while self._under_way > left:
            arrived = self._get()
            if isinstance(arrived, InferenceServerException):
                errors.add(arrived.message())
        return errors

    def all(self, model: str, name: str, ids: Any, **options: Any) -> list[dict[str, np.ndarray]]:
        self.send(model, name, ids, **options)
        found = [self.next()]
        while not found[-1]["final"].all():
            found.append(self.next())
        return found


def sse(address: str, model: str, body: object) -> list[dict[str, Any]]:
    """The JSON objects of a generate_stream."""
    request = urllib.request.Request(
        f"http://{address}/v2/models/{model}/generate_stream",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        lines = [line.decode().removeprefix("data: ") for line in answer if line.strip()]
    return [json.loads(line) for line in lines]


# Parts and the answer ------------------------------------------------------------------------------------------------


def parts_of_a_sample_join_to_what_the_other_model_answers(served: EmbeddedServer, stream: Stream) -> None:
    _join(stream, {"sampling_method": "topk", "top_k": 5, "seed": 4})


def parts_of_a_greedy_text_join_to_what_the_other_model_answers(served: EmbeddedServer, stream: Stream) -> None:
    _join(stream, {"sampling_method": "greedy"})


def _join(stream: Stream, options: dict[str, Any]) -> None:
    *parts, final = stream.all("text_stream", "token_ids", [[5, 6, 7]], **options)
    plain = ask(stream.client, "text", "token_ids", [[5, 6, 7]], **options)["result"]
    np.testing.assert_array_equal(final["result"], plain)
    assert len(parts) > 1
    joined = np.concatenate([part["result"] for part in parts], axis=1)
    np.testing.assert_array_equal(joined, plain[:, 3:])
    assert final["first_token_ms"][0, 0] > 0


def samples_stream_side_by_side(served: EmbeddedServer, stream: Stream) -> None:
    options = {"sampling_method": "sample", "seed": 4, "num_hypotheses": 3}
    *parts, final = stream.all("text_stream", "token_ids", [[5, 6]], **options)
    joined = np.concatenate([part["result"] for part in parts], axis=2)
    np.testing.assert_array_equal(joined[0, :, : final["result"].shape[2] - 2], final["result"][0, :, 2:])


def parts_of_a_search_join_to_its_best_text(served: EmbeddedServer, stream: Stream) -> None:
    source = [[79, 3, 41, 12]]
    for method in ("beam_search", "standard_beam"):
        *parts, final = stream.all("head_stream", "source_ids", source, sampling_method=method, beam_size=3)
        plain = ask(stream.client, "head", "source_ids", source, sampling_method=method, beam_size=3)
        for name, array in plain.items():
            np.testing.assert_array_equal(final[name], array)
        joined = np.concatenate([part["target_ids"] for part in parts], axis=2)
        assert joined.shape[1] == 1
        np.testing.assert_array_equal(joined[0, 0], final["target_ids"][0, 0, : joined.shape[2]])
        assert set(final["target_ids"][0, 0, joined.shape[2] :].tolist()) <= {99}  # filled up with the end id


def http_streams_the_same(served: EmbeddedServer, stream: Stream) -> None:
    options = {"sampling_method": "greedy", "max_new_tokens": 6}
    *parts, final = sse(served.http, "text_stream", {"token_ids": [5, 6, 7], **options})
    plain = ask(stream.client, "text", "token_ids", [[5, 6, 7]], **options)["result"][0].tolist()
    assert (final["final"], final["result"]) == (True, plain)
    joined = [
        id_ for part in parts for id_ in (part["result"] if isinstance(part["result"], list) else [part["result"]])
    ]
    assert joined == plain[3:]
    assert not any(part["final"] for part in parts)


def stream_of_several_rows_is_refused(served: EmbeddedServer, stream: Stream) -> None:
    stream.send("text_stream", "token_ids", [[5], [6]])
    with pytest.raises(InferenceServerException, match="2 rows; a stream has one"):
        stream.next()


def bad_option_is_refused_and_the_stream_goes_on(served: EmbeddedServer, stream: Stream) -> None:
    stream.send("text_stream", "token_ids", [[5]], beam_size=99)
    with pytest.raises(InferenceServerException, match="beam_size is 99"):
        stream.next()
    assert stream.all("text_stream", "token_ids", [[5]], sampling_method="greedy")[-1]["result"].size


def stop_words_end_a_stream_and_an_answer_alike(served: EmbeddedServer, stream: Stream) -> None:
    """The stop is taken from the middle of what comes without one."""
    options = {"sampling_method": "greedy", "max_new_tokens": 12}
    whole = ask(stream.client, "text", "token_ids", [[5, 6, 7]], **options)["result"][0].tolist()
    word = next(whole[at : at + 2] for at in range(5, len(whole)) if whole[at] not in whole[3:at])
    cut = whole.index(word[0], 3)
    *parts, final = stream.all("text_stream", "token_ids", [[5, 6, 7]], stop=json.dumps([word]), **options)
    assert final["result"][0].tolist() == whole[:cut]
    joined = np.concatenate([part["result"] for part in parts], axis=1)[0].tolist()
    assert joined == whole[3:cut]
    plain = ask(stream.client, "text", "token_ids", [[5, 6, 7]], stop=json.dumps([word]), **options)
    assert plain["result"][0].tolist() == whole[:cut]


# Leaving early --------------------------------------------------------------------------------------------------------


CANCELLED = 'requests_total{outcome="cancelled"}'


def after_one_more_cancelled(server: EmbeddedServer, model: str, before: dict[str, float]) -> dict[str, float]:
    """The metrics once one more request was cancelled, as differences; slots in use as they are."""
    end = time.monotonic() + 10
    while (now := metrics_of(server, model)).get(CANCELLED, 0) <= before.get(CANCELLED, 0):
        assert time.monotonic() < end, now
    return {name: value - before.get(name, 0) for name, value in now.items()} | {"slots_in_use": now["slots_in_use"]}


def cancelled_grpc_stream_frees_its_slots(served: EmbeddedServer, stream: Stream) -> None:
    before = metrics_of(served, "long_stream")
    with Stream(served.grpc) as given_up:
        given_up.send("long_stream", "token_ids", [[5]], **LONG)
        assert given_up.next()["result"].shape[1] == 4
    changed = after_one_more_cancelled(served, "long_stream", before)
    assert (changed[CANCELLED], changed["slots_in_use"]) == (1, 0)
    assert 0 < changed["steps_total"] < LONGEST - 10  # it was not decoded to its end


def cancelled_grpc_call_frees_its_slots(served: EmbeddedServer, stream: Stream) -> None:
    before = metrics_of(served, "long")
    with grpc(served.grpc) as client:
        given = [tensor(tritonclient.grpc, "token_ids", [[5]])]
        call = client.async_infer("long", given, lambda result, error: None, parameters=dict(LONG))
        end = time.monotonic() + 10
        while metrics_of(served, "long")["slots_in_use"] == 0:
            assert time.monotonic() < end
        call.cancel()
        changed = after_one_more_cancelled(served, "long", before)
    assert (changed[CANCELLED], changed["slots_in_use"]) == (1, 0)


def request_is_stopped_by_its_id(served: EmbeddedServer, stream: Stream) -> None:
    stream.send("long_stream", "token_ids", [[5]], request_id="mine", **LONG)
    stream.next()
    with Stream(served.grpc) as other:
        other.send("long_stream", "token_ids", [[5]], cancel_request_id="other")
        with pytest.raises(InferenceServerException, match="no request with the id 'other' is under way"):
            other.next()
        other.send("long_stream", "token_ids", [[5]], cancel_request_id="mine")
        with pytest.raises(InferenceServerException, match="stopped by its id, mine"):
            stream.end()


def deadline_ends_a_call(served: EmbeddedServer, stream: Stream) -> None:
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="the deadline passed") as late:
        ask(stream.client, "long", "token_ids", [[5]], deadline_ms=200, **LONG)
    assert 0.19 < time.monotonic() - started < 5
    assert late.value.status() == "StatusCode.CANCELLED"


def deadline_ends_a_stream(served: EmbeddedServer, stream: Stream) -> None:
    stream.send("long_stream", "token_ids", [[5]], deadline_ms=200, **LONG)
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="the deadline passed"):
        stream.end()
    assert 0.1 < time.monotonic() - started < 5


def slow_reader_gets_everything(served: EmbeddedServer, stream: Stream) -> None:
    with Stream(served.grpc, slow=0.01) as slow:
        options = {"sampling_method": "sample", "seed": 2, "min_new_tokens": 60, "max_new_tokens": 60}
        *parts, final = slow.all("long_stream", "token_ids", [[5, 6]], **options)
    joined = np.concatenate([part["result"] for part in parts], axis=1)
    np.testing.assert_array_equal(joined, final["result"][:, 2:])


CASES: tuple[Callable[[EmbeddedServer, Stream], None], ...] = (
    parts_of_a_sample_join_to_what_the_other_model_answers,
    parts_of_a_greedy_text_join_to_what_the_other_model_answers,
    samples_stream_side_by_side,
    parts_of_a_search_join_to_its_best_text,
    http_streams_the_same,
    stream_of_several_rows_is_refused,
    bad_option_is_refused_and_the_stream_goes_on,
    stop_words_end_a_stream_and_an_answer_alike,
    cancelled_grpc_stream_frees_its_slots,
    cancelled_grpc_call_frees_its_slots,
    request_is_stopped_by_its_id,
    deadline_ends_a_call,
    deadline_ends_a_stream,
    slow_reader_gets_everything,
)
