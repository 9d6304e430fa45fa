"""Files as bytes: mapped to be read, whole or not at all where they are written; memory that devices like to copy."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from lightseq_backend.errors import WeightError

FilePath = str | os.PathLike[str]
ALIGNMENT = 64  # bytes; what vector loads and copies to a device like best


class MappedFile:
    """A file's bytes, mapped: uint8 [n]. WeightError when there is no such file, or nothing in it."""

    def __init__(self, path: str | os.PathLike[str]):
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise WeightError("the file is empty")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise WeightError("there is no such file") from None
        except OSError as error:
            raise WeightError(f"the file cannot be read: {error.strerror or error}") from None
        self.bytes = np.frombuffer(self._map, np.uint8)

    def __len__(self) -> int:
        return len(self._map)

    def __getitem__(self, index: Any) -> Any:
        return self._map[index]

    def release(self, start: int, end: int) -> None:
        """Pages of this range no longer count as this process's memory; the page cache keeps them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start -= start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def write_file(path: FilePath, pieces: Iterable[bytes | memoryview]) -> None:
    with replacing(path) as partial, open(partial, "wb") as file:
        file.writelines(pieces)


@contextmanager
def replacing(path: FilePath) -> Iterator[str]:
    """A name to write to, which becomes `path` if all goes well and else is gone: whoever reads meanwhile finds the old
    file or the new one, never half of one."""
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def aligned_empty(count: int) -> np.ndarray:
    """float32 [count], uninitialised, at an address that ALIGNMENT divides."""
    spare = ALIGNMENT // 4
    raw = np.empty(count + spare, np.float32)
    first = -raw.ctypes.data % ALIGNMENT // 4
    return raw[first : first + count]
