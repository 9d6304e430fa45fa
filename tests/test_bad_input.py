"""Bad requests and bad models through a real Triton: each a clear answer, and nobody else notices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from repositories import GPT, GPTLM, TRANSFORMER, ask, ask_later, golden_cases, grpc, http, post, write_model
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend.serving.embedded import EmbeddedServer

# t01_base: source vocabulary 96, target vocabulary 100, max_step 48, padding id 0, beam 4. g01_base: vocabulary 128.
ADMIN = {"admin-key": "test"}
# One translation at a time, two may wait; 100 steps between two looks at the queue make each last a while.
NARROW = {"slots": 4, "queue": 2, "burst": 100}
GOOD = golden_cases("t01_base")[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "translate", golden("t01_base.pb"), TRANSFORMER, rows=4)
    write_model(root, "generate", golden("g01_base.pb"), GPT, rows=4)
    write_model(root, "score", golden("g01_base.pb"), GPTLM, rows=4)
    write_model(root, "narrow", golden("t01_base.pb"), TRANSFORMER, rows=1, parameters=NARROW)
    write_bad_models(root)
    served = ["translate", "generate", "score", "narrow"]
    with EmbeddedServer(root, device="cpu", models=served, admin_key=ADMIN["admin-key"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: EmbeddedServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with grpc(server.grpc) as connected:
        yield connected


def check_good(outputs: dict[str, np.ndarray]) -> None:
    assert outputs["target_ids"].tolist() == [GOOD["rows"][0]["ids"]]


def refusal(client: Any, model: str, name: str, ids: Any, dtype: type = np.int32, **options: Any) -> tuple[str, str]:
    """Status and message of a refused request; a good one before it, still under way, and one after it succeed."""
    before = ask_later(client, "translate", "source_ids", GOOD["source_ids"])
    with pytest.raises(InferenceServerException) as refused:
        ask(client, model, name, ids, dtype, **options)
    check_good(before())
    check_good(ask(client, "translate", "source_ids", GOOD["source_ids"]))
    return refused.value.status(), refused.value.message()


ROWS = {
    "empty_row": (np.zeros((1, 0)), "the row is empty; it needs at least one id"),
    "only_padding": ([[0, 0, 0]], "the row holds only padding (id 0)"),
    "negative_id": ([[5, -7]], "id -7 at column 1 is outside the vocabulary (0 to 95)"),
    "id_beyond_the_vocabulary": ([[96, 3]], "id 96 at column 0 is outside the vocabulary (0 to 95)"),
    "too_long": (np.ones((1, 49)), "the row has 49 ids; this model takes 48 (max_step)"),
    "one_bad_row_of_three": ([[5, 6], [5, 999], [7, 8]], "row 1: id 999 at column 1 is outside the vocabulary"),
    "two_bad_rows": ([[0, 0], [5, 1], [-1, 1]], "row 0: the row holds only padding (id 0) (and 1 more of the 3 rows"),
    # These never reach the model; the words are Triton's.
    "empty_batch": (np.zeros((0, 3)), "Expected 12, got 0"),
    "too_many_rows": (np.ones((5, 2)), "inference request batch-size must be <= 4 for 'translate'"),
    "too_low_a_rank": (
        [1, 2, 3],
        "unexpected shape for input 'source_ids' for model 'translate'. Expected [-1,-1], got [3]",
    ),
    "too_high_a_rank": (np.ones((1, 2, 2)), "Expected [-1,-1], got [1,2,2]"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_row_is_refused_with_value_and_limit(client: Any, case: str) -> None:
    ids, words = ROWS[case]
    status, message = refusal(client, "translate", "source_ids", ids)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert words in message


def test_wrong_datatype_is_refused_with_both_types(client: Any) -> None:
    status, message = refusal(client, "translate", "source_ids", [[5, 6]], np.int64)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert "data-type is 'INT64', but model 'translate' expects 'INT32'" in message


def test_unknown_input_is_refused_by_name(client: Any) -> None:
    assert "unexpected inference input 'ids'" in refusal(client, "translate", "ids", [[5, 6]])[1]


@pytest.mark.parametrize(("model", "name"), [("generate", "token_ids"), ("score", "inputs_ids")])
def test_gpt_refuses_a_bad_row_with_value_and_limit(client: Any, model: str, name: str) -> None:
    assert "id 128 at column 1 is outside the vocabulary (0 to 127)" in refusal(client, model, name, [[5, 128]])[1]


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "beam_size_over_the_maximum": ({"beam_size": 17}, "beam_size is 17; it must be from 1 to 16, this model's maximum"),
    "beam_size_0": ({"beam_size": 0}, "beam_size is 0; it must be from 1 to 16"),
    "top_k_0": ({"sampling_method": "topk", "top_k": 0}, "top_k is 0; it must be from 1 to 100, the vocabulary"),
    "top_k_beyond_the_vocabulary": (
        {"sampling_method": "topk", "top_k": 101},
        "top_k is 101; it must be from 1 to 100",
    ),
    "top_p_2": ({"sampling_method": "topp", "top_p": 2.0}, "top_p is 2.0; it must be over 0 and at most 1"),
    "temperature_0": ({"sampling_method": "sample", "temperature": 0}, "temperature is 0.0; it must be from 0.001 to"),
    "temperature_nan": ({"sampling_method": "sample", "temperature": np.nan}, "temperature is nan; it must be from"),
    "infinite_penalty": ({"length_penalty": np.inf}, "length_penalty is inf; it must be from -10 to 10"),
    "negative_seed": ({"sampling_method": "sample", "seed": -1}, "seed is -1; it must be from 0 to"),
    "no_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
    "too_many_hypotheses": ({"num_hypotheses": 5}, "num_hypotheses is 5; it must be from 1 to 4, the beam size"),
    "unknown_method": ({"sampling_method": "nucleus"}, "sampling_method is 'nucleus'; methods are beam_search"),
    "text_for_a_number": ({"beam_size": "4"}, "beam_size is '4'; it takes a value of type int"),
    "truth_for_a_number": ({"beam_size": True}, "beam_size is True; it takes a value of type int"),
    "unknown_option": ({"beams": 4}, "unknown option beams; options are sampling_method, beam_size"),
    "ignored_option": ({"top_k": 3}, "top_k needs a sampling method"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_option_is_refused_with_value_and_limit(client: Any, case: str) -> None:
    options, words = OPTIONS[case]
    status, message = refusal(client, "translate", "source_ids", GOOD["source_ids"], **options)
    assert status == "StatusCode.INVALID_ARGUMENT"
    assert words in message


def test_scoring_refuses_options_by_name(client: Any) -> None:
    assert (
        "unknown option beam_size; scoring has no options"
        in refusal(client, "score", "inputs_ids", [[5, 6]], beam_size=2)[1]
    )


def test_bad_request_over_http_is_status_400_with_the_reason(server: EmbeddedServer) -> None:
    url = f"http://{server.http}/v2/models/translate/generate"
    assert post(url, {"source_ids": [79], "beam_size": 99}) == (
        400,
        {"error": "beam_size is 99; it must be from 1 to 16, this model's maximum"},
    )


def test_nan_over_http_is_refused(server: EmbeddedServer) -> None:
    status, answer = post(
        f"http://{server.http}/v2/models/translate/generate",
        {"source_ids": [79], "sampling_method": "sample", "temperature": float("nan")},
    )
    assert (status, "error" in answer) == (400, True)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_full_queue_is_unavailable_and_the_rest_is_answered(server: EmbeddedServer, protocol: str) -> None:
    client = grpc(server.grpc) if protocol == "grpc" else http(server.http, at_once=10)
    with client:
        answers = [ask_later(client, "narrow", "source_ids", GOOD["source_ids"]) for _ in range(10)]
        refused = []
        for answer in answers:
            try:
                check_good(answer())
            except InferenceServerException as error:
                refused.append((error.status(), error.message()))
        check_good(ask(client, "narrow", "source_ids", GOOD["source_ids"]))
    assert 0 < len(refused) < 10
    assert {status for status, _ in refused} == {{"grpc": "StatusCode.UNAVAILABLE", "http": "503"}[protocol]}
    words = r"the queue has 2 of 2 places taken and cannot take 1 more; come again in \d+\.\d s"
    assert [message for _, message in refused if not re.search(words, message)] == []


# Models that must not load ----------------------------------------------------------------------------------------

BAD_MODELS = {
    "missing": ["no weights; looked for", "missing/transformer.pb", "missing/missing.pb"],
    "misnamed": ["no weights; looked for", "/nowhere.pb"],
    "truncated": ["truncated.pb cannot be used", "the file is cut short or damaged"],
    "no_protobuf": ["text.pb cannot be used"],
    "gpt_as_transformer": ["g01_base.pb cannot be used", "this looks like a gpt file, not a transformer file"],
    "transformer_as_gpt": ["t01_base.pb cannot be used", "this looks like a transformer file, not a gpt file"],
    "names": [
        "input 'ids' is unknown; inputs are source_ids, src_ids:0, token_ids, inputs_ids",
        "output 'words' is unknown; outputs are gpt_out, gpt_scores, log_probability, loss",
        "output score is TYPE_FP64; it must be TYPE_FP32",
        "parameter 'slotz' is unknown; parameters are weights, dialect, precision, slots",
        "dialect is 'v7'; dialects are head, v0",
        "parameter queue is 'long'; it must be a whole number from 1 up",
    ],
    "half_the_outputs": ["outputs are target_ids; they must be one of: target_ids + target_scores;"],
    "mixed": ["input source_ids is of a transformer model, but output result of a gpt model"],
    "float_ids": ["input source_ids is TYPE_FP32; it must be TYPE_INT32 or TYPE_INT64"],
    "half_precision": ["precision is 'fp16'; a CPU computes in fp32 or int8"],
    "no_queue": ["queue is 2; max_batch_size lets a request have 8 rows"],
    "no_slots": ["beam_size is 4; it must be from 1 to 2, this model's maximum"],
    "bert": ["model_type is 'Bert'; this backend serves Transformer, Gpt, QuantTransformer, QuantGpt"],
    "cached": ["response_cache is enabled; Triton's cache does not tell requests with different options apart"],
    "decoupled": ["output final (TYPE_BOOL) is missing; it tells a stream's parts from its answer"],
    "decoupled_score": ["model_transaction_policy is decoupled; a model that scores gives one answer to a request"],
    "final_alone": ["output final needs a model_transaction_policy that is decoupled"],
    "on_a_gpu": ["has kind KIND_GPU but no GPUs are available"],
    "of_no_kind": ["instance kind is KIND_MODEL; kinds are KIND_CPU, KIND_GPU"],
}


def write_bad_models(root: Path) -> None:
    t01, g01 = golden("t01_base.pb"), golden("g01_base.pb")
    truncated, text = root / "truncated.pb", root / "text.pb"
    truncated.write_bytes(t01.read_bytes()[:100_000])
    text.write_text("These are no weights.\n" * 100)
    strange = {"inputs": {"ids": "INT32"}, "outputs": {"words": "INT32", "score": "FP64"}}
    write_model(root, "missing", None, TRANSFORMER)
    write_model(root, "misnamed", Path("nowhere.pb"), TRANSFORMER)
    write_model(root, "truncated", truncated, TRANSFORMER)
    write_model(root, "no_protobuf", text, TRANSFORMER)
    write_model(root, "gpt_as_transformer", g01, TRANSFORMER)
    write_model(root, "transformer_as_gpt", t01, GPT)
    write_model(root, "names", t01, strange, parameters={"slotz": 3, "dialect": "v7", "queue": "long"})
    write_model(root, "half_the_outputs", t01, {**TRANSFORMER, "outputs": {"target_ids": "INT32"}})
    write_model(root, "mixed", t01, {**TRANSFORMER, "outputs": {"result": "INT32"}})
    write_model(root, "float_ids", t01, {**TRANSFORMER, "inputs": {"source_ids": "FP32"}})
    write_model(root, "half_precision", t01, TRANSFORMER, parameters={"precision": "fp16"})
    write_model(root, "no_queue", t01, TRANSFORMER, parameters={"queue": 2})
    write_model(root, "no_slots", t01, TRANSFORMER, parameters={"slots": 2})
    write_model(root, "bert", t01, TRANSFORMER, parameters={"model_type": "Bert"})
    write_model(root, "cached", t01, TRANSFORMER, more="response_cache { enable: true }")
    decoupled = "model_transaction_policy { decoupled: true }"
    write_model(root, "decoupled", t01, TRANSFORMER, more=decoupled)
    scored = {**GPTLM, "outputs": {**GPTLM["outputs"], "final": "BOOL"}}
    write_model(root, "decoupled_score", g01, scored, more=decoupled)
    write_model(root, "final_alone", g01, {**GPT, "outputs": {**GPT["outputs"], "final": "BOOL"}})
    write_model(root, "on_a_gpu", t01, TRANSFORMER, kind="KIND_GPU")
    write_model(root, "of_no_kind", t01, TRANSFORMER, kind="KIND_MODEL")


@pytest.fixture(scope="module")
def load_failures(server: EmbeddedServer) -> dict[str, str]:
    """What Triton says of each bad model. All are asked for at once: a load is two processes' start."""

    def load(name: str) -> str:
        with http(server.http) as client:
            try:
                client.load_model(name, headers=ADMIN)
            except InferenceServerException as error:
                return str(error)
        return "it loaded"

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(BAD_MODELS, pool.map(load, BAD_MODELS)))


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model_does_not_load_and_says_why(load_failures: dict[str, str], name: str) -> None:
    missing = [words for words in BAD_MODELS[name] if words not in load_failures[name]]
    assert missing == [], load_failures[name]


def test_bad_models_leave_the_others_serving(load_failures: dict[str, str], client: Any) -> None:
    check_good(ask(client, "translate", "source_ids", GOOD["source_ids"]))
    assert client.is_server_live()
