"""Small things that are done for every request: arrays made and copied without giving up the interpreter's lock.

NumPy 1 gives it up for every copy, np.arange, concatenation and sort, however small, and takes it again. In a served
model several threads share it, and each time another one may have it for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

_REMEMBERED = 64
SHORT = 128  # numbers that a list of them costs less than the lock
_LARGE = 1 << 16  # bytes that others should not have to wait for
_COUNT = np.arange(1 << 12, dtype=np.int32)
_COUNT.flags.writeable = False


First = TypeVar("First")
Second = TypeVar("Second")
Made = TypeVar("Made")


def remembered(make: Callable[[First, Second], Made]) -> Callable[[First, Second], Made]:
    """make, which does nothing twice for the same two objects: the same, not equal ones, for to tell that takes long.
    A few results are kept, with their objects."""
    known: dict[tuple[int, int], tuple[First, Second, Made]] = {}

    def find(first: First, second: Second) -> Made:
        key = id(first), id(second)
        found = known.get(key)
        if found is None:
            if len(known) >= _REMEMBERED:
                known.clear()
            found = known[key] = first, second, make(first, second)
        return found[2]

    return find


def counting(length: int) -> np.ndarray:
    """int32 0, 1, ... [length], read-only."""
    return _COUNT[:length] if length <= len(_COUNT) else np.arange(length, dtype=np.int32)


def copied(array: np.ndarray) -> np.ndarray:
    """A copy, read-only but for large ones."""
    if array.nbytes > _LARGE:
        return np.array(array)
    copy = np.frombuffer(array.tobytes(), array.dtype)
    return copy if array.ndim == 1 else copy.reshape(array.shape)


def as_int32(array: np.ndarray) -> np.ndarray:
    """One-dimensional integers as a copy of that type."""
    if array.dtype == np.int32:
        return copied(array)
    return np.array(array.tolist(), np.int32) if len(array) <= SHORT else array.astype(np.int32)


def largest(array: np.ndarray) -> int:
    """Of one-dimensional integers, one or more: where it is NumPy finds five times as fast as what it is."""
    return int(array[array.argmax()])


def smallest(array: np.ndarray) -> int:
    """The same at the other end."""
    return int(array[array.argmin()])


def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """One-dimensional contiguous arrays of one type, one or more, end to end; read-only."""
    arrays = list(arrays)
    assert len({array.dtype for array in arrays}) == 1, "of one type, and one at least"
    return np.frombuffer(b"".join(arrays), arrays[0].dtype)  # type: ignore[arg-type]


def fill(out: np.ndarray, source: np.ndarray) -> None:
    """out[...] = source, both one-dimensional, contiguous, of one type and length."""
    if out.nbytes > _LARGE:
        out[...] = source
    elif len(out):
        memoryview(out.view(np.uint8))[:] = memoryview(source.view(np.uint8))  # type: ignore[arg-type]
