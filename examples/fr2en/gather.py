"""Fetches the Debian packages of packages.tsv with apt-get and keeps their French catalogues.

    python -m examples.fr2en.gather --data build/fr2en

Needs Debian's `apt-get` and `dpkg-deb` and package lists that `apt-get update` has made; installs nothing. Writes
DATA/catalogues/PACKAGE/*.mo and DATA/gathered.tsv: package, version, licence.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = Path(__file__).with_name("packages.tsv")
_BATCH = 40  # packages of one apt-get
_CATALOGUE = re.compile(r"/(fr|fr_FR)(/LC_MESSAGES)?(/[^/]+)?\.mo$")
_LICENCE_FIELD = re.compile(r"^License: *(\S.*)$", re.MULTILINE)
_LICENCE_FILE = re.compile(r"common-licenses/([A-Za-z]+(?:-[0-9.]+)?)")


@dataclass(frozen=True)
class Package:
    """A line of packages.tsv. pairs: the distinct ones that it adds to those of the packages before it."""

    name: str
    version: str
    licence: str
    pairs: int


@dataclass(frozen=True)
class Contents:
    """What is kept of one package. catalogues: the bytes of each French .mo file by its path in the package."""

    name: str
    version: str
    licence: str
    catalogues: dict[str, bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that takes everything fetched")
    gather(listed(), parser.parse_args().data)


def listed() -> list[Package]:
    """The packages that the shipped model was made from."""
    rows = [line.split("\t") for line in PACKAGES.read_text(encoding="utf-8").splitlines()[1:]]
    return [Package(name, version, licence, int(pairs)) for name, version, licence, pairs in rows]


def gather(packages: list[Package], data: Path) -> None:
    """Fetches what DATA/gathered.tsv does not list yet, so that a run that broke off goes on where it was."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} was not found; gathering needs a Debian system")
    record = data / "gathered.tsv"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.touch()
    have = {line.split("\t")[0] for line in record.read_text(encoding="utf-8").splitlines()}
    wanted = {package.name: package.version for package in packages if package.name not in have}
    with record.open("a", encoding="utf-8") as lines:
        for contents in fetched(wanted):
            keep(contents, data)
            lines.write(f"{contents.name}\t{contents.version}\t{contents.licence}\n")
            lines.flush()


def keep(contents: Contents, data: Path) -> None:
    """Writes the catalogues; two of one name in a package lie side by side with a number."""
    folder = data / "catalogues" / contents.name
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(contents.catalogues)):
        (folder / f"{number:03}-{Path(path).name}").write_bytes(contents.catalogues[path])


def fetched(wanted: dict[str, str]) -> Iterator[Contents]:
    """Downloads packages (name: version) in batches; a version that is gone gives way to the one offered, aloud."""
    names = list(wanted)
    for start in range(0, len(names), _BATCH):
        batch = names[start : start + _BATCH]
        with tempfile.TemporaryDirectory() as folder:
            _download([f"{name}={wanted[name]}" if wanted[name] else name for name in batch], Path(folder))
            for name in batch:
                if _archive(name, folder) is None and wanted[name]:
                    print(f"{name} {wanted[name]} is not offered; taking the version that is")
                    _download([name], Path(folder))
                archive = _archive(name, folder)
                if archive is None:
                    print(f"{name} is not offered at all (after apt-get update?); going on without it")
                    continue
                yield read(archive)
        print(f"{min(start + _BATCH, len(names))} of {len(names)} packages read", flush=True)


def read(archive: Path) -> Contents:
    """The name, version, licence and French catalogues of one .deb file."""
    fields = subprocess.run(
        ["dpkg-deb", "--show", "--showformat=${Package}\t${Version}", str(archive)],
        check=True,
        capture_output=True,
        text=True,
    )
    name, version = fields.stdout.split("\t")
    catalogues, licence = {}, "see its copyright file"
    files = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as members:
        for member in members:
            if not member.isfile():
                continue
            if _CATALOGUE.search(member.name):
                catalogues[member.name] = _content(members, member)
            elif member.name.endswith(f"/doc/{name}/copyright"):
                licence = licence_of(_content(members, member).decode("utf-8", "replace"))
    return Contents(name, version, licence, catalogues)


def licence_of(copyright_file: str) -> str:
    """The first licence that a Debian copyright file names, the one of its main files."""
    found = _LICENCE_FIELD.search(copyright_file) or _LICENCE_FILE.search(copyright_file)
    return " ".join(found[1].split()).rstrip(".") if found else "see its copyright file"


def _content(members: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = members.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read()


def _download(packages: Iterable[str], folder: Path) -> None:
    """One apt-get for all; where it refuses (one of them is not offered), one apt-get each."""
    command = ["apt-get", "--quiet=2", "download", *packages]
    if subprocess.run(command, cwd=folder, capture_output=True).returncode and len(command) > 4:
        for package in command[3:]:
            subprocess.run([*command[:3], package], cwd=folder, capture_output=True)


def _archive(name: str, folder: str) -> Path | None:
    return next(Path(folder).glob(f"{name}_*.deb"), None)


if __name__ == "__main__":
    main()
