"""Streams through a real Triton: parts that join to the answer, calls that are given up, deadlines, stops by id."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import small_models
import stream_cases
from repositories import TIMEOUT, ask
from stream_cases import Stream, sse
from tritonclient.utils import InferenceServerException

from lightseq_backend.config import DecodingOptions
from lightseq_backend.request import Hypothesis, Output
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_backend.serving.parts import Parts, Written
from lightseq_backend.serving.wire import Wire, read_wire


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    stream_cases.write_models(root)
    with EmbeddedServer(root, device="cpu", models=stream_cases.MODELS, stop_timeout=5) as running:
        yield running


@pytest.fixture
def stream(served: EmbeddedServer) -> Iterator[Stream]:
    with Stream(served.grpc) as opened:
        yield opened


@pytest.mark.parametrize("case", stream_cases.CASES, ids=lambda case: case.__name__)
def test_stream(served: EmbeddedServer, stream: Stream, case: Callable[[EmbeddedServer, Stream], None]) -> None:
    case(served, stream)


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


# Leaving early -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", [0, -1, "soon", True, 86_400_001])
def test_bad_deadline_is_refused(stream: Stream, deadline: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"deadline_ms is .*; it must be over 0"):
        ask(stream.client, "text", "token_ids", [[5]], deadline_ms=deadline)


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


@pytest.fixture
def replies_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """serving/replies.py with a stand-in for Triton."""
    triton = types.ModuleType("triton_python_backend_utils")
    triton.InferenceResponse = lambda output_tensors: output_tensors  # type: ignore[attr-defined]
    triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    sys.modules.pop("lightseq_backend.serving.replies", None)
    replies = importlib.import_module("lightseq_backend.serving.replies")
    monkeypatch.setattr(replies, "to_tensor", lambda name, tensor: (name, tensor))
    yield replies
    del sys.modules["lightseq_backend.serving.replies"]


def test_answers_do_not_wait_for_each_other_and_all_of_one_comes_in_order(replies_module: Any) -> None:
    module = replies_module
    replies = module.Replies(wire(), TEXT, lambda sender: None)
    replies.start()
    row, options = np.array([3]), DecodingOptions("greedy")
    held, others = Sender(), [Sender() for _ in range(module.COURIERS - 1)]
    for sender in (held, *others):
        ticket = module.Ticket(sender, [row], parts=Parts(wire(), TEXT, row, options))
        (reply,), progress = replies.expect(ticket), replies.progress(ticket)
        assert progress is not None
        progress((np.array([5], np.int32),))
        reply(Output((Hypothesis(np.array([5, 6], np.int32), -1.0, False),), steps=2, cut=True))
    assert held.started.wait(TIMEOUT)
    for sender in others:
        sender.go.set()
        assert sender.done.wait(TIMEOUT)
    assert not held.done.is_set()
    held.go.set()
    assert held.done.wait(TIMEOUT)
    replies.close()
    for sender in (held, *others):
        assert [part["result"].tolist() for part in sender.sent[:2]] == [[[5]], [[6]]]
        assert "final" in sender.sent[-1]
    assert replies.outcomes[module.ANSWERED] == module.COURIERS


def test_answer_is_sent_at_once_where_nobody_else_waits_and_it_is_whole(replies_module: Any) -> None:
    """By whoever brings it: no thread that sends has been started."""
    module, alone = replies_module, [True]
    replies = module.Replies(dataclasses.replace(wire(), streams=False), TEXT, lambda sender: None, lambda: alone[0])
    row, options = np.array([3]), DecodingOptions("greedy")
    output = Output((Hypothesis(np.array([5], np.int32), -1.0, False),), steps=1, cut=True)
    parts = Parts(wire(), TEXT, row, options)

    def sent(rows: int, parts: Any = None) -> int:
        sender = Sender()
        sender.go.set()
        for reply in replies.expect(module.Ticket(sender, [row] * rows, parts=parts)):
            reply(output)
        return len(sender.sent)

    assert sent(1) == 1
    assert (sent(2), sent(1, parts)) == (0, 0)
    alone[0] = False
    assert sent(1) == 0
    assert replies._arrived.qsize() == 3  # the two rows of one request wait together


@pytest.mark.parametrize("decode", [None, str])
def test_who_brings_the_last_row_writes_the_answer_unless_it_is_much_text_and_another_sends_it(
    decode: Any, replies_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, writers = replies_module, []
    replies = module.Replies(dataclasses.replace(wire(), streams=False), TEXT, lambda sender: None)
    response = replies._response
    monkeypatch.setattr(
        replies, "_response", lambda ticket: (writers.append(threading.current_thread()), response(ticket))[1]
    )
    sender, row = Sender(), np.array([3])
    output = Output((Hypothesis(np.array([5], np.int32), -1.0, False),), steps=1, cut=True)
    first, second = replies.expect(module.Ticket(sender, [row] * 2, decode))
    second(output)
    assert writers == []
    first(output)
    assert (writers, sender.sent) == ([] if decode else [threading.current_thread()], [])
    sender.go.set()
    replies.start()
    replies.close()
    assert [sent["result"].ravel().tolist() for sent in sender.sent] == [[3, 5, 3, 5]]
    assert len(writers) == 1


@pytest.mark.parametrize("streams", [False, True])
def test_answer_that_cannot_be_written_is_an_error_and_harms_no_other(
    streams: bool, replies_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = replies_module
    monkeypatch.setattr(module, "_error_response", lambda error: (module.FAILED, {"error": str(error)}))
    left: list[object] = []
    replies = module.Replies(dataclasses.replace(wire(), streams=streams), TEXT, left.append)
    replies.start()
    row, senders = np.array([3]), [Sender(), Sender()]
    good = Output((Hypothesis(np.array([5], np.int32), -1.0, False),), steps=1, cut=True)
    for sender, output in zip(senders, ("no output at all", good)):
        sender.go.set()
        parts = Parts(wire(), TEXT, row, DecodingOptions("greedy")) if streams else None
        (reply,) = replies.expect(module.Ticket(sender, [row], parts=parts))
        reply(output)
        assert sender.done.wait(TIMEOUT)
    replies.close()
    assert left == senders
    assert "attribute" in senders[0].sent[-1]["error"]
    assert replies.outcomes == {**dict.fromkeys(module.OUTCOMES, 0), module.FAILED: 1, module.ANSWERED: 1}


def test_parts_wait_together_while_one_is_sent(replies_module: Any) -> None:
    module = replies_module
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
    assert len(ticket.arrived) <= 1  # however long it takes
    reply(Output((Hypothesis(tokens, -1.0, False),), steps=200, cut=True))
    sender.go.set()
    assert sender.done.wait(TIMEOUT)
    replies.close()
    assert [part["result"].shape[1] for part in sender.sent] == [1, 198, 1, 201]
    assert left == [sender]
