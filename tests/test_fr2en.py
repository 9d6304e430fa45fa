"""The French-English translator behind a real Triton: as good as transformers' own decoding of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from repositories import write_model

from examples.fr2en.scores import bleu
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_backend.text.marian import Marian
from lightseq_client import Client, ServerText

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "model_repository" / "fr2en"
MOST_BYTES = 20_000_000
TOLERANCE = 0.2  # BLEU
TEXT = {
    "inputs": {"source_ids": "INT32", "text_input": "STRING"},
    "outputs": {"target_ids": "INT32", "target_scores": "FP32", "text_output": "STRING"},
}


def held_out() -> tuple[list[str], list[str], list[str]]:
    """French, English and transformers' translations with beam 4 in fp32 (make_fr2en_fixture.py)."""
    lines = (ROOT / "tests" / "fr2en" / "held_out.tsv").read_text(encoding="utf-8").splitlines()
    french, english, theirs = zip(*(line.split("\t") for line in lines), strict=True)
    return list(french), list(english), list(theirs)


def server(root: Path, device: str, precisions: tuple[str, ...]) -> EmbeddedServer:
    """The shipped weights, a model a precision: fr2en_fp32, ..."""
    for precision in precisions:
        kind = {"kind": "KIND_GPU"} if device == "gpu" else {}
        parameters = {"precision": precision, "slots": 256, "queue": 1000}
        weights = MODEL / "transformer.safetensors"
        write_model(root, f"fr2en_{precision}", weights, TEXT, rows=16, optional=True, parameters=parameters, **kind)
    return EmbeddedServer(root, device=device, stop_timeout=5)


def translations(address: str, model: str) -> list[str]:
    french, _, _ = held_out()
    with Client(address) as client:
        answers = client.translate(french, model=model, codec=Marian(MODEL), beam_size=4)
        return [answer.hypotheses[0].text for answer in answers]


def check(address: str, precision: str, equal: float) -> None:
    """The served model's BLEU is transformers', and at least that share of its texts."""
    _, english, theirs = held_out()
    ours = translations(address, f"fr2en_{precision}")
    same = sum(map(str.__eq__, ours, theirs)) / len(theirs)
    print(
        f"{precision}: BLEU {bleu(ours, english):.2f}, transformers' {bleu(theirs, english):.2f}, {same:.1%} the same"
    )
    assert bleu(ours, english) == pytest.approx(bleu(theirs, english), abs=TOLERANCE)
    assert same >= equal


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("fr2en"), "cpu", ("fp32", "int8")) as running:
        yield running.grpc


def test_served_translator_is_as_good_as_transformers(address: str) -> None:
    check(address, "fp32", 0.99)


def test_served_translator_is_as_good_with_int8_weights(address: str) -> None:
    check(address, "int8", 0.7)


def test_fixture_is_what_was_kept_from_training() -> None:
    french, english, theirs = held_out()
    assert len(set(french)) == len(french) == 500
    assert bleu(theirs, english) >= 35
    assert all(theirs)


def test_typography_makes_no_difference(address: str) -> None:
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("Triton's Python stub takes no strings under NumPy 2")
    spellings = ['Voulez-vous enregistrer "%s"?', "Voulez\u2011vous enregistrer «\u00a0%s\u00a0»\u202f?"]
    with Client(address) as client:
        plain, typeset = (client.translate([text], model="fr2en_fp32", codec=ServerText()) for text in spellings)
        assert plain[0].hypotheses[0].text == typeset[0].hypotheses[0].text
        assert "%s" in plain[0].hypotheses[0].text


def test_shipped_files_are_small_and_described() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= MOST_BYTES
    card = (MODEL / "MODEL_CARD.md").read_text(encoding="utf-8")
    for heading in ("Data", "Licences", "Training", "Scores", "Limits", "Examples"):
        assert f"## {heading}" in card
