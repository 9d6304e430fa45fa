"""Model repositories for the tests that serve: written from a few words, asked in one line."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from weight_files import golden

TIMEOUT = 60.0  # seconds

TRANSFORMER = {"inputs": {"source_ids": "INT32"}, "outputs": {"target_ids": "INT32", "target_scores": "FP32"}}
GENERATE = {"inputs": {"src_ids:0": "INT32"}, "outputs": {"trg_ids:0": "INT32", "score": "FP32"}}
BEST = {"inputs": {"src_ids:0": "INT32"}, "outputs": {"trg_ids:0": "INT32"}}
SCORED = {
    "inputs": {"source_ids": "INT32", "target_ids": "INT32"},
    "outputs": {"log_probability": "FP32", "token_log_probabilities": "FP32"},
}
GPT = {"inputs": {"token_ids": "INT32"}, "outputs": {"result": "INT32"}}
GPTLM = {"inputs": {"inputs_ids": "INT32"}, "outputs": {"loss": "FP32"}}


def config(
    name: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    *,
    rows: int = 8,
    kind: str = "KIND_CPU",
    count: int = 1,
    optional: bool = False,
    parameters: Mapping[str, object] | None = None,
    more: str = "",
) -> str:
    """A config.pbtxt. The dims of the outputs are LightSeq's own, which are not the shapes that come; an input of
    text has one string a row. count: of instances; optional: each input is."""

    def tensors(given: Mapping[str, str], more: str = "") -> str:
        return ", ".join(
            f'{{ name: "{key}", data_type: TYPE_{kind}, dims: [ {1 if key == "text_input" else -1} ]{more} }}'
            for key, kind in given.items()
        )

    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {rows}",
        f"input [ {tensors(inputs, ', optional: true' if optional else '')} ]",
        f"output [ {tensors(outputs)} ]",
        f"instance_group [ {{ kind: {kind}, count: {count} }} ]",
        *(
            f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}'
            for key, value in (parameters or {}).items()
        ),
        more,
    ]
    return "\n".join(lines) + "\n"


def write_model(
    root: Path, name: str, weights: Path | None, tensors: Mapping[str, Mapping[str, str]], **more: Any
) -> None:
    """A model of the repository `root`; `more` as for `config`. Without weights the file beside it counts."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.py").write_text("from lightseq_backend.serving.model import TritonPythonModel\n")
    if weights is not None:
        more["parameters"] = {"weights": weights, **more.get("parameters", {})}
    (root / name / "config.pbtxt").write_text(config(name, **tensors, **more))


def grpc(address: str) -> tritonclient.grpc.InferenceServerClient:
    """A client with a connection of its own: gRPC would share one among all clients of a process."""
    return tritonclient.grpc.InferenceServerClient(address, channel_args=[("grpc.use_local_subchannel_pool", 1)])


def http(address: str, at_once: int = 1) -> tritonclient.http.InferenceServerClient:
    return tritonclient.http.InferenceServerClient(address, concurrency=at_once)


def tensor(protocol: Any, name: str, ids: Any, dtype: type = np.int32) -> Any:
    array = np.asarray(ids, dtype)
    given = protocol.InferInput(name, list(array.shape), np.dtype(dtype).name.upper())
    given.set_data_from_numpy(array)
    return given


def ask(client: Any, model: str, name: str, ids: Any, dtype: type = np.int32, **options: Any) -> dict[str, np.ndarray]:
    """The outputs by name. Options are request parameters."""
    return arrays(client.infer(model, [tensor(_protocol(client), name, ids, dtype)], parameters=options or None))


def ask_later(client: Any, model: str, name: str, ids: Any, **options: Any) -> Callable[[], dict[str, np.ndarray]]:
    """`ask`, sent now; what it returns waits for the outputs or raises the error."""
    given = [tensor(_protocol(client), name, ids)]
    if _protocol(client) is tritonclient.http:
        pending = client.async_infer(model, given, parameters=options or None)
        return lambda: arrays(pending.get_result())
    answer: Future[Any] = Future()

    def arrived(result: Any, error: Exception | None) -> None:
        answer.set_result(result) if error is None else answer.set_exception(error)

    client.async_infer(model, given, arrived, parameters=options or None)
    return lambda: arrays(answer.result(TIMEOUT))


def _protocol(client: Any) -> Any:
    return tritonclient.http if isinstance(client, tritonclient.http.InferenceServerClient) else tritonclient.grpc


def arrays(result: Any) -> dict[str, np.ndarray]:
    response = result.get_response()
    names = (
        [output["name"] for output in response["outputs"]]
        if isinstance(response, dict)
        else [output.name for output in response.outputs]
    )
    return {name: result.as_numpy(name) for name in names}


def post(url: str, body: object) -> tuple[int, dict[str, Any]]:
    """Status and answer of a JSON request."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def golden_cases(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in golden(f"{name}.jsonl").read_text().splitlines()]


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """int32 [rows, longest]"""
    width = max(map(len, rows))
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows], np.int32)
