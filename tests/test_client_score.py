"""Scores of given translations and of texts, asked for with the client: both of its protocols, through Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from repositories import SCORED, TRANSFORMER, write_model
from test_scoring_served import NUMPY_1, SCORED_GPT, SOURCES, TARGETS, TEXTS
from test_text import write_words
from weight_files import golden

from lightseq_backend import local
from lightseq_backend.request import SCORE as ENGINE_SCORE
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_client import SCORE, Answer, Client, Failure, Ids, ModelError, RowError, ServerText, Words
from lightseq_client.__main__ import main
from lightseq_client.answers import Row, grouped
from lightseq_client.signature import signature
from lightseq_client.vocabulary import Codec

PROTOCOLS = ("grpc", "http")
PAIRS = [*zip(SOURCES, TARGETS)]
TEXT_METADATA = dict.fromkeys(TEXTS, "BYTES")
LINES = ["5 9 20 95\t17 4 99", "7 95\t8 9 10 11 12 99", "30 31 32 33 34\t40 99"]
needs_text = pytest.mark.skipif(not NUMPY_1, reason="Triton's Python stub takes no strings under NumPy 2")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_model(
        root, "scorer", golden("t01_base.pb"), {**SCORED, "inputs": {**SCORED["inputs"], **TEXTS}}, optional=True
    )
    write_words(root / "scorer")
    write_model(root, "of_ids", golden("t01_base.pb"), SCORED)
    write_model(root, "translator", golden("t01_base.pb"), TRANSFORMER)
    write_model(root, "text_scorer", golden("g01_base.pb"), SCORED_GPT)
    return root


@pytest.fixture(scope="module")
def triton(repository: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(repository, device="cpu", stop_timeout=5) as server:
        yield server


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, triton: EmbeddedServer) -> Iterator[Client]:
    with Client(getattr(triton, request.param), request.param) as connected:
        yield connected


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    """Of PAIRS, the engine's own: what each token of the target is worth."""
    engine = local.build(golden("t01_base.pb"))
    outputs = [engine.answer([pair[0]], ENGINE_SCORE, targets=[pair[1]])[0] for pair in PAIRS]
    return [output.target_log_probabilities.tolist() for output in outputs]


def at(server: EmbeddedServer, model: str = "scorer", protocol: str = "grpc") -> list[str]:
    return ["--quiet", "--model", model, "--url", getattr(server, protocol), "--protocol", protocol]


def same(answers: list[Answer], wanted: list[list[float]]) -> None:
    for answer, parts in zip(answers, wanted, strict=True):
        assert answer.log_probability == pytest.approx(sum(parts), rel=1e-5)
        assert answer.token_log_probabilities == pytest.approx(parts, rel=1e-5)
        assert (answer.loss, answer.hypotheses) == (None, ())


# The library


@pytest.mark.parametrize("model", ["scorer", "of_ids"])
@pytest.mark.parametrize(("rows_per_request", "padding_id"), [(1, None), (3, None), (2, 0), (3, 0)])
def test_translations_are_scored_as_without_a_server(
    client: Client, expected: list[list[float]], model: str, rows_per_request: int, padding_id: int | None
) -> None:
    answers = client.score_targets(
        PAIRS, model=model, codec=Ids(padding_id=padding_id), rows_per_request=rows_per_request
    )
    same(answers, expected)
    assert [(list(answer.ids), list(answer.target)) for answer in answers] == PAIRS
    assert [answer.tokens for answer in answers] == [3, 6, 2]


def test_pairs_of_the_same_lengths_share_a_request(client: Client, expected: list[list[float]]) -> None:
    answers = client.score_targets([PAIRS[0], PAIRS[1], PAIRS[0]], model="of_ids", rows_per_request=3)
    same(answers, [expected[0], expected[1], expected[0]])
    assert answers[0].latency == answers[2].latency != answers[1].latency


