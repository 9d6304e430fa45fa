"""How the French-English pairs are read, cleaned and kept apart, against literals."""

from __future__ import annotations

import gettext
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.fr2en import catalogues, clean, prepare
from examples.fr2en.gather import licence_of, listed
from examples.fr2en.prepare import Pair
from examples.fr2en.scores import bleu


def catalogue(messages: dict[str, str], order: str = "<") -> bytes:
    """A .mo file as msgfmt writes it: originals sorted, every text with a zero behind it."""
    texts = sorted((one.encode(), other.encode()) for one, other in messages.items())
    tables, body, start = [], b"", 28 + 16 * len(texts)
    for side in (0, 1):
        for pair in texts:
            tables += [len(pair[side]), start + len(body)]
            body += pair[side] + b"\0"
    header = (0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, 28)
    return struct.pack(f"{order}{7 + len(tables)}I", *header, *tables) + body


HEADER = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=n>1;\n"}


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogue_gives_messages_without_context_and_both_plurals(order: str) -> None:
    messages = {
        "File": "Fichier",
        "menu\x04Open": "Ouvrir",
        "%d day\0%d days": "%d jour\0%d jours",
        "untranslated": "",
    }
    data = catalogue(HEADER | messages, order)
    assert gettext.GNUTranslations(io.BytesIO(data)).ngettext("%d day", "%d days", 3) == "%d jours"  # it is a catalogue
    assert sorted(catalogues.messages(data)) == [
        ("%d day", "%d jour"),
        ("%d days", "%d jours"),
        ("File", "Fichier"),
        ("Open", "Ouvrir"),
    ]


@given(st.integers(0, 400), st.binary(max_size=8))
def test_damaged_catalogue_is_refused_or_read(at: int, noise: bytes) -> None:
    data = catalogue(HEADER | {"File": "Fichier", "Open": "Ouvrir"})
    damaged = data[:at] + noise + data[at + len(noise) :]
    try:
        read = list(catalogues.messages(damaged))
    except catalogues.CatalogueError:
        return
    assert all(isinstance(text, str) for pair in read for text in pair)


def test_what_is_no_catalogue_is_named() -> None:
    with pytest.raises(catalogues.CatalogueError, match="5 bytes are too few"):
        list(catalogues.messages(b"hello"))
    with pytest.raises(catalogues.CatalogueError, match="0x950412de; these bytes start with 68656c6c"):
        list(catalogues.messages(b"hello" * 9))
    with pytest.raises(catalogues.CatalogueError, match="ends behind the file's"):
        list(catalogues.messages(catalogue({"File": "Fichier"})[:-4]))


@pytest.mark.parametrize(
    ("english", "french", "pairs"),
    [
        ("Save _As…", "Enregistrer _sous…", [("Enregistrer sous...", "Save As...")]),
        ("&Open && close", "&Ouvrir && fermer", [("Ouvrir & fermer", "Open & close")]),
        ("Pr_eferences", "Pré_férences", [("Préférences", "Preferences")]),
        ("~File", "~Fichier", [("Fichier", "File")]),
        ("_Add", "Ajouter", [("Ajouter", "Add")]),
        ("_Options", "_Options", [("Options", "Options")]),
        ("file_name is bad", "file_name est mauvais", [("file_name est mauvais", "file_name is bad")]),
        ("<b>Bold:</b> %s", "<b>Gras\u00a0:</b> %s", [("Gras: %s", "Bold: %s")]),
        ("Delete “%s”?", "Supprimer « %s » ?", [('Supprimer "%s"?', 'Delete "%s"?')]),
        ("first part\n\nsecond part", "premier\n\nsecond", [("premier", "first part"), ("second", "second part")]),
        ("_: a hint\nOpen", "Ouvrir", [("Ouvrir", "Open")]),
        ("Saved to %2$s", "Enregistré sous %s", []),  # another code
        ("foo_bar", "foo_bar", []),
        ("/usr/share", "/usr/share", []),
        ("No", "Cette traduction est beaucoup trop longue pour être juste.", []),
        ("Language", "Язык", []),
        ("Your names", "Prénom Nom", []),
        ("translator-credits", "Prénom Nom <nom@exemple.fr>", []),
        ("word " * 61, "mot " * 61, []),
    ],
)
def test_pairs_of_a_message(english: str, french: str, pairs: list[tuple[str, str]]) -> None:
    assert list(clean.pairs(english, french)) == pairs


