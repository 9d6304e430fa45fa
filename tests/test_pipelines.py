"""A converted model's text is what transformers makes of the same text with the same directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_checkpoints
from test_tokenizers import SENTENCES, write_lines

import lightseq_backend
from lightseq_backend.__main__ import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "the fox sleeps",
    "le chien saute par-dessus nine dogs, said the dog",
    "don't jump, quick quick",
    "Étonné, 12!",
]
LENGTH = 20


def converted(tmp_path: Path, source: Path, source_language: str | None = None) -> Any:
    language = ["--source-language", source_language] if source_language else []
    assert main(["convert", str(source), str(tmp_path / "ours"), "--no-check", *language]) == 0
    return lightseq_backend.load(tmp_path / "ours", device="cpu")


def train_pieces(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "sentences", *SENTENCES)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "sentences"), model_prefix=str(folder / "own"), minloglevel=2,
        **{"vocab_size": 90, **settings},
    )  # fmt: skip
    return folder / "own.model"


def save(family: str, tokenizer: Any, folder: Path, **settings: Any) -> Any:
    model = small_checkpoints.build(family, max_position_embeddings=64, **settings)
    model.generation_config.bad_words_ids = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()  # what is computed, as sinusoids, is not saved


def translated(model: Any, tokenizer: Any, beams: int, **settings: Any) -> list[str]:
    """As transformers' pipeline for translations did it, until version 5 left that out."""
    texts = []
    for text in TEXTS:
        ids = model.generate(
            **tokenizer(text, return_tensors="pt"), num_beams=beams, max_new_tokens=LENGTH, do_sample=False, **settings
        )
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


@pytest.mark.parametrize("beams", [1, 4])
def test_marian_translates_as_transformers_does(beams: int, tmp_path: Path) -> None:
    pieces = train_pieces(tmp_path / "pieces", model_type="bpe")
    names = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    vocabulary = ["</s>", "<unk>", *(names.id_to_piece(id_) for id_ in range(3, 90)), "<pad>"]
    ids = {piece: id_ for id_, piece in enumerate(vocabulary)}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    tokenizer = transformers.MarianTokenizer(
        str(pieces), str(pieces), str(tmp_path / "vocab.json"), source_lang="en", target_lang="fr"
    )
    special = {"pad_token_id": len(ids) - 1, "decoder_start_token_id": len(ids) - 1, "eos_token_id": 0}
    model = save("marian", tokenizer, tmp_path / "source", vocab_size=len(ids), **special)
    with converted(tmp_path, tmp_path / "source") as ours:
        answers = ours.translate(TEXTS, sampling_method="standard_beam", beam_size=beams, max_new_tokens=LENGTH,
                                 length_penalty=1.0)  # fmt: skip
        assert [answer.text for answer in answers] == translated(model, tokenizer, beams)


@pytest.mark.parametrize("beams", [1, 4])
def test_bart_translates_as_transformers_does(beams: int, tmp_path: Path) -> None:
    source = tmp_path / "source"
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        SENTENCES, vocab_size=400, show_progress=False, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    source.mkdir()
    trained.save_model(str(source))
    tokenizer = transformers.BartTokenizer.from_pretrained(source)
    size = trained.get_vocab_size()
    model = save("bart", tokenizer, source, vocab_size=size, forced_bos_token_id=None)
    with converted(tmp_path, source) as ours:
        answers = ours.translate(TEXTS, sampling_method="standard_beam", beam_size=beams, max_new_tokens=LENGTH,
                                 length_penalty=1.0)  # fmt: skip
        assert [answer.text for answer in answers] == translated(model, tokenizer, beams)


def test_gpt2_generates_as_the_pipeline_does(tmp_path: Path) -> None:
    source = tmp_path / "source"
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(SENTENCES, vocab_size=400, show_progress=False, special_tokens=["<|endoftext|>"])
    source.mkdir()
    trained.save_model(str(source))
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(source)
    end = trained.token_to_id("<|endoftext|>")
    model = small_checkpoints.build(
        "gpt2", vocab_size=trained.get_vocab_size(), n_positions=64, eos_token_id=end, bos_token_id=end
    )
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = [
        generate(text, max_new_tokens=LENGTH, do_sample=False, pad_token_id=end)[0]["generated_text"] for text in TEXTS
    ]
    with converted(tmp_path, source) as ours:
        answers = ours.generate(TEXTS, sampling_method="greedy", max_new_tokens=LENGTH)
        assert [answer.text for answer in answers] == expected
