"""Pairs of clean text from catalogue messages: accelerators and markup gone, format codes kept, oddities refused."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator

LONGEST = 300  # characters of a side
_LONGEST_WORDS = 60
_SHARE_OF_LETTERS = 0.5
_RATIO = 2.5  # of the longer side's characters to the shorter's, after 12 on each
_SLACK = 12

# A format code of C, Python, Qt, Boost or a shell: %s %1$s %-10.3lf %(name)s %1 {0} {name} ${name}. One left on one
# side alone is a translator's slip, or a text whose percent sign is a percent sign.
FORMAT_CODE = re.compile(
    r"%\([A-Za-z_]\w*\)[-+#0]*\d*(?:\.\d+)?[a-zA-Z]"
    r"|%(?:\d+\$)?[-+#0]*(?:\d+|\*)?(?:\.(?:\d+|\*))?(?:hh|h|ll|l|z|j|t)?[diouxXeEfgGcsp](?![a-zA-Z])"
    r"|%L?\d{1,2}"
    r"|\$?\{[A-Za-z0-9_.:]*\}"
)
_TAG = re.compile(
    r"</?(?:a|abbr|app|application|b|big|blockquote|body|br|center|code|command|div|em|emphasis|filename|font|guibutton"
    r"|guilabel|guimenu|guimenuitem|h[1-6]|head|hr|html|i|icode|img|interface|item|kbd|keycap|keycombo|li|link|literal"
    r"|menuchoice|menuitem|nobr|note|ol|option|p|para|placeholder|pre|qt|replaceable|resource|s|screen|shortcut|small"
    r"|span|strong|sub|sup|table|tbody|td|th|title|tr|tt|u|ul|userinput|var|warning)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_OLD_CONTEXT = re.compile(r"^_: ?[^\n]*\n")  # KDE before 4
_BLANKS = "\u00a0\u2002\u2003\u2007\u2009\u202f"
_SIGNS = {"’": "'", "‘": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "«": '"', "»": '"', "…": "...", "\u2011": "-"}


def _spellings() -> dict[str, str]:
    """What is written otherwise here, and how: typographic signs, blanks of any kind, an accent apart from its letter.

    French puts a blank before : ; ! ? and inside « »; many translators do not, so that here no one does.
    """
    rules = _SIGNS | dict.fromkeys(_BLANKS, " ")
    for blank in " " + _BLANKS:
        rules |= {f"{blank}{sign}": sign for sign in ":;!?"} | {f"«{blank}": '"', f"{blank}»": '"'}
    composed = (chr(code) for code in range(0xC0, 0x180))
    rules |= {apart: sign for sign in composed if (apart := unicodedata.normalize("NFD", sign)) != sign}
    return rules


# The tokenizer has these rules as well: what users ask is spelt like what the model has read.
SPELLINGS = _spellings()
_SPELLING = re.compile("|".join(map(re.escape, sorted(SPELLINGS, key=len, reverse=True))))

_WORDS = re.compile(r"[^\W\d_]+")
_IDENTIFIER = re.compile(r"^\S*[a-z0-9][_/.:]\w\S*$|^\S*[a-z][A-Z]\S*$")
_CREDITS = re.compile(r"your (name|email)|translator-credits|launchpad\.net|translated by|@\w+\.\w+", re.IGNORECASE)


def pairs(english: str, french: str) -> Iterator[tuple[str, str]]:
    """(French, English) texts of one message, a line each: none, one, or one a paragraph where both have as many."""
    english = _OLD_CONTEXT.sub("", english)
    if _CREDITS.search(english):
        return
    sides = [_paragraphs(english), _paragraphs(french)]
    if len(sides[0]) != len(sides[1]):
        sides = [[english], [french]]
    for one, other in zip(*sides, strict=True):
        one, other = _without_accelerators(one, other)
        one, other = text(one), text(other)
        if good(one, other):
            yield other, one


def text(given: str) -> str:
    """One line: markup and control characters gone, entities resolved, blanks single, signs spelt one way."""
    given = html.unescape(_TAG.sub(" ", given.replace("\\n", " ")))
    given = _SPELLING.sub(lambda found: SPELLINGS[found[0]], given)
    given = "".join(" " if unicodedata.category(sign)[0] in "ZC" else sign for sign in given)
    return " ".join(given.split())


def good(english: str, french: str) -> bool:
    """Whether two clean texts look like each other's translation."""
    if not english or not french or max(len(english), len(french)) > LONGEST:
        return False
    if len(english.split()) > _LONGEST_WORDS or len(french.split()) > _LONGEST_WORDS:
        return False
    if not all(_is_language(side) for side in (english, french)):
        return False
    shorter, longer = sorted((len(english), len(french)))
    if longer > _RATIO * (shorter + _SLACK):
        return False
    return sorted(FORMAT_CODE.findall(english)) == sorted(FORMAT_CODE.findall(french))


def key(given: str) -> str:
    """What two texts share that differ in case, signs and blanks alone: no such two lie in training and test."""
    return " ".join(_WORDS.findall(FORMAT_CODE.sub(" ", given).casefold()))


def _paragraphs(given: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", given) if part.strip()]


def _without_accelerators(english: str, french: str) -> tuple[str, str]:
    """Both without the sign before a menu entry's key ("_Save", "&Save", "~Save"), where each has just one of it.

    A word that has it inside on both sides ("file_name") is a name, and stays.
    """
    for sign in "_&~":
        sides = [english, french]
        marked = [[word for word in side.split() if re.search(f"{sign}\\w", word)] for side in sides]
        names = marked[0] == marked[1] and not any(word.startswith(sign) for word in marked[0])
        if names or max(map(len, marked)) > 1:
            continue
        english, french = (re.sub(f"{sign}(?=\\w)", "", side, count=1) for side in sides)
    return english.replace("&&", "&"), french.replace("&&", "&")


def _is_language(given: str) -> bool:
    """At least half letters, of our alphabet, and no lone identifier, path or address."""
    bare = FORMAT_CODE.sub("", given)
    letters = [sign for sign in bare if sign.isalpha()]
    if len(letters) < 2 or len(letters) < _SHARE_OF_LETTERS * len(bare.replace(" ", "")):
        return False
    if any(ord(sign) > 0x24F for sign in letters):
        return False
    return not _IDENTIFIER.match(bare.strip())
