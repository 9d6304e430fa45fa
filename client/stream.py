"""One answer as it comes: the two protocols' streams, read in the caller's own thread."""

from __future__ import annotations

import json
import queue
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_client.answers import (
    Answer,
    Call,
    Failure,
    Row,
    answers_of,
    hypotheses_of,
    sides_of,
    texts_of,
)
from lightseq_client.errors import INTERNAL, UNAVAILABLE, UNKNOWN, RequestFailed, RequestTimeout
from lightseq_client.protocols import HTTP_STATUS, Outputs, inputs_of
from lightseq_client.signature import DETAILS, FINAL, FIRST_TOKEN, GENERATE, TEXT_INPUT, TEXT_OUTPUT

_SIDE_BY_SIDE = ("topk", "topp", "sample", "topk_greedy")  # methods whose texts stream each by itself
_PATIENCE = 1.0  # seconds for the server to end a stream by itself
_NOT_HERE = "no request with the id"  # what it says of a stop that finds none
_TYPES = {FINAL: np.bool_, FIRST_TOKEN: np.float32, DETAILS: np.float32, TEXT_OUTPUT: np.object_}


_Arrived = queue.SimpleQueue[tuple[Any, Any]]  # of a stream: results or errors


@dataclass(frozen=True)
class Part:
    """What is new since the last part.

    ids, texts  of each text that streams: of every sample, or of a search's best
    seconds     since the row was sent
    answer      of the last part alone: all of it, as a model without a stream answers
    first_token_ms  of the last part alone: what the server took for the first token
    """

    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    seconds: float
    answer: Answer | None = None
    first_token_ms: float | None = None


def parts(
    url: str, protocol: str, call: Call, row: Row, request_id: str, timeout: float
) -> Generator[Part, None, None]:
    """Sends the row and yields what comes; closed early, it has the server stop. timeout: seconds between two parts."""
    started = time.perf_counter()
    (rows,) = sides_of(call, [row])
    responses = (_grpc if protocol == "grpc" else _http)(url, call, rows, request_id, timeout)
    told: list[list[int]] = []
    try:
        for outputs in responses:
            seconds = time.perf_counter() - started
            if outputs[FINAL].all():
                (answer,) = answers_of(call, [row], outputs, seconds)
                if isinstance(answer, Failure):
                    raise answer.error
                first = outputs.get(FIRST_TOKEN)
                yield Part((), (), seconds, answer, None if first is None else float(first.ravel()[0]))
                return
            found = [ids for ids, _ in hypotheses_of(outputs[str(call.tensors.ids)], None, 1)[0]]
            told = told or [[] for _ in found]
            texts = texts_of(outputs[TEXT_OUTPUT], 1)[0] if call.sends_text else _read(call, told, found)
            for whole, ids in zip(told, found, strict=True):
                whole += ids
            yield Part(tuple(found), tuple(texts), seconds)
        raise RequestFailed(INTERNAL, "the stream ended without an answer")
    finally:
        responses.close()


def _read(call: Call, told: list[list[int]], found: list[tuple[int, ...]]) -> list[str]:
    """What the codec makes of new ids behind those before them."""
    pairs = [(call.codec.decode(whole), call.codec.decode([*whole, *ids])) for whole, ids in zip(told, found)]
    return [now[len(before) :] if now.startswith(before) else "" for before, now in pairs]