def test_text_is_spelt_one_way() -> None:
    assert clean.text("L’icône «\u202fOuvrir\u202f»\u00a0: voir  e\u0301té…") == 'L\'icône "Ouvrir": voir été...'
    assert clean.text("&lt;b&gt; n&rsquo;est\tpas") == "<b> n'est pas"


def test_texts_that_differ_in_case_signs_and_codes_have_one_key() -> None:
    assert clean.key("Open %s…") == clean.key("open") != clean.key("opens")


def test_parts_share_no_package_and_no_text() -> None:
    names = [f"program{number:c}{number:c}" for number in range(ord("a"), ord("z"))]
    pairs = [
        Pair(name, f"le {name} numéro {n % 9 * 'x'}", f"the {name} number {n}") for name in names for n in range(9)
    ]
    pairs += [Pair(name, "Ouvrir", "Open") for name in names]
    parts = prepare.split(pairs)
    assert {len(pairs) > 0 for pairs in parts.values()} == {True}
    for one, other in [("training", "validation"), ("training", "test"), ("validation", "test")]:
        assert not {pair.package for pair in parts[one]} & {pair.package for pair in parts[other]}
        texts = [
            {clean.key(text) for pair in parts[part] for text in (pair.french, pair.english)} for part in (one, other)
        ]
        assert not texts[0] & texts[1]


def test_training_has_few_equal_sides_and_no_text_often() -> None:
    pairs = [Pair("a", f"mot{n:c}", f"mot{n:c}") for n in range(97, 107)]
    pairs += [Pair("a", "Ouvrir", f"open {n:c}") for n in range(97, 117)]
    pairs += [Pair("a", f"phrase {n}", f"sentence {n}") for n in range(70)]
    kept = prepare.split([Pair("blender-data", pair.french, pair.english) for pair in pairs])["training"]
    assert sum(pair.french == pair.english for pair in kept) == 2  # 2 % of 100
    assert sum(pair.french == "Ouvrir" for pair in kept) == 3


def test_packages_of_one_program_lie_in_one_part() -> None:
    for names in (
        ["gcc-11-locales", "gcc-12-locales"],
        ["wesnoth-1.16-data", "wesnoth-data"],
        ["gedit", "gedit-common"],
    ):
        assert len({prepare.part_of(name) for name in names}) == 1


def test_listed_packages_are_enough_for_the_model() -> None:
    packages = listed()
    assert len({package.name for package in packages}) == len(packages)
    assert sum(package.pairs for package in packages) >= 250_000
    assert all(package.version and package.licence for package in packages)


def test_licence_is_that_of_the_main_files() -> None:
    assert licence_of("Files: *\nLicense: GPL-2+\n\nFiles: debian/*\nLicense: MIT\n") == "GPL-2+"
    assert licence_of("On Debian systems see /usr/share/common-licenses/LGPL-2.1.\n") == "LGPL-2.1"
    assert licence_of("Do what you like.") == "see its copyright file"


def test_bleu_is_sacrebleus() -> None:
    """A literal of sacrebleu 2.6.0, BLEU(tokenize="13a", smooth_method="none"), for texts that both cut alike."""
    references = ["The file could not be opened .", "Show the list of all open windows", "Save As"]
    hypotheses = ["The file cannot be opened .", "Show the list of open windows", "Save As"]
    assert bleu(references, references) == pytest.approx(100)
    assert bleu(hypotheses, references) == pytest.approx(39.2922, abs=0.001)
    assert bleu(["nothing"], ["Save As"]) == 0
