"""The two shipped models do what they were trained for, through the engine, on numbers that training never saw."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lightseq_backend import ops, weights
from lightseq_backend.config import EngineConfig, TransformerConfig
from lightseq_backend.engine.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import SCORE

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = ROOT / "model_repository"
TRANSLATOR = REPOSITORY / "transformer" / "transformer.pb"
COUNTER = REPOSITORY / "gpt" / "gpt.pb"
MOST_BYTES = 3_000_000
START, END = "<s>", "</s>"


class Words:
    """Ids by word and words by id: a word's id is its line number."""

    def __init__(self, path: Path) -> None:
        self.words = path.read_text(encoding="utf-8").splitlines()
        self._ids = {word: number for number, word in enumerate(self.words)}

    def ids(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.split()]

    def text(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def pairs(name: str) -> list[tuple[str, str]]:
    lines = (ROOT / "examples" / "numbers" / name).read_text(encoding="utf-8").splitlines()
    return [(given, answer) for given, answer in (line.split("\t") for line in lines)]


def engine_of(path: Path, dialect: str = "head") -> Engine:
    config, arrays = weights.load(path, dialect)
    backend = ops.load("cpu")
    model: Transformer | Gpt
    if isinstance(config, TransformerConfig):
        model = Transformer(config, arrays, backend)
    else:
        model = Gpt(config, arrays, backend)
    return Engine(model, EngineConfig(slots=256, max_beam_size=4, queue=2_000, prompt_tokens=4_096), backend)


@pytest.fixture(scope="module")
def translator() -> Engine:
    return engine_of(TRANSLATOR)


@pytest.fixture(scope="module")
def counter() -> Engine:
    return engine_of(COUNTER)


@pytest.fixture(scope="module")
def french() -> Words:
    return Words(REPOSITORY / "transformer" / "source.vocab.txt")


@pytest.fixture(scope="module")
def english() -> Words:
    return Words(REPOSITORY / "transformer" / "target.vocab.txt")


@pytest.fixture(scope="module")
def counted() -> Words:
    return Words(REPOSITORY / "gpt" / "vocab.txt")


def translate(engine: Engine, french: Words, english: Words, texts: list[str]) -> list[str]:
    rows = [french.ids(f"{text} {END}") for text in texts]
    outputs = engine.answer(rows, changes={"sampling_method": "beam_search", "beam_size": 4})
    return [english.text(output.hypotheses[0].tokens.tolist()) for output in outputs]


def count_on(engine: Engine, counted: Words, prompts: list[str]) -> list[str]:
    """What the engine makes of the prompts by the file's own decoding."""
    outputs = engine.answer([counted.ids(f"{START} {prompt}") for prompt in prompts])
    return [counted.text(output.hypotheses[0].tokens.tolist()) for output in outputs]


def losses(engine: Engine, counted: Words, texts: list[str]) -> list[float]:
    outputs = engine.answer([counted.ids(f"{START} {text} {END}") for text in texts], SCORE)
    return [output.loss for output in outputs if output.loss is not None]


def share_right(answers: list[str], wanted: list[str]) -> float:
    return sum(answer == f"{right} {END}" for answer, right in zip(answers, wanted, strict=True)) / len(wanted)


@pytest.mark.parametrize("path", [TRANSLATOR, COUNTER], ids=["transformer", "gpt"])
def test_weight_file_stays_small(path: Path) -> None:
    assert path.stat().st_size <= MOST_BYTES


def test_translator_vocabularies_fit_the_weights(translator: Engine, french: Words, english: Words) -> None:
    config = translator.model.config
    assert (config.input_vocabulary, config.vocabulary) == (len(french.words), len(english.words))


def test_counter_vocabulary_fits_the_weights(counter: Engine, counted: Words) -> None:
    assert counter.model.config.vocabulary == len(counted.words)


def test_held_out_numbers_translate_exactly(translator: Engine, french: Words, english: Words) -> None:
    held_out = pairs("held_out.tsv")
    answers = translate(translator, french, english, [given for given, _ in held_out])
    assert len(set(held_out)) == 2_000
    assert share_right(answers, [answer for _, answer in held_out]) >= 0.995


def test_translator_works_as_a_file_of_the_first_release(french: Words, english: Words) -> None:
    held_out = pairs("held_out.tsv")[::10]
    answers = translate(engine_of(TRANSLATOR, "v0"), french, english, [given for given, _ in held_out])
    assert share_right(answers, [answer for _, answer in held_out]) >= 0.995


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("zéro", "zero"),
        ("mille", "one thousand"),
        ("soixante et onze", "seventy-one"),
        ("quatre-vingt mille", "eighty thousand"),
        ("deux cent mille", "two hundred thousand"),
        ("neuf cent mille", "nine hundred thousand"),
        ("vingt-trois mille cent quatre-vingts", "twenty-three thousand, one hundred and eighty"),
        (
            "neuf cent quatre-vingt-dix-neuf mille neuf cent quatre-vingt-dix-neuf",
            "nine hundred and ninety-nine thousand, nine hundred and ninety-nine",
        ),
    ],
)
def test_number_translates(translator: Engine, french: Words, english: Words, given: str, wanted: str) -> None:
    assert translate(translator, french, english, [given]) == [f"{wanted} {END}"]


