"""NLLB and mBART-50: texts in the languages asked for, as transformers translates them with the same directory.

Its tokenizer is one file, tokenizer.json, where transformers 5 saved it; what was published before has SentencePiece's
model and, in tokenizer_config.json, the ids of the languages.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")

from test_pipelines import LENGTH, TEXTS, converted, save, train_pieces, translated  # noqa: E402 -- which needs them too

LANGUAGES = ["eng_Latn", "fra_Latn", "deu_Latn"]
# Family -> its tokenizer's class, how its pieces are made, two languages, and settings of the model.
FAMILIES: dict[str, tuple[str, str, tuple[str, str], dict[str, Any]]] = {
    "m2m_100": ("NllbTokenizer", "bpe", ("eng_Latn", "deu_Latn"), {}),
    "mbart": ("MBart50Tokenizer", "unigram", ("en_XX", "de_DE"), {"decoder_start_token_id": 2}),
}


def published(root: Path, family: str) -> Path:
    """The files of a tokenizer as they lie beside the models that one downloads."""
    name, kind, _, _ = FAMILIES[family]
    shutil.copy(train_pieces(root / "pieces", model_type=kind, vocab_size=70), root / "sentencepiece.bpe.model")
    settings: dict[str, Any] = {"tokenizer_class": name}
    if name == "NllbTokenizer":
        settings["additional_special_tokens"] = LANGUAGES
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("form", ["published", "saved"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_translated_between_the_languages_asked_for(
    family: str, form: str, beams: int, tmp_path: Path
) -> None:
    name, _, (english, german), settings = FAMILIES[family]
    files = published(tmp_path / "tokenizer", family)
    tokenizer = getattr(transformers, name).from_pretrained(files, src_lang=english)
    source = tmp_path / "source"
    model = save(family, tokenizer, source, vocab_size=len(tokenizer), **settings)
    if form == "published":
        (source / "tokenizer.json").unlink()
        shutil.copy(files / "sentencepiece.bpe.model", source)
        added = {id_: {"content": str(token), "special": True} for id_, token in tokenizer.added_tokens_decoder.items()}
        written = json.loads((files / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": added}
        (source / "tokenizer_config.json").write_text(json.dumps(written))
    for there, back in ((english, german), (german, english)):
        tokenizer.src_lang = there
        with converted(tmp_path / there, source, there) as ours:
            answers = ours.translate(
                TEXTS, sampling_method="standard_beam", beam_size=beams, max_new_tokens=LENGTH - 1, length_penalty=1.0,
                target_language=back,
            )  # fmt: skip
            found = [answer.text for answer in answers]
        forced = tokenizer.convert_tokens_to_ids(back)
        assert found == translated(model, tokenizer, beams, forced_bos_token_id=forced)
