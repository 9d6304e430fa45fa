"""Text in, text out, through a real Triton: what tokenised requests get is what their ids get."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import small_models
import tokenizers
import tritonclient.grpc
from repositories import BEST, GPT, GPTLM, TRANSFORMER, arrays, ask, golden_cases, grpc, http, post, write_model
from test_serving import triton_arguments
from tritonclient.utils import InferenceServerException
from weight_files import golden

from lightseq_backend.errors import ConfigError
from lightseq_backend.request import Hypothesis, Output
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_backend.serving.settings import read_settings
from lightseq_backend.serving.tensors import survive_strings
from lightseq_backend.serving.wire import ALL, read_wire
from lightseq_client import TRANSLATE, Answer, Client, Failure, ModelError, ServerText
from lightseq_client.__main__ import main

REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"
ADMIN = {"admin-key": "test"}
# t01_base: vocabularies 96 and 100, 48 positions, padding id 0, end id 99. g01_base: 128, end id 127, 48 positions.
SENTENCES = ["one dog and two foxes", "three foxes saw no dog at all", "two dogs saw a fox", "the end of one long day"]
TEXT = {"text_input": "STRING"}
HEAD, _ = small_models.transformer()  # end id 2
TEXT_MODEL, _ = small_models.gpt()
FRENCH = ["quatre-vingt-dix-sept", "deux cent mille un"]
ENGLISH = ["ninety-seven", "two hundred thousand and one"]


def with_text(tensors: dict[str, dict[str, str]], output: bool = True) -> dict[str, dict[str, str]]:
    given = {"text_output": "STRING"} if output else {}
    return {"inputs": {**tensors["inputs"], **TEXT}, "outputs": {**tensors["outputs"], **given}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("Triton's Python stub takes no strings under NumPy 2")
    root = tmp_path_factory.mktemp("repository")
    for name in ("transformer", "gpt", "gptlm"):  # as they are shipped, sharing their weights and vocabularies
        (root / name).symlink_to(REPOSITORY / name)
    write_text_model(root, "words", golden("t01_base.pb"), with_text(TRANSFORMER), write_words)
    write_model(root, "ids_only", golden("t01_base.pb"), TRANSFORMER)
    write_text_model(root, "bpe", golden("g01_base.pb"), with_text(GPT), write_bpe)
    write_text_model(root, "bpe_loss", golden("g01_base.pb"), with_text(GPTLM, output=False), write_bpe)
    write_text_model(root, "marian", golden("t01_base.pb"), with_text(TRANSFORMER), write_marian)
    write_text_model(root, "bare", golden("t01_base.pb"), with_text(TRANSFORMER), lambda directory: None)
    served = [path.name for path in root.iterdir()]
    other = {"tokenizer": "../transformer"}
    write_model(root, "other_words", golden("t01_base.pb"), with_text(TRANSFORMER), optional=True, parameters=other)
    with EmbeddedServer(root, device="cpu", models=served, admin_key=ADMIN["admin-key"]) as running:
        yield running


def write_text_model(
    root: Path,
    name: str,
    weights: Path,
    tensors: dict[str, dict[str, str]],
    write_tokenizer: Callable[[Path], None],
    **more: Any,
) -> None:
    write_model(root, name, weights, tensors, optional=True, **more)
    write_tokenizer(root / name)


def write_words(directory: Path) -> None:
    """s1 to s93 and t1 to t97, so that word and id say the same."""
    sides = {"source": (96, "s"), "target": (100, "t")}
    for side, (size, letter) in sides.items():
        words = ["<pad>", *(f"{letter}{id_}" for id_ in range(1, size - 2)), "<unk>", "</s>"]
        (directory / f"{side}.vocab.txt").write_text("".join(f"{word}\n" for word in words))


def write_bpe(directory: Path) -> None:
    """tokenizer.json with 128 tokens, the end last: what training on so little leaves open is filled up."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    own.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, show_progress=False, special_tokens=["<pad>", "<unk>"])
    own.train_from_iterator(SENTENCES, trainer)
    table = json.loads(own.to_str())
    ids = table["model"]["vocab"]
    ids |= {**{f"filler{id_}": id_ for id_ in range(len(ids), 127)}, "</s>": 127}
    table["added_tokens"].append({**table["added_tokens"][0], "id": 127, "content": "</s>"})
    (directory / "tokenizer.json").write_text(json.dumps(table))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def write_marian(directory: Path) -> None:
    """45 pieces, the same on either side; the end has the last id of each."""
    (directory / "sentences").write_text("\n".join(SENTENCES))
    prefix = str(directory / "own")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "sentences"), model_prefix=prefix, model_type="bpe", vocab_size=45, minloglevel=2
    )
    own = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    names = ["<pad>", "<unk>", *(own.id_to_piece(id_) for id_ in range(3, 45))]
    for side, file, end in (("source", "vocab.json", 95), ("target", "target_vocab.json", 99)):
        (directory / f"{side}.spm").symlink_to(f"{prefix}.model")
        (directory / file).write_text(json.dumps({**{name: id_ for id_, name in enumerate(names)}, "</s>": end}))


