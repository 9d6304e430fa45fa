"""The client: its pure parts against literals, both of its protocols against a real Triton."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_client import (
    SCORE,
    TRANSLATE,
    Answer,
    Client,
    Failure,
    Ids,
    ModelError,
    RequestFailed,
    RequestTimeout,
    RowError,
    ServerUnreachable,
    Vocabulary,
    VocabularyError,
    Words,
)
from lightseq_client.__main__ import main
from lightseq_client.answers import Row, ended, grouped, hypotheses_of, matrix
from lightseq_client.client import pause
from lightseq_client.lines import Lines
from lightseq_client.output import percentile
from lightseq_client.protocols import checked_url

BUSY_ONCE, BUSY, SLOW, REFUSED, TELLS_OPTIONS = 901, 902, 903, 904, 905  # of client_model.py
PROTOCOLS = ("grpc", "http")
MODELS = {
    "transformer": ("source_ids", "TYPE_INT32", {"target_ids": "TYPE_INT32", "target_scores": "TYPE_FP32"}),
    "old": ("src_ids:0", "TYPE_INT32", {"trg_ids:0": "TYPE_INT32"}),
    "old_generate": ("src_ids:0", "TYPE_INT64", {"trg_ids:0": "TYPE_INT64", "score": "TYPE_FP32"}),
    "gpt": ("token_ids", "TYPE_INT32", {"result": "TYPE_INT32"}),
    "gptlm": ("inputs_ids", "TYPE_INT32", {"loss": "TYPE_FP32"}),
}
ADMIN_KEY = "the-key"
SOURCE_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "un", "deux", "trois"]
TARGET_WORDS = ["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three"]


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    repository = tmp_path_factory.mktemp("client_repository")
    for name, (given, datatype, outputs) in MODELS.items():
        (repository / name / "1").mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("client_model.py"), repository / name / "1" / "model.py")
        tensors = ", ".join(f'{{ name: "{out}" data_type: {kind} dims: [-1] }}' for out, kind in outputs.items())
        (repository / name / "config.pbtxt").write_text(
            f'backend: "python"\nmax_batch_size: 8\noutput [{tensors}]\n'
            f'input [{{ name: "{given}" data_type: {datatype} dims: [-1] }}]\n'
            "instance_group [{ kind: KIND_CPU count: 1 }]\n"
            + ('parameters { key: "weights" value: { string_value: "../gpt/gpt.pb" } }\n' if name == "gptlm" else "")
        )
    with EmbeddedServer(repository, device="cpu", admin_key=ADMIN_KEY) as server:
        yield server


@pytest.fixture(params=PROTOCOLS)
def client(request: pytest.FixtureRequest, triton: EmbeddedServer) -> Iterator[Client]:
    with Client(getattr(triton, request.param), request.param) as connected:
        yield connected


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "source.vocab.txt").write_text("".join(f"{word}\n" for word in SOURCE_WORDS))
    (tmp_path / "target.vocab.txt").write_text("".join(f"{word}\n" for word in TARGET_WORDS))
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in TARGET_WORDS))
    return tmp_path


def at(server: EmbeddedServer, protocol: str = "grpc") -> list[str]:
    return ["--url", getattr(server, protocol), "--protocol", protocol]


# Vocabularies and codecs


def test_source_text_is_sent_as_its_words_and_the_end(vocabulary: Path) -> None:
    assert Words.for_translation(vocabulary).encode(" trois  un ") == [6, 4, 2]


def test_prompt_is_sent_as_the_start_and_its_words(vocabulary: Path) -> None:
    assert Words.for_generation(vocabulary).encode("three one") == [1, 6, 4]


def test_text_ends_at_the_first_end_token(vocabulary: Path) -> None:
    assert Words.for_translation(vocabulary).decode([1, 5, 4, 0, 2, 6, 2]) == "two one"


def test_unknown_word_becomes_unk_with_one_warning(vocabulary: Path) -> None:
    warnings: list[str] = []
    words = Words.for_translation(vocabulary, warn=warnings.append)
    assert (words.encode("un chat"), words.encode("chat")) == ([4, 3, 2], [3, 2])
    assert len(warnings) == 1
    assert "'chat'" in warnings[0]


def test_unknown_word_is_refused_by_a_vocabulary_without_unk() -> None:
    words = Words(Vocabulary(["</s>", "un"], "small.txt"), Vocabulary(["</s>"], "other.txt"))
    with pytest.raises(RowError, match=r"'chat', 'chien'.*small\.txt"):
        words.encode("un chat un chien")


def test_id_beyond_the_vocabulary_is_named(vocabulary: Path) -> None:
    with pytest.raises(VocabularyError, match=r"id 7; .*target\.vocab\.txt has 7 tokens"):
        Words.for_translation(vocabulary).decode([4, 7])


def test_every_fault_of_a_vocabulary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("a\n\na\nb c\n")
    with pytest.raises(VocabularyError) as caught:
        Vocabulary.load(tmp_path / "bad.txt")
    assert [line.split(", ")[1][:6] for line in str(caught.value).splitlines()] == ["line 2", "line 3", "line 4"]


def test_vocabulary_without_an_end_token_is_refused() -> None:
    with pytest.raises(VocabularyError, match="words has no </s>"):
        Words(Vocabulary(["un"], "words"), Vocabulary(["one"], "words"))


def test_word_among_ids_is_named() -> None:
    with pytest.raises(RowError, match="'x7' is not an id"):
        Ids().encode("4 x7")


# Shapes


def test_matrix_is_filled_up_on_the_right_with_the_padding_id() -> None:
    array = matrix([(5, 6, 7), (8,)], "INT64", 9)
    assert array.dtype == np.int64
    assert array.tolist() == [[5, 6, 7], [8, 9, 9]]


def test_rows_of_one_length_share_a_request_where_padding_is_not_allowed() -> None:
    rows = [Row(1, "", (5, 6)), Row(2, "", (7,)), Row(3, "", (8, 9))]
    assert [[row.number for row in group] for group in grouped(rows, may_pad=False)] == [[1, 3], [2]]


def test_hypothesis_is_cut_behind_its_first_end_id_after_the_prompt() -> None:
    assert ended((2, 5, 2, 2, 2), 1, 2) == (2, 5, 2)
    assert ended((4, 5, 5), 0, 2) == (4, 5, 5)
    assert ended((4, 5, 5), 0, None) == (4, 5, 5)


@pytest.mark.parametrize("shape", [(3, 4), (2,), (2, 0, 4), (2, 1, 1, 4)])
def test_answer_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestFailed, match="for 2 rows"):
        hypotheses_of(np.zeros(shape, np.int32), None, 2)


def test_scores_that_do_not_match_the_hypotheses_are_refused() -> None:
    with pytest.raises(RequestFailed, match=r"scores of shape \[2, 3\] beside ids of shape \[2, 2, 5\]"):
        hypotheses_of(np.zeros((2, 2, 5), np.int32), np.zeros((2, 3), np.float32), 2)


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(value) for value in range(1, 11)]
    assert [percentile(values, p) for p in (50, 95, 99)] == [5.0, 10.0, 10.0]
    assert percentile([7.0], 50) == 7.0


def test_pauses_double_up_to_a_bound() -> None:
    for attempt, longest in enumerate((0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0), 1):
        assert longest / 2 <= pause(attempt) <= longest


@pytest.mark.parametrize(
    "url", ["", "localhost", "http://localhost:8000", "host:port", "host:0", "host:8000/v2", ":80"]
)
def test_url_must_be_host_and_port(url: str) -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        checked_url(url)


def test_ipv6_url_is_accepted() -> None:
    assert checked_url("[::1]:8001") == "[::1]:8001"


# Lines of a pipe


def test_lines_tell_whether_the_next_one_has_come() -> None:
    reading, writing = os.pipe()
    lines = Lines(reading)
    found = []
    try:
        assert not lines.ready()
        os.write(writing, "é\r\nsecond".encode())
        assert lines.ready()
        found.append(next(iter(lines)))
        assert not lines.ready()  # "second" may go on
    finally:
        os.close(writing)
    assert lines.ready()
    found += list(lines)
    os.close(reading)
    assert found == ["é", "second"]


def test_lines_of_a_file_are_counted_without_being_read(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("a\n\nb")
    with (tmp_path / "rows").open() as file:
        lines = Lines(file.fileno())
        assert lines.count() == 3
        assert list(lines) == ["a", "", "b"]


# The protocols, through Triton


def test_translation_has_all_hypotheses_with_their_scores(client: Client) -> None:
    (answer,) = client.translate([[5, 6, 7]])
    assert [(found.ids, found.score) for found in answer.hypotheses] == [((7, 6, 5, 2), -0.5), ((6, 5, 2, 2), -1.0)]


def test_hypotheses_end_at_the_end_id_where_it_is_known(client: Client) -> None:
    (answer,) = client.translate([[5, 6, 7]], codec=Ids(end_id=2))
    assert [found.ids for found in answer.hypotheses] == [(7, 6, 5, 2), (6, 5, 2)]


def test_answers_keep_the_order_of_the_rows_when_a_slow_one_is_overtaken(client: Client) -> None:
    rows = [[SLOW, 5], *([number] * (number % 3 + 1) for number in range(10, 60))]
    answers = client.translate(rows)
    assert [answer.hypotheses[0].ids for answer in answers] == [(*row[::-1], 2) for row in rows]


def test_slow_row_does_not_hold_up_those_behind_it(client: Client) -> None:
    slow, *fast = client.translate([[SLOW], *([number] for number in range(10, 30))])
    assert slow.latency > 0.4
    assert max(answer.latency for answer in fast) < 0.4


def test_options_arrive_with_their_values_and_types(client: Client) -> None:
    options = {
        "sampling_method": "topp",
        "beam_size": 3,
        "length_penalty": -0.5,
        "diverse_lambda": 1e-7,
        "top_k": 4,
        "top_p": 0.75,
        "temperature": 1.0,
        "seed": 2**63 - 1,
        "max_new_tokens": 9,
        "num_hypotheses": 2,
    }
    with pytest.raises(RequestFailed) as caught:
        client.translate([[TELLS_OPTIONS]], **options)
    told = json.loads(caught.value.message[caught.value.message.index("{") :])
    told.pop("binary_data_output", None)  # HTTP's own
    assert told == options


def test_option_of_none_is_not_sent(client: Client) -> None:
    (answer,) = client.translate([[5, 6]], beam_size=None)
    assert len(answer.hypotheses) == 2


def test_old_names_without_scores_give_one_hypothesis(client: Client) -> None:
    (answer,) = client.translate([[5, 6]], model="old")
    assert [(found.ids, found.score) for found in answer.hypotheses] == [((6, 5, 2), None)]


def test_old_names_with_scores_and_64_bit_ids_give_all_hypotheses(client: Client) -> None:
    (answer,) = client.translate([[2**31 + 5]], model="old_generate", beam_size=1)
    assert [(found.ids, found.score) for found in answer.hypotheses] == [((2**31 + 5, 2), -0.5)]


def test_generated_ids_begin_with_the_prompt(client: Client) -> None:
    (answer,) = client.generate([[5, 6]])
    assert [found.ids for found in answer.hypotheses] == [(5, 6, 6, 5, 2)]
    assert (answer.prompt_length, answer.tokens) == (2, 3)


def test_generated_hypotheses_come_all(client: Client) -> None:
    (answer,) = client.generate([[5, 6]], num_hypotheses=2)
    assert [found.ids for found in answer.hypotheses] == [(5, 6, 6, 5, 2), (5, 6, 5, 2, 2)]


def test_scores_are_one_a_row(client: Client) -> None:
    assert client.score([[5, 6], [7]]) == pytest.approx([1.1, 0.7])


def test_busy_server_is_asked_again(client: Client) -> None:
    (answer,) = client.translate([[BUSY_ONCE, 10 + PROTOCOLS.index(client.protocol)]])
    assert answer.latency > 0.025  # the shortest pause


def test_server_that_stays_busy_is_given_up(triton: EmbeddedServer) -> None:
    with Client(triton.grpc, retries=2) as client, pytest.raises(RequestFailed, match="queue is full") as caught:
        client.translate([[BUSY]])
    assert caught.value.status == "UNAVAILABLE"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answer_that_does_not_come_in_time_is_a_timeout(triton: EmbeddedServer, protocol: str) -> None:
    with (
        Client(getattr(triton, protocol), protocol, timeout=0.1) as client,
        pytest.raises(RequestTimeout, match=r"within 0\.1 s"),
    ):
        client.translate([[SLOW]])


def test_refused_row_leaves_the_others_alone(client: Client) -> None:
    items = list(client.answers(TRANSLATE, [[5], [REFUSED], [], [6]]))
    assert [(item.number, isinstance(item, Answer)) for item in items] == [(1, True), (2, False), (3, False), (4, True)]
    errors = [str(item.error) for item in items if isinstance(item, Failure)]
    assert "id 904 is beyond the vocabulary (INVALID_ARGUMENT)" in errors[0]
    assert errors[1] == "the row is empty"


def test_id_too_large_for_the_input_is_refused(client: Client) -> None:
    with pytest.raises(RowError, match="id 2147483648 does not fit the model's input, which is INT32"):
        client.translate([[2**31]])


def test_padded_matrix_gives_every_row_its_answer(client: Client) -> None:
    rows = [[5, 6, 7], [8], [9, 10]]
    answers = client.translate(rows, codec=Ids(end_id=2, padding_id=0), rows_per_request=3)
    assert [answer.hypotheses[0].ids for answer in answers] == [(7, 6, 5, 2), (8, 2), (10, 9, 2)]


def test_matrix_without_padding_keeps_the_order(client: Client) -> None:
    rows = [[5, 6], [8], [9, 10], [11], [12, 13]]
    answers = client.generate(rows, rows_per_request=4)
    assert [answer.hypotheses[0].ids for answer in answers] == [(*row, *row[::-1], 2) for row in rows]


def test_bad_row_of_a_matrix_harms_itself_alone(client: Client) -> None:
    items = list(client.answers(SCORE, [[5], [REFUSED], [6]], rows_per_request=3))
    assert [item.loss if isinstance(item, Answer) else None for item in items] == [0.5, None, pytest.approx(0.6)]


def test_text_is_translated_through_the_vocabulary(client: Client, vocabulary: Path) -> None:
    answers = client.translate(["un deux", "trois"], codec=Words.for_translation(vocabulary))
    assert [answer.hypotheses[0].text for answer in answers] == ["two one", "three"]


def test_rows_are_drawn_as_room_appears(triton: EmbeddedServer) -> None:
    drawn = []

    def rows() -> Iterator[list[int]]:
        for number in range(10, 1000):
            drawn.append(number)
            yield [number]

    with Client(triton.grpc, concurrency=2) as client:
        answers = client.answers(TRANSLATE, rows())
        next(answers)
        answers.close()
    assert len(drawn) <= 10


def test_answers_are_handed_out_before_waiting_for_the_next_row(client: Client) -> None:
    answers = client.answers(TRANSLATE, iter([[5], [6]]), ready=lambda: False)
    started = next(answers)
    assert started.number == 1


def test_clients_of_both_protocols_work_beside_a_running_loop(triton: EmbeddedServer) -> None:
    async def ask() -> list[tuple[int, ...]]:
        with Client(triton.grpc) as first, Client(triton.http, "http") as second, Client(triton.grpc) as third:
            return [one.translate([[5, 6]])[0].hypotheses[0].ids for one in (first, second, third)]

    assert asyncio.run(ask()) == [(6, 5, 2)] * 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_closing_gives_up_what_is_under_way(triton: EmbeddedServer, protocol: str) -> None:
    client = Client(getattr(triton, protocol), protocol)
    answers = client.answers(TRANSLATE, [[5], [SLOW]])
    next(answers)
    started = time.perf_counter()
    client.close()
    assert time.perf_counter() - started < 0.3
    with pytest.raises(RuntimeError, match="closed"):
        client.health()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unreachable_server_is_named(protocol: str) -> None:
    with Client("127.0.0.1:9", protocol) as client, pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1:9"):
        client.translate([[5]])


def test_model_of_another_kind_is_refused_with_its_tensors(client: Client) -> None:
    with pytest.raises(ModelError, match=r"gptlm cannot translate.*inputs_ids INT32.*loss FP32"):
        client.translate([[5]], model="gptlm")


def test_missing_model_is_named(client: Client) -> None:
    with pytest.raises(ModelError, match="model nothing is not ready"):
        client.translate([[5]], model="nothing")


def test_health_knows_the_default_models_of_a_closed_server(client: Client) -> None:
    health = client.health()
    assert (health.live, health.ready) == (True, True)
    assert [(m.name, m.version, m.ready) for m in health.models] == [
        ("gpt", "1", True),
        ("gptlm", "1", True),
        ("transformer", "1", True),
    ]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_health_with_the_admin_key_lists_every_model(triton: EmbeddedServer, protocol: str) -> None:
    with Client(getattr(triton, protocol), protocol, admin_key=ADMIN_KEY) as client:
        models = client.health().models
    assert [(model.name, model.state) for model in models] == [(name, "READY") for name in sorted(MODELS)]


# The command


def test_command_writes_the_best_hypothesis_a_line(triton: EmbeddedServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "5 6 7", "8", *at(triton)]) == 0
    output = capfd.readouterr()
    assert output.out == "7 6 5 2\n8 2\n"
    assert output.err.startswith("2 requests, 0 failed, ")


def test_command_shows_all_hypotheses_with_scores(triton: EmbeddedServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["translate", "--all", "--quiet", "--end-id", "2", "5 6", "8", *at(triton, "http")]) == 0
    assert capfd.readouterr().out == (
        "1\t1\t-0.500000\t6 5 2\n1\t2\t-1.000000\t5 2\n2\t1\t-0.500000\t8 2\n2\t2\t-1.000000\t2\n"
    )


def test_command_translates_text(triton: EmbeddedServer, vocabulary: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = ["--text", "--vocabulary", str(vocabulary)]
    assert main(["translate", *directory, "un chat deux", *at(triton)]) == 0
    output = capfd.readouterr()
    assert output.out == "two <unk> one\n"
    assert "'chat': not in" in output.err


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_vocabulary_is_looked_for_beside_the_weights(
    triton: EmbeddedServer,
    protocol: str,
    vocabulary: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = vocabulary / "model_repository" / "gpt"
    directory.mkdir(parents=True)
    (vocabulary / "vocab.txt").rename(directory / "vocab.txt")
    monkeypatch.chdir(vocabulary)
    for command in ("generate", "score"):
        assert main([command, "--text", "one two", *at(triton, protocol)]) == 0
    assert capfd.readouterr().out == "one two two one\n1.000000\n"


def test_command_writes_json(triton: EmbeddedServer, vocabulary: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = ["--text", "--vocabulary", str(vocabulary)]
    assert main(["generate", "--json", *text, "one two", *at(triton)]) == 0
    line = json.loads(capfd.readouterr().out)
    assert line.pop("latency_ms") > 0
    assert line == {
        "line": 1,
        "input": "one two",
        "input_ids": [1, 4, 5],
        "prompt_length": 3,
        "hypotheses": [{"ids": [1, 4, 5, 5, 4, 1, 2], "score": None, "text": "one two two one"}],
    }


def test_command_writes_losses_to_a_file(triton: EmbeddedServer, tmp_path: Path) -> None:
    assert main(["score", "5 6", "7", "--output", str(tmp_path / "losses"), *at(triton)]) == 0
    assert (tmp_path / "losses").read_text() == "1.100000\n0.700000\n"


def test_command_names_failed_rows_and_answers_the_others(
    triton: EmbeddedServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["translate", "5", f"6 {REFUSED}", "x", "7", *at(triton)]) == 1
    output = capfd.readouterr()
    assert output.out == "5 2\n\n\n7 2\n"
    lines = output.err.splitlines()
    assert lines[0].startswith("lightseq-client: line 2: ")
    assert lines[0].endswith("id 904 is beyond the vocabulary (INVALID_ARGUMENT)")
    assert lines[1] == "lightseq-client: line 3: 'x' is not an id"
    assert lines[2].startswith("4 requests, 2 failed, ")


def test_command_sends_its_options(triton: EmbeddedServer, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--beam-size", "3", "--length-penalty", "-0.5", "--seed", "7", "--sampling-method", "topk_greedy"]
    assert main(["translate", str(TELLS_OPTIONS), *options, *at(triton)]) == 1
    told = '{"beam_size": 3, "length_penalty": -0.5, "sampling_method": "topk_greedy", "seed": 7}'
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["translate", "--url", "http://host:1"],
        ["translate", "--beam-size", "many"],
        ["translate", "--concurrency", "0"],
        ["translate", "--text", "--vocabulary", "/nowhere", "un"],
        ["translate", "--vocabulary", "/nowhere", "5"],
        ["score", "--all"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert main(arguments) == 2


def test_unreachable_server_exits_with_3_and_keeps_the_output_file(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("old")
    assert main(["translate", "5", "--url", "127.0.0.1:9", "--output", str(tmp_path / "answers")]) == 3
    assert (tmp_path / "answers").read_text() == "old"


def test_missing_model_exits_with_3(triton: EmbeddedServer) -> None:
    assert main(["translate", "5", "--model", "nothing", *at(triton)]) == 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_health_prints_every_state(triton: EmbeddedServer, protocol: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["health", *at(triton, protocol), "--admin-key", ADMIN_KEY, "--model", "old", "--model", "nothing"]) == 3
    )
    assert capfd.readouterr().out.splitlines() == [
        f"server {getattr(triton, protocol)} ({protocol}): live, ready",
        "model old: ready, version 1",
        "model nothing: not ready",
    ]


def test_health_of_a_good_server_exits_with_0(triton: EmbeddedServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--json", *at(triton, "http")]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [model["name"] for model in told["models"]] == ["gpt", "gptlm", "transformer"]


def run_command(arguments: list[str], **settings: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lightseq_client", *arguments]

    def heed_interrupts() -> None:  # a shell's background jobs ignore them, and what they start does too
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, stdin=subprocess.PIPE, text=True, preexec_fn=heed_interrupts, **settings
    )


def test_pipe_gets_each_answer_before_the_next_row_is_sent(triton: EmbeddedServer) -> None:
    process = run_command(["translate", "--quiet", *at(triton)], stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    for row in ("5 6", "7"):
        process.stdin.write(f"{row}\n")
        process.stdin.flush()
        answers.append(process.stdout.readline())
    process.stdin.close()
    assert (answers, process.wait(10)) == (["6 5 2\n", "7 2\n"], 0)
    process.stdout.close()


def test_closed_pipe_ends_the_command_quietly(triton: EmbeddedServer, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = run_command(["translate", "--quiet", "5", *at(triton)], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (141, "")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_interrupt_keeps_what_was_answered(triton: EmbeddedServer, protocol: str) -> None:
    process = run_command(["translate", *at(triton, protocol)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("5\n")
    process.stdin.flush()
    assert process.stdout.readline() == "5 2\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.startswith("1 requests, 0 failed, ")
    assert errors.endswith("\nlightseq-client: interrupted\n")


def test_example_reads_both_outputs_of_ten_asynchronous_requests(triton: EmbeddedServer) -> None:
    example = Path(__file__).parents[1] / "examples" / "async_requests.py"
    host, port = triton.grpc.split(":")
    command = [sys.executable, str(example), "--host", host, "--port", port]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert output.count("target_ids [2, 2, 9] target_scores [2, 2]") == 10
