"""Words with blanks between them: vocabulary files of one word a line, and fairseq's dictionaries with their BPE."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightseq_backend.config import Config, TransformerConfig
from lightseq_backend.errors import ConfigError, RequestError
from lightseq_backend.text.tokenizer import NO_TOKEN, Tokenizer, check_known, optional_package, read_lines

PADDING, START, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
FAIRSEQ_SPECIALS = (START, PADDING, END, UNKNOWN)  # ids 0 to 3 of every dictionary; its file begins with id 4
_OVERWRITE = "#fairseq:overwrite"
_HIDDEN = (PADDING, START, END)
CODES = ("bpecodes", "code")  # what fairseq's examples and released models call them
_GOES_ON = "@@"
_MOST_CACHED = 100_000  # words that the codes' package keeps the pieces of, and would forever


class Vocabulary:
    """Tokens by id, ids by token. ConfigError names every line that is not one word, or not a new one."""

    def __init__(self, tokens: Sequence[str], name: str, first_line: int = 1):
        self.tokens, self.name = tuple(tokens), name
        self.ids: dict[str, int] = {}
        faults = []
        for id_, token in enumerate(self.tokens):
            if len(token.split()) != 1:
                faults.append(f"{name}, line {id_ + first_line}: {token!r} is not one word")
            elif token in self.ids:
                faults.append(f"{name}, line {id_ + first_line}: {token!r} has id {self.ids[token]} already")
            else:
                self.ids[token] = id_
        if faults or not self.tokens:
            raise ConfigError("\n".join(faults) or f"{name} is empty")

    def special(self, token: str) -> int:
        if token not in self.ids:
            raise ConfigError(f"{self.name} has no {token}")
        return self.ids[token]


class Words:
    """A word that the vocabulary lacks becomes its <unk>; without one the text is refused.

    The text of ids ends at the first </s>. The client's class of this name does the same, and a test compares them.
    """

    def __init__(
        self, source: Vocabulary, target: Vocabulary, before: Iterable[str] = (), after: Iterable[str] = ()
    ) -> None:
        self._source, self._target = source, target
        self.source_size, self.target_size = len(source.tokens), len(target.tokens)
        self.end_id: int | None = target.special(END)
        self.padding_id: int | None = source.ids.get(PADDING)
        self._before = [source.special(token) for token in before]
        self._after = [source.special(token) for token in after]
        self._hidden = {target.ids[token] for token in _HIDDEN if token in target.ids}

    def encode(self, text: str) -> list[int]:
        return self._before + self._found(text, self._source) + self._after

    def encode_target(self, text: str) -> list[int]:
        return [*self._found(text, self._target), self._target.ids[END]]

    def language_id(self, name: str) -> int | None:
        return None

    @staticmethod
    def _found(text: str, vocabulary: Vocabulary) -> list[int]:
        words, ids, unknown = text.split(), vocabulary.ids, vocabulary.ids.get(UNKNOWN)
        if unknown is None:
            missing = [word for word in dict.fromkeys(words) if word not in ids]
            if missing:
                names = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
                raise RequestError(f"{names}: not among the {len(ids)} words of this model, which has no {UNKNOWN}")
        found = [ids[word] if unknown is None else ids.get(word, unknown) for word in words]
        check_known(found, (unknown,), len(ids))
        return found

    def decode(self, ids: Iterable[int]) -> str:
        words = []
        for id_ in ids:
            if id_ == self.end_id:
                break
            if id_ not in self._hidden:
                words.append(self._target.tokens[id_] if 0 <= id_ < self.target_size else NO_TOKEN)
        return " ".join(words)


class Subwords(Words):
    """Words cut into pieces by byte-pair codes first; a piece that the word goes on behind ends in @@."""

    def __init__(self, source: Vocabulary, target: Vocabulary, codes: Any) -> None:
        super().__init__(source, target, after=[END])
        self._codes = codes

    def encode(self, text: str) -> list[int]:
        return super().encode(self._cut(text))

    def encode_target(self, text: str) -> list[int]:
        return super().encode_target(self._cut(text))

    def _cut(self, text: str) -> str:
        if len(self._codes.cache) > _MOST_CACHED:
            self._codes.cache.clear()
        return str(self._codes.process_line(" ".join(text.split())))

    def decode(self, ids: Iterable[int]) -> str:
        return f"{super().decode(ids)} ".replace(f"{_GOES_ON} ", "").rstrip()


def load_words(directory: Path, config: Config, language: str | None) -> Tokenizer:
    """source.vocab.txt and target.vocab.txt, or one vocab.txt; the line number, from 0, is the id.

    A source is read as its words and </s>, a prompt or a text to score as <s> and its words: so the models that come
    with this project were trained.
    """
    names = ("source.vocab.txt", "target.vocab.txt")
    if not (directory / names[0]).is_file():
        names = ("vocab.txt",) * 2
    source, target = (Vocabulary(read_lines(directory / name), str(directory / name)) for name in names)
    return _words(source, target, config)


def load_fairseq(directory: Path, config: Config, language: str | None) -> Tokenizer:
    """dict.<language>.txt for source and target, or one dictionary for both; with BPE codes where they lie beside."""
    paths = sorted(directory.glob("dict.*txt"))
    source = target = paths[0]
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        if len(paths) > 2 or directory / f"dict.{language}.txt" not in paths:
            raise ConfigError(
                f"{directory} has the dictionaries {names}; the parameter source_language must name the source's "
                f"language among two of them, it is {language!r}"
            )
        source = directory / f"dict.{language}.txt"
        (target,) = (path for path in paths if path != source)
    codes = next((directory / name for name in CODES if (directory / name).is_file()), None)
    if codes is not None and isinstance(config, TransformerConfig):
        return Subwords(_dictionary(source), _dictionary(target), _load_codes(codes))
    return _words(_dictionary(source), _dictionary(target), config)


def _load_codes(path: Path) -> Any:
    """subword-nmt's, and fastBPE's, which count in a third column."""
    subwords = optional_package("subword_nmt.apply_bpe", path)
    lines = [line.strip() for line in read_lines(path)]
    headed = bool(lines) and lines[0].startswith("#version")
    pairs = [line.split(" ") for line in lines[headed:] if line]
    counted = bool(pairs) and all(len(pair) == 3 and pair[2].isdecimal() for pair in pairs)
    wrong = [pair for pair in pairs if len(pair) != 2 + counted]
    if wrong or not pairs:
        raise ConfigError(
            f"{path} must have two symbols a line" + (f"; one is {' '.join(wrong[0])!r}" if wrong else "")
        )
    header = lines[:1] if headed else ["#version: 0.2"] if counted else []
    return subwords.BPE(io.StringIO("\n".join([*header, *(" ".join(pair[:2]) for pair in pairs)])))


def _words(source: Vocabulary, target: Vocabulary, config: Config) -> Words:
    if isinstance(config, TransformerConfig):
        return Words(source, target, after=[END])
    return Words(source, target, before=[START])


def _dictionary(path: Path) -> Vocabulary:
    """fairseq's dictionary: lines of a word and its count. A word marked as overwriting takes its name's place."""
    tokens, faults = list(FAIRSEQ_SPECIALS), []
    for number, line in enumerate(read_lines(path), 1):
        overwrites = line.endswith(f" {_OVERWRITE}")
        word, _, count = line.removesuffix(f" {_OVERWRITE}").rpartition(" ")
        if not word or not count.isdecimal():
            faults.append(f"{path}, line {number}: {line!r} is not a word and its count")
        if overwrites and word in tokens:
            tokens[tokens.index(word)] = f"{word}#{number}"  # what stood there keeps its id and cannot be written
        tokens.append(word)
    if faults:
        raise ConfigError("\n".join(faults))
    return Vocabulary(tokens, str(path), first_line=1 - len(FAIRSEQ_SPECIALS))
