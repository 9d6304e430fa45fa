"""Weights rounded to int8: the rounding itself, and what becomes of the shipped models' answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import weight_files
from int8_files import messages
from test_trained_models import COUNTER, END, REPOSITORY, START, TRANSLATOR, Words, pairs

from lightseq_backend import local, ops, weights
from lightseq_backend.config import EngineConfig, GptConfig
from lightseq_backend.engine.engine import Engine
from lightseq_backend.errors import ConfigError
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops.cpu import Folded
from lightseq_backend.ops.int8 import dequantise, quantise
from lightseq_backend.quantised import Rounded
from lightseq_backend.request import SCORE, Hypothesis, Output


def engine(path: object, precision: str) -> Engine:
    backend = ops.load("cpu", precision=precision)
    config, arrays = weights.load(path)  # type: ignore[arg-type]
    model = Gpt(config, arrays, backend) if isinstance(config, GptConfig) else Transformer(config, arrays, backend)
    return Engine(model, EngineConfig(slots=256, max_beam_size=4, queue=2_000, prompt_tokens=4_096), backend)


def best(outputs: list[Output]) -> list[Hypothesis]:
    return [output.hypotheses[0] for output in outputs]


def test_weights_are_rounded_in_steps_of_their_column() -> None:
    numbers, scales = quantise(np.array([[127, 0, -2.54], [-1.4, 0, 1.26], [2.5, 0, 0.03]], np.float32))
    assert numbers.tolist() == [[127, 0, -127], [-1, 0, 63], [2, 0, 2]]
    np.testing.assert_allclose(scales[[0, 2]], [1, 0.02], rtol=1e-6)
    assert scales[1] > 0


def test_what_was_rounded_stays_as_it_is() -> None:
    weight = np.random.default_rng(1).standard_normal((300, 70), np.float32)
    once = quantise(weight)
    np.testing.assert_array_equal(quantise(dequantise(*once))[0], once[0])
    assert np.abs(dequantise(*once) - weight).max(axis=0) == pytest.approx(once[1] / 2, rel=0.1)


def test_norm_is_folded_before_the_weight_is_rounded() -> None:
    backend = ops.load("cpu", precision="int8")
    weight, gain, bias = np.array([[127, 1], [50, 2]], np.float32), np.array([1, 100], np.float32), np.ones(2)
    folded = backend.matrix(weight, (gain, bias))
    assert isinstance(folded, Folded)
    np.testing.assert_allclose(folded.weight, [[3 * 5000 / 127, 200 / 127], [5000, 200]], rtol=1e-6)
    np.testing.assert_allclose(folded.offsets, [177, 3])


@pytest.mark.parametrize("kind", ["transformer", "gpt"])
def test_int8_file_answers_as_the_floats_its_bytes_stand_for(kind: str, tmp_path: Path) -> None:
    """With precision int8 no weight is rounded again, with a LayerNorm in front or not; read as floats, they are."""
    path = weight_files.written(tmp_path / f"{kind}.pb", messages(kind, seed=3, topk=1, extra_decode_length=4)[0])
    rows = [[5, 9, 2], [7, 2], [1, 3, 8, 6], [10]]
    engines = (*(local.build(path, precision=precision) for precision in ("fp32", "int8")), engine(path, "int8"))
    exact, kept, again = (best(one.answer(rows)) for one in engines)
    assert [one.tokens.tolist() for one in kept] == [one.tokens.tolist() for one in exact]
    scores, wanted, other = (np.array([one.score for one in found]) for found in (kept, exact, again))
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(other - wanted).max() > 1e-3


def test_rounded_weight_has_no_norm_folded_into_it() -> None:
    rounded = Rounded(np.array([[3, -1], [2, 100]], np.int8), np.array([0.5, 2], np.float32))
    backend = ops.load("cpu", precision="int8")
    for place in (backend.matrix, backend.vocabulary_matrix):
        assert place(rounded).tolist() == [[1.5, -2], [1, 200]]
    with pytest.raises(AssertionError):
        backend.matrix(rounded, (np.ones(2), np.zeros(2)))


def test_a_cpu_has_no_half_precision() -> None:
    with pytest.raises(ConfigError, match=r"precision is 'fp16'; a CPU computes in fp32 or int8"):
        ops.load("cpu", precision="fp16")


@pytest.mark.parametrize("kind", ["transformer", "gpt"])
def test_shipped_model_answers_alike_with_int8_weights(kind: str) -> None:
    """On at least 97 % of the inputs that training never saw, every fourth of them."""
    if kind == "transformer":
        words, path = Words(REPOSITORY / "transformer" / "source.vocab.txt"), TRANSLATOR
        rows = [words.ids(f"{text} {END}") for text, _ in pairs("held_out.tsv")[::4]]
    else:
        words, path = Words(REPOSITORY / "gpt" / "vocab.txt"), COUNTER
        rows = [words.ids(f"{START} {prompt}") for prompt, _ in pairs("counting.tsv")[::4]]
    exact, rounded = (
        [one.hypotheses[0].tokens.tolist() for one in engine(path, precision).answer(rows)]
        for precision in ("fp32", "int8")
    )
    equal = sum(one == other for one, other in zip(exact, rounded, strict=True)) / len(rows)
    print(f"{kind}: {equal:.2%} of {len(rows)} answers are equal")
    assert equal >= 0.97


def test_shipped_model_keeps_its_perplexity_with_int8_weights() -> None:
    words = Words(REPOSITORY / "gpt" / "vocab.txt")
    rows = [words.ids(f"{START} {prompt} {rest} {END}") for prompt, rest in pairs("counting.tsv")]
    tokens = np.array([len(row) - 1 for row in rows])
    losses = (
        [output.loss for output in engine(COUNTER, precision).answer(rows, SCORE)] for precision in ("fp32", "int8")
    )
    exact, rounded = (float(np.exp(np.average(loss, weights=tokens))) for loss in losses)
    print(f"perplexity {exact:.5f}, with int8 weights {rounded:.5f}: {rounded / exact - 1:+.3%}")
    assert abs(rounded / exact - 1) <= 0.005
    assert rounded != exact
