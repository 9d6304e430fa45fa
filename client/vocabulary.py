"""Between what a user writes and ids: vocabulary files, and the codecs `Ids`, `Words` and `ServerText`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from lightseq_client.errors import RowError, VocabularyError

PADDING = "<pad>"
START = "<s>"
END = "</s>"
UNKNOWN = "<unk>"
_HIDDEN = (PADDING, START, END)


class Codec(Protocol):
    """What turns a row of text into ids and ids into text; an id that is None is not known.

    One that has a method encode_target too writes with it the translations that are scored.
    """

    end_id: int | None
    padding_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Vocabulary:
    """One token a line, UTF-8; the line number, from 0, is the id."""

    def __init__(self, tokens: Iterable[str], name: str):
        self.tokens = tuple(tokens)
        self.name = name
        self.ids: dict[str, int] = {}
        faults = []
        for id_, token in enumerate(self.tokens):
            if len(token.split()) != 1:
                faults.append(f"{name}, line {id_ + 1}: {token!r} is not one word")
            elif token in self.ids:
                faults.append(f"{name}, line {id_ + 1}: {token!r} stands in line {self.ids[token] + 1} too")
            else:
                self.ids[token] = id_
        if faults or not self.tokens:
            raise VocabularyError("\n".join(faults) or f"{name} is empty")

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise VocabularyError(f"cannot read the vocabulary {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise VocabularyError(
                f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
            ) from None
        lines = text.split("\n")
        return cls((line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)), str(path))

    def __len__(self) -> int:
        return len(self.tokens)

    def special(self, token: str) -> int:
        if token not in self.ids:
            raise VocabularyError(f"{self.name} has no {token}")
        return self.ids[token]


class Ids:
    """Rows written as ids with blanks between them."""

    def __init__(self, end_id: int | None = None, padding_id: int | None = None):
        self.end_id = end_id
        self.padding_id = padding_id

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in text.split():
            try:
                ids.append(int(word))
            except ValueError:
                raise RowError(f"{word!r} is not an id") from None
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))


class ServerText:
    """Rows are text that the server tokenises; it writes the text of its hypotheses too. For models with an input
    text_input; which ids a row became is not told."""

    end_id: int | None = None
    padding_id: int | None = None

    def encode(self, text: str) -> list[int]:
        raise RowError("the server tokenises; there are no ids here")

    def decode(self, ids: Iterable[int]) -> str:
        raise VocabularyError("the server writes the text; there is no vocabulary here")


class Words:
    """Rows written as words with blanks between them.

    A word that the vocabulary lacks becomes its `<unk>`, and `warn` is told once; a vocabulary without
    `<unk>` refuses the row. The text of a hypothesis ends at its first `</s>`.
    """

    def __init__(
        self,
        source: Vocabulary,
        target: Vocabulary,
        before: Iterable[str] = (),
        after: Iterable[str] = (),
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.source = source
        self.target = target
        self.end_id: int | None = target.special(END)
        self.padding_id: int | None = source.ids.get(PADDING)
        self._before = [source.special(token) for token in before]
        self._after = [source.special(token) for token in after]
        self._warn = warn
        self._warned: set[tuple[str, str]] = set()
        self._hidden = {target.ids[token] for token in _HIDDEN if token in target.ids}

    @classmethod
    def for_translation(cls, directory: str | Path, warn: Callable[[str], None] = warnings.warn) -> Words:
        """source.vocab.txt and target.vocab.txt. A source is sent as its words and `</s>`: so the
        translator that comes with this project was trained."""
        source, target = (Vocabulary.load(Path(directory) / f"{side}.vocab.txt") for side in ("source", "target"))
        return cls(source, target, after=[END], warn=warn)

    @classmethod
    def for_generation(cls, directory: str | Path, warn: Callable[[str], None] = warnings.warn) -> Words:
        """vocab.txt. A prompt, or a text to score, is sent as `<s>` and its words."""
        vocabulary = Vocabulary.load(Path(directory) / "vocab.txt")
        return cls(vocabulary, vocabulary, before=[START], warn=warn)

    def encode(self, text: str) -> list[int]:
        return self._before + self._ids(text, self.source, "row") + self._after

    def encode_target(self, text: str) -> list[int]:
        """A translation as the model would write it: its words and `</s>`."""
        return [*self._ids(text, self.target, "target"), self.target.ids[END]]

    def decode(self, ids: Iterable[int]) -> str:
        words = []
        for id_ in ids:
            if id_ == self.end_id:
                break
            if not 0 <= id_ < len(self.target):
                raise VocabularyError(
                    f"the model answered id {id_}; {self.target.name} has {len(self.target)} tokens: "
                    "is it this model's vocabulary?"
                )
            if id_ not in self._hidden:
                words.append(self.target.tokens[id_])
        return " ".join(words)

    def _ids(self, text: str, vocabulary: Vocabulary, what: str) -> list[int]:
        words = text.split()
        if not words:
            raise RowError(f"the {what} is empty")
        unknown = [word for word in dict.fromkeys(words) if word not in vocabulary.ids]
        if unknown:
            self._excuse(unknown, vocabulary)
        return [vocabulary.ids[word if word in vocabulary.ids else UNKNOWN] for word in words]

    def _excuse(self, unknown: list[str], vocabulary: Vocabulary) -> None:
        names = ", ".join(map(repr, unknown))
        if UNKNOWN not in vocabulary.ids:
            raise RowError(f"{names}: no such word in {vocabulary.name}, which has no {UNKNOWN} either")
        new = [word for word in unknown if (vocabulary.name, word) not in self._warned]
        if new:
            self._warned.update((vocabulary.name, word) for word in new)
            self._warn(f"{', '.join(map(repr, new))}: not in {vocabulary.name}; sent as {UNKNOWN}")
