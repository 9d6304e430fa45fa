"""The shipped model repository behind a real Triton on a GPU: it answers as the engine on the CPU does.

Triton is found as `lightseq serve` finds it: an unpacked one is named by LIGHTSEQ_TRITON.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stream_cases
import tritonclient.grpc
from held_out_english import HELD_OUT, WITHIN, perplexity, pytorch_perplexity
from repositories import SCORED, TRANSFORMER, arrays, ask, ask_later, grpc, http, padded, tensor, write_model
from stream_cases import Stream
from test_scoring_served import SOURCES, TARGETS, expected
from test_trained_models import COUNTER, REPOSITORY, TRANSLATOR, count_on, engine_of, pairs
from test_trained_models import Words as Vocabulary
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend.errors import ConfigError
from lightseq_backend.request import SCORE, Output
from lightseq_backend.serving.embedded import EmbeddedServer, find_triton
from lightseq_client import Client, Words

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import perf

DEVICE, KIND = "gpu", "KIND_GPU"
SHIPPED = (
    *("transformer", "transformer_generate", "transformer_stream"),
    *("gpt", "gpt_stream", "gptlm", "gpt_en_score"),
)
ADMIN = {"admin-key": "test"}
SENTENCES = [sentence for sentence, _ in pairs("held_out.tsv")[::31]]
PROMPTS = [prompt for prompt, _ in pairs("counting.tsv")[::10]]
TEXTS = [f"{prompt} {rest}" for prompt, rest in pairs("counting.tsv")[::20]]
CONCURRENCIES = (1, 4, 16, 64)
WRECKED = 29  # a source with this id wrecks the device, in the model of that name alone
WRECKING_ENGINE = f"""
import cupy
import numpy as np
from lightseq_backend.engine.engine import Engine
from lightseq_backend.serving.engine_process import main

wreck = cupy.RawKernel('extern "C" __global__ void wreck(int* nowhere) {{ *nowhere = 1; }}', "wreck")
submit = Engine.submit

def wrecking_submit(self, requests):
    if any({WRECKED} in request.tokens for request in requests):
        with self._ops._stream:
            wreck((1,), (1,), (np.uint64(16),))
    submit(self, requests)

Engine.submit = wrecking_submit
main()
"""
WRECKING_MODEL = """
from lightseq_backend.serving.model import TritonPythonModel as Served

