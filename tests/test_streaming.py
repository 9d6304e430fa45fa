"""Streams through a real Triton: parts that join to the answer, calls that are given up, deadlines, stops by id."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Iterator
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
from lightseq_backend.config import DecodingOptions
from lightseq_backend.request import Hypothesis, Output
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_backend.serving.parts import Parts, Written
from lightseq_backend.serving.wire import Wire, read_wire

DECOUPLED = "model_transaction_policy { decoupled: true }"
LONGEST = 4000  # tokens of a text that takes seconds
LONG = {"sampling_method": "sample", "seed": 1, "min_new_tokens": LONGEST - 10, "num_hypotheses": 4}


def streamed(tensors: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    return {**tensors, "outputs": {**tensors["outputs"], "final": "BOOL", "first_token_ms": "FP32"}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    t01, g01 = golden("t01_base.pb"), golden("g01_base.pb")
    weights.save(root / "long.pb", *small_models.gpt(3, max_positions=LONGEST + 8))
    write_model(root, "text", g01, GPT)
    write_model(root, "text_stream", g01, streamed(GPT), more=DECOUPLED)
    write_model(root, "head", t01, TRANSFORMER)
    write_model(root, "head_stream", t01, streamed(TRANSFORMER), more=DECOUPLED, parameters={"burst": 2})
    for name, more in (("long", ""), ("long_stream", DECOUPLED)):
        tensors = streamed(GPT) if more else GPT
        write_model(root, name, root / "long.pb", tensors, more=more, parameters={"slots": 8, "max_beam_size": 4})
    names = ("text", "text_stream", "head", "head_stream", "long", "long_stream")
    with EmbeddedServer(root, device="cpu", models=names, stop_timeout=5) as running:
        yield running


class Stream:
    """One gRPC stream: what came, an array or more each, until the final response."""

    def __init__(self, address: str, slow: float = 0.0) -> None:
        self.client = grpc(address)
        self._arrived: queue.Queue[Any] = queue.Queue()

        def arrives(result: Any, error: Any) -> None:
            time.sleep(slow)
            self._arrived.put(error or result)

        self.client.start_stream(arrives)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    def send(self, model: str, name: str, ids: Any, request_id: str = "", **options: Any) -> None:
        given = [tensor(tritonclient.grpc, name, ids)]
        self.client.async_stream_infer(model, given, request_id=request_id, parameters=options or None)

    def next(self) -> dict[str, np.ndarray]:
        arrived = self._arrived.get(timeout=TIMEOUT)
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

    def all(self, model: str, name: str, ids: Any, **options: Any) -> list[dict[str, np.ndarray]]:
        self.send(model, name, ids, **options)
        found = [self.next()]
        while not found[-1]["final"].all():
            found.append(self.next())
        return found


@pytest.fixture
def stream(served: EmbeddedServer) -> Iterator[Stream]:
    with Stream(served.grpc) as opened:
        yield opened


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


@pytest.mark.parametrize(
    "options", [{"sampling_method": "topk", "top_k": 5, "seed": 4}, {"sampling_method": "greedy"}], ids=str
)
def test_parts_of_a_text_join_to_what_the_other_model_answers(stream: Stream, options: dict[str, Any]) -> None:
    *parts, final = stream.all("text_stream", "token_ids", [[5, 6, 7]], **options)
    plain = ask(stream.client, "text", "token_ids", [[5, 6, 7]], **options)["result"]
    np.testing.assert_array_equal(final["result"], plain)
    assert len(parts) > 1
    joined = np.concatenate([part["result"] for part in parts], axis=1)
    np.testing.assert_array_equal(joined, plain[:, 3:])
    assert final["first_token_ms"][0, 0] > 0


def test_samples_stream_side_by_side(stream: Stream) -> None:
    options = {"sampling_method": "sample", "seed": 4, "num_hypotheses": 3}
    *parts, final = stream.all("text_stream", "token_ids", [[5, 6]], **options)
    joined = np.concatenate([part["result"] for part in parts], axis=2)
    np.testing.assert_array_equal(joined[0, :, : final["result"].shape[2] - 2], final["result"][0, :, 2:])


def test_parts_of_a_search_join_to_its_best_text(stream: Stream) -> None:
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


def test_http_streams_the_same(served: EmbeddedServer, stream: Stream) -> None:
    options = {"sampling_method": "greedy", "max_new_tokens": 6}
    *parts, final = sse(served.http, "text_stream", {"token_ids": [5, 6, 7], **options})
    plain = ask(stream.client, "text", "token_ids", [[5, 6, 7]], **options)["result"][0].tolist()
    assert (final["final"], final["result"]) == (True, plain)
    joined = [
        id_ for part in parts for id_ in (part["result"] if isinstance(part["result"], list) else [part["result"]])
    ]
    assert joined == plain[3:]
    assert not any(part["final"] for part in parts)


@pytest.mark.parametrize("model", ["gpt", "transformer"])
def test_text_streams(server: EmbeddedServer, model: str) -> None:
    given, before = {"gpt": ("twelve , thirteen ,", "twelve , thirteen ,"), "transformer": ("deux cent mille un", "")}[
        model
    ]
    options = {"max_new_tokens": 12, **({"sampling_method": "greedy"} if model == "gpt" else {"num_hypotheses": 1})}
    *parts, final = sse(server.http, f"{model}_stream", {"text_input": given, **options})
    assert before + "".join(part["text_output"] for part in parts) == final["text_output"]
    assert len(parts) > 1


def test_stop_word_of_text_ends_a_stream(server: EmbeddedServer) -> None:
    options = {"sampling_method": "greedy", "max_new_tokens": 30, "stop": '["sixteen", "no"]'}
    *parts, final = sse(server.http, "gpt_stream", {"text_input": "twelve , thirteen ,", **options})
    assert final["text_output"] == "twelve , thirteen , fourteen , fifteen , "
    assert "".join(part["text_output"] for part in parts) == " fourteen , fifteen , "
    assert len(final["result"]) == 9  # <s> and eight words


def test_stream_of_several_rows_is_refused(stream: Stream) -> None:
    stream.send("text_stream", "token_ids", [[5], [6]])
    with pytest.raises(InferenceServerException, match="2 rows; a stream has one"):
        stream.next()


def test_bad_option_is_refused_and_the_stream_goes_on(stream: Stream) -> None:
    stream.send("text_stream", "token_ids", [[5]], beam_size=99)
    with pytest.raises(InferenceServerException, match="beam_size is 99"):
        stream.next()
    assert stream.all("text_stream", "token_ids", [[5]], sampling_method="greedy")[-1]["result"].size


# Leaving early -------------------------------------------------------------------------------------------------------


CANCELLED = 'requests_total{outcome="cancelled"}'


def after_one_more_cancelled(server: EmbeddedServer, model: str, before: dict[str, float]) -> dict[str, float]:
    """The metrics once one more request was cancelled, as differences; slots in use as they are."""
    end = time.monotonic() + 10
    while (now := metrics_of(server, model)).get(CANCELLED, 0) <= before.get(CANCELLED, 0):
        assert time.monotonic() < end, now
    return {name: value - before.get(name, 0) for name, value in now.items()} | {"slots_in_use": now["slots_in_use"]}


def test_cancelled_grpc_stream_frees_its_slots(served: EmbeddedServer) -> None:
    before = metrics_of(served, "long_stream")
    with Stream(served.grpc) as stream:
        stream.send("long_stream", "token_ids", [[5]], **LONG)
        assert stream.next()["result"].shape[1] == 4
    changed = after_one_more_cancelled(served, "long_stream", before)
    assert (changed[CANCELLED], changed["slots_in_use"]) == (1, 0)
    assert 0 < changed["steps_total"] < LONGEST - 10  # it was not decoded to its end


def test_cancelled_grpc_call_frees_its_slots(served: EmbeddedServer) -> None:
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


def test_request_is_stopped_by_its_id(served: EmbeddedServer, stream: Stream) -> None:
    stream.send("long_stream", "token_ids", [[5]], request_id="mine", **LONG)
    stream.next()
    with Stream(served.grpc) as other:
        other.send("long_stream", "token_ids", [[5]], cancel_request_id="other")
        with pytest.raises(InferenceServerException, match="no request with the id 'other' is under way"):
            other.next()
        other.send("long_stream", "token_ids", [[5]], cancel_request_id="mine")
        with pytest.raises(InferenceServerException, match="stopped by its id, mine"):
            stream.end()


def test_deadline_ends_a_call(stream: Stream) -> None:
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="the deadline passed") as late:
        ask(stream.client, "long", "token_ids", [[5]], deadline_ms=200, **LONG)
    assert 0.19 < time.monotonic() - started < 5
    assert late.value.status() == "StatusCode.CANCELLED"


def test_deadline_ends_a_stream(stream: Stream) -> None:
    stream.send("long_stream", "token_ids", [[5]], deadline_ms=200, **LONG)
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="the deadline passed"):
        stream.end()
    assert 0.1 < time.monotonic() - started < 5


@pytest.mark.parametrize("deadline", [0, -1, "soon", True, 86_400_001])
def test_bad_deadline_is_refused(stream: Stream, deadline: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"deadline_ms is .*; it must be over 0"):
        ask(stream.client, "text", "token_ids", [[5]], deadline_ms=deadline)


def test_slow_reader_gets_everything(served: EmbeddedServer) -> None:
    with Stream(served.grpc, slow=0.01) as stream:
        options = {"sampling_method": "sample", "seed": 2, "min_new_tokens": 60, "max_new_tokens": 60}
        *parts, final = stream.all("long_stream", "token_ids", [[5, 6]], **options)
    joined = np.concatenate([part["result"] for part in parts], axis=1)
    np.testing.assert_array_equal(joined, final["result"][:, 2:])


# Without a server ----------------------------------------------------------------------------------------------------

TEXT, _ = small_models.gpt()


def wire(rows: int = 8) -> Wire:
    outputs = {"result": "INT32", "text_output": "STRING", "final": "BOOL", "first_token_ms": "FP32"}
    config = {
        "max_batch_size": rows,
        "input": [{"name": "token_ids", "data_type": "TYPE_INT32", "dims": [-1]}],
        "output": [{"name": name, "data_type": f"TYPE_{kind}", "dims": [-1]} for name, kind in outputs.items()],
        "model_transaction_policy": {"decoupled": True},
    }
    faults: list[str] = []
    found = read_wire(config, faults)
    assert found is not None, faults
    return found


@pytest.mark.parametrize(("rows", "expected"), [(8, [[[5, 6]]]), (0, [[5, 6]])])
def test_part_has_a_row_where_the_model_is_batched(rows: int, expected: list[Any]) -> None:
    parts = Parts(wire(rows), TEXT, np.array([3, 4]), DecodingOptions("greedy"))
    part = parts.part([np.array([5, 6])])
    assert part is not None
    assert [part["result"].tolist()] == expected
    assert part["final"].shape == (1,) * (2 if rows else 1)
    assert parts.part([np.array([5, 6])]) is None


def test_characters_of_several_tokens_come_whole() -> None:
    text = "héllo wörld 🎉, ok"
    written = Written(lambda ids: bytes(ids).decode(errors="replace"), list(b"> "))
    told = [written.grown(list(text.encode()[:end])) for end in range(1, len(text.encode()) + 1)]
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in told)
    assert "".join(told) == text
    assert told.count("") == len(text.encode()) - len(text) + 3  # and three blanks, each told with what follows


def test_nothing_is_told_of_a_blank_that_a_decoder_may_take_back() -> None:
    tokens = ["Yes", " ", ".", " No"]

    def decode(ids: Any) -> str:
        return "".join(tokens[id_] for id_ in ids).replace(" .", ".")

    written = Written(decode, [])
    assert [written.grown(list(range(end))) for end in (1, 2, 3, 4)] == ["Yes", "", ".", " No"]
    assert written.completed("Yes. No!") == "!"


def test_text_that_ends_in_half_a_character_is_completed_by_the_answer() -> None:
    written = Written(lambda ids: bytes(ids).decode(errors="replace"), [])
    assert written.grown([104, 0xC3]) == ""
    assert written.completed("h\N{REPLACEMENT CHARACTER}") == "h\N{REPLACEMENT CHARACTER}"


class Sender:
    """Triton's, for a reader who takes a while: sending goes on when `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.started = threading.Event()
        self.done = threading.Event()
        self.sent: list[dict[str, np.ndarray]] = []

    def send(self, response: Any, flags: int = 0) -> None:
        self.started.set()
        assert self.go.wait(TIMEOUT)
        self.sent.append(dict(response))
        if flags:
            self.done.set()


