"""Lines of standard input, with a way to see whether the next one is already there."""

from __future__ import annotations

import os
import select
import stat
from collections import deque
from collections.abc import Iterator

_CHUNK = 1 << 16


class Lines:
    """The lines of a file descriptor, without their ends, decoded as UTF-8 (what is not becomes U+FFFD).

    Reads the descriptor itself: Python's own buffer would hide what has already arrived, and a client in a
    pipe must hand out its answers before it waits for the next line.
    """

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()  # complete ones
        self._begun = b""  # what has come of the next
        self._ended = False

    def __iter__(self) -> Iterator[str]:
        while self._lines or not self._ended:
            if self._lines:
                yield self._lines.popleft().decode("utf-8", errors="replace").rstrip("\r")
            else:
                self._fill()

    def ready(self) -> bool:
        """Whether the next line, or the end, can be had without waiting."""
        while not self._lines and not self._ended:
            if not select.select([self._descriptor], [], [], 0)[0]:
                return False
            self._fill()
        return True

    def count(self) -> int | None:
        """How many lines there are from here on, when this is a regular file; else None."""
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            return None
        offset = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        lines, last = 0, b"\n"
        while chunk := os.pread(self._descriptor, _CHUNK, offset):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
            offset += len(chunk)
        return lines + (last != b"\n")

    def _fill(self) -> None:
        chunk = os.read(self._descriptor, _CHUNK)
        *complete, self._begun = (self._begun + chunk).split(b"\n")
        self._lines.extend(complete)
        if not chunk:
            self._ended = True
            if self._begun:  # a last line without its end
                self._lines.append(self._begun)
