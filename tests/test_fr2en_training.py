"""How the translator's training feeds its model: every pair once an epoch, and the loss that transformers computes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from test_fr2en_data import HEADER, catalogue

import lightseq_backend

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the extra fr2en)")
pytest.importorskip("transformers", reason="transformers is not installed (the extra fr2en)")

from examples.fr2en import __main__ as steps  # noqa: E402
from examples.fr2en import prepare, train  # noqa: E402

VOCABULARY = 50
PADDING = VOCABULARY - 1


@pytest.fixture(scope="module")
def pairs() -> train.Pairs:
    """400 pairs of 1 to 30 random ids and END."""
    draw = np.random.default_rng(3)
    arrays = {}
    for side in ("french", "english"):
        texts = [[*draw.integers(2, PADDING, size), train.END] for size in draw.integers(1, 31, 400)]
        arrays[f"training_{side}"] = np.concatenate(texts).astype(np.uint16)
        arrays[f"training_{side}_lengths"] = np.array([len(text) for text in texts], np.uint8)
    return train.Pairs.of(arrays, "training", PADDING, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 64, 500, 10_000_000])
def test_epoch_has_every_pair_once_in_batches_of_the_size(pairs: train.Pairs, tokens: int) -> None:
    plan = pairs._plan(tokens, np.random.default_rng(1))
    assert sorted(np.concatenate(plan)) == list(range(400))
    for chosen in plan:
        batch = pairs.batch(chosen)
        assert batch.source.numel() + batch.target.numel() <= max(tokens, 2 * 32)
    assert len(plan) <= max(1, 400 * 64 // tokens) or tokens < 64


def test_batch_holds_the_texts_and_padding_behind_them(pairs: train.Pairs) -> None:
    chosen = np.array([7, 399, 0])
    batch = pairs.batch(chosen)
    for side, rows in ((pairs.source, batch.source), (pairs.target, batch.target)):
        for index, row in zip(chosen, rows.tolist(), strict=True):
            start, length = side.starts[index], side.lengths[index]
            assert row == [*side.ids[start : start + length].tolist(), *[PADDING] * (len(row) - length)]
            assert row[length - 1] == train.END


def test_loss_is_that_of_transformers(pairs: train.Pairs) -> None:
    torch.manual_seed(5)
    settings = train.Settings(hidden=32, inner=64, encoder_layers=2, decoder_layers=1)
    model = train.marian(settings, VOCABULARY).eval()
    batch = pairs.batch(np.arange(40))
    mask = (batch.source != PADDING).long()
    with torch.no_grad():
        labels = batch.target.masked_fill(batch.target == PADDING, -100)
        theirs = model(input_ids=batch.source, attention_mask=mask, labels=labels)
        assert train.loss(model, batch, 0.0).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
        evenly = -theirs.logits.log_softmax(-1).mean(-1)[labels != -100].mean().item()  # loss of a uniform target
        smoothed = 0.75 * theirs.loss.item() + 0.25 * evenly
        assert train.loss(model, batch, 0.25).item() == pytest.approx(smoothed, rel=1e-5)


def test_texts_end_where_they_end() -> None:
    names = ["</s>", "<unk>", "▁Open", "▁the", "▁file", "s", "<pad>"]
    rows = torch.tensor([[6, 2, 3, 4, 5, 0, 6], [2, 4, 5, 5, 5, 5, 5]])
    assert train._texts(rows, names) == ["Open the files", "Open filesssss"]


def test_catalogues_become_a_model_that_is_served(tmp_path: Path) -> None:
    """Every step after gathering, on made-up words: what the data is made into, trained and converted fits together."""
    pytest.importorskip("sentencepiece")
    draw = random.Random(4)
    words = {f"mot{one}{other}": f"word{one}{other}" for one in "abcdefgh" for other in "klmnopqr"}
    for name in (*(f"program{letter}{letter}" for letter in "bcdefghijklm"), "konsole", "gawk"):
        (tmp_path / "catalogues" / name).mkdir(parents=True)
        texts = [draw.sample(list(words), 3) for _ in range(60)]
        messages = {" ".join(words[word] for word in text): " ".join(text) for text in texts}
        (tmp_path / "catalogues" / name / "000-a.mo").write_bytes(catalogue(HEADER | messages))
    prepare.prepare(tmp_path, vocabulary=150)
    settings = train.Settings(hidden=32, inner=64, encoder_layers=1, decoder_layers=1, tokens=600, warmup=5)
    train.train(tmp_path, tmp_path / "trained", 1.0, settings)
    steps.convert(tmp_path)
    with lightseq_backend.load(tmp_path / "fr2en", device="cpu") as model:
        (answer,) = model.translate(["motak «\u00a0motbl\u00a0»"], num_hypotheses=4, beam_size=4)
    assert len(answer.hypotheses) == 4
    curves = (tmp_path / "trained" / "training.log").read_text().splitlines()
    assert '"bleu"' in curves[-1]
