"""Serving: which tensors mean what, LightSeq's shapes, options, and one answer for every request."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import tritonclient.grpc
from repositories import (
    BEST,
    GENERATE,
    GPT,
    GPTLM,
    SCORED,
    TRANSFORMER,
    arrays,
    ask,
    ask_later,
    golden_cases,
    grpc,
    http,
    post,
    tensor,
    write_model,
)
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend.config import DIALECTS, EngineConfig
from lightseq_backend.errors import ConfigError
from lightseq_backend.request import Hypothesis, Output
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_backend.serving.settings import Settings, read_settings
from lightseq_backend.serving.wire import Wire, read_wire

ROOT = Path(__file__).resolve().parents[1]
MODELS = (
    *("transformer", "transformer_generate", "transformer_stream", "fr2en"),
    *("gpt", "gpt_stream", "gptlm", "gpt_en", "gpt_en_score"),
)
END = 2  # small_models' end id
GPT_ALL = {"inputs": {"token_ids": "INT32"}, "outputs": {"gpt_out": "INT32", "gpt_scores": "FP32"}}
GPT_GENERATE = {"inputs": {"inputs_ids": "INT32"}, "outputs": {"outputs_ids": "INT32"}}


# Tensors, without a server ----------------------------------------------------------------------------------------


def wire(tensors: dict[str, dict[str, str]], rows: int = 8) -> Wire:
    faults: list[str] = []
    result = read_wire(triton_config(tensors, rows), faults)
    assert faults == []
    assert result is not None
    return result


def triton_config(tensors: dict[str, dict[str, str]], rows: int = 8) -> dict[str, Any]:
    def given(part: str) -> list[dict[str, Any]]:
        return [{"name": name, "data_type": f"TYPE_{kind}", "dims": [-1]} for name, kind in tensors[part].items()]

    return {"max_batch_size": rows, "input": given("inputs"), "output": given("outputs"), "parameters": {}}


def hypothesis(*tokens: int, score: float = -1.0, finished: bool = True) -> Hypothesis:
    return Hypothesis(np.array(tokens, np.int32), score, finished)


ENDED = Output((hypothesis(7, END, score=-0.5), hypothesis(7, 8, END, score=-0.75)), steps=3)
CUT = Output((hypothesis(5, END), hypothesis(5, 6, 7, 8, finished=False)), steps=4, cut=True)
EMPTY = Output((hypothesis(finished=False), hypothesis(finished=False)), steps=0, cut=True)
HEAD, _ = small_models.transformer()
V0, _ = small_models.transformer(dialect=DIALECTS["v0"])
TEXT, _ = small_models.gpt()
ROW = np.array([3, 4], np.int32)


@pytest.mark.parametrize(
    ("tensors", "config", "output", "expected"),
    [
        (TRANSFORMER, HEAD, ENDED, [[7, 2, 2], [7, 8, 2]]),
        (TRANSFORMER, HEAD, CUT, [[5, 2, 2, 2, 2], [5, 6, 7, 8, 2]]),
        (TRANSFORMER, HEAD, EMPTY, [[2], [2]]),
        (GENERATE, HEAD, CUT, [[5, 2, 2, 2, 2], [5, 6, 7, 8, 2]]),
        # V0's generate server has no column for the end id of a search that was cut, its other server has.
        (GENERATE, V0, CUT, [[5, 2, 2, 2], [5, 6, 7, 2]]),
        (GENERATE, V0, ENDED, [[7, 2, 2], [7, 8, 2]]),
        (GENERATE, V0, EMPTY, [[], []]),
        (BEST, V0, CUT, [5, 2, 2, 2, 2]),
        (BEST, HEAD, ENDED, [7, 2, 2]),
        (GPT_ALL, TEXT, CUT, [[3, 4, 5, 2, 2, 2], [3, 4, 5, 6, 7, 8]]),
        (GPT, TEXT, Output((hypothesis(5, 6, finished=False),), steps=2, cut=True), [3, 4, 5, 6]),
        (GPT_GENERATE, TEXT, Output((hypothesis(5, END),), steps=2), [3, 4, 5, 2]),
    ],
)
def test_ids_have_the_shape_of_lightseqs_server(tensors: Any, config: Any, output: Output, expected: Any) -> None:
    form = wire(tensors).form
    assert wire(tensors).answer([ROW], [output], config)[str(form.ids)].tolist() == [expected]


def test_rows_of_a_batch_are_filled_up_with_the_end_id() -> None:
    tensors = wire(TRANSFORMER).answer([ROW, ROW], [ENDED, CUT], HEAD)
    assert tensors["target_ids"].tolist() == [
        [[7, 2, 2, 2, 2], [7, 8, 2, 2, 2]],
        [[5, 2, 2, 2, 2], [5, 6, 7, 8, 2]],
    ]
    assert tensors["target_scores"].tolist() == [[-0.5, -0.75], [-1.0, -1.0]]


def test_padding_around_a_prompt_is_not_part_of_the_text() -> None:
    padding = TEXT.padding_id
    rows = [np.array([padding, 3, 4]), np.array([5, padding, padding])]
    outputs = [Output((hypothesis(6, finished=False),), steps=1, cut=True)] * 2
    assert wire(GPT).answer(rows, outputs, TEXT)["result"].tolist() == [[3, 4, 6], [5, 6, END]]


def test_losses_are_a_column() -> None:
    losses = wire(GPTLM).answer([ROW, ROW], [Output(loss=1.5), Output(loss=0.0)], TEXT)["loss"]
    assert (losses.dtype, losses.tolist()) == (np.float32, [[1.5], [0.0]])


def test_without_batch_dimension_a_request_is_one_row() -> None:
    unbatched = wire(TRANSFORMER, rows=0)
    assert [row.tolist() for row in unbatched.rows(ROW, "source_ids")] == [[3, 4]]
    tensors = unbatched.answer([ROW], [ENDED], HEAD)
    assert tensors["target_ids"].tolist() == [[7, 2, 2], [7, 8, 2]]
    assert tensors["target_scores"].tolist() == [-0.5, -0.75]


def test_triton_keeps_its_own_parameters() -> None:
    own = {"priority": 1, "timeout": 5, "sequence_id": 3, "binary_data_output": True, "triton_enable_empty": False}
    assert wire(TRANSFORMER).changes(json.dumps({**own, "beam_size": 2})) == {"beam_size": 2}


# Settings, without a server ---------------------------------------------------------------------------------------


def triton_arguments(directory: Path, config: Any = None, **changes: str) -> dict[str, str]:
    """What Triton hands to `initialize`."""
    return {
        "model_config": json.dumps(triton_config(TRANSFORMER) if config is None else config),
        "model_name": "mine",
        "model_version": "1",
        "model_instance_name": "mine_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
        "model_repository": str(directory),
        **changes,
    }


def settings(directory: Path, tensors: Any = TRANSFORMER, environment: Any = None, **changes: Any) -> Settings:
    parameters = {key: {"string_value": str(value)} for key, value in changes.pop("parameters", {}).items()}
    config = {**triton_config(tensors), "parameters": parameters, **changes}
    return read_settings(triton_arguments(directory, config), environment or {})


@pytest.mark.parametrize(
    "name", ["transformer.pb", "mine.pb", "transformer.hdf5", "mine.hdf5", "transformer.safetensors"]
)
def test_weights_beside_the_configuration_are_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert settings(tmp_path).weights == tmp_path / name


def test_lightseqs_protobuf_file_goes_before_its_hdf5_file(tmp_path: Path) -> None:
    for name in ("transformer.safetensors", "transformer.hdf5", "mine.pb"):
        (tmp_path / name).touch()
    assert settings(tmp_path).weights == tmp_path / "mine.pb"
    (tmp_path / "mine.pb").unlink()
    assert settings(tmp_path).weights == tmp_path / "transformer.hdf5"


def test_default_model_filename_names_the_weights_first(tmp_path: Path) -> None:
    for name in ("transformer.pb", "other.pb"):
        (tmp_path / name).touch()
    assert settings(tmp_path, default_model_filename="other.pb").weights == tmp_path / "other.pb"


@pytest.mark.parametrize("name", ["model.py", "libtransformer.so"])
def test_default_model_filename_of_a_program_names_no_weights(tmp_path: Path, name: str) -> None:
    for file in ("transformer.pb", name):
        (tmp_path / file).touch()
    assert settings(tmp_path, default_model_filename=name).weights == tmp_path / "transformer.pb"


def test_weights_are_found_in_the_model_zoo_of_lightseqs_first_release(tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    (zoo / "mine").mkdir(parents=True)
    (zoo / "mine" / "gpt.pb").touch()
    found = settings(tmp_path, GPTLM, environment={"MODEL_ZOO": str(zoo)})
    assert found.weights == zoo / "mine" / "gpt.pb"


def test_engine_has_room_for_the_files_own_beams_and_a_full_batch(tmp_path: Path) -> None:
    (tmp_path / "transformer.pb").touch()
    file, _ = small_models.transformer()
    wide = settings(tmp_path, max_batch_size=512)
    config = small_models.transformer(decoding=type(file.decoding)(beam_size=40))[0]
    assert wide.engine_config(config) == EngineConfig(
        slots=40, max_beam_size=40, queue=512, queue_tokens=1 << 18, queue_seconds=300, scores=False
    )


def test_engine_sizes_of_the_configuration_count(tmp_path: Path) -> None:
    (tmp_path / "transformer.pb").touch()
    sizes = {"slots": 8, "queue": 9, "queue_tokens": 99, "queue_seconds": 7, "burst": 3, "prompt_tokens": 77}
    wanted = EngineConfig(**sizes, max_beam_size=8, scores=False)  # type: ignore[arg-type]
    assert settings(tmp_path, parameters=sizes).engine_config(HEAD) == wanted


def test_scoring_takes_no_memory_for_slots(tmp_path: Path) -> None:
    (tmp_path / "gpt.pb").touch()
    assert settings(tmp_path, GPTLM).engine_config(TEXT).slots == 1


def test_only_a_model_that_scores_is_made_ready_to(tmp_path: Path) -> None:
    for kind, tensors, config, scores in (
        ("gpt", GPTLM, TEXT, True),
        ("gpt", GPT, TEXT, False),
        ("transformer", TRANSFORMER, HEAD, False),
        ("transformer", SCORED, HEAD, True),
    ):
        (tmp_path / f"{kind}.pb").touch()
        assert settings(tmp_path, tensors).engine_config(config).scores == scores


def test_all_faults_of_a_configuration_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, parameters={"slotz": 1, "slots": 0, "dialect": "v7", "precision": "int4"})
    assert len(str(error.value).splitlines()) == 5  # and the missing weights


# Through Triton ---------------------------------------------------------------------------------------------------

ADMIN = {"admin-key": "test"}
SERVED = (
    *("head", "deep", "best", "v0", "v0_best", "unbatched", "counted", "twice", "leaving"),
    *("text", "text_all", "text_old", "theirs"),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    t01, t11, g01 = golden("t01_base.pb"), golden("t11_enc3_dec1.pb"), golden("g01_base.pb")
    old = {"parameters": {"dialect": "v0"}}
    write_model(root, "head", t01, TRANSFORMER, parameters={"model_type": "Transformer"})
    write_model(root, "deep", t11, TRANSFORMER)
    write_model(root, "best", t01, BEST)
    write_model(root, "counted", t01, BEST, parameters={"slots": 12})
    write_model(root, "v0", t11, GENERATE, **old)
    write_model(root, "v0_best", t11, BEST, **old)
    write_model(root, "unbatched", t01, TRANSFORMER, rows=0)
    write_model(root, "text", g01, GPT)
    write_model(root, "text_all", g01, GPT_ALL)
    write_model(root, "text_old", g01, GPT_GENERATE)
    write_model(root, "twice", t01, TRANSFORMER, more="instance_group [ { count: 1 kind: KIND_CPU } ]")
    write_model(root, "leaving", t01, TRANSFORMER, parameters={"burst": 100, "slots": 4})
    write_lightseq_model(root, "theirs", t01)
    with EmbeddedServer(root, device="cpu", models=SERVED, admin_key=ADMIN["admin-key"]) as running:
        yield running


def write_lightseq_model(root: Path, name: str, weights: Path) -> None:
    """A model directory as LightSeq's Triton backend takes it: no program, its own backend, its own parameters."""
    (root / name / "1").mkdir(parents=True)
    (root / name / "transformer.pb").symlink_to(weights)
    (root / name / "config.pbtxt").write_text(
        f"""name: "{name}"
backend: "lightseq"
max_batch_size: 8
input [ {{ name: "source_ids" data_type: TYPE_INT32 dims: [ -1 ] }} ]
output [
  {{ name: "target_ids" data_type: TYPE_INT32 dims: [ -1 ] }},
  {{ name: "target_scores" data_type: TYPE_FP32 dims: [ -1 ] }}
]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
default_model_filename: "transformer.pb"
parameters: [ {{ key: "model_type" value: {{ string_value: "Transformer" }} }} ]
"""
    )


