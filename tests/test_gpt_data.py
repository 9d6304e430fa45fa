"""What the GPT's training text is made of: paragraphs out of each format, which are kept, and who may share them."""

from __future__ import annotations

import gzip
import io
import itertools
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from examples.gpt import clean, formats, gather, prepare

SENTENCE = "The daemon reads its configuration when it starts, and again when it is told to."


def kept(pieces: object) -> list[str]:
    return [paragraph for piece in pieces if (paragraph := clean.prose(piece))]  # type: ignore[attr-defined]


def test_html_gives_paragraphs_without_listings() -> None:
    page = f"""<html><head><title>{SENTENCE}</title><style>p {{ }}</style></head><body><!-- {SENTENCE} -->
    <p>The <code>read</code> call gives <a href="x">the number</a>
    of bytes, which may be &quot;fewer&quot; than were asked for.</p>
    <pre>The code in a listing is not prose, however much it may look like it here.</pre>
    <li>It is an error if the file that is named by the option does not exist.</li></body></html>"""
    assert kept(formats.markup(page)) == [
        'The read call gives the number of bytes, which may be "fewer" than were asked for.',
        "It is an error if the file that is named by the option does not exist.",
    ]


def test_man_page_gives_paragraphs_in_plain_letters() -> None:
    page = r""".\" The comment of a page is not a part of what is read by anyone who uses it.
.TH TEST 1
.SH DESCRIPTION
The
.B test
command is like
.BR ls (1),
but it does \fInot\fR read the user\(aqs own files \- ever.
.PP
.nf
The literal text of an example is left out, and so is all that is in it.
.fi
.TP
.BI \-f " file"
Take the patterns from the file that is named, one on each line of it.
"""
    assert kept(formats.man_page(page)) == [
        "The test command is like ls(1), but it does not read the user's own files - ever.",
        "Take the patterns from the file that is named, one on each line of it.",
    ]


def test_page_in_mdoc_gives_nothing() -> None:
    assert kept(formats.man_page(f".Dd May 1, 2020\n.Sh NAME\n{SENTENCE}\n")) == []


def test_text_loses_the_marks_of_its_format() -> None:
    source = """The :func:`open <builtins.open>` function and ``close()`` are *not* for the faint of heart::

    Use `the manual`_ to find out which of the options are **really** needed by you.
"""
    assert kept(formats.text(source)) == [
        "The open function and close() are not for the faint of heart:",
        "Use the manual to find out which of the options are really needed by you.",
    ]


def test_pod_keeps_paragraphs_alone() -> None:
    prose = "The C<print> function takes a L<list|perlop> and gives B<true> if it is able to."
    source = f"=head1 NAME\n\n{prose}\n\n    print;\n"
    assert kept(formats.pod(source)) == ["The print function takes a list and gives true if it is able to."]


@pytest.mark.parametrize(
    ("path", "reader"),
    [
        ("usr/share/man/man8/mount.8.gz", "man_page"),
        ("usr/share/doc/git-doc/git.html", "markup"),
        ("usr/share/info/guile.info-3.gz", "text"),
        ("usr/share/perl/5.36/pod/perlre.pod", "pod"),
        ("usr/share/doc/git/changelog.gz", None),
        ("usr/share/doc/python/html/_sources/os.rst.txt", None),
        ("usr/bin/git", None),
    ],
)
def test_reader_is_chosen_by_path(path: str, reader: str | None) -> None:
    found = formats.reader_of(path)
    assert (found and found.__name__) == reader


@pytest.mark.parametrize(
    "paragraph",
    [
        "Too short to be a paragraph.",
        "the first letter of this paragraph is not one that a sentence would begin with.",
        "There is no mark at the end of this paragraph, which is a heading or a cell of a table",
        "Le démon lit sa configuration quand il démarre, et encore une fois quand on le lui dit.",
        "Set the value of x = {1, 2} and call it with f(x) -> y, as it is in the code of this.",
        "Table 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29.",
        "Alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho.",
    ],
)
def test_what_is_no_english_paragraph_is_dropped(paragraph: str) -> None:
    assert clean.prose(paragraph) is None


