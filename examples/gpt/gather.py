"""Debian packages and the documents in them: downloaded, read without being installed, cleaned."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from examples.gpt import clean, formats

COLUMNS = ("package", "version", "licence", "bytes", "part")
PARTS = ("test", "validation", "training")
MOST_OF_ONE = 1_400_000  # characters of one package, so that no project sets the tone
LEAST_OF_ONE = 3_000
_AT_ONCE = 40  # packages that one call of apt-get downloads
_LICENCE = re.compile(r"^License:[ \t]*([\w.+~/-]+(?: (?:or|and) [\w.+~/-]+)*)[ \t]*$", re.MULTILINE)
_PROSE_LICENCES = (
    ("GNU Free Documentation License", "GFDL"),
    ("GNU Lesser General Public License", "LGPL"),
    ("GNU Library General Public License", "LGPL"),
    ("GNU General Public License", "GPL"),
    ("Apache License", "Apache"),
    ("Artistic License", "Artistic"),
    ("Creative Commons Attribution-Share", "CC-BY-SA"),
    ("Creative Commons", "CC-BY"),
    ("Mozilla Public License", "MPL"),
    ("Boost Software License", "BSL"),
    ("PostgreSQL", "PostgreSQL"),
    ("Redistribution and use in source and binary forms", "BSD"),
    ("Permission is hereby granted, free of charge", "MIT"),
    ("Permission to use, copy, modify", "ISC"),
    ("public domain", "public-domain"),
)


@dataclass(frozen=True)
class Package:
    """A line of packages.tsv; bytes: of prose that came of it."""

    package: str
    version: str = ""
    licence: str = ""
    bytes: int = 0
    part: str = "training"


@dataclass
class Corpus:
    """documents: by part, each the paragraphs of a file; packages: what they came from."""

    packages: list[Package] = field(default_factory=list)
    documents: dict[str, list[list[str]]] = field(default_factory=lambda: {part: [] for part in PARTS})


def read_packages(path: Path) -> list[Package]:
    """The lines of a packages.tsv; every column but the first may be empty."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    if tuple(header.split("\t")) != COLUMNS:
        raise ValueError(f"{path} begins with {header!r}; its columns are {', '.join(COLUMNS)}")
    rows = [line.split("\t") for line in lines]
    return [Package(name, version, licence, int(size or 0), part) for name, version, licence, size, part in rows]


def write_packages(path: Path, packages: list[Package]) -> None:
    rows = [COLUMNS, *((p.package, p.version, p.licence, str(p.bytes), p.part) for p in packages)]
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def download(packages: list[Package], into: Path) -> list[tuple[Package, Path]]:
    """Each package and its .deb: in the version that is named, else in the one that the mirror has now."""
    into.mkdir(parents=True, exist_ok=True)
    missing = [package.package for package in packages if not _archive(package, into)]
    if missing:
        there = _versions(missing)
        wanted = [p for p in packages if p.package in there and not _archive(p, into)]
        names = [f"{p.package}={p.version}" if p.version in there[p.package] else p.package for p in wanted]
        for begin in range(0, len(names), _AT_ONCE):
            subprocess.run(["apt-get", "-qq", "download", *names[begin : begin + _AT_ONCE]], cwd=into, check=True)
    found = [(package, _archive(package, into)) for package in packages]
    for package, path in found:
        if path is None:
            print(f"{package.package}: the mirror has it no longer", file=sys.stderr)
        elif package.version and package.version != _version(path):
            print(f"{package.package}: {_version(path)} instead of {package.version}", file=sys.stderr)
    return [(package, path) for package, path in found if path is not None]


def corpus(archives: list[tuple[Package, Path]], seed: int, workers: int) -> Corpus:
    """All documents. What a package that is held out says, no package of training does: the first keeps a paragraph,
    and those of testing come first."""
    result, seen = Corpus(), set[bytes]()
    archives = sorted(archives, key=lambda one: (PARTS.index(one[0].part), one[0].package))
    with ProcessPoolExecutor(workers) as pool:
        readings = pool.map(_documents, [path for _, path in archives], chunksize=4)
        for (package, path), (licence, documents) in zip(archives, readings, strict=True):
            random.Random(f"{seed} {package.package}").shuffle(documents)
            kept, size = _fresh(documents, seen)
            result.packages.append(replace(package, version=_version(path), licence=licence, bytes=size))
            result.documents[package.part] += kept
    return result


def _fresh(documents: list[list[str]], seen: set[bytes]) -> tuple[list[list[str]], int]:
    """What nobody has said before, and its characters; at most MOST_OF_ONE of them, and none where they are few."""
    kept, size = [], 0
    for document in documents:
        keys = {clean.key(paragraph): paragraph for paragraph in reversed(document)}
        fresh = [paragraph for one, paragraph in reversed(keys.items()) if one not in seen]
        seen.update(keys)
        if fresh and size < MOST_OF_ONE:
            kept.append(fresh)
            size += sum(map(len, fresh))
    return (kept, size) if size >= LEAST_OF_ONE else ([], 0)


def _documents(path: Path) -> tuple[str, list[list[str]]]:
    """The licences that a package names, and its files' paragraphs of prose."""
    licence, documents = "", []
    process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE)
    with process, tarfile.open(fileobj=process.stdout, mode="r|") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            copyright_file = name.startswith("usr/share/doc/") and name.endswith("/copyright")
            reader = formats.reader_of(name)
            if member.issym() and name == f"usr/share/doc/{path.name.split('_')[0]}":
                licence = f"as {Path(member.linkname).name}"
            if not member.isfile() or not (reader or copyright_file):
                continue
            stored = archive.extractfile(member)
            text = formats.decoded(name, stored.read()) if stored else None
            if text is None:
                continue
            if copyright_file:
                licence = licences(text)
            elif reader:
                documents += [paragraphs] if (paragraphs := list(_prose(reader(text)))) else []
    return licence, documents


def _prose(pieces: Iterator[str]) -> Iterator[str]:
    return (paragraph for piece in pieces if (paragraph := clean.prose(piece)))


def licences(copyright_text: str) -> str:
    """The first three licences that a copyright file names, in its own short names where it has them."""
    named = list(dict.fromkeys(_LICENCE.findall(copyright_text)))
    if not named:
        named = [short for phrase, short in _PROSE_LICENCES if phrase in copyright_text]
    return ", ".join(named[:3]) or "see its copyright file"


def _archive(package: Package, folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{package.package}_*.deb"))), None)


def _version(path: Path) -> str:
    return path.name.split("_")[1].replace("%3a", ":")


def _versions(names: list[str]) -> dict[str, set[str]]:
    """Versions by package that the mirror has."""
    there: dict[str, set[str]] = {}
    for line in subprocess.run(["apt-cache", "madison", *names], capture_output=True, text=True).stdout.splitlines():
        name, version, *_ = (part.strip() for part in line.split("|"))
        there.setdefault(name, set()).add(version)
    return there
