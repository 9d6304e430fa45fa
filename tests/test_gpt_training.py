"""The GPT's training script, in seconds and tiny: what it writes can be converted, and is measured rightly."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gpt_data import sentences

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the extra gpt)")
pytest.importorskip("transformers", reason="transformers is not installed (the extra gpt)")

from examples.gpt import evaluate, prepare, train  # noqa: E402
from lightseq_backend.export import huggingface  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [sentences(40 * n, 30).replace("\n\n", "\n") for n in range(12)]
    prepare.write(texts, texts[:2], folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("model")
    flags = ["--data", str(data), "--output", str(output), "--seconds", "4", "--tiny", "--windows", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *flags])
        train.main()
    return output


def test_directory_of_the_training_converts(trained: Path, data: Path) -> None:
    model = huggingface.read(trained)
    numbers = json.loads((data / "data.json").read_text())
    assert model.notes == []
    assert (model.config.vocabulary, model.config.end_id) == (numbers["vocabulary"], numbers["end_id"])
    assert (model.config.decoding.sampling_method, model.config.decoding.top_p) == ("topp", 0.9)
    assert {array.dtype for array in model.arrays.values()} == {np.dtype(np.float16)}


def test_training_reports_what_it_did(trained: Path) -> None:
    report = json.loads((trained / "training.json").read_text())
    lines = [json.loads(line) for line in (trained / "training.log").read_text().splitlines()]
    losses = [line["validation"]["loss"] for line in lines if "validation" in line]
    assert report["steps"] == lines[-1]["step"]
    assert report["validation"]["loss"] == pytest.approx(min(losses[-1], lines[-1]["kept"]["loss"]))
    assert losses[0] > report["validation"]["loss"]


def test_windows_are_runs_of_the_text() -> None:
    ids = torch.arange(2_000, dtype=torch.int32)
    batch = next(train.drawn(ids, windows=3, seed=1))
    assert batch.shape == (3, train.POSITIONS + 1)
    assert bool((batch.diff(dim=1) == 1).all())


def test_measured_perplexity_is_that_of_transformers(trained: Path, data: Path) -> None:
    model, tokenizer = evaluate.load(trained, data / "tokenizer.json")
    text = sentences(5_000, 3).replace("\n\n", "\n")
    ids = torch.tensor([[*tokenizer.encode(text).ids, tokenizer.token_to_id(prepare.END)]])
    with torch.no_grad():
        wanted = float(model(ids, labels=ids).loss)  # transformers' own shift
    found = evaluate.measured(model, tokenizer, [text])
    assert found["perplexity_per_token"] == pytest.approx(math.exp(wanted), rel=1e-5)
    assert found["tokens"] == ids.shape[1] - 1


def test_fixture_holds_each_text_in_its_place(trained: Path, data: Path) -> None:
    model, tokenizer = evaluate.load(trained, data / "tokenizer.json")
    texts = [sentences(6_000 + n, 1 + n % 3).replace("\n\n", "\n") for n in range(11)]
    alone: list[Any] = [evaluate.scored(model, tokenizer, [text])[0] for text in texts]
    together = evaluate.scored(model, tokenizer, texts)
    assert [one["text"] for one in together] == texts
    for one, other in zip(together, alone):
        assert one["ids"] == other["ids"]
        assert one["log_probability"] == pytest.approx(other["log_probability"], rel=1e-5)