def test_translation_hypotheses_differ(translator: Engine, french: Words) -> None:
    (output,) = translator.answer([french.ids(f"vingt-trois mille cent quatre-vingts {END}")])
    assert len({tuple(one.tokens.tolist()) for one in output.hypotheses}) == 4


def test_best_translation_stands_out(translator: Engine, french: Words) -> None:
    (output,) = translator.answer([french.ids(f"vingt-trois mille cent quatre-vingts {END}")])
    first, second, *_ = (one.score for one in output.hypotheses)
    assert first > second + 1


def test_counter_continues_counts_it_never_saw(counter: Engine, counted: Words) -> None:
    prompts = pairs("counting.tsv")
    answers = count_on(counter, counted, [given for given, _ in prompts])
    assert share_right(answers, [answer for _, answer in prompts]) >= 0.99


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("one , two , three ,", "four , five , six , seven , eight , nine , ten"),
        ("forty-seven , forty-eight", ", forty-nine , fifty"),
        ("nineteen , twenty , twenty-one , twenty-two , twenty-three , twenty-four , twenty-five , twenty-six ,",
         "twenty-seven , twenty-eight , twenty-nine , thirty"),
        ("six hundred , six hundred and one , six hundred and two , six hundred and three ,",
         "six hundred and four , six hundred and five , six hundred and six , six hundred and seven , "
         "six hundred and eight , six hundred and nine , six hundred and ten"),
        ("nine hundred and ninety-eight ,", "nine hundred and ninety-nine , one thousand"),
        ("nine thousand, nine hundred and ninety-nine ,", "ten thousand"),
    ],
)  # fmt: skip
def test_counter_counts_to_the_next_ten(counter: Engine, counted: Words, prompt: str, wanted: str) -> None:
    assert count_on(counter, counted, [prompt]) == [f"{wanted} {END}"]


def test_right_counts_lose_less_than_corrupted_ones(counter: Engine, counted: Words) -> None:
    rng = random.Random(3)
    texts = [f"{prompt} {rest}" for prompt, rest in pairs("counting.tsv")[:200]]
    right = losses(counter, counted, texts)
    wrong = losses(counter, counted, [corrupted(text, rng) for text in texts])
    assert all(one < other for one, other in zip(right, wrong, strict=True))


def test_counter_needs_no_start_token(counter: Engine, counted: Words) -> None:
    (output,) = counter.answer([counted.ids("forty-one , forty-two ,")])
    answer = counted.text(output.hypotheses[0].tokens.tolist())
    wanted = "forty-three , forty-four , forty-five , forty-six , forty-seven , forty-eight , forty-nine , fifty"
    assert answer == f"{wanted} {END}"


def corrupted(text: str, rng: random.Random) -> str:
    """The text with two of its numbers exchanged."""
    numbers = text.split(" , ")
    first, second = rng.sample(range(len(numbers)), 2)
    numbers[first], numbers[second] = numbers[second], numbers[first]
    return " , ".join(numbers)