@pytest.fixture(scope="module")
def client(server: EmbeddedServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with grpc(server.grpc) as connected:
        yield connected


def strings(protocol: Any, texts: Any) -> Any:
    array = np.array(texts, np.object_)
    given = protocol.InferInput("text_input", list(array.shape), "BYTES")
    given.set_data_from_numpy(array)
    return given


def say(client: Any, model: str, texts: Any, outputs: list[str] | None = None, **options: Any) -> dict[str, np.ndarray]:
    """The outputs for text; texts nested as the tensor is."""
    protocol = tritonclient.http if isinstance(client, tritonclient.http.InferenceServerClient) else tritonclient.grpc
    wanted = None if outputs is None else [protocol.InferRequestedOutput(name) for name in outputs]
    found = arrays(client.infer(model, [strings(protocol, texts)], parameters=options or None, outputs=wanted))
    return {
        name: np.vectorize(bytes.decode)(array) if array.dtype == np.object_ else array for name, array in found.items()
    }


def refusal(client: Any, model: str, texts: Any, **options: Any) -> str:
    with pytest.raises(InferenceServerException) as refused:
        say(client, model, texts, **options)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    return refused.value.message()


# The shipped models -----------------------------------------------------------------------------------------------


def test_shipped_translator_translates_text(client: Any) -> None:
    found = say(client, "transformer", [[text] for text in FRENCH])
    assert found["text_output"].shape == found["target_scores"].shape == (2, 4)
    assert found["text_output"][:, 0].tolist() == ENGLISH


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_text_gets_what_its_ids_get(server: EmbeddedServer, protocol: str) -> None:
    with grpc(server.grpc) if protocol == "grpc" else http(server.http) as client:
        text = say(client, "transformer", [["mille neuf cent"]], num_hypotheses=3)
        ids = ask(
            client,
            "transformer",
            "source_ids",
            [[ids_of("mille"), ids_of("neuf"), ids_of("cent"), 102]],
            num_hypotheses=3,
        )
    assert sorted(text) == ["target_ids", "target_scores", "text_output"]
    for name, array in ids.items():
        np.testing.assert_array_equal(text[name], array)


def ids_of(word: str) -> int:
    return (REPOSITORY / "transformer" / "source.vocab.txt").read_text().split("\n").index(word)


def test_shipped_gpt_continues_text(client: Any) -> None:
    found = say(client, "gpt", [["twelve , thirteen ,"]], sampling_method="greedy")
    assert found["text_output"].shape == (1, 1)
    assert found["text_output"][0, 0].startswith("twelve , thirteen , fourteen , fifteen")


def test_samples_of_a_prompt_are_one_text_each(client: Any) -> None:
    found = say(client, "gpt", [["twelve ,"]], sampling_method="sample", num_hypotheses=3, seed=1)
    assert found["text_output"].shape == (1, 3) == found["result"].shape[:2]


def test_shipped_scorer_scores_text(client: Any) -> None:
    right, wrong = say(client, "gptlm", [["twenty-one , twenty-two"], ["twenty-one , forty"]])["loss"].ravel()
    assert right < wrong


def test_generate_takes_a_text_and_gives_one(server: EmbeddedServer) -> None:
    url = f"http://{server.http}/v2/models/transformer/generate"
    status, answer = post(url, {"text_input": FRENCH[0], "num_hypotheses": 1})
    assert (status, answer["text_output"]) == (200, ENGLISH[0])
    status, answer = post(url, {"text_input": FRENCH, "num_hypotheses": 1})
    assert (status, answer["text_output"]) == (200, ENGLISH)


# Which outputs ----------------------------------------------------------------------------------------------------


def test_ids_get_no_text_unless_they_ask(client: Any) -> None:
    assert sorted(ask(client, "words", "source_ids", [[79, 95]])) == ["target_ids", "target_scores"]


def test_ids_that_ask_for_text_alone_get_it(client: Any) -> None:
    ids = [[79, 3, 95]]
    protocol = tritonclient.grpc
    given = protocol.InferInput("source_ids", [1, 3], "INT32")
    given.set_data_from_numpy(np.array(ids, np.int32))
    found = arrays(client.infer("words", [given], outputs=[protocol.InferRequestedOutput("text_output")]))
    assert list(found) == ["text_output"]
    (said,) = say(client, "words", [["s79 s3"]])["text_output"].tolist()
    assert [text.decode() for text in found["text_output"][0]] == said


def test_text_that_asks_for_ids_alone_gets_no_text(client: Any) -> None:
    assert list(say(client, "words", [["s79 s3"]], ["target_ids"])) == ["target_ids"]


# Shapes and tokenizers --------------------------------------------------------------------------------------------


def test_every_hypothesis_is_the_text_of_its_ids(client: Any) -> None:
    found = say(client, "words", [["s79 s3"], ["s5"]])
    for ids, texts in zip(found["target_ids"].tolist(), found["text_output"].tolist()):
        cut = [row[: row.index(99)] if 99 in row else row for row in ids]
        assert texts == [" ".join("<unk>" if id_ == 98 else f"t{id_}" for id_ in row if id_) for row in cut]


@pytest.mark.parametrize(
    ("tensors", "rows", "config", "expected"),
    [
        (TRANSFORMER, 8, HEAD, [["7", "7 8"], ["7", "7 8"]]),
        (TRANSFORMER, 0, HEAD, ["7", "7 8"]),  # without a dimension of rows
        (BEST, 8, HEAD, [["7"], ["7"]]),
        (GPT, 8, TEXT_MODEL, [["3 4 7"], ["4 7"]]),
    ],
)
def test_text_output_has_a_string_a_hypothesis(tensors: Any, rows: int, config: Any, expected: Any) -> None:
    wire = read_wire({**configuration(**with_text(tensors)), "max_batch_size": rows}, [])
    assert wire is not None
    both = (Hypothesis(np.array([7, 2]), -1.0, True), Hypothesis(np.array([7, 8]), -2.0, False))
    output = Output(both if wire.form.hypotheses == ALL else both[:1], steps=2, cut=True)
    given = [np.array([3, 4]), np.array([11, 4])]  # 11 is the GPT's padding
    answer = wire.answer(given, [output, output], config, lambda ids: " ".join(map(str, ids)))
    assert answer["text_output"].tolist() == expected


def test_golden_source_as_text_gets_the_golden_ids(client: Any) -> None:
    case = next(case for case in golden_cases("t01_base") if len(case["source_ids"]) == 1)
    source = [id_ for id_ in case["source_ids"][0] if id_]
    if source[-1] != 95:  # text always ends so
        source.append(95)
    text = " ".join("<unk>" if id_ == 94 else f"s{id_}" for id_ in source[:-1])
    np.testing.assert_array_equal(
        say(client, "words", [[text]])["target_ids"], ask(client, "words", "source_ids", [source])["target_ids"]
    )


def test_subwords_come_from_the_files_of_the_model(client: Any, server: EmbeddedServer) -> None:
    own = tokenizers.Tokenizer.from_file(str(Path(server.model_repository) / "bpe" / "tokenizer.json"))
    prompt = "two dogs saw"
    found = say(client, "bpe", [[prompt]])
    ids = own.encode(prompt).ids
    assert found["result"][0, : len(ids)].tolist() == ids
    assert found["text_output"][0, 0].startswith(prompt)
    np.testing.assert_array_equal(
        say(client, "bpe_loss", [[prompt]])["loss"], ask(client, "bpe_loss", "inputs_ids", [ids])["loss"]
    )


def test_pieces_come_from_the_files_of_the_model(client: Any, server: EmbeddedServer) -> None:
    directory = Path(server.model_repository) / "marian"
    own = sentencepiece.SentencePieceProcessor(model_file=str(directory / "own.model"))
    ids = json.loads((directory / "vocab.json").read_text())
    source = [*(ids[piece] for piece in own.encode(SENTENCES[0], out_type=str)), 95]
    found, wanted = say(client, "marian", [[SENTENCES[0]]]), ask(client, "marian", "source_ids", [source])
    np.testing.assert_array_equal(found["target_ids"], wanted["target_ids"])


# The client -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_lets_the_server_tokenise(server: EmbeddedServer, protocol: str) -> None:
    with Client(getattr(server, protocol), protocol) as client:
        for together in (1, 2):
            answers = client.translate(FRENCH, codec=ServerText(), rows_per_request=together)
            assert [answer.hypotheses[0].text for answer in answers] == ENGLISH
            assert [len(answer.hypotheses) for answer in answers] == [4, 4]
        (answer,) = client.generate(["twelve , thirteen ,"], codec=ServerText(), sampling_method="greedy")
        assert (answer.hypotheses[0].text or "").startswith("twelve , thirteen , fourteen")
        right, wrong = client.score(["twenty-one , twenty-two", "twenty-one , forty"], codec=ServerText())
        assert right < wrong


def test_refused_text_of_a_matrix_harms_itself_alone(server: EmbeddedServer) -> None:
    with Client(server.grpc) as client:
        rows = [FRENCH[0], "", FRENCH[1]]
        items = list(client.answers(TRANSLATE, rows, codec=ServerText(), rows_per_request=3))
        (_, ids) = client.answers(TRANSLATE, [FRENCH[0], [1, 2]], codec=ServerText())
    assert [isinstance(item, Answer) for item in items] == [True, False, True]
    assert isinstance(ids, Failure)
    assert "[1, 2] is not text" in str(ids.error)


def test_command_needs_no_vocabulary(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["translate", "--text", "--quiet", *FRENCH, "--url", server.grpc]) == 0
    assert capfd.readouterr().out == "".join(f"{text}\n" for text in ENGLISH)
    assert main(["translate", "--text", "--json", "--quiet", FRENCH[0], "--url", server.grpc]) == 0
    line = json.loads(capfd.readouterr().out)
    assert sorted(line) == ["hypotheses", "input", "latency_ms", "line"]
    assert line["hypotheses"][0]["text"] == ENGLISH[0]


def test_client_refuses_text_for_a_model_that_takes_none(server: EmbeddedServer) -> None:
    with Client(server.grpc) as client, pytest.raises(ModelError, match="model ids_only cannot translate text: it has"):
        client.translate(["un"], model="ids_only", codec=ServerText())


# Bad requests and bad models --------------------------------------------------------------------------------------


REFUSED = {
    "empty": ([[""]], "the text is empty; it needs at least one token"),
    "blanks": ([[" \t "]], "the text is empty; it needs at least one token"),
    "unknown": ([["chat chien"]], "the text has 2 tokens and none of them is in the vocabulary of 96"),
    "too_long": ([["s1 " * 60]], "the text has 61 tokens; this model takes 48 (max_step)"),
    "much_too_long": ([["s1 " * 9999]], "the text has 29997 bytes; this model takes 48 tokens, and no more than 3072"),
    "padding": ([["s1 <pad> s2"]], "token 1 of the text has id 0, which this model takes for padding"),
    "one_bad_row": ([["s1"], [""]], "row 1: the text is empty"),
    "no_utf8": ([[b"s1 \xff"]], "the text is not UTF-8: byte 3 is 0xff"),
    "two_a_row": ([["s1", "s2"]], "Expected [-1,1], got [1,2]"),  # Triton's words
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_text_is_refused_with_the_numbers(client: Any, case: str) -> None:
    texts, words = REFUSED[case]
    assert words in refusal(client, "words", texts)
    assert say(client, "words", [["s79"]])["text_output"].size == 4


def test_bad_options_of_a_text_are_refused_as_those_of_ids(client: Any) -> None:
    assert "beam_size is 99" in refusal(client, "words", [["s1"]], beam_size=99)


def test_ids_and_text_together_are_refused(server: EmbeddedServer) -> None:
    url = f"http://{server.http}/v2/models/words/generate"
    message = "the request gives both source_ids and text_input; it takes one of them"
    assert post(url, {"source_ids": [5], "text_input": "s5"}) == (400, {"error": message})


def test_neither_ids_nor_text_is_refused(server: EmbeddedServer) -> None:
    status, _ = post(f"http://{server.http}/v2/models/words/generate", {"beam_size": 2})
    assert status == 400


def test_model_without_a_tokenizer_serves_ids_and_says_what_text_needs(client: Any) -> None:
    assert ask(client, "bare", "source_ids", [[79]])["target_ids"].shape[:2] == (1, 4)
    message = refusal(client, "bare", [["s79"]])
    assert "this model takes ids only: no tokenizer in " in message
    assert "it may be source.spm + target.spm + vocab.json; " in message


def test_model_with_anothers_tokenizer_does_not_load_and_says_why(server: EmbeddedServer) -> None:
    with http(server.http) as admin, pytest.raises(InferenceServerException) as refused:
        admin.load_model("other_words", headers=ADMIN)
    message = refused.value.message()
    assert "has 103 source tokens; the model's source vocabulary has 96" in message
    assert "has 108 target tokens; the model's target vocabulary has 100" in message
    assert "has end id 107; the model's is 99" in message


def configuration(inputs: dict[str, str], outputs: dict[str, str], optional: bool = True) -> dict[str, Any]:
    """As Triton gives it."""

    def tensors(given: dict[str, str], **more: Any) -> list[dict[str, Any]]:
        return [{"name": name, "data_type": f"TYPE_{kind}", "dims": [-1], **more} for name, kind in given.items()]

    return {"max_batch_size": 8, "input": tensors(inputs, optional=optional), "output": tensors(outputs)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            configuration(**with_text(TRANSFORMER), optional=False),
            [
                "input source_ids must be optional (optional: true): a request gives it or text_input",
                "input text_input must be optional (optional: true): a request gives it or ids",
            ],
        ),
        (
            configuration(
                {**TRANSFORMER["inputs"], "text_input": "INT32"}, {**TRANSFORMER["outputs"], "text_output": "FP32"}
            ),
            [
                "input text_input is TYPE_INT32; it must be TYPE_STRING",
                "output text_output is TYPE_FP32; it must be TYPE_STRING",
            ],
        ),
        (
            configuration(**with_text(GPTLM)),
            ["output text_output has no place in a model that scores; it needs an output of ids"],
        ),
        (
            configuration(TEXT, TRANSFORMER["outputs"]),
            ["there are 0 inputs (none); there must be one"],
        ),
    ],
    ids=["no_choice", "numbers", "text_of_a_loss", "text_alone"],
)
def test_faults_of_a_configuration_are_named(config: dict[str, Any], expected: list[str]) -> None:
    faults: list[str] = []
    assert read_wire(config, faults) is None
    assert faults == expected


def test_tokenizer_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "transformer.pb").touch()
    config = {**configuration(**with_text(TRANSFORMER)), "parameters": {"tokenizer": {"string_value": "nothing"}}}
    args = triton_arguments(tmp_path, config)
    with pytest.raises(ConfigError, match=r"parameter tokenizer is 'nothing', but .*/nothing is not a directory"):
        read_settings(args, {})


def test_stub_that_takes_no_strings_reads_empty_ones_in_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under NumPy 2, where it would otherwise end its own process over the first request of text."""
    stub = SimpleNamespace(deserialize_bytes_tensor=None)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    survive_strings()
    read = stub.deserialize_bytes_tensor(np.array([3, 3, 3, 3], np.uint8)).reshape([2, 1])
    assert (read.dtype, read.tolist()) == (np.object_, [[b""], [b""]])
