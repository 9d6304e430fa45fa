"""Files of lines: many read as one, and one written that can be gone on with."""

from __future__ import annotations

import os
import stat
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lightseq_backend.errors import RequestError

STDIN = "-"
_CHUNK = 1 << 20


class Chunk(NamedTuple):
    """`lines` lines of a file, which begin at byte `start`; the first has the number `first` among all lines."""

    path: str
    start: int
    lines: int
    first: int

    def read(self) -> Iterator[bytes]:
        """The lines, without their ends."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for line in islice(file, self.lines):
                yield line.rstrip(b"\r\n")


class Lines:
    """The lines of files, one after the other, as bytes without their ends; what is read is not kept.

    paths: "-" is standard input, and so is no path at all. RequestError when one cannot be read.
    """

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths) or (STDIN,)
        for path in self.paths:
            if path != STDIN and (os.path.isdir(path) or not os.access(path, os.R_OK)):
                raise RequestError(f"{path} cannot be read: {_obstacle(path)}")
        self._firsts: list[int] = []  # the number of each file's first line, of those that were begun

    def __iter__(self) -> Iterator[bytes]:
        number = 0
        for path in self.paths:
            self._firsts.append(number)
            with sys.stdin.buffer if path == STDIN else open(path, "rb") as file:
                for line in file:
                    yield line.rstrip(b"\r\n")
                    number += 1

    def place(self, number: int) -> str:
        """Where a line is that was read, by its number from 0."""
        file = bisect_right(self._firsts, number) - 1
        name = "standard input" if self.paths[file] == STDIN else self.paths[file]
        return f"{name}, line {number - self._firsts[file] + 1}"

    def count(self) -> int | None:
        """How many there are; None where a file gives them only once."""
        if not all(path != STDIN and stat.S_ISREG(os.stat(path).st_mode) for path in self.paths):
            return None
        counts = []
        for path in self.paths:
            with open(path, "rb") as file:
                lines, kept = _count(file)
                counts.append(lines + (kept < file.tell()))
        return sum(counts)

    def chunks(self, most: int, done: int = 0) -> Iterator[Chunk]:
        """All lines behind the first `done`, in order, at most `most` at a time; of files that can be read again."""
        number = 0
        for path in self.paths:
            self._firsts.append(number)
            with open(path, "rb") as file:
                start = count = size = 0
                for line in file:
                    if number < done:
                        start += len(line)
                    else:
                        count, size = count + 1, size + len(line)
                    number += 1
                    if count == most:
                        yield Chunk(path, start, count, number - count)
                        start, count, size = start + size, 0, 0
                if count:
                    yield Chunk(path, start, count, number - count)

    def includes(self, path: str | Path) -> bool:
        return any(one != STDIN and os.path.exists(path) and os.path.samefile(one, path) for one in self.paths)


def begin(path: str | Path) -> BinaryIO:
    """A new file to write lines to, in place of one that may be there."""
    return _opened(path, "wb")


def resume(path: str | Path) -> tuple[BinaryIO, int, int]:
    """A file to go on with: itself, the complete lines in it, and the bytes of half a line that were cut off."""
    if not os.path.exists(path):
        return begin(path), 0, 0
    file = _opened(path, "r+b")
    lines, kept = _count(file)
    cut = file.tell() - kept
    file.truncate(kept)
    file.seek(kept)
    return file, lines, cut


def _count(file: BinaryIO) -> tuple[int, int]:
    """Complete lines, and the bytes that they take; the file is at its end then."""
    lines = kept = size = 0
    while chunk := file.read(_CHUNK):
        last = chunk.rfind(b"\n")
        if last >= 0:
            lines, kept = lines + chunk.count(b"\n"), size + last + 1
        size += len(chunk)
    return lines, kept


def _opened(path: str | Path, mode: str) -> BinaryIO:
    try:
        return open(path, mode)  # type: ignore[return-value]
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None


def _obstacle(path: str) -> str:
    if os.path.isdir(path):
        return "it is a directory"
    return "permission denied" if os.path.exists(path) else "there is no such file"