@needs_text
def test_text_is_scored_as_its_ids(client: Client, repository: Path) -> None:
    of_ids = client.score_targets([([5, 9, 95], [17, 4, 99]), ([7, 95], [8, 99])], model="scorer")
    wanted = [[*(answer.token_log_probabilities or ())] for answer in of_ids]
    pairs = [("s5 s9", "t17 t4"), ("s7", "t8")]
    codecs: list[Codec] = [ServerText(), Words.for_translation(repository / "scorer")]
    for codec in codecs:
        same(client.score_targets(pairs, model="scorer", codec=codec), wanted)
    together = client.score_targets(pairs, model="scorer", codec=ServerText(), rows_per_request=2)
    same(together, [wanted[0], [*wanted[1], 0.0]])


def test_bad_pair_harms_itself_alone(client: Client, expected: list[list[float]]) -> None:
    pairs = [PAIRS[0], ([5, 95], [100]), ([5], []), PAIRS[2]]
    found = [*client.answers(SCORE, pairs, model="of_ids", codec=Ids(padding_id=0), rows_per_request=4)]
    failures = [item for item in found if isinstance(item, Failure)]
    same([item for item in found if isinstance(item, Answer)], [expected[0], expected[2]])
    assert [failure.number for failure in failures] == [2, 3]
    assert "id 100 at column 0 of the target is outside the vocabulary" in str(failures[0].error)
    assert str(failures[1].error) == "the target is empty"


@pytest.mark.parametrize(
    ("model", "row", "message"),
    [
        ("of_ids", [5, 6], "the row has 1 part; model of_ids scores two"),
        ("of_ids", "5 6", "the row has 1 part"),
        ("of_ids", ([5], [6], [7]), "the row has 3 parts"),
        ("of_ids", ([5], "x"), "'x' is not an id"),
        ("text_scorer", ([5], [6]), "the row has 2 parts; model text_scorer takes one text, or one row of ids"),
    ],
)
def test_row_of_another_kind_is_refused(client: Client, model: str, row: object, message: str) -> None:
    with pytest.raises(RowError, match=message):
        client.score_targets([row], model=model)  # type: ignore[list-item]


def test_sums_are_not_handed_out_as_losses(client: Client) -> None:
    for model in ("scorer", "text_scorer"):
        with pytest.raises(ModelError, match="gives log_probability, not a loss"):
            client.score([[3, 4, 5]], model=model)


def test_text_has_its_sum_and_its_tokens(client: Client) -> None:
    rows = [[3, 4, 5], [6, 7]]
    engine = local.build(golden("g01_base.pb"))
    wanted = [engine.answer([row], ENGINE_SCORE)[0].target_log_probabilities.tolist() for row in rows]
    same([*client.answers(SCORE, rows, model="text_scorer")], wanted)  # type: ignore[arg-type]


def test_translator_that_scores_nothing_is_refused_with_its_tensors(client: Client) -> None:
    with pytest.raises(ModelError, match=r"translator cannot score.*target_ids too.*inputs source_ids INT32 and"):
        client.score_targets(PAIRS, model="translator")


# Metadata and shapes


def test_pairs_share_a_request_where_both_lengths_are_the_same() -> None:
    rows = [Row(1, "", (5,), (7, 8)), Row(2, "", (6,), (7,)), Row(3, "", (9,), (8, 8)), Row(4, "", (9, 9), (8, 8))]
    assert [[row.number for row in group] for group in grouped(rows, may_pad=False)] == [[1, 3], [2], [4]]


@pytest.mark.parametrize(
    ("inputs", "takes_text", "target"),
    [
        ({"text_input": "BYTES", "source_ids": "INT32", "target_ids": "INT64"}, False, ("target_ids", "INT64")),
        ({**TEXT_METADATA, "source_ids": "INT32", "target_ids": "INT32"}, True, ("target_ids", "INT32")),
        ({"text_input": "BYTES", "token_ids": "INT32"}, True, None),
    ],
)
def test_kind_of_a_model_is_told_by_its_inputs(
    inputs: dict[str, str], takes_text: bool, target: tuple[str, str] | None
) -> None:
    outputs = {"log_probability": "FP32", "token_log_probabilities": "FP32"}
    sides = {"inputs": inputs, "outputs": outputs}
    found = signature(
        SCORE, "m", {side: [{"name": n, "datatype": d} for n, d in given.items()] for side, given in sides.items()}
    )
    assert (found.takes_text(SCORE), found.target, found.scores) == (takes_text, target, "log_probability")