def test_paragraph_becomes_one_line_of_ascii() -> None:
    given = "  The  “daemon” doesn’t\nread its configuration – it is told…\u00a0 what to do by the user. "
    wanted = 'The "daemon" doesn\'t read its configuration - it is told... what to do by the user.'
    assert clean.prose(given) == wanted


def test_paragraphs_that_differ_in_case_and_digits_are_the_same() -> None:
    assert clean.key("See chapter 3, The Kernel.") == clean.key("see chapter 14: the kernel.")
    assert clean.key("See chapter 3.") != clean.key("See section 3.")


def archive(folder: Path, name: str, files: dict[str, str]) -> tuple[gather.Package, Path]:
    """A .deb of some files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path, text in files.items():
            content = gzip.compress(text.encode()) if path.endswith(".gz") else text.encode()
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("./control"))
    for part, content in (("debian-binary", b"2.0\n"), ("control.tar.gz", control.getvalue())):
        (folder / part).write_bytes(content)
    (folder / "data.tar.gz").write_bytes(packed.getvalue())
    path = folder / f"{name}_1.2-3_all.deb"
    parts = ["debian-binary", "control.tar.gz", "data.tar.gz"]
    subprocess.run(["ar", "rc", path.name, *parts], cwd=folder, check=True)
    return gather.Package(name), path


def sentences(first: int, count: int) -> str:
    words = ["the", "of", "a", "kernel", "file", "user", "is", "in", "option", "which", "process", "memory"]
    rng = np.random.default_rng(first)
    return "\n\n".join(f"The {' '.join(rng.choice(words, 20))} is {'x' * (first + n)}." for n in range(count))


def test_held_out_packages_share_no_paragraph_with_training(tmp_path: Path) -> None:
    shared = sentences(1, 40)
    test, test_path = archive(tmp_path, "zebra", {"usr/share/doc/zebra/a.txt.gz": shared})
    training = archive(
        tmp_path,
        "aardvark",
        {
            "usr/share/doc/aardvark/copyright": "License: GPL-2+\n text\n\nLicense: MIT\n",
            "usr/share/doc/aardvark/b.txt": f"{shared.upper().capitalize()}\n\n{shared}\n\n{sentences(100, 40)}",
        },
    )
    test = gather.Package("zebra", part="test")
    corpus = gather.corpus([training, (test, test_path)], seed=1, workers=1)
    held_out, learned = ({clean.key(p) for d in corpus.documents[part] for p in d} for part in ("test", "training"))
    assert len(held_out) == 40
    assert len(learned) == 40
    assert not held_out & learned
    facts = {p.package: (p.version, p.licence) for p in corpus.packages}
    assert facts == {"zebra": ("1.2-3", ""), "aardvark": ("1.2-3", "GPL-2+, MIT")}


def test_packages_survive_their_file(tmp_path: Path) -> None:
    packages = [gather.Package("git-doc", "1:2.39", "GPL-2", 5, "test"), gather.Package("bash")]
    gather.write_packages(tmp_path / "packages.tsv", packages)
    assert gather.read_packages(tmp_path / "packages.tsv") == packages


def test_data_holds_documents_between_ends(tmp_path: Path) -> None:
    texts = [sentences(1, 30).replace("\n\n", "\n"), sentences(200, 30).replace("\n\n", "\n")]
    prepare.write(texts, texts[:1], tmp_path, seed=1)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = prepare.read_training(tmp_path)
    ends = np.flatnonzero(ids == tokenizer.token_to_id(prepare.END))
    assert ids.dtype == np.uint16
    assert ends[0] == 0
    assert ends[-1] == len(ids) - 1
    found = [tokenizer.decode(ids[first + 1 : last]) for first, last in itertools.pairwise(ends)]
    assert found == texts
    assert tokenizer.encode(texts[0]).ids == ids[: ends[1]].tolist()
