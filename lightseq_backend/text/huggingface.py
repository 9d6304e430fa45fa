"""What the package `tokenizers` reads: tokenizer.json, and GPT-2's vocab.json with merges.txt."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightseq_backend.config import Config, TransformerConfig
from lightseq_backend.errors import ConfigError
from lightseq_backend.text.multilingual import CONFIG, SPECIALS, Family, check_told, family_of
from lightseq_backend.text.tokenizer import NO_TOKEN, Tokenizer, check_known, optional_package, read_json

END_OF_TEXT = "<|endoftext|>"
_BART = ("<s>", "</s>", "<pad>", "<unk>")


class HuggingFace:
    """A tokenizer of the package.

    family    of a multilingual translator, whose source is in `language`, an id, unless its post-processor knows better
    around    ids before and after a text that its own post-processor does not put there

    Tokens that are marked special are read in a text as the tokens they are, and left out of one that is written.
    """

    def __init__(
        self,
        tokenizer: Any,
        specials: dict[str, str | None],
        model: Config,
        family: Family | None = None,
        language: int | None = None,
        around: tuple[list[int], list[int]] | None = None,
    ) -> None:
        tokenizer.no_truncation()  # a text that is too long is refused, never cut
        tokenizer.no_padding()
        self._tokenizer, self._model, self._family, self._language = tokenizer, model, family, language
        self._around = around
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._known = frozenset(vocabulary.values())
        self.source_size = self.target_size = max(self._known) + 1
        self._unknown = vocabulary.get(getattr(tokenizer.model, "unk_token", None))
        self.end_id: int | None = vocabulary.get(specials.get("eos_token"))
        self.padding_id: int | None = vocabulary.get(specials.get("pad_token"))

    def encode(self, text: str) -> list[int]:
        if self._family and self._language is not None:
            return self._family.placed(self._found(text), self._language, self._model.end_id)
        return self._complete(text)

    def encode_target(self, text: str) -> list[int]:
        if self._family:
            check_told(self._model)
            return [*self._found(text), self._model.end_id]
        ids = self._complete(text)
        forced = self._model.forced_id if isinstance(self._model, TransformerConfig) else None
        return ids[1:] if ids[0] == forced else ids  # the decoder is fed it

    def language_id(self, name: str) -> int | None:
        if self._family is None:
            return None
        ids = (self._tokenizer.token_to_id(written) for written in (name, self._family.mark.format(name)))
        return next((id_ for id_ in ids if id_ is not None), None)

    def _complete(self, text: str) -> list[int]:
        found = self._found(text)
        if self._around:
            return [*self._around[0], *found, *self._around[1]]
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def _found(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        check_known(ids, (self._unknown,), self.source_size)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        text, run = "", []
        for id_ in ids:  # the package leaves out ids it does not know
            if id_ in self._known:
                run.append(id_)
            else:
                text += self._tokenizer.decode(run) + NO_TOKEN
                run = []
        return text + str(self._tokenizer.decode(run))


def load_file(directory: Path, config: Config, language: str | None) -> Tokenizer:
    """tokenizer.json. Its own post-processor says what stands around a text, unless a source language is asked for."""
    path = directory / "tokenizer.json"
    package = _package(path)
    try:
        tokenizer = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower class
        raise ConfigError(f"{path} cannot be used: {error}") from None
    family, source = family_of(directory), None
    if language is not None:
        if family is None:
            raise ConfigError(
                f"source_language is {language!r}, but {directory / CONFIG} names no multilingual tokenizer"
            )
        ids = [tokenizer.token_to_id(name) for name in (language, family.mark.format(language))]
        source = next((id_ for id_ in ids if id_ is not None), None)
        if source is None:
            raise ConfigError(f"source_language is {language!r}; {path} has no such token")
    return HuggingFace(tokenizer, _specials(directory), config, family, source)


def load_gpt2(directory: Path, config: Config, language: str | None) -> Tokenizer:
    """vocab.json and merges.txt: byte-level BPE as GPT-2's, nothing around a prompt; BART's <s> and </s> around a
    source, where the vocabulary has them."""
    path = directory / "vocab.json"
    package = _package(path)
    try:
        model = package.models.BPE.from_file(str(path), str(directory / "merges.txt"))
    except Exception as error:
        raise ConfigError(f"{path} with merges.txt cannot be used: {error}") from None
    tokenizer = package.Tokenizer(model)
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    marks = [token for token in (END_OF_TEXT, *_BART) if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens(marks)
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    specials = _specials(directory)
    if isinstance(config, TransformerConfig) and None not in (start, end):
        specials = {"eos_token": "</s>", "pad_token": "<pad>", **specials}
        return HuggingFace(tokenizer, specials, config, around=([start], [end]))
    plain = specials["eos_token"] or (END_OF_TEXT if END_OF_TEXT in marks else None)
    return HuggingFace(tokenizer, {**specials, "eos_token": plain}, config)


def _package(path: Path) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would take the engine's cores
    return optional_package("tokenizers", path)


def _specials(directory: Path) -> dict[str, str | None]:
    """eos_token and pad_token as the configuration beside a tokenizer names them."""
    found: dict[str, str | None] = {}
    config, specials = read_json(directory / CONFIG), read_json(directory / SPECIALS)
    for name in ("eos_token", "pad_token"):
        entry = config.get(name) or specials.get(name)
        found[name] = entry.get("content") if isinstance(entry, dict) else entry
    return found
