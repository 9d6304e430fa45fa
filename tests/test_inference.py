"""LightSeq's Python package, as its scripts use it: golden results, arguments honoured or refused, RuntimeError."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from int8_files import messages
from repositories import golden_cases
from weight_files import golden, written

import lightseq_backend.inference as lsi
from lightseq_backend import local


@functools.cache
def translator(name: str = "t01_base") -> lsi.Transformer:
    return lsi.Transformer(str(golden(f"{name}.pb")), 8, device="cpu")


@functools.cache
def gpt(name: str = "g01_base") -> lsi.Gpt:
    return lsi.Gpt(str(golden(f"{name}.pb")), 8, device="cpu")


def expected(case: dict[str, Any], end_id: int) -> np.ndarray:
    """The rows of a golden case as one array, wider rows deciding."""
    width = max(len(ids) for row in case["rows"] for ids in row["ids"])
    return np.array([[ids + [end_id] * (width - len(ids)) for ids in row["ids"]] for row in case["rows"]])


# As scripts were written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t01_base", "t05_postln_bart", "t09_topk_greedy", "t18_short_cap"])
def test_infer_gives_all_beams_as_the_last_release_does(name: str) -> None:
    model = translator(name)
    end_id = local.build(golden(f"{name}.pb")).model.config.end_id
    for case in golden_cases(name)[:6]:
        tokens, scores = model.infer(case["source_ids"])  # lists, as in LightSeq's README
        wanted = expected(case, end_id)
        assert (tokens.dtype, scores.dtype, scores.shape) == (np.int32, np.float32, wanted.shape[:2])
        np.testing.assert_array_equal(tokens, wanted)
        for row, given in zip(scores, case["rows"], strict=True):
            for score, one in zip(row, given["scores"], strict=True):
                assert one is None or abs(score - one) <= 1e-4


def test_ppl_and_sample_give_the_golden_results() -> None:
    for case in golden_cases("g01_base"):
        if case["kind"] == "ppl":
            kept = [i for i in range(len(case["ppl"])) if i not in case.get("quirk", [])]
            found = gpt().ppl(np.array(case["token_ids"])[kept])
            assert (found.dtype, found.shape) == (np.float32, (len(kept),))
            np.testing.assert_allclose(found, np.array(case["ppl"])[kept], atol=1e-4)
        else:
            found = gpt().sample(np.array(case["token_ids"]))
            assert (found.dtype, found.tolist()) == (np.int32, case["ids"])


def test_script_of_lightseqs_examples_runs_after_one_import() -> None:
    """The shape of ls_fairseq.py and hf_gpt2: a model, a matrix, what comes out is indexed."""
    ls_model = lsi.Transformer(str(golden("t01_base.pb")), 8, device="cpu")
    src_tokens = np.array([[79, 0, 0], [45, 12, 91]])
    output, _ = ls_model.infer(src_tokens)
    first = [ids[0] for ids in output]
    assert np.array(first).shape == (2, output.shape[2])
    generator = lsi.Gpt(str(golden("g01_base.pb")), max_batch_size=16, device="cpu")
    ids = generator.sample(np.array([[25, 109]], dtype="int"))
    assert ids[0][:2].tolist() == [25, 109]


# Arguments of earlier releases -----------------------------------------------------------------------------------


def test_multiple_output_says_whether_all_beams_come() -> None:
    rows = [[45, 12, 91, 67], [79, 0, 0, 0]]
    all_beams, best = translator().infer(rows, True), translator().infer(rows, multiple_output=False)
    assert (all_beams[0].shape[:2], best[0].shape[:2], best[1].shape) == ((2, 4), (2, 1), (2, 1))
    np.testing.assert_array_equal(best[1], all_beams[1][:, :1])
    np.testing.assert_array_equal(best[0], all_beams[0][:, :1])
    greedy, _ = translator("t09_topk_greedy").infer(rows, multiple_output=False)
    assert greedy.shape[1] > 1


def test_sampling_method_stays_for_later_calls() -> None:
    model = lsi.Transformer(str(golden("t01_base.pb")), 8, device="cpu")
    assert model.infer([[45, 12]])[0].shape[1] == 4
    assert model.infer([[45, 12]], sampling_method="topk", topk=1)[0].shape[1] == 1
    assert model.infer([[45, 12]], topk=1)[0].shape[1] == 1
    assert model.infer([[45, 12]], sampling_method="beam_search")[0].shape[1] == 4


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"beam_size": 2}, {"beam_size": 2}),
        ({"length_penalty": 2.0}, {"length_penalty": 2.0}),
        ({"diverse_lambda": 0.5}, {"diverse_lambda": 0.5}),
        ({"sampling_method": "topk_greedy", "beam_size": 3}, {"sampling_method": "topk_greedy", "beam_size": 3}),
    ],
)
def test_arguments_are_honoured(arguments: dict[str, Any], options: dict[str, object]) -> None:
    model = lsi.Transformer(str(golden("t01_base.pb")), 8, device="cpu")
    tokens, scores = model.infer([[45, 12, 91, 67, 86]], **arguments)
    (output,) = local.build(golden("t01_base.pb")).answer([[45, 12, 91, 67, 86]], changes=options)
    plain, _ = model.infer([[45, 12, 91, 67, 86]], sampling_method="beam_search")
    assert scores[0].tolist() == pytest.approx([one.score for one in output.hypotheses])
    assert [row[: len(one.tokens)].tolist() for row, one in zip(tokens[0], output.hypotheses, strict=True)] == [
        one.tokens.tolist() for one in output.hypotheses
    ]
    assert tokens.shape != plain.shape or (tokens != plain).any()  # the argument makes a difference here


def test_greedy_sample_by_arguments_is_the_argmax() -> None:
    case = next(case for case in golden_cases("g01_base") if case["kind"] == "gen")
    for arguments in (("topk", 1, 0.75), ("topp", -1, 1e-6), ("", 1)):  # positional, the first as v2.0.0's defaults
        assert gpt().sample(case["token_ids"], *arguments).tolist() == case["ids"]


def test_max_step_of_old_releases_limits_rows() -> None:
    model = lsi.Gpt(str(golden("g01_base.pb")), 8, 6, device="cpu")
    assert model.sample([[25, 109, 30]], topk=1).shape[1] <= 6
    with pytest.raises(RuntimeError, match="seq len of input greater than max_step: it is 7, max_step is 6"):
        model.sample([[25] * 7])
    positions = local.build(golden("g01_base.pb")).model.config.max_positions
    with pytest.raises(RuntimeError, match=f"max_step is {positions + 1}; this model has {positions} positions"):
        lsi.Gpt(str(golden("g01_base.pb")), 8, positions + 1, device="cpu")


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[3]] * 9, RuntimeError, "batch size of input greater than max_batch_size: it is 9, max_batch_size is 8"),
        ([[3] * 49], RuntimeError, "seq len of input greater than max_step: it is 49, max_step is 48"),
        ([[3, 96]], RuntimeError, "id 96 at column 1 is outside the vocabulary"),
        ([[2**32 + 3]], RuntimeError, f"id {2**32 + 3} at column 0 is outside"),
        ([[0, 0]], RuntimeError, "only padding"),
        ([[]], RuntimeError, r"shape \[1, 0\]"),
        ([3, 4], ValueError, "incorrect number of dimensions: 1; expected 2"),
        ([["a"]], TypeError, "it must be one of integers"),
    ],
)
def test_bad_input_is_refused(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        translator().infer(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling_method": "best"}, "unsupported sampling_method: best"),
        ({"beam_size": 1000}, "beam_size is 1000; it must be from 1 to"),
        ({"topk": 4}, "topk is 4; it is for sampling, and this call uses beam_search"),
        ({"topp": 0.5}, "topp is 0.5; it is for sampling"),
        ({"sampling_method": "topk", "topk": 101}, "top_k is 101"),
        ({"sampling_method": "topp", "topp": 1.5}, "top_p is 1.5"),
        ({"sampling_method": "topk", "topk": 2, "beam_size": 2}, "beam_size needs a search"),
        ({"sampling_method": "topp", "topp": 0.5, "diverse_lambda": 0.5}, "diverse_lambda needs beam_search"),
        ({"length_penalty": 99.0}, "length_penalty is 99"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(arguments: dict[str, Any], message: str) -> None:
    model = lsi.Transformer(str(golden("t01_base.pb")), 8, device="cpu")
    with pytest.raises(RuntimeError, match=message):
        model.infer([[3, 4]], **arguments)


@pytest.mark.parametrize("kind", [lsi.Transformer, lsi.Gpt])
def test_what_cannot_be_loaded_is_a_runtime_error(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "weights.pb").write_bytes(b"no weights")
    for path in (tmp_path / "weights.pb", tmp_path / "none.pb", tmp_path):
        with pytest.raises(RuntimeError):
            kind(str(path), 8, device="cpu")
    with pytest.raises(RuntimeError, match="max_batch_size is 0"):
        kind(str(golden("t01_base.pb")), 0, device="cpu")
    with pytest.raises(RuntimeError, match="device is 'tpu'"):
        kind(str(golden("t01_base.pb")), 8, device="tpu")


def test_gpt_does_not_search() -> None:
    with pytest.raises(RuntimeError, match="unsupported sampling_method: beam_search"):
        gpt().sample([[3]], sampling_method="beam_search")


def test_fractions_are_cut_off() -> None:
    np.testing.assert_array_equal(translator().infer([[45.7, 12.2]])[0], translator().infer([[45, 12]])[0])
    assert json.dumps(translator().infer(np.array([[45, 12]], np.int64))[0].tolist())


def test_classes_of_int8_files_keep_their_weights(tmp_path: Path) -> None:
    for kind, made, plain in (("transformer", lsi.QuantTransformer, lsi.Transformer), ("gpt", lsi.QuantGpt, lsi.Gpt)):
        path = str(written(tmp_path / f"{kind}.pb", messages(kind, seed=3, topk=1, extra_decode_length=4)[0]))
        rounded, exact = made(path, 2, device="cpu"), plain(path, 2, device="cpu")
        if kind == "transformer":
            for one, other in zip(rounded.infer([[5, 9, 2]]), exact.infer([[5, 9, 2]]), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5)
        else:
            np.testing.assert_allclose(rounded.ppl([[5, 9, 2]]), exact.ppl([[5, 9, 2]]), rtol=1e-5)
            np.testing.assert_array_equal(rounded.sample([[5, 9, 2]]), exact.sample([[5, 9, 2]]))
