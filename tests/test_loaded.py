"""A model in Python: streams of texts and ids in their order, errors of one row, any number of rows."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models
from weight_files import golden

import lightseq_backend
from lightseq_backend import local, weights
from lightseq_backend.answers import Failure, Score
from lightseq_backend.errors import ConfigError, Overloaded, RequestError
from lightseq_backend.loaded import Model
from lightseq_backend.request import SCORE

REPOSITORY = Path(__file__).resolve().parents[1] / "model_repository"
FRENCH = ["quatre-vingt-dix-sept", "mille", "deux cent mille un", "vingt et un", "trois"]
ENGLISH = ["ninety-seven", "one thousand", "two hundred thousand and one", "twenty-one", "three"]


@pytest.fixture(scope="module")
def translator() -> Iterator[Model]:
    with lightseq_backend.load(REPOSITORY / "transformer", device="cpu", window=3) as model:
        yield model


@pytest.fixture(scope="module")
def gpt() -> Iterator[Model]:
    with lightseq_backend.load(REPOSITORY / "gpt", device="cpu", window=3) as model:
        yield model


def direct(path: Path) -> Any:
    return local.build(path)


# Answers ---------------------------------------------------------------------------------------------------------


def test_texts_are_translated_in_their_order(translator: Model) -> None:
    answers = list(translator.translate(FRENCH * 3))
    assert [answer.text for answer in answers] == ENGLISH * 3
    assert [answer.number for answer in answers] == list(range(15))
    assert all(len(answer.hypotheses) == 1 and answer.best.finished for answer in answers)


def test_ids_get_what_the_engine_gives(translator: Model) -> None:
    rows = [[5, 9, 102], [7, 102], [20, 30, 40, 102]]
    outputs = direct(REPOSITORY / "transformer" / "transformer.pb").answer(rows, changes={"beam_size": 3})
    for answer, output in zip(translator.translate(rows, beam_size=3, num_hypotheses=3), outputs, strict=True):
        ours = [(one.ids, one.score, one.finished) for one in answer.hypotheses]
        assert ours == [(tuple(one.tokens.tolist()), one.score, one.finished) for one in output.hypotheses]
        assert [one.text for one in answer.hypotheses] == [
            translator.tokenizer.decode(one.tokens) for one in output.hypotheses
        ]


def test_continuation_ends_before_its_stop_word(gpt: Model) -> None:
    options = {"sampling_method": "greedy", "max_new_tokens": 30}
    (answer,) = gpt.generate(["twelve , thirteen"], stop="fifteen", **options)
    assert answer.text == "twelve , thirteen , fourteen , "
    (answer,) = gpt.generate(["twelve , thirteen"], end_ids=[15], **options)  # the id of fourteen
    assert (answer.text, answer.best.ids[-1]) == ("twelve , thirteen ,", 15)


def test_continuation_begins_with_its_prompt(gpt: Model) -> None:
    (answer,) = gpt.generate(["twelve , thirteen"], sampling_method="greedy")
    prompt = gpt.tokenizer.encode("twelve , thirteen")
    assert answer.ids[: answer.prompt_length] == tuple(prompt)
    assert answer.text.startswith("twelve , thirteen , fourteen")
    (padded,) = gpt.generate([[0, *prompt, 0]], sampling_method="greedy")
    assert padded.ids == answer.ids


def test_scores_are_the_engines(translator: Model, gpt: Model) -> None:
    source, target = [5, 9, 102], [3, 4, 107]
    (wanted,) = direct(REPOSITORY / "transformer" / "transformer.pb").answer([source], SCORE, targets=[target])
    (found,) = translator.score([(source, target)])
    assert found == Score(0, tuple(target), tuple(wanted.target_log_probabilities.tolist()))
    assert found.total == pytest.approx(-3 * wanted.loss, rel=1e-6)
    (filled,) = translator.score([(source, [*target, 107, 107])])
    assert filled == found
    (wanted,) = direct(REPOSITORY / "gpt" / "gpt.pb").answer([[107, 13, 105]], SCORE)
    (found,) = gpt.score([[107, 13, 105]])
    assert (found.ids, found.loss) == ((13, 105), pytest.approx(wanted.loss, rel=1e-6))
    assert list(gpt.perplexity([[107, 13, 105]])) == [pytest.approx(math.exp(wanted.loss), rel=1e-6)]


def test_text_of_a_target_is_scored_with_its_end(translator: Model) -> None:
    scores = list(translator.score(zip(FRENCH, ENGLISH, strict=True)))
    assert all(score.ids[-1] == translator.config.end_id for score in scores)
    assert [score.ids for score in scores] == [answer.ids for answer in translator.translate(FRENCH)]
    assert max(score.loss for score in scores) < 0.5 < next(iter(translator.score([(FRENCH[0], ENGLISH[1])]))).loss


def test_score_of_what_cannot_be_is_infinite_perplexity() -> None:
    assert Score(0, (3,), (-1e5,)).perplexity == math.inf
    assert (Score(0, (), ()).loss, Score(0, (), ()).perplexity) == (0.0, 1.0)
    assert math.copysign(1, Score(0, (), ()).loss) == 1


def test_each_call_may_choose_its_target_language(tmp_path: Path) -> None:
    config, arrays = small_models.transformer(target_vocabulary=11, source_vocabulary=11, start_id=2, forced_id=7)
    weights.save(tmp_path / "transformer.safetensors", config, arrays)
    with lightseq_backend.load(tmp_path, device="cpu") as model:
        model.tokenizer = SimpleNamespace(language_id={"fr": 8, "de": 7}.get, decode=lambda ids: "")
        found = {name: next(model.translate([[3, 4, 5]], target_language=name)) for name in ("fr", "de")}
        own = next(model.translate([[3, 4, 5]]))
    french, _ = small_models.transformer(target_vocabulary=11, source_vocabulary=11, start_id=2, forced_id=8)
    (wanted,) = small_models.engine(french, arrays).answer([[3, 4, 5]])
    assert found["fr"].ids == tuple(wanted.hypotheses[0].tokens.tolist())
    assert found["fr"].best.score == wanted.hypotheses[0].score
    assert found["de"].best == own.best != found["fr"].best


# Streams ---------------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_are_needed(translator: Model) -> None:
    taken = itertools.count()
    rows = (FRENCH[next(taken) % 5] for _ in itertools.count())  # without end
    answers = translator.translate(rows)
    assert next(taken) == 0  # none before the first answer is asked for
    assert [next(answers).text for _ in range(10)] == [ENGLISH[(i + 1) % 5] for i in range(10)]
    assert next(taken) <= 1 + 10 + 3 * 3  # windows of 3: one that is answered, two that are read


def test_a_window_is_submitted_longest_first(translator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, lengths = translator._engine.submit, []

    def recorded(requests: Any) -> None:
        lengths.extend(len(request.tokens) for request in requests)
        submit(requests)

    monkeypatch.setattr(translator._engine, "submit", recorded)
    rows = [[5] * length for length in (1, 7, 4, 9, 2, 3, 8)]
    assert [answer.number for answer in translator.translate(rows)] == list(range(7))
    assert lengths == [7, 4, 1, 9, 3, 2, 8]  # windows of 3


def test_with_none_ahead_an_answer_waits_for_nothing(translator: Model) -> None:
    said: list[str] = []

    def rows() -> Iterator[str]:
        for number in range(7):
            said.append(f"row {number}")
            yield FRENCH[number % 5]

    for number, _ in enumerate(translator.translate(rows(), ahead=0)):
        assert len(said) == min(7, 3 * (number // 3 + 1))


def test_streams_of_several_threads_do_not_mix(translator: Model) -> None:
    found: dict[int, list[str | None]] = {}

    def translate(shift: int) -> None:
        rows = [FRENCH[(i + shift) % 5] for i in range(20)]
        found[shift] = [answer.text for answer in translator.translate(rows)]

    threads = [threading.Thread(target=translate, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {shift: [ENGLISH[(i + shift) % 5] for i in range(20)] for shift in range(4)}


def test_abandoned_stream_harms_no_other(translator: Model) -> None:
    assert next(translator.translate(FRENCH * 10)).text == ENGLISH[0]
    assert [answer.text for answer in translator.translate(FRENCH)] == ENGLISH


def test_seeded_samples_depend_on_the_row_and_not_on_the_window(gpt: Model) -> None:
    options: dict[str, Any] = {"sampling_method": "sample", "seed": 5, "temperature": 3.0, "max_new_tokens": 8}
    rows = [[107, 13, 105]] * 7
    samples = [answer.ids for answer in gpt.generate(rows, **options)]
    assert len(set(samples)) > 1
    assert [answer.ids for answer in gpt.generate(rows[4:], first=4, **options)] == samples[4:]
    with lightseq_backend.load(REPOSITORY / "gpt", device="cpu", slots=1) as other:
        assert [answer.ids for answer in other.generate(rows, **options)] == samples


def test_samples_beyond_the_streams_of_a_seed_take_the_next_one(gpt: Model) -> None:
    options: dict[str, Any] = {"sampling_method": "sample", "temperature": 3.0, "max_new_tokens": 12}
    at = {
        (seed, first): next(gpt.generate([[107, 13]], seed=seed, first=first, **options)).ids
        for seed, first in ((5, 0), (5, 65536), (6, 0), (2**63 - 1, 65536))
    }
    assert at[5, 65536] == at[6, 0] != at[5, 0]


def test_closing_waits_for_nothing_that_nobody_reads() -> None:
    with lightseq_backend.load(REPOSITORY / "transformer", device="cpu", window=10_000) as model:
        stream = model.translate(FRENCH * 2000)
        assert next(stream).text == ENGLISH[0]
    assert not model._engine.alive
    assert model._engine.counts["answered"] < 10_000
    with pytest.raises(Overloaded, match="the engine was stopped"):
        list(stream)
    with pytest.raises(Overloaded, match="the engine is stopping"):
        list(model.translate(FRENCH))


# Errors ----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str]] = {
    "unknown word": ("xyz", "none of them is in the vocabulary"),
    "no text": ("", "the text is empty"),
    "no ids": ([], "the row is empty"),
    "beyond the vocabulary": ([5, 400], "id 400 at column 1 is outside"),
    "fractions": ([1.5], "one-dimensional and integer"),
    "one number": (7, "one-dimensional and integer"),
    "ragged": ([[1], [2, 3]], "a row of ids is a sequence of integers"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_error_of_a_row_is_that_rows(translator: Model, row: Any, message: str) -> None:
    rows = [*FRENCH[:3], row, FRENCH[3]]
    stream = translator.translate(rows)
    assert [next(stream).text for _ in range(3)] == ENGLISH[:3]
    with pytest.raises(RequestError, match=f"row 3: .*{message}"):
        next(stream)
    answers = list(translator.translate(rows, errors="return", first=100))
    assert [type(answer) for answer in answers].index(Failure) == 3
    assert (answers[3].number, answers[4].text) == (103, ENGLISH[3])
    assert message in str(answers[3].error)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("mille", ""), "target: the text is empty"),
        (("mille", [3, 108]), "id 108 at column 1 of the target"),
        (("mille", []), "the target is empty"),
        ("mille", "a pair of source and target"),
        (("mille", "one", "thousand"), "a pair of source and target"),
        (7, "a pair of source and target"),
    ],
)
def test_error_of_a_pair_is_that_pairs(translator: Model, pair: Any, message: str) -> None:
    found = list(translator.score([pair, (FRENCH[0], ENGLISH[0])], errors="return"))
    assert [type(one) for one in found] == [Failure, Score]
    assert message in str(found[0].error)
    assert isinstance(next(iter(translator.perplexity([pair], errors="return"))), Failure)


def test_what_the_call_gets_wrong_is_said_at_once(translator: Model, gpt: Model) -> None:
    with pytest.raises(RequestError, match="beam_size is 99"):
        translator.translate(FRENCH, beam_size=99)
    with pytest.raises(RequestError, match="unknown option beams"):
        translator.translate(FRENCH, beams=4)
    with pytest.raises(RequestError, match="this model translates"):
        translator.generate(FRENCH)
    with pytest.raises(RequestError, match="this model continues texts"):
        gpt.translate(FRENCH)
    with pytest.raises(TypeError, match="rows is one text"):
        translator.translate("mille")
    with pytest.raises(ValueError, match="errors is 'ignore'"):
        translator.translate(FRENCH, errors="ignore")


def test_fault_of_the_engine_is_raised_whatever_errors_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with lightseq_backend.load(REPOSITORY / "transformer", device="cpu") as model:
        monkeypatch.setattr(model._engine._passes, "prefill", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(model.translate(FRENCH, errors="return"))


# Loading ---------------------------------------------------------------------------------------------------------


def test_model_without_a_tokenizer_takes_ids_alone(tmp_path: Path) -> None:
    config, arrays = small_models.transformer()
    weights.save(tmp_path / "mine.pb", config, arrays)
    with lightseq_backend.load(tmp_path / "mine.pb", device="cpu") as model:
        (answer,) = model.translate([np.array([3, 4])])
        assert (answer.text, len(answer.ids) > 0) == (None, True)
        with pytest.raises(RequestError, match=f"takes ids only: no tokenizer in {tmp_path}"):
            list(model.translate(["three"]))


def test_directory_may_be_named_by_its_weights(tmp_path: Path) -> None:
    config, arrays = small_models.gpt()
    directory = tmp_path / "tiny"
    directory.mkdir()
    weights.save(directory / "tiny.safetensors", config, arrays)
    with lightseq_backend.load(directory, device="cpu") as model:
        assert model.continues_texts
    (directory / "gpt.pb").touch()
    with pytest.raises(ConfigError, match=r"one weight file of .*; gpt\.pb and tiny\.safetensors are there"):
        lightseq_backend.load(directory, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; devices are auto, cpu, gpu"),
        ({"device": "cpu", "precision": "fp16"}, "precision is 'fp16'; a CPU computes in fp32 or int8"),
        ({"device": "cpu", "window": 0}, "window is 0"),
        ({"device": "cpu", "slots": 0}, "slots is 0"),
        ({"device": "cpu", "tokenizer": "/nowhere"}, "no tokenizer in /nowhere"),
        ({"device": "cpu", "dialect": "v7"}, "dialect is 'v7'"),
    ],
)
def test_what_cannot_be_loaded_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lightseq_backend.load(golden("t01_base.pb"), **settings)


def test_directory_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hold config\.pbtxt, or one weight file of transformer\.pb, .*; none is"):
        lightseq_backend.load(tmp_path, device="cpu")


# A model directory's config.pbtxt ------------------------------------------------------------------------------------


def configured(directory: Path, text: str, name: str = "config.pbtxt") -> Path:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)
    return directory


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}\n'


@pytest.mark.parametrize("name", ["gptlm", "gpt_stream"])
def test_directory_whose_weights_lie_elsewhere_is_loaded(name: str, gpt: Model) -> None:
    text = "twelve , thirteen"
    with lightseq_backend.load(REPOSITORY / name, device="cpu") as model:
        assert list(model.perplexity([text])) == list(gpt.perplexity([text]))


def test_config_names_weights_dialect_and_tokenizer(tmp_path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, 100))]
    (tmp_path / "words").mkdir()
    for side in ("source", "target"):
        (tmp_path / "words" / f"{side}.vocab.txt").write_text("\n".join(words) + "\n")
    weights_at = parameter("weights", str(golden("t01_base.pb")))
    directory = configured(tmp_path / "one", "# a comment\nbackend: 'python', max_batch_size: 8\n" + weights_at)
    with lightseq_backend.load(directory, device="cpu") as model:
        assert (model.config.dialect.name, model.tokenizer) == ("head", None)
    old = configured(tmp_path / "two", weights_at + parameter("dialect", "v0") + parameter("tokenizer", "../words"))
    with pytest.raises(ConfigError, match=r"words: the tokenizer of source\.vocab\.txt"):  # its end id is another
        lightseq_backend.load(old, device="cpu")
    with lightseq_backend.load(configured(old, weights_at + parameter("dialect", "v0")), device="cpu") as model:
        assert model.config.dialect.name == "v0"
    with lightseq_backend.load(old, device="cpu", dialect="head") as model:  # what a caller says goes before it
        assert model.config.dialect.name == "head"


def test_config_for_machines_without_a_gpu_goes_before_the_other(tmp_path: Path) -> None:
    weights_at = parameter("weights", str(golden("t01_base.pb")))
    directory = configured(tmp_path, weights_at + parameter("precision", "fp16"))
    with pytest.raises(ConfigError, match="precision is 'fp16'; a CPU computes in fp32 or int8"):
        lightseq_backend.load(directory, device="cpu")
    configured(directory, weights_at + parameter("precision", "int8"), "configs/cpu.pbtxt")
    with lightseq_backend.load(directory, device="cpu") as model:
        assert isinstance(model, Model)


def test_config_of_a_lightseq_server_is_read(tmp_path: Path) -> None:
    """Its own backend names the weights' file, and its inputs say which kind that is."""
    text = 'backend: "lightseq"\ndefault_model_filename: "weights"\ninput [{name: "token_ids" data_type: TYPE_INT32}]\n'
    directory = configured(tmp_path, text)
    with pytest.raises(ConfigError, match=r"no weights; looked for .*/weights, .*/gpt\.pb"):
        lightseq_backend.load(directory, device="cpu")
    (directory / "weights").symlink_to(golden("g01_base.pb"))
    (directory / "transformer.pb").symlink_to(golden("t01_base.pb"))
    with lightseq_backend.load(directory, device="cpu") as model:
        assert model.continues_texts


def test_config_that_is_none_is_named(tmp_path: Path) -> None:
    directory = configured(tmp_path, "parameters {{")
    with pytest.raises(ConfigError, match=r"config\.pbtxt is no model configuration: line 1: there is '{' where"):
        lightseq_backend.load(directory, device="cpu")
    configured(directory, parameter("weights", str(golden("t01_base.pb"))) + parameter("tokenizer", "none"))
    with pytest.raises(ConfigError, match=r"parameter tokenizer is 'none', but .* is not a directory"):
        lightseq_backend.load(directory, device="cpu")