class TritonPythonModel(Served):
    ENGINE = "wrecking_engine"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    try:
        find_triton()
    except ConfigError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("served") / "models"
    shutil.copytree(REPOSITORY, root)
    write_model(root, "wrecked", TRANSLATOR, TRANSFORMER, kind=KIND)
    write_model(root, "huge", TRANSLATOR, TRANSFORMER, kind=KIND, parameters={"slots": 20_000_000})
    (root / "wrecked" / "1" / "model.py").write_text(WRECKING_MODEL)
    (root / "wrecked" / "1" / "wrecking_engine.py").write_text(WRECKING_ENGINE)
    settings: dict[str, Any] = {"admin_key": ADMIN["admin-key"], "start_timeout": 300, "shm_bytes": 16 << 20}
    with EmbeddedServer(root, device=DEVICE, models=SHIPPED, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def translated() -> list[Output]:
    """What the engine on the CPU makes of SENTENCES."""
    codec = Words.for_translation(REPOSITORY / "transformer")
    return engine_of(TRANSLATOR).answer([codec.encode(sentence) for sentence in SENTENCES])


def ids(output: Output) -> tuple[int, ...]:
    return tuple(output.hypotheses[0].tokens.tolist())


pytestmark = pytest.mark.timeout(400)  # the first test waits for the server; its models compile what is new


def test_shipped_models_run_on_the_gpu_in_half_precision(server: EmbeddedServer) -> None:
    loads = [line for line in server.log.splitlines() if " on cuda, fp16, " in line]
    print(*loads, sep="\n")
    assert len(loads) == len(SHIPPED)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("model", ["transformer", "transformer_generate"])
def test_translations_are_those_of_the_cpu(
    server: EmbeddedServer, translated: list[Output], protocol: str, model: str
) -> None:
    codec = Words.for_translation(REPOSITORY / "transformer")
    with Client(getattr(server, protocol), protocol) as client:
        answers = client.translate(SENTENCES, model=model, codec=codec)
    assert [answer.hypotheses[0].ids for answer in answers] == [ids(output) for output in translated]
    scores = [answer.hypotheses[0].score for answer in answers]
    np.testing.assert_allclose(scores, [output.hypotheses[0].score for output in translated], atol=0.02)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_texts_are_those_of_the_cpu(server: EmbeddedServer, protocol: str) -> None:
    codec = Words.for_generation(REPOSITORY / "gpt")
    with Client(getattr(server, protocol), protocol) as client:
        answers = client.generate(PROMPTS, codec=codec)
    counted = Vocabulary(REPOSITORY / "gpt" / "vocab.txt")
    expected = count_on(engine_of(COUNTER), counted, PROMPTS)
    found = [counted.text(list(answer.hypotheses[0].ids[answer.prompt_length :])) for answer in answers]
    assert found == expected


def test_losses_are_those_of_the_cpu(server: EmbeddedServer) -> None:
    codec = Words.for_generation(REPOSITORY / "gpt")
    with Client(server.grpc) as client:
        found = client.score(TEXTS, codec=codec)
    expected = [output.loss for output in engine_of(COUNTER).answer([codec.encode(text) for text in TEXTS], SCORE)]
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_english_has_the_perplexity_that_pytorch_gives_it(server: EmbeddedServer) -> None:
    with grpc(server.grpc) as client:
        found = [ask(client, "gpt_en_score", "token_ids", [one["ids"]])["log_probability"].item() for one in HELD_OUT]
    assert perplexity(found) == pytest.approx(pytorch_perplexity(), rel=WITHIN)


def test_many_at_once_get_what_each_gets_alone(server: EmbeddedServer, translated: list[Output]) -> None:
    codec = Words.for_translation(REPOSITORY / "transformer")
    rows = [[list(codec.encode(sentence))] for sentence in SENTENCES]
    with grpc(server.grpc) as client:
        answers = [ask_later(client, "transformer", "source_ids", row) for row in rows]
        together = [answer()["target_ids"][0, 0].tolist() for answer in answers]
    with http(server.http) as client:
        alone = [ask(client, "transformer", "source_ids", row)["target_ids"][0, 0].tolist() for row in rows]
    assert together == alone
    assert [tuple(row[: len(ids(output))]) for row, output in zip(alone, translated)] == [*map(ids, translated)]


def test_model_that_does_not_fit_does_not_load_and_says_what_would(server: EmbeddedServer) -> None:
    with http(server.http) as admin, pytest.raises(InferenceServerException) as refused:
        admin.load_model("huge", headers=ADMIN)
    message = str(refused.value)
    print(message)
    assert "huge: the engine needs " in message
    assert " MiB for 20000000 slots and 1024 prompt tokens; " in message
    assert " slots would fit" in message


def test_wrecked_model_fails_alone_and_works_again_once_it_is_loaded_anew(
    server: EmbeddedServer, translated: list[Output]
) -> None:
    good = [list(Words.for_translation(REPOSITORY / "transformer").encode(SENTENCES[0]))]
    assert WRECKED not in good[0]
    internal, illegal = "StatusCode.INTERNAL", "illegal memory access"

    def translate(client: Any, model: str) -> tuple[int, ...]:
        row = ask(client, model, "source_ids", good)["target_ids"][0, 0].tolist()
        return tuple(row[: len(ids(translated[0]))])

    with grpc(server.grpc) as client, http(server.http) as admin:
        for _ in range(2):
            admin.load_model("wrecked", headers=ADMIN)
            assert translate(client, "wrecked") == ids(translated[0])
            answers = [ask_later(client, "wrecked", "source_ids", good) for _ in range(8)]
            answers.append(ask_later(client, "wrecked", "source_ids", [[WRECKED]]))
            answers += [ask_later(client, "wrecked", "source_ids", good) for _ in range(8)]
            errors = []
            for answer in answers:  # none of them hangs
                try:
                    answer()
                except InferenceServerException as error:
                    errors.append((error.status(), illegal in error.message()))
            assert set(errors) == {(internal, True)}
            with pytest.raises(InferenceServerException, match=r"GPU 0 has failed: .*illegal memory access"):
                ask(client, "wrecked", "source_ids", good)
            assert translate(client, "transformer") == ids(translated[0])
            admin.unload_model("wrecked", headers=ADMIN)


def test_unloaded_model_is_gone_and_comes_back(server: EmbeddedServer) -> None:
    with http(server.http) as admin, grpc(server.grpc) as client:
        admin.unload_model("transformer_generate", headers=ADMIN)
        assert not admin.is_model_ready("transformer_generate")
        assert ask(client, "transformer", "source_ids", [[5, 6, 7]])["target_ids"].shape[:2] == (1, 4)
        admin.load_model("transformer_generate", headers=ADMIN)
        assert ask(client, "transformer_generate", "src_ids:0", [[5, 6, 7]])["trg_ids:0"].shape[:2] == (1, 4)


# Streams, stops, cancellation, scores --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """The models of stream_cases, whose long texts take a GPU a second for all their layers, and one that scores."""
    root = tmp_path_factory.mktemp("small")
    stream_cases.write_models(root, KIND, layers=24)
    write_model(root, "scorer", golden("t01_base.pb"), SCORED, kind=KIND, parameters={"precision": "fp32"})
    with EmbeddedServer(root, device=DEVICE, start_timeout=300, shm_bytes=16 << 20) as running:
        yield running


@pytest.mark.parametrize("case", stream_cases.CASES, ids=lambda case: case.__name__)
def test_stream(small: EmbeddedServer, case: Callable[[EmbeddedServer, Stream], None]) -> None:
    with Stream(small.grpc) as stream:
        case(small, stream)


def test_scores_of_targets_are_those_of_the_cpu(small: EmbeddedServer) -> None:
    given = [tensor(tritonclient.grpc, "source_ids", padded(SOURCES, 0))]
    given.append(tensor(tritonclient.grpc, "target_ids", padded(TARGETS, 99)))
    with grpc(small.grpc) as client:
        found = arrays(client.infer("scorer", given))
    for name, array in expected("t01_base.pb", padded(SOURCES, 0).tolist(), TARGETS).items():
        np.testing.assert_allclose(found[name], array, atol=2e-3)


@pytest.mark.parametrize("model", ["transformer_stream", "gpt_stream"])
def test_shipped_streams_end_as_the_other_model_answers(server: EmbeddedServer, model: str) -> None:
    if model == "gpt_stream":
        name, outputs, row = "token_ids", "result", Words.for_generation(REPOSITORY / "gpt").encode(PROMPTS[0])
    else:
        codec = Words.for_translation(REPOSITORY / "transformer")
        name, outputs, row = "source_ids", "target_ids", codec.encode(SENTENCES[0])
    with grpc(server.grpc) as client, Stream(server.grpc) as stream:
        *parts, final = stream.all(model, name, [list(row)])
        plain = ask(client, model.removesuffix("_stream"), name, [list(row)])[outputs]
    assert len(parts) > 0
    np.testing.assert_array_equal(final[outputs], plain)


# perf_analyzer -------------------------------------------------------------------------------------------------------


WINDOWS = ["--measurement-interval", "1000", "--stability-percentage", "50", "--max-trials", "4"]


def measure(address: str, rows: Path, concurrency: int, report: Path) -> dict[str, str]:
    """One row of perf_analyzer's report, column name -> value; a few seconds of load."""
    more = [*WINDOWS, "-f", str(report)]
    perf.analyze(perf.install(), address, "transformer", rows, concurrency, more)
    with report.open(newline="") as lines:
        return next(csv.DictReader(lines))


def test_perf_analyzer_measures_it(server: EmbeddedServer, tmp_path: Path) -> None:
    codec = Words.for_translation(REPOSITORY / "transformer")
    encoded = [list(codec.encode(sentence)) for sentence in SENTENCES]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"data": [{"source_ids": {"content": row, "shape": [len(row)]}} for row in encoded]}))
    print("\ntransformer, beam 4, over gRPC\nconcurrency   requests/s       p50 us       p99 us")
    rates = []
    for concurrency in CONCURRENCIES:
        row = measure(server.grpc, rows, concurrency, tmp_path / f"{concurrency}.csv")
        print(
            f"{concurrency:>11}"
            + "".join(f"{row[key]:>13}" for key in ("Inferences/Second", "p50 latency", "p99 latency"))
        )
        rates.append(float(row["Inferences/Second"]))
    assert min(rates) > 0
    assert max(rates[1:]) > rates[0]  # several share a step
