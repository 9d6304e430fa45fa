"""The standard search, its rules and token log-probabilities through Triton and its clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import small_checkpoints
from repositories import GPT, TRANSFORMER, ask, grpc, post, write_model
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend import local
from lightseq_backend.__main__ import main
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_client import Client

DETAILS = "token_log_probabilities"
ROWS = [[79, 3, 12, 5], [20, 3]]
SOURCE = golden("t01_base.pb")
SEARCH: dict[str, Any] = {"sampling_method": "standard_beam", "beam_size": 3, "length_penalty": 0.7}
RULES: dict[str, Any] = {
    "early_stopping": "never", "no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_length": 4, "max_length": 12,
    "suppress_tokens": "[5]", "bad_words_ids": "[[6], [7, 8]]", "forced_eos_token_id": 9, "decoder_prefix": "[11]",
}  # fmt: skip


def detailed(tensors: Any) -> dict[str, dict[str, str]]:
    return {**tensors, "outputs": {**tensors["outputs"], DETAILS: "FP32"}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "plain", SOURCE, TRANSFORMER)
    write_model(root, "detailed", SOURCE, detailed(TRANSFORMER))
    write_model(root, "text", golden("g01_base.pb"), detailed(GPT))
    assert main(["convert", str(small_checkpoints.FOLDER / "bart"), str(root / "bart"), "--no-check"]) == 0
    with EmbeddedServer(root, device="cpu") as running:
        yield running


@pytest.fixture(scope="module")
def client(served: EmbeddedServer) -> Iterator[Any]:
    with grpc(served.grpc) as connected:
        yield connected


def test_standard_search_through_triton_is_the_engines(client: Any) -> None:
    engine = local.build(SOURCE)
    for options in (SEARCH, {**SEARCH, **RULES}, {**SEARCH, "early_stopping": True, "num_hypotheses": 2}):
        for row in ROWS:
            outputs = ask(client, "plain", "source_ids", [row], **options)
            (output,) = engine.answer([row], changes=options)
            wanted = [one.tokens.tolist() for one in output.hypotheses]
            found = outputs["target_ids"][0].tolist()
            assert [ids[: len(text)] for ids, text in zip(found, wanted, strict=True)] == wanted
            assert outputs["target_scores"][0].tolist() == pytest.approx([one.score for one in output.hypotheses])


def test_generate_takes_lists_as_json(served: EmbeddedServer, client: Any) -> None:
    status, answer = post(f"http://{served.http}/v2/models/plain/generate", {"source_ids": ROWS[0], **SEARCH, **RULES})
    assert status == 200
    assert (
        answer["target_ids"]
        == ask(client, "plain", "source_ids", ROWS[:1], **SEARCH, **RULES)["target_ids"].ravel().tolist()
    )


def test_log_probabilities_of_tokens_add_up_to_the_score(client: Any) -> None:
    outputs = ask(client, "detailed", "source_ids", ROWS[:1], **SEARCH, token_log_probabilities=True)
    ids, details = outputs["target_ids"][0], outputs[DETAILS][0]
    assert details.shape == ids.shape
    for found, score in zip(details, outputs["target_scores"][0]):
        assert found.sum() / (found != 0).sum() ** 0.7 == pytest.approx(score, rel=1e-5)
    assert DETAILS not in ask(client, "detailed", "source_ids", ROWS[:1], **SEARCH)


def test_prompt_has_no_log_probabilities(client: Any) -> None:
    options = {"sampling_method": "standard_beam", "beam_size": 2, "max_new_tokens": 4, DETAILS: True}
    outputs = ask(client, "text", "token_ids", [[79, 3, 12]], **options)
    assert outputs[DETAILS].shape == outputs["result"].shape
    assert not outputs[DETAILS][0, :3].any()
    assert (outputs[DETAILS][0, 3:] < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({DETAILS: True}, "token_log_probabilities needs an output of that name in the model's config.pbtxt"),
        ({**SEARCH, "bad_words_ids": "[3]"}, "bad_words_ids is '[3]'; it takes a value of type list"),
        ({**SEARCH, "beam_size": 17}, "beam_size is 17; it must be from 1 to"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size needs standard_beam, greedy or a sampling method"),
    ],
)
def test_options_that_cannot_be_are_refused(client: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT") as refused:
        ask(client, "plain", "source_ids", ROWS[:1], **options)
    assert message in str(refused.value)


def test_converted_model_searches_as_its_original_by_default(client: Any) -> None:
    """Its generation settings say one beam; more come with a request, lengths as there."""
    expected = np.load(small_checkpoints.FOLDER / "bart" / "expected.npz")
    ids, wanted = expected["ids.0"].tolist(), expected["greedy.0"].tolist()
    answer = ask(client, "bart", "source_ids", [ids], max_new_tokens=len(wanted))
    assert answer["target_ids"][0, 0, : len(wanted)].tolist() == wanted
    assert DETAILS not in answer


def test_converted_model_tells_the_log_probabilities_of_its_tokens(client: Any) -> None:
    options = {"sampling_method": "standard_beam", "beam_size": 3, "length_penalty": 1.0, "max_new_tokens": 6}
    answer = ask(client, "bart", "source_ids", [[5, 9, 2]], **options, token_log_probabilities=True)
    for found, score in zip(answer[DETAILS][0], answer["target_scores"][0], strict=True):
        assert found.sum() / (found != 0).sum() == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_sends_lists_and_reads_log_probabilities(served: EmbeddedServer, protocol: str) -> None:
    with Client(getattr(served, protocol), protocol=protocol) as clients:
        (plain,) = clients.translate([ROWS[0]], model="detailed", **SEARCH, bad_words_ids=[[6], [7, 8]])
        options = {**SEARCH, "bad_words_ids": [[6], [7, 8]], DETAILS: True}
        (answer,) = clients.translate([ROWS[0]], model="detailed", **options)
    assert plain.hypotheses[0].token_log_probabilities is None
    for one, other in zip(answer.hypotheses, plain.hypotheses, strict=True):
        assert one.ids == other.ids
        assert one.token_log_probabilities is not None
        assert len(one.token_log_probabilities) == len(one.ids)
        assert one.token_log_probabilities[0] < 0
