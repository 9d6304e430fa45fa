"""Which paragraphs are English prose, how they are written, and which are the same."""

from __future__ import annotations

import hashlib
import re

SHORTEST, LONGEST = 60, 3_000  # characters of a paragraph
LEAST_LETTERS = 0.90  # of its characters
LEAST_COMMON = 0.20  # of its words are among the commonest of English

_PLAIN = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′´", "'"),
        **dict.fromkeys("“”„‟″«»", '"'),
        **dict.fromkeys("‐‑‒–−", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f", " "),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\ufeff¶§†‡®™©", ""),
        "—": " -- ",
        "…": "...",
        "•": "",
        "×": "x",
        "→": "->",
        "ﬁ": "fi",
        "ﬂ": "fl",
    }
)
_SPACE = re.compile(r"\s+")
_BEGINS = re.compile(r"^[A-Z\"'(]")
_ENDS = re.compile(r"[.!?:][\"')]*$")
_NEVER = re.compile(
    r"[{}<>|\\^~]|\*[Nn]ote|::|->|=>|==|&&|\$\(|[;,]{2}|[=*_+#-]{3}|\.{4}|https?://|www\.|@\w+\.|\[\w*\]|\w\(\)\.|"
    r"(?:\b\w\b ){5}|\b[a-z]+[A-Z]\w*[A-Z]\w*|[0-9a-f]{12}"
)
_WORD = re.compile(r"[A-Za-z']+")
_COMMONEST = (
    "a about after all also an and any are as at be because been before but by can do does each for from has have how "
    "if in into is it its may more most must no not of on one only or other should so some such than that the their "
    "them then there these they this to under up use used using was we were what when where which while who will with "
    "would you your"
)
_COMMON = frozenset(_COMMONEST.split())
_LISTED = re.compile(r"^(?:[-*o+]|\(?\d{1,2}[.)]|\(?[a-z][.)])\s+")


def prose(paragraph: str) -> str | None:
    """The paragraph in ASCII on one line, or None where it is not a whole paragraph of English.

    It has 60 to 3,000 characters, begins as a sentence and ends as one, is mostly letters, every fifth of its words is
    a very common one, and nothing in it looks like code, an address or a table.
    """
    plain = _LISTED.sub("", _SPACE.sub(" ", paragraph.translate(_PLAIN)).strip())
    if not SHORTEST <= len(plain) <= LONGEST or not plain.isascii():
        return None
    if not _BEGINS.match(plain) or not _ENDS.search(plain) or _NEVER.search(plain):
        return None
    letters = sum(map(str.isalpha, plain)) + plain.count(" ")
    words = [word.lower() for word in _WORD.findall(plain)]
    if letters < LEAST_LETTERS * len(plain) or len(words) < 8:
        return None
    return plain if sum(word in _COMMON for word in words) >= LEAST_COMMON * len(words) else None


def key(paragraph: str) -> bytes:
    """The same for paragraphs that differ in case, digits, blanks and marks alone."""
    return hashlib.blake2b(re.sub(r"[^a-z]+", "", paragraph.lower()).encode(), digest_size=12).digest()
