"""What the two models read: numbers in words by num2words, vocabularies, and numbers kept from training.

A token is whatever stands between two blanks, so that a text needs no tokeniser: `"a b".split()` and `" ".join`
are the whole of it. num2words' own spelling is kept: "vingt-trois" and "thousand," are one token each.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from num2words import num2words

PADDING, UNKNOWN, START, END = "<pad>", "<unk>", "<s>", "</s>"

LARGEST = 999_999  # the translator's last number
# From, up to (exclusive), kept for testing, share of the training numbers. Below 100 nothing is kept: every number
# there is a word of its own, which a model must have seen.
_MAGNITUDES = (
    (0, 100, 0, 0.05),
    (100, 1_000, 100, 0.10),
    (1_000, 10_000, 400, 0.15),
    (10_000, 100_000, 650, 0.20),
    (100_000, LARGEST + 1, 750, 0.30),
)
# Round numbers are what people try first and what chance hardly ever draws, so they get a share of their own.
_ROUND_TO = (10, 100, 1_000, 10_000, 100_000)
_ROUND = 0.20
_THOUSANDS_KEPT = 100  # multiples of 1000 kept for testing, beside the rest

LAST_COUNT = 10_000  # the counter's last number
SEPARATOR = ","
_KEPT_TENS = 100  # tens (n1 .. n0) that no training text of the counter touches
_COUNTED_BELOW = (100, 1_000, LAST_COUNT, LAST_COUNT)  # a text's first number is below one of these
_ROUND_STARTS = 0.10  # share of texts that lead to, or start at, a hundred or a thousand: by chance they are few
_GOES_ON = 1 / 3  # share of texts that count on past a multiple of ten


@cache
def french(number: int) -> str:
    return num2words(number, lang="fr")


@cache
def english(number: int) -> str:
    return num2words(number, lang="en")


class Vocabulary:
    """Words by id; a word's id is its line number in the file.

    Padding is the first id; unknown, start and end are the last three, in that order, because LightSeq's first
    release takes them from there whatever the file says.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        words = dict.fromkeys(word for text in texts for word in text.split())
        self.words = (PADDING, *words, UNKNOWN, START, END)
        self._ids = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        return self._ids[word]

    def encode(self, text: str) -> list[int]:
        """The ids of a text of known words, ended by `</s>`."""
        return [*(self._ids[word] for word in text.split()), self._ids[END]]

    def file(self) -> str:
        return "".join(f"{word}\n" for word in self.words)


def translator_vocabularies() -> tuple[Vocabulary, Vocabulary]:
    """French and English words of every number up to LARGEST: each half below 1000, with and without thousand."""
    numbers = [*range(1_000), *range(1_000, LARGEST + 1, 1_000), 1_100]  # 1,100 brings "thousand,"
    return Vocabulary(map(french, numbers)), Vocabulary(map(english, numbers))


@dataclass(frozen=True)
class Split:
    """Numbers for training (drawn by magnitude, with repetition) and numbers it never sees, ascending."""

    training: list[int]
    held_out: list[int]


def split_numbers(seed: int, training: int) -> Split:
    """The translator's numbers, always the same for one seed."""
    rng = random.Random(seed)
    held_out = set(rng.sample(range(1_000, LARGEST + 1, 1_000), _THOUSANDS_KEPT))
    for low, high, kept, _ in _MAGNITUDES:
        held_out.update(rng.sample([n for n in range(low, high) if n not in held_out], kept))
    numbers: list[int] = []
    for low, high, _, share in _MAGNITUDES:
        allowed = [n for n in range(low, high) if n not in held_out]
        numbers += rng.choices(allowed, k=round(training * share))
    for unit in _ROUND_TO:
        allowed = [n for n in range(unit, LARGEST + 1, unit) if n not in held_out]
        numbers += rng.choices(allowed, k=round(training * _ROUND / len(_ROUND_TO)))
    rng.shuffle(numbers)
    return Split(numbers, sorted(held_out))


def counter_vocabulary() -> Vocabulary:
    return Vocabulary([*map(english, range(LAST_COUNT + 1)), SEPARATOR])


def count(first: int, last: int) -> str:
    """ "eight , nine , ten" """
    return f" {SEPARATOR} ".join(english(n) for n in range(first, last + 1))


def next_ten(number: int) -> int:
    """The first multiple of ten after a number: where the counter stops."""
    return (number // 10 + 1) * 10


def kept_tens(seed: int) -> set[int]:
    """Tens t (the numbers 10t+1 .. 10t+10) that the counter's training never touches.

    None below 100, and none that ends at a thousand: there are only ten of those, each with a word of its own.
    """
    return set(random.Random(seed).sample([t for t in range(10, LAST_COUNT // 10) if t % 100 != 99], _KEPT_TENS))


def counting_texts(seed: int, texts: int) -> list[str]:
    """Counts that start anywhere, small numbers more often, and end at a multiple of ten: mostly the first."""
    rng = random.Random(seed)
    kept = kept_tens(seed)
    result: list[str] = []
    while len(result) < texts:
        first = rng.randrange(rng.choice(_COUNTED_BELOW))
        if rng.random() < _ROUND_STARTS:
            unit = rng.choice((100, 1_000))
            first = min(unit * rng.randint(1, LAST_COUNT // unit) - rng.randint(0, 9), LAST_COUNT - 1)
        last = next_ten(first)
        while rng.random() < _GOES_ON and last < LAST_COUNT:
            last += 10
        if kept.isdisjoint(range((first - 1) // 10, last // 10)):
            result.append(count(first, last))
    return result


def counting_prompts(seed: int, prompts: int) -> list[tuple[str, str]]:
    """(prompt, right continuation) from the tens kept apart: one to three numbers, and the rest up to the ten."""
    rng = random.Random(seed)
    tens = sorted(kept_tens(seed))
    result = []
    for _ in range(prompts):
        ten, said = rng.choice(tens), rng.randint(1, 3)
        first = 10 * ten + rng.randint(1, 10 - said)
        prompt = f"{count(first, first + said - 1)} {SEPARATOR}"
        result.append((prompt, count(first + said, 10 * ten + 10)))
    return result
