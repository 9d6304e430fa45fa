"""Scores through Triton: each token's and their sum, of a translation given with its source and of a GPT's text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from repositories import GPT, SCORED, TRANSFORMER, arrays, grpc, padded, tensor, write_model
from test_text import configuration, write_words
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend import local
from lightseq_backend.request import SCORE
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_backend.serving.wire import read_wire

# t01_base: vocabularies 96 and 100, padding id 0, end id 99.
SOURCES = [[5, 9, 20, 95], [7, 95], [30, 31, 32, 33, 34]]
TARGETS = [[17, 4, 99], [8, 9, 10, 11, 12, 99], [40, 99]]
TEXTS = {"text_input": "STRING", "target_text": "STRING"}
SCORED_GPT = {"inputs": GPT["inputs"], "outputs": SCORED["outputs"]}
NUMPY_1 = np.lib.NumpyVersion(np.__version__) < "2.0.0"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    root = tmp_path_factory.mktemp("repository")
    with_text = {**SCORED, "inputs": {**SCORED["inputs"], **TEXTS}}
    write_model(root, "scorer", golden("t01_base.pb"), with_text, optional=True)
    write_words(root / "scorer")
    write_model(root, "text_scorer", golden("g01_base.pb"), SCORED_GPT)
    with EmbeddedServer(root, device="cpu", stop_timeout=5) as running, grpc(running.grpc) as connected:
        yield connected


def strings(name: str, texts: list[str]) -> Any:
    given = tritonclient.grpc.InferInput(name, [len(texts), 1], "BYTES")
    given.set_data_from_numpy(np.array([[text] for text in texts], np.object_))
    return given


def ids(name: str, rows: Any) -> Any:
    return tensor(tritonclient.grpc, name, rows)


def score(client: Any, *inputs: Any) -> dict[str, np.ndarray]:
    return arrays(client.infer("scorer", list(inputs)))


def expected(file: str, rows: list[list[int]], targets: list[list[int]] | None = None) -> dict[str, np.ndarray]:
    outputs = local.build(golden(file)).answer(rows, SCORE, targets=targets)
    parts = [output.target_log_probabilities.tolist() for output in outputs]
    width = max(map(len, parts))
    return {
        "log_probability": np.array([[sum(part)] for part in parts]),
        "token_log_probabilities": np.array([[*part, *[0.0] * (width - len(part))] for part in parts]),
    }


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=1e-6)


@pytest.mark.parametrize("fill", [0, 99])
def test_translations_are_scored_as_without_a_server(client: Any, fill: int) -> None:
    found = score(client, ids("source_ids", padded(SOURCES, 0)), ids("target_ids", padded(TARGETS, fill)))
    same(found, expected("t01_base.pb", padded(SOURCES, 0).tolist(), TARGETS))


def test_texts_are_scored_as_without_a_server(client: Any) -> None:
    rows = [[3, 4, 5], [6, 7, 8]]
    found = arrays(client.infer("text_scorer", [ids("token_ids", rows)]))
    same(found, expected("g01_base.pb", rows))


@pytest.mark.skipif(not NUMPY_1, reason="Triton's Python stub takes no strings under NumPy 2")
def test_text_is_scored_as_its_ids(client: Any) -> None:
    of_ids = score(client, ids("source_ids", [[5, 9, 95]]), ids("target_ids", [[17, 4, 99]]))
    for source in (strings("text_input", ["s5 s9"]), ids("source_ids", [[5, 9, 95]])):
        same(score(client, source, strings("target_text", ["t17 t4"])), of_ids)


def test_what_is_wrong_is_named(client: Any) -> None:
    source, target = ids("source_ids", [[5], [6]]), ids("target_ids", [[5], [100]])
    faults = {
        "row 1: id 100 at column 0 of the target is outside the vocabulary": [source, target],
        "input target_ids or target_text is missing": [source],
        "input source_ids or text_input is missing": [target],
    }
    if NUMPY_1:
        faults["gives both target_ids and target_text"] = [source, target, strings("target_text", ["t3"] * 2)]
    for message, inputs in faults.items():
        with pytest.raises(InferenceServerException, match=message) as refused:
            score(client, *inputs)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"inputs": TRANSFORMER["inputs"], "outputs": SCORED["outputs"]}, "input target_ids is missing"),
        ({"inputs": SCORED["inputs"], "outputs": TRANSFORMER["outputs"]}, "input target_ids is for translators with"),
        ({"inputs": {**GPT["inputs"], "target_ids": "INT32"}, "outputs": SCORED["outputs"]}, "is for translators with"),
        ({"inputs": {**SCORED["inputs"], "target_text": "STRING"}, "outputs": SCORED["outputs"]}, "must be optional"),
        ({"inputs": {**SCORED["inputs"], "target_ids": "FP32"}, "outputs": SCORED["outputs"]}, "target_ids is TYPE_FP"),
    ],
)
def test_faults_of_a_configuration_are_named(tensors: Any, message: str) -> None:
    faults: list[str] = []
    assert read_wire(configuration(**tensors, optional=False), faults) is None
    assert any(message in fault for fault in faults), faults
