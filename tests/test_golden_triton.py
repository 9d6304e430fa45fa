"""LightSeq's golden cases through a real Triton: every row in its batch and alone, and many at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from repositories import GPT, GPTLM, TRANSFORMER, ask, ask_later, golden_cases, grpc, write_model
from tritonclient.utils import InferenceServerException
from weight_files import golden, golden_names

from lightseq_backend.serving.embedded import EmbeddedServer

NAMES = [name.removesuffix(".pb") for name in golden_names()]
TRANSFORMERS = [name for name in NAMES if name.startswith("t")]
GPTS = [name for name in NAMES if name.startswith("g")]
INT64 = {"inputs": {"source_ids": "INT64"}, "outputs": {"target_ids": "INT64", "target_scores": "FP32"}}
SCORE_TOLERANCE = 1e-4  # absolute; the golden README's


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("golden")
    for name in TRANSFORMERS:
        write_model(root, name, golden(f"{name}.pb"), TRANSFORMER)
    for name in GPTS:
        write_model(root, name, golden(f"{name}.pb"), GPT)
        write_model(root, f"{name}_ppl", golden(f"{name}.pb"), GPTLM)
    write_model(root, "int64", golden("t01_base.pb"), INT64)
    with EmbeddedServer(root, device="cpu") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: EmbeddedServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with grpc(server.grpc) as connected:
        yield connected


def differences(case: dict[str, Any], found: dict[str, np.ndarray], rows: list[dict[str, Any]]) -> list[str]:
    """What distinguishes the answer to a golden case's rows from the golden one."""
    width = max(len(row["ids"][0]) for row in rows)
    end_ids = [row["ids"][0][-1] for row in rows]
    ids = np.array([[[*text, *[end] * (width - len(text))] for text in row["ids"]] for row, end in zip(rows, end_ids)])
    scores = np.array([[np.nan if score is None else score for score in row["scores"]] for row in rows])
    if found["target_ids"].shape != ids.shape or not (found["target_ids"] == ids).all():
        return [f"{case['case']}: ids {found['target_ids'].tolist()}, not {ids.tolist()}"]
    if found["target_scores"].shape != scores.shape or not np.isfinite(found["target_scores"]).all():
        return [f"{case['case']}: scores {found['target_scores'].tolist()}"]
    off = np.nanmax(np.abs(found["target_scores"] - scores), initial=0.0)
    return [f"{case['case']}: scores off by {off}"] if off > SCORE_TOLERANCE else []


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_translation_in_a_batch_is_lightseqs(client: Any, name: str) -> None:
    cases = golden_cases(name)
    answers = [ask_later(client, name, "source_ids", case["source_ids"]) for case in cases]
    assert [fault for case, answer in zip(cases, answers) for fault in differences(case, answer(), case["rows"])] == []


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_translation_of_a_row_alone_is_lightseqs(client: Any, name: str) -> None:
    rows = [(case, row) for case in golden_cases(name) for row in range(len(case["rows"]))]
    answers = [ask_later(client, name, "source_ids", [case["source_ids"][row]]) for case, row in rows]
    faults = [
        fault
        for (case, row), answer in zip(rows, answers)
        for fault in differences(case, answer(), [case["rows"][row]])
    ]
    assert faults == []


def test_translation_with_int64_ids_is_lightseqs(client: Any) -> None:
    for case in golden_cases("t01_base"):
        found = ask(client, "int64", "source_ids", case["source_ids"], np.int64)
        assert found["target_ids"].dtype == np.int64
        assert differences(case, found, case["rows"]) == []


@pytest.mark.parametrize("name", GPTS)
def test_continuation_in_a_batch_is_lightseqs(client: Any, name: str) -> None:
    for case in golden_cases(name):
        if case["kind"] == "gen":
            assert ask(client, name, "token_ids", case["token_ids"])["result"].tolist() == case["ids"], case["case"]


@pytest.mark.parametrize("name", GPTS)
def test_continuation_of_a_row_alone_is_lightseqs_up_to_its_end(client: Any, name: str) -> None:
    for case in golden_cases(name):
        if case["kind"] != "gen":
            continue
        length = len(case["token_ids"][0])
        for prompt, expected in zip(case["token_ids"], case["ids"]):
            (found,) = ask(client, name, "token_ids", [prompt])["result"].tolist()
            # A batch goes on until all its rows have ended; a row alone stops at its own end.
            assert found == expected[: len(found)], case["case"]
            assert len(set(expected[len(found) - 1 :])) == 1 or len(found) == len(expected), case["case"]
            assert len(found) > length


@pytest.mark.parametrize("name", GPTS)
def test_perplexity_in_a_batch_is_lightseqs(client: Any, name: str) -> None:
    for case in golden_cases(name):
        if case["kind"] == "ppl" and "quirk" not in case:
            loss = ask(client, f"{name}_ppl", "inputs_ids", case["token_ids"])["loss"]
            np.testing.assert_allclose(loss, np.array(case["ppl"])[:, None], atol=SCORE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", GPTS)
def test_perplexity_of_a_row_alone_is_lightseqs(client: Any, name: str) -> None:
    for case in golden_cases(name):
        for row in set(range(len(case.get("ppl", ())))) - set(case.get("quirk", ())):
            loss = ask(client, f"{name}_ppl", "inputs_ids", [case["token_ids"][row]])["loss"]
            assert abs(loss.item() - case["ppl"][row]) < SCORE_TOLERANCE, (case["case"], row)


def test_a_row_of_padding_that_lightseq_scores_by_accident_is_refused(client: Any) -> None:
    # For n = 0 tokens its formula divides by n - 1 and its score is nonsense: the case's "quirk".
    (case,) = [case for case in golden_cases("g01_base") if "quirk" in case]
    with pytest.raises(InferenceServerException, match=r"row 1: the row holds only padding \(id 0\)"):
        ask(client, "g01_base_ppl", "inputs_ids", case["token_ids"])


@pytest.mark.parametrize(
    ("model", "name", "vocabulary", "options"),
    [
        ("t01_base", "source_ids", 96, {}),
        ("t01_base", "source_ids", 96, {"sampling_method": "topp", "top_p": 0.9, "seed": 7}),
        ("g01_base", "token_ids", 127, {"sampling_method": "topk", "top_k": 20, "seed": 7}),
    ],
)
def test_fifty_requests_at_once_give_what_each_gives_alone(
    server: EmbeddedServer, client: Any, model: str, name: str, vocabulary: int, options: dict[str, object]
) -> None:
    random = np.random.default_rng(5)
    rows = [random.integers(1, vocabulary, (1, random.integers(1, 40))) for _ in range(50)]
    connections = [grpc(server.grpc) for _ in range(4)]
    answers = [ask_later(connections[i % 4], model, name, row, **options) for i, row in enumerate(rows)]
    together = [answer() for answer in answers]
    for connection in connections:
        connection.close()
    alone = [ask(client, model, name, row, **options) for row in rows]
    for one, other in zip(together, alone):
        for output in one:
            np.testing.assert_array_equal(one[output], other[output])


def test_ten_asynchronous_matrices_bring_both_outputs(client: Any) -> None:
    matrix = np.arange(16, dtype=np.int32).reshape(2, 8) % 95 + 1
    answers = [ask_later(client, "t01_base", "source_ids", matrix) for _ in range(10)]
    for answer in answers:
        outputs = answer()
        assert outputs["target_ids"].shape[:2] == outputs["target_scores"].shape == (2, 4)
