"""Protobuf's text form, which config.pbtxt is in, read without a schema: protobuf's own reader needs all of Triton's.

(https://protobuf.dev/reference/protobuf/textformat-spec)
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

from google.protobuf.text_encoding import CUnescape

from lightseq_backend.errors import ConfigError

Message = dict[str, list["str | Message"]]
_TOKEN = re.compile(
    r"""(?:\s|\#[^\n]*)*(?:
        (?P<string>"(?:[^"\\\n]|\\.)*" | '(?:[^'\\\n]|\\.)*') |
        (?P<word>-?[\w.+-]+) |
        (?P<mark>[{}<>\[\]:,;]) |
        (?P<end>\Z))""",
    re.VERBOSE,
)
_CLOSES = {"{": "}", "<": ">"}
_DEEPEST = 64


class Token(NamedTuple):
    kind: str
    text: str
    line: int


def parse(text: str) -> Message:
    """The values of every field by its name, in their order: strings without quotes and escapes, numbers and names as
    they are written, messages as the same again. ConfigError says what stands where something else should."""
    reader = _Reader(text)
    return reader.message("", 0)


class _Reader:
    def __init__(self, text: str):
        self._text, self._place = text, 0
        self._next = self._read()

    def message(self, closing: str, depth: int) -> Message:
        """The fields up to that mark, or the end of the text where there is none."""
        fields: Message = {}
        while not self._takes(closing):
            if self._next.kind != "word":
                self._fail("the name of a field")
            name = self._advance().text
            colon = self._takes(":")
            if not colon and self._next.text not in ("{", "<", "["):
                self._fail(f"a colon or a message behind {name}")
            fields.setdefault(name, []).extend(self._values(depth))
            _ = self._takes(",") or self._takes(";")
        return fields

    def _values(self, depth: int) -> list[str | Message]:
        if not self._takes("["):
            return [self._value(depth)]
        values: list[str | Message] = []
        while not self._takes("]"):
            if values and not self._takes(","):
                self._fail("a comma or ]")
            values.append(self._value(depth))
        return values

    def _value(self, depth: int) -> str | Message:
        if self._next.text in _CLOSES and self._next.kind == "mark":
            if depth == _DEEPEST:
                self._fail(f"at most {_DEEPEST} messages in one another")
            return self.message(_CLOSES[self._advance().text], depth + 1)
        if self._next.kind == "word":
            return self._advance().text
        parts, line = [], self._next.line
        while self._next.kind == "string":
            parts.append(self._advance().text[1:-1])
        if not parts:
            self._fail("a value")
        try:
            return CUnescape("".join(parts)).decode()
        except UnicodeError:
            raise ConfigError(f"line {line}: a string is no UTF-8, or has an escape over \\377") from None

    def _takes(self, mark: str) -> bool:
        """Goes on behind the mark if it is what comes next. "": the end of the text, behind which nothing is."""
        found = self._next.text == mark and self._next.kind in ("mark", "end")
        if found and mark:
            self._advance()
        return found

    def _advance(self) -> Token:
        taken, self._next = self._next, self._read()
        return taken

    def _read(self) -> Token:
        found = _TOKEN.match(self._text, self._place)
        if found is None:
            line = self._text.count("\n", 0, self._place) + 1
            raise ConfigError(f"line {line}: {self._text[self._place :][:20].strip()!r} is nothing that can be read")
        self._place = found.end()
        kind = str(found.lastgroup)
        return Token(kind, found[kind], self._text.count("\n", 0, found.start(kind)) + 1)

    def _fail(self, wanted: str) -> NoReturn:
        found = repr(self._next.text) if self._next.text else "the end"
        raise ConfigError(f"line {self._next.line}: there is {found} where {wanted} should be")