@pytest.fixture(scope="module")
def client(served: EmbeddedServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with grpc(served.grpc) as connected:
        yield connected


def test_lightseq_model_directory_is_served_unchanged(client: Any) -> None:
    case = golden_cases("t01_base")[0]
    (expected,) = case["rows"]
    answer = ask(client, "theirs", "source_ids", case["source_ids"])
    assert answer["target_ids"].tolist() == [expected["ids"]]
    np.testing.assert_allclose(answer["target_scores"], [expected["scores"]], atol=1e-4)


def test_best_hypothesis_is_the_first_of_all(client: Any) -> None:
    for case in golden_cases("t01_base"):
        best = ask(client, "best", "src_ids:0", case["source_ids"])
        assert list(best) == ["trg_ids:0"]
        everything = ask(client, "head", "source_ids", case["source_ids"])["target_ids"]
        np.testing.assert_array_equal(best["trg_ids:0"], everything[:, 0])


def test_first_release_allows_one_more_token(client: Any) -> None:
    # lightseq_format.md 3.5: where M = 2 columns leave later releases no token, V0 generates one. Its generate server
    # overwrites that by the end id; its other server has one column more for it.
    source = [[29, 29]]  # and an extra_decode_length of 0
    assert ask(client, "deep", "source_ids", source)["target_ids"].tolist() == [[[99]] * 4]
    assert ask(client, "v0", "src_ids:0", source)["trg_ids:0"].tolist() == [[[99]] * 4]
    ((token, end),) = ask(client, "v0_best", "src_ids:0", source)["trg_ids:0"].tolist()
    assert (token != 99, end) == (True, 99)


def test_an_answer_without_a_column_arrives(client: Any) -> None:
    # M = 1: V0's generate server has M - 1 columns.
    assert ask(client, "v0", "src_ids:0", [[29]])["trg_ids:0"].shape == (1, 4, 0)


def test_unbatched_model_takes_and_gives_one_row(client: Any) -> None:
    case = golden_cases("t01_base")[0]
    outputs = ask(client, "unbatched", "source_ids", case["source_ids"][0])
    assert outputs["target_ids"].tolist() == case["rows"][0]["ids"]
    assert outputs["target_scores"].shape == (4,)


def test_gpt_gives_one_text_unless_more_are_asked_for(client: Any) -> None:
    sampled = {"sampling_method": "topk", "top_k": 5, "seed": 3}
    prompts = [[5, 6], [7, 8]]
    one = ask(client, "text", "token_ids", prompts, **sampled)["result"]
    three = ask(client, "text", "token_ids", prompts, num_hypotheses=3, **sampled)["result"]
    assert (one.ndim, three.ndim, three.shape[:2]) == (2, 3, (2, 3))


def test_gpt_beam_search_gives_all_texts_and_scores_best_first(client: Any) -> None:
    searched = {"sampling_method": "beam_search", "beam_size": 3, "max_new_tokens": 4}
    outputs = ask(client, "text_all", "token_ids", [[5, 6]], **searched)
    assert outputs["gpt_out"].shape[:2] == (1, 3)
    assert (np.diff(outputs["gpt_scores"]) <= 0).all()
    best = ask(client, "text", "token_ids", [[5, 6]], **searched)["result"]
    np.testing.assert_array_equal(outputs["gpt_out"][:, 0], best)


def test_gpt_under_its_other_names_gives_the_same(client: Any) -> None:
    prompts = [[5, 6], [7, 8]]
    old, new = ask(client, "text_old", "inputs_ids", prompts), ask(client, "text", "token_ids", prompts)
    np.testing.assert_array_equal(old["outputs_ids"], new["result"])


def test_prompts_of_different_lengths_continue_as_each_alone(client: Any) -> None:
    prompts = [[5, 6, 7, 8], [9, 0, 0, 0], [10, 11, 0, 0]]  # 0 is padding
    options = {"max_new_tokens": 3}
    together = ask(client, "text", "token_ids", prompts, **options)["result"]
    for row, prompt in zip(together.tolist(), prompts):
        (alone,) = ask(client, "text", "token_ids", [[token for token in prompt if token]], **options)[
            "result"
        ].tolist()
        assert row == alone + [127] * (len(row) - len(alone))


def test_seed_decides_the_text(client: Any) -> None:
    def sample(seed: int) -> list[int]:
        return ask(client, "text", "token_ids", [[5]], sampling_method="sample", seed=seed)["result"].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_options_of_a_request_count(client: Any) -> None:
    source = golden_cases("t01_base")[0]["source_ids"]
    outputs = ask(client, "head", "source_ids", source, beam_size=6, num_hypotheses=2, max_new_tokens=3)
    assert outputs["target_ids"].shape[:2] == outputs["target_scores"].shape == (1, 2)
    assert outputs["target_ids"].shape[2] <= 4


@pytest.mark.parametrize("model", ["head", "text"])
def test_generate_takes_options_beside_the_ids(served: EmbeddedServer, client: Any, model: str) -> None:
    name, output = {"head": ("source_ids", "target_ids"), "text": ("token_ids", "result")}[model]
    options = {"max_new_tokens": 3, "length_penalty": 0.5}
    status, answer = post(f"http://{served.http}/v2/models/{model}/generate", {name: [79, 3], **options})
    assert status == 200
    assert answer[output] == ask(client, model, name, [[79, 3]], **options)[output].ravel().tolist()


def test_http_and_grpc_agree(served: EmbeddedServer, client: Any) -> None:
    case = golden_cases("t01_base")[3]
    with http(served.http) as other:
        ours, theirs = (ask(one, "head", "source_ids", case["source_ids"]) for one in (client, other))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_client_may_ask_for_one_output_alone(client: Any) -> None:
    wanted = [tritonclient.grpc.InferRequestedOutput("target_scores")]
    given = [tensor(tritonclient.grpc, "source_ids", [[79]])]
    assert list(arrays(client.infer("head", given, outputs=wanted))) == ["target_scores"]


def test_two_instances_share_the_work(client: Any) -> None:
    case = golden_cases("t01_base")[0]
    answers = [ask_later(client, "twice", "source_ids", case["source_ids"]) for _ in range(8)]
    assert [answer()["target_ids"].tolist() for answer in answers] == [[case["rows"][0]["ids"]]] * 8


def test_unloading_answers_what_is_under_way(served: EmbeddedServer, client: Any) -> None:
    case = golden_cases("t01_base")[0]
    answers = [ask_later(client, "leaving", "source_ids", case["source_ids"]) for _ in range(4)]
    answers[0]()  # the others wait in the queue by now, each for many steps
    with http(served.http) as admin:
        admin.unload_model("leaving", headers=ADMIN)
    assert [answer()["target_ids"].tolist() for answer in answers] == [[case["rows"][0]["ids"]]] * 4


def test_metrics_count_what_a_model_did(served: EmbeddedServer, client: Any) -> None:
    with pytest.raises(InferenceServerException):
        ask(client, "counted", "src_ids:0", [[999]])
    (text,) = ask(client, "counted", "src_ids:0", [[79, 3]])["trg_ids:0"].tolist()
    wanted = {
        'requests_total{outcome="refused"}': 1,
        'requests_total{outcome="answered"}': 1,
        'requests_total{outcome="overloaded"}': 0,
        'requests_total{outcome="failed"}': 0,
        "prompt_tokens_total": 2,
        "generated_tokens_total": text.index(99) + 1,  # what follows the end id fills up
        "slots": 12,
        "slots_in_use": 0,
        "queue_rows": 0,
    }
    deadline = time.monotonic() + 10
    found: dict[str, float] = {}
    while wanted.items() - found.items() and time.monotonic() < deadline:
        found = metrics_of(served, "counted")
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["engine_bytes"] > 0
    assert found["steps_total"] >= len(text)  # other beams went on


def metrics_of(server: EmbeddedServer, model: str) -> dict[str, float]:
    """Our metrics of one model, without the prefix and the labels that all have in common."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    found = {}
    for line in lines:
        match = re.fullmatch(r"lightseq_(\w+)\{(.*)\} (\S+)", line)
        if match and f'model="{model}"' in match[2]:
            outcome = re.search(r'outcome="\w+"', match[2])
            found[match[1] + (f"{{{outcome[0]}}}" if outcome else "")] = float(match[3])
    return found


# The shipped repository -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_shipped_configurations_differ_in_the_device_alone(model: str) -> None:
    gpu, cpu = (
        [line for line in (ROOT / "model_repository" / model / name).read_text().splitlines() if line[0] != "#"]
        for name in ("config.pbtxt", "configs/cpu.pbtxt")
    )
    differing = [(one, other) for one, other in zip(gpu, cpu, strict=True) if one != other]
    assert differing == [("instance_group [ { kind: KIND_GPU } ]", "instance_group [ { kind: KIND_CPU } ]")]


def test_shipped_models_serve(server: EmbeddedServer) -> None:
    asked = {
        "transformer": "source_ids",
        "transformer_generate": "src_ids:0",
        "gpt": "token_ids",
        "gptlm": "inputs_ids",
    }
    with grpc(server.grpc) as client:
        answers = {model: ask(client, model, name, [[5, 6, 7], [8, 9, 10]]) for model, name in asked.items()}
    assert {name: array.shape[0] for outputs in answers.values() for name, array in outputs.items()} == dict.fromkeys(
        ["target_ids", "target_scores", "trg_ids:0", "score", "result", "loss"], 2
    )
    np.testing.assert_array_equal(answers["transformer"]["target_ids"], answers["transformer_generate"]["trg_ids:0"])