def test_parts_wait_together_while_one_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = types.ModuleType("triton_python_backend_utils")
    triton.InferenceResponse = lambda output_tensors: output_tensors  # type: ignore[attr-defined]
    triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    monkeypatch.delitem(sys.modules, "lightseq_backend.serving.replies", raising=False)
    from lightseq_backend.serving import replies as module

    monkeypatch.setattr(module, "to_tensor", lambda name, tensor: (name, tensor))
    left: list[object] = []
    replies = module.Replies(wire(), TEXT, left.append)
    replies.start()
    row, options, sender = np.array([3]), DecodingOptions("greedy"), Sender()
    ticket = module.Ticket(sender, [row], parts=Parts(wire(), TEXT, row, options))
    (reply,), progress = replies.expect(ticket), replies.progress(ticket)
    assert progress is not None
    tokens = np.arange(3, 203, dtype=np.int32)
    progress((tokens[:1],))
    assert sender.started.wait(TIMEOUT)
    for end in range(2, 200):
        progress((tokens[:end],))
    assert replies._arrived.qsize() <= 1  # however long it takes
    reply(Output((Hypothesis(tokens, -1.0, False),), steps=200, cut=True))
    sender.go.set()
    assert sender.done.wait(TIMEOUT)
    replies.close()
    assert [part["result"].shape[1] for part in sender.sent] == [1, 198, 1, 201]
    assert left == [sender]
    monkeypatch.delitem(sys.modules, "lightseq_backend.serving.replies")
