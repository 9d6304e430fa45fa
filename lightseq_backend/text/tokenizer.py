"""What every tokenizer can do, and what the kinds have in common: files, optional packages, texts to refuse."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lightseq_backend.errors import ConfigError, RequestError

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes one
NO_TOKEN = "\N{REPLACEMENT CHARACTER}"  # an id that no token has: tables of weights are often rounded up


class Tokenizer(Protocol):
    """Text to the ids that a model reads, and the ids that it writes to text. Any thread may call it.

    source_size, target_size  every id that encode gives, or that decode has a token for, is below
    end_id, padding_id        None where the files do not say
    """

    source_size: int
    target_size: int
    end_id: int | None
    padding_id: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text with what the model wants before and after it; RequestError when there is nothing in it."""

    def encode_target(self, text: str) -> list[int]:
        """The ids of a translation as the model would write it, its end included; RequestError as for `encode`."""

    def language_id(self, name: str) -> int | None:
        """The id that says a text is in the language of that name; None where the tokenizer has none."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the tokens that only steer a model."""


def check_known(ids: Sequence[int], unread: Container[int | None], size: int) -> None:
    """RequestError where a text, given by its ids alone, has nothing that a model could read but what is in `unread`:
    the id of unknown tokens, and of a blank alone."""
    if not ids:
        raise RequestError("the text is empty; it needs at least one token")
    if all(id_ in unread for id_ in ids):
        raise RequestError(f"the text has {len(ids)} tokens and none of them is in the vocabulary of {size}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file. Only a line feed ends one: other separators are characters of a vocabulary."""
    lines = read_text(path).split("\n")
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; it must hold an object")
    return values


def read_ids(path: Path) -> dict[str, int]:
    """Ids by token, from a JSON object."""
    ids = read_json(path)
    wrong = [token for token, id_ in ids.items() if not isinstance(id_, int) or isinstance(id_, bool) or id_ < 0]
    if wrong or not ids:
        raise ConfigError(f"{path} must give an id for each token" + (f"; {wrong[0]!r} has none" if wrong else ""))
    return ids


def optional_package(name: str, path: Path) -> Any:
    """The package, which this file needs and not every installation has."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{path} needs the package {name} ({error}): install the extra `text`") from None


def load_pieces(path: Path) -> Any:
    """SentencePiece's processor for a model file."""
    sentencepiece = optional_package("sentencepiece", path)
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} is no SentencePiece model: {error}") from None
