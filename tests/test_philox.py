"""The random generator: Random123's known answers, and noise that is Gumbel's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference

from lightseq_backend.ops.philox import gumbel, philox

ONES = 0xFFFFFFFF

# Random123's kat_vectors for philox4x32, ten rounds.
KNOWN_ANSWERS = {
    "zeros": ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([ONES] * 4, (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "digits of pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_known_answer(counter: list[int], key: tuple[int, int], answer: list[int]) -> None:
    assert philox(np.array([counter], np.uint32), key).tolist() == [answer]
    assert reference.philox(counter, key) == answer


def test_philox_treats_each_counter_by_itself() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (50, 4), dtype=np.uint32)
    key = (0xDEADBEEF, 7)
    assert philox(counters, key).tolist() == [reference.philox(counter, key) for counter in counters.tolist()]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_gumbel_takes_its_word_by_seed_stream_step_and_token(seed: int) -> None:
    tokens = np.array([0, 1, 2, 3, 4, 257, 30015])
    wanted = [reference.gumbel(seed, 3, 17, token) for token in tokens.tolist()]
    np.testing.assert_allclose(gumbel(seed, 3, 17, tokens), wanted, rtol=2e-6, atol=2e-6)


def test_gumbel_of_a_token_does_not_depend_on_which_others_are_asked_for() -> None:
    every = gumbel(9, 1, 2, np.arange(1000))
    some = np.array([999, 3, 500])
    assert gumbel(9, 1, 2, some).tolist() == every[some].tolist()


@pytest.mark.parametrize("other", [(6, 0, 0), (5, 1, 0), (5, 0, 1), (5 + 2**32, 0, 0)])
def test_gumbel_differs_by_seed_stream_and_step(other: tuple[int, int, int]) -> None:
    first, second = gumbel(5, 0, 0, np.arange(500)), gumbel(*other, np.arange(500))
    assert not np.isin(first, second).any()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


@pytest.mark.parametrize("kind", ["tokens", "steps", "streams", "seeds"])
def test_gumbel_has_gumbels_distribution_along(kind: str) -> None:
    count = 20_000 if kind == "tokens" else 3_000
    if kind == "tokens":
        noise = gumbel(11, 2, 3, np.arange(count))
    else:
        place = {"steps": (11, 2, None), "streams": (11, None, 3), "seeds": (None, 2, 3)}[kind]
        places = [[i if part is None else part for part in place] for i in range(count)]
        noise = np.array([gumbel(*one, np.array([6]))[0] for one in places])
    # Kolmogorov-Smirnov: the largest distance to exp(-exp(-x)) passes 1.95 / sqrt(n) once in a thousand.
    reached = np.exp(-np.exp(-np.sort(noise.astype(np.float64))))
    above = np.abs(np.arange(1, count + 1) / count - reached).max()
    below = np.abs(np.arange(count) / count - reached).max()
    assert max(above, below) < 1.95 / math.sqrt(count)


@pytest.mark.parametrize(
    ("word", "limits"),
    # The largest uniform that float32 has below one gives -log(24 log 2), the smallest log(2^33).
    [(ONES, (-2.82, -2.81)), (ONES - 128, (-2.82, -2.81)), (0, (22.86, 22.88)), (1, (21.76, 21.79))],
)
def test_gumbel_is_finite_for_extreme_words(
    word: int, limits: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lightseq_backend.ops.philox.philox", lambda counter, key: np.full((len(counter), 4), word, np.uint32)
    )
    noise = gumbel(0, 0, 0, np.arange(5))
    assert noise.dtype == np.float32
    assert ((limits[0] <= noise) & (noise <= limits[1])).all()
