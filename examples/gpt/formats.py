"""Paragraphs out of what documentation is written in: HTML and DocBook, man pages, info files, plain text, POD."""

from __future__ import annotations

import gzip
import html
import re
import zlib
from collections.abc import Callable, Iterator

MOST_BYTES = 16_000_000  # of one file, unpacked: what is longer is a generated index

_SKIPPED = re.compile(
    r"/_sources/|/_static/|/(changelog|copyright|NEWS|ChangeLog|THANKS|AUTHORS)[^/]*$|/genindex|/search\."
)
_MAN_PAGE = re.compile(r"^usr/share/man/man[1-9]/")
_TEXT = re.compile(r"\.(txt|rst|md|adoc|asciidoc|info(-\d+)?|dict|help)$|^usr/share/doc/.*/(README|FAQ|HOWTO)[^/]*$")
_MARKUP = re.compile(r"\.(html?|xhtml|page|docbook|xml)$", re.IGNORECASE)

_DROPPED = re.compile(
    r"<!--.*?-->|<(script|style|pre|head|nav|footer|svg|math|select|textarea|programlisting|screen|synopsis)\b.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_INLINE = re.compile(
    r"</?(a|abbr|acronym|application|b|big|cite|code|command|dfn|em|emphasis|filename|font|function|guilabel|gui|i|kbd|"
    r"key|link|literal|option|parameter|q|quote|replaceable|samp|small|span|strong|sub|sup|tt|u|ulink|userinput|var|"
    r"varname|xref)\b[^>]*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^>]*>")

_BLANK_LINE = re.compile(r"\n\s*\n")
_ROLE = re.compile(r":[a-z:+-]+:`([^`<]+?)\s*(?:<[^`>]*>)?`")  # reStructuredText: :func:`name`
_REFERENCE = re.compile(r"`+([^`<]+?)\s*(?:<[^`>]*>)?`+_{0,2}")
_STARRED = re.compile(r"(?<!\w)\*{1,2}([^*\s](?:[^*]*[^*\s])?)\*{1,2}(?!\w)")
_POD_LINK = re.compile(r"L<([^<>|]*)\|[^<>]*>")
_POD_CODE = re.compile(r"[BCFILSX]<+\s?([^<>]*?)\s?>+")

_BREAKS = {"SH", "SS", "PP", "P", "LP", "IP", "HP", "sp", "br", "RS", "RE", "TS", "TE", "TQ", "nf", "EX", "fi", "EE"}
_FONTS = {"B", "I", "SM", "SB", "BR", "RB", "BI", "IB", "IR", "RI"}
_ESCAPES = (
    (re.compile(r"\\[fF](\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s(\[[^]]*\]|[-+]?\d)"), ""),
    (re.compile(r"\\\(aq|\\\[aq\]|\\\(cq|\\\(oq"), "'"),
    (re.compile(r"\\\(lq|\\\(rq|\\\(dq|\\\*\(lq|\\\*\(rq|\\\*[LR]\""), '"'),
    (re.compile(r"\\\(em|\\\[em\]"), " -- "),
    (re.compile(r"\\-|\\\(en|\\\(mi|\\\(hy"), "-"),
    (re.compile(r"\\[~ 0|^]"), " "),
    (re.compile(r"\\[&:/,%c]|\\\*\([^\s]{2}|\\\*\[[^]]*\]|\\[hvkw]'[^']*'"), ""),
    (re.compile(r"\\e|\\\(rs|\\\\"), r"\\"),
)
_WORD = re.compile(r'"((?:[^"]|"")*)"|(\S+)')


def reader_of(path: str) -> Callable[[str], Iterator[str]] | None:
    """What reads a file of a package, by its path there without a leading slash; None: nothing to read."""
    bare = re.sub(r"\.(gz|dz)$", "", path)
    if _SKIPPED.search(bare):
        return None
    if _MAN_PAGE.match(bare):
        return man_page
    if bare.endswith(".pod"):
        return pod
    if _MARKUP.search(bare):
        return markup
    return text if _TEXT.search(bare) else None


def decoded(path: str, content: bytes) -> str | None:
    """The text of a file, gunzipped where its name says so; None where it is none or too long."""
    if path.endswith((".gz", ".dz")):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return None
    if len(content) > MOST_BYTES or b"\0" in content:
        return None
    return content.decode("utf-8", "replace")


def markup(source: str) -> Iterator[str]:
    """What stands between two block tags, of HTML, Mallard and DocBook; listings are left out."""
    for piece in _TAG.split(_INLINE.sub("", _DROPPED.sub("<p>", source))):
        yield html.unescape(piece)


def text(source: str) -> Iterator[str]:
    """What stands between two blank lines, without the marks of reStructuredText and Markdown."""
    for piece in _BLANK_LINE.split(source.replace("\r", "")):
        if "*Note" not in piece and "\t\t" not in piece:
            piece = _REFERENCE.sub(r"\1", _ROLE.sub(r"\1", piece))
            yield re.sub(r"::\s*$", ":", _STARRED.sub(r"\1", piece))


def pod(source: str) -> Iterator[str]:
    """Perl's documentation: paragraphs that are neither commands nor indented."""
    for piece in _BLANK_LINE.split(source):
        if not piece.startswith(("=", " ", "\t")):
            yield html.unescape(_POD_CODE.sub(r"\1", _POD_CODE.sub(r"\1", _POD_LINK.sub(r"\1", piece))))


def man_page(source: str) -> Iterator[str]:
    """Paragraphs of a page in the man macros; one in mdoc's gives none."""
    if re.search(r"^\.Dd ", source, re.MULTILINE):
        return
    lines: list[str] = []
    literal = tagged = False
    for line in source.splitlines():
        if line[:1] not in (".", "'"):
            if not line.strip():
                yield _plain(lines)
            elif not literal and not tagged:
                lines.append(line)
            tagged = False
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        if macro in _FONTS:
            if not literal and not tagged:
                lines.append(_in_fonts(macro, rest))
            tagged = False
        elif macro in _BREAKS or macro == "TP":
            yield _plain(lines)
            literal = macro in ("nf", "EX", "TS") or (literal and macro not in ("fi", "EE", "TE", "SH"))
            tagged = macro == "TP"
    yield _plain(lines)


def _in_fonts(macro: str, rest: str) -> str:
    """The words of .B, joined, and of .BR, side by side without a blank."""
    words = [quoted or bare for quoted, bare in _WORD.findall(rest)]
    return ("" if len(macro) == 2 and macro not in ("SM", "SB") else " ").join(words)


def _plain(lines: list[str]) -> str:
    """The paragraph that `lines` hold, which are taken."""
    joined = "\n".join(lines)
    lines.clear()
    for pattern, plain in _ESCAPES:
        joined = pattern.sub(plain, joined)
    return joined
