"""Gettext's compiled catalogues (.mo): messages and their translations, context apart and plural forms told apart.

The format: GNU gettext manual, "The Format of GNU MO Files".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MAGIC = 0x950412DE
_CONTEXT_END = "\x04"
_PLURAL = "\0"


class CatalogueError(ValueError):
    """The bytes are no catalogue."""


def messages(data: bytes) -> Iterator[tuple[str, str]]:
    """(message, translation) of every translated message of a .mo file in UTF-8; the header is left out.

    A message with plural forms gives its singular with the first form and its plural with the last, which is what
    these are in English and French. CatalogueError where the bytes are no such file.
    """
    order = _byte_order(data)
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    for index in range(count):
        original = _text(data, order, originals + 8 * index)
        translation = _text(data, order, translations + 8 * index)
        if original and translation:
            yield from _forms(original.rpartition(_CONTEXT_END)[2], translation)


def _byte_order(data: bytes) -> str:
    if len(data) < 28:
        raise CatalogueError(f"{len(data)} bytes are too few for a catalogue, whose header has 28")
    for order in "<>":
        if struct.unpack_from(f"{order}I", data)[0] == _MAGIC:
            return order
    raise CatalogueError(f"a catalogue starts with {_MAGIC:#x}; these bytes start with {data[:4].hex()}")


def _text(data: bytes, order: str, entry: int) -> str:
    """The string that the table entry at `entry` names; "" where it is not UTF-8."""
    try:
        length, start = struct.unpack_from(f"{order}2I", data, entry)
        if start + length > len(data):
            raise CatalogueError(f"a text of {length} bytes at {start} ends behind the file's {len(data)} bytes")
        return data[start : start + length].decode("utf-8")
    except UnicodeDecodeError:
        return ""
    except struct.error as error:
        raise CatalogueError(f"the table entry at {entry} lies outside the file's {len(data)} bytes") from error


def _forms(original: str, translation: str) -> Iterator[tuple[str, str]]:
    singular, several, plural = original.partition(_PLURAL)
    forms = translation.split(_PLURAL)
    yield singular, forms[0]
    if several and len(forms) > 1:
        yield plural, forms[-1]