def _grpc(url: str, call: Call, rows: np.ndarray, request_id: str, timeout: float) -> Generator[Outputs, None, None]:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    arrived: _Arrived = queue.SimpleQueue()
    # A connection of its own: a client of tritonclient's has one stream.
    client = grpc.InferenceServerClient(url)
    given, request_id = inputs_of(grpc, call.tensors, [rows]), request_id or secrets.token_hex(16)
    ended = False
    try:
        # Without the header triton_grpc_error, which would have a status travel: Triton 24.10 may end after it.
        client.start_stream(lambda result, error: arrived.put((result, error)))
        client.async_stream_infer(call.model, given, request_id=request_id, parameters=dict(call.parameters))
        while True:
            try:
                result, error = arrived.get(timeout=timeout)
            except queue.Empty:
                raise RequestTimeout(timeout) from None
            if error is not None:
                ended = True
                status = (error.status() or UNKNOWN).removeprefix("StatusCode.")
                raise RequestFailed(status, error.message() or "no reason given")
            outputs = {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
            ended = bool(outputs[FINAL].all())
            yield outputs
    except InferenceServerException as error:
        raise RequestFailed(INTERNAL, error.message() or "no reason given") from None
    finally:
        try:
            ended = ended or _stopped(client, call.model, given, request_id, arrived, min(timeout, _PATIENCE))
        finally:  # whatever becomes of that, a second Ctrl-C too: tritonclient's thread would keep the process
            end_stream(client, ended)
            client.close()


def _stopped(client: Any, model: str, given: list[Any], request_id: str, arrived: _Arrived, patience: float) -> bool:
    """Asks the server to stop that request; whether it has, within so many seconds. Not where the server has given this
    to another instance of the model than the request, which does not know the id."""
    from tritonclient.utils import InferenceServerException

    try:
        client.async_stream_infer(model, given, parameters={"cancel_request_id": request_id})
    except InferenceServerException:  # the stream never began, or is broken
        return False
    under_way, end = 2, time.monotonic() + patience
    while under_way:
        try:
            result, error = arrived.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            return False
        if error is not None and under_way == 2 and _NOT_HERE in (error.message() or ""):
            return False
        under_way -= error is not None or result.get_response().parameters["triton_final_response"].bool_param
    return True


def end_stream(client: Any, ended: bool) -> None:
    """Ends the stream of a tritonclient.grpc.InferenceServerClient.

    ended: nothing is under way on it. Then the server is told that no more requests come, and ends it. Otherwise it is
    cancelled, for which Triton 24.10 pays: with some of its memory for good and, when it stops, with all the time it
    has for that. By itself tritonclient (2.73) leaves a thread behind then that waits for one more request for ever.
    """
    stream = getattr(client, "_stream", None)
    requests, reader = getattr(stream, "_request_queue", None), getattr(stream, "_handler", None)
    if ended and requests is not None:
        requests.put(None)
    try:
        if ended and reader is not None:
            reader.join(_PATIENCE)
    finally:
        client.stop_stream(cancel_requests=True)  # of no effect on one that has ended
        if not ended and requests is not None:
            requests.put(None)


def _http(url: str, call: Call, rows: np.ndarray, request_id: str, timeout: float) -> Generator[Outputs, None, None]:
    ((name, _, _),) = call.tensors.given([rows])
    value = rows[0, 0].decode() if name == TEXT_INPUT else rows[0].tolist()
    body = {name: value, **call.parameters, **({"request_id": request_id} if request_id else {})}
    done = False
    try:
        with _post(url, call.model, body, timeout) as answer:
            for fields in _events(answer):
                if "error" in fields:
                    raise RequestFailed(INTERNAL, str(fields["error"]))
                outputs = _arrays(call, fields)
                done = bool(outputs[FINAL].all())
                yield outputs
    except urllib.error.HTTPError as error:
        done = True
        with suppress(ValueError):
            text = error.read().decode(errors="replace").strip().removeprefix("data: ")
            message = json.loads(text).get("error", text)
            raise RequestFailed(HTTP_STATUS.get(str(error.code), INTERNAL), message) from None
        raise RequestFailed(HTTP_STATUS.get(str(error.code), INTERNAL), str(error)) from None
    except TimeoutError:
        raise RequestTimeout(timeout) from None
    except OSError as error:
        raise RequestFailed(UNAVAILABLE, str(error)) from None
    finally:
        if not done and request_id:  # a connection that is dropped goes unnoticed
            with suppress(OSError):
                _post(url, call.model, {name: value, "cancel_request_id": request_id}, timeout).close()


def _post(url: str, model: str, body: Mapping[str, Any], timeout: float) -> Any:
    request = urllib.request.Request(
        f"http://{url}/v2/models/{model}/generate_stream",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=timeout)


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of server-sent events."""
    for line in answer:
        if line.startswith(b"data:"):
            yield json.loads(line[5:])


def _arrays(call: Call, fields: Mapping[str, Any]) -> Outputs:
    """The tensors of one event, for one row; JSON has them flat, and without a list where there is one value."""
    ids, scores = str(call.tensors.ids), str(call.tensors.scores)
    arrays = {}
    for name in (ids, scores, *_TYPES):
        if name in fields:
            values = fields[name] if isinstance(fields[name], list) else [fields[name]]
            if name == TEXT_OUTPUT:
                values = [value.encode() for value in values]
            arrays[name] = np.array(values, _TYPES.get(name))[None]
    told = next((arrays[name].size for name in (scores, TEXT_OUTPUT) if name in arrays), None)
    if told is None:
        # Of a search one text streams; JSON has no shapes to tell that, and the method may be the file's own.
        method = call.parameters.get("sampling_method", "topk" if call.task == GENERATE else "beam_search")
        whole = bool(arrays[FINAL].all()) or method in _SIDE_BY_SIDE
        told = int(call.parameters.get("num_hypotheses", 1)) if whole else 1
    for name in (ids, DETAILS):
        if name in arrays:
            arrays[name] = arrays[name].reshape(1, told, -1)
    return arrays