# Words for both sides


def test_target_is_its_own_vocabularys_words_and_the_end(tmp_path: Path) -> None:
    (tmp_path / "source.vocab.txt").write_text("<unk>\nun\n</s>\nchat\n")
    (tmp_path / "target.vocab.txt").write_text("<unk>\ncat\none\nun\n</s>\n")
    warnings: list[str] = []
    words = Words.for_translation(tmp_path, warn=warnings.append)
    assert (words.encode("un chat"), words.encode_target("one cat")) == ([1, 3, 2], [2, 1, 4])
    assert (words.encode("one"), words.encode_target("chat one")) == ([0, 2], [0, 2, 4])
    assert [text.split(": not in ")[0] for text in warnings] == ["'one'", "'chat'"]
    assert "target.vocab.txt" in warnings[1]
    with pytest.raises(RowError, match="the target is empty"):
        words.encode_target(" ")


# The command


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("more", [[], ["--rows-per-request", "3", "--padding-id", "0"]])
def test_command_writes_a_sum_a_line(
    triton: EmbeddedServer,
    expected: list[list[float]],
    capfd: pytest.CaptureFixture[str],
    protocol: str,
    more: list[str],
) -> None:
    assert main(["score", *LINES, *more, *at(triton, "of_ids", protocol)]) == 0
    found = [float(line) for line in capfd.readouterr().out.splitlines()]
    np.testing.assert_allclose(found, [sum(parts) for parts in expected], atol=1e-5)


def test_command_names_lines_that_are_no_pairs(
    triton: EmbeddedServer, expected: list[list[float]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "5 9", LINES[0], "5\t6\t7", "5\t", "5\t100", *at(triton)]) == 1
    output = capfd.readouterr()
    first, second, *others = output.out.split("\n")
    assert (first, others) == ("", ["", "", "", ""])
    assert float(second) == pytest.approx(sum(expected[0]), abs=1e-5)
    told = output.err.splitlines()
    assert told[0] == (
        "lightseq-client: line 1: the row has 1 part; model scorer scores two: a source and its target, in a line with "
        "a tab between"
    )
    assert [line.split(": ")[1] for line in told] == ["line 1", "line 3", "line 4", "line 5"]
    assert told[2].endswith("the target is empty")


def test_command_names_pairs_for_a_model_of_texts(triton: EmbeddedServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "3 4\t5", *at(triton, "text_scorer")]) == 1
    output = capfd.readouterr()
    assert output.out == "\n"
    assert output.err.startswith("lightseq-client: line 1: the row has 2 parts; model text_scorer takes one text")


def test_command_writes_each_token_as_json(
    triton: EmbeddedServer, expected: list[list[float]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "--json", LINES[2], *at(triton)]) == 0
    line = json.loads(capfd.readouterr().out)
    assert line.pop("latency_ms") > 0
    assert line.pop("log_probability") == pytest.approx(sum(expected[2]), rel=1e-5)
    assert line.pop("token_log_probabilities") == pytest.approx(expected[2], rel=1e-5)
    assert line == {
        "line": 1,
        "input": ["30 31 32 33 34", "40 99"],
        "input_ids": [30, 31, 32, 33, 34],
        "target_ids": [40, 99],
    }


@needs_text
def test_command_scores_text(triton: EmbeddedServer, repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "5 9 95\t17 4 99", *at(triton)]) == 0
    by_ids = capfd.readouterr().out
    for more in ([], ["--vocabulary", str(repository / "scorer")]):
        assert main(["score", "--text", "s5 s9\tt17 t4", *more, *at(triton)]) == 0
        assert capfd.readouterr().out == by_ids
    assert main(["score", "--text", "s5 s9\tt17 t4", "s5\tt5", "--rows-per-request", "2", *at(triton)]) == 0
    assert capfd.readouterr().out.splitlines()[0] + "\n" == by_ids
