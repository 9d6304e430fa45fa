"""Marian's translators (OPUS-MT): one SentencePiece model a side, ids from vocab.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lightseq_backend.config import Config
from lightseq_backend.errors import ConfigError
from lightseq_backend.text.tokenizer import BLANK, NO_TOKEN, Tokenizer, check_known, load_pieces, read_ids

FILES = ("source.spm", "target.spm", "vocab.json")
TARGET_IDS = "target_vocab.json"  # of models whose sides have ids of their own
END, PADDING, UNKNOWN = "</s>", "<pad>", "<unk>"
_LANGUAGE = re.compile(r"\s*(>>[^<>]+<<)")  # what a model of many target languages wants before the text


class Marian:
    """A source is its pieces and </s>; a piece without an id is <unk>."""

    def __init__(self, directory: Path) -> None:
        self._source, self._target = load_pieces(directory / FILES[0]), load_pieces(directory / FILES[1])
        path = directory / FILES[2]
        self._ids = read_ids(path)
        own = directory / TARGET_IDS
        target_ids = read_ids(own) if own.is_file() else self._ids
        missing = [token for token in (END, PADDING, UNKNOWN) if token not in self._ids or token not in target_ids]
        if missing:
            raise ConfigError(f"{path} has no {', '.join(missing)}")
        self._target_ids = target_ids
        self._unknown = self._ids[UNKNOWN]
        self._pieces = {id_: piece for piece, id_ in target_ids.items()}
        self._hidden = {target_ids[END], target_ids[PADDING], target_ids[UNKNOWN]}
        self.source_size, self.target_size = max(self._ids.values()) + 1, max(target_ids.values()) + 1
        self.end_id: int | None = target_ids[END]
        self.padding_id: int | None = self._ids[PADDING]

    def encode(self, text: str) -> list[int]:
        language = _LANGUAGE.match(text)
        before = [self._ids.get(language[1], self._unknown)] if language else []
        pieces = self._source.encode(text[language.end() :] if language else text, out_type=str)
        ids = [self._ids.get(piece, self._unknown) for piece in pieces]
        check_known(ids, (self._unknown, self._ids.get(BLANK)), self.source_size)
        return [*before, *ids, self._ids[END]]

    def encode_target(self, text: str) -> list[int]:
        known, unknown = self._target_ids, self._target_ids[UNKNOWN]
        ids = [known.get(piece, unknown) for piece in self._target.encode(text, out_type=str)]
        check_known(ids, (unknown, known.get(BLANK)), self.target_size)
        return [*ids, known[END]]

    def language_id(self, name: str) -> int | None:
        return None  # it stands in front of the source, as >>fra<<

    def decode(self, ids: Iterable[int]) -> str:
        pieces = [self._pieces.get(id_, NO_TOKEN) for id_ in ids if id_ not in self._hidden]
        # SentencePiece leaves the mark of a blank in pieces that its own model lacks: vocab.json has both sides'.
        text: str = self._target.decode_pieces(pieces)
        return text.replace(BLANK, " ").strip()


def load_marian(directory: Path, config: Config, language: str | None) -> Tokenizer:
    return Marian(directory)
