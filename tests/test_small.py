"""Copies that keep the interpreter's lock."""

from __future__ import annotations

import numpy as np
import pytest

from lightseq_backend.serving.wire import FORMS, Wire
from lightseq_backend.small import as_int32, copied, counting, fill, joined, largest, remembered, smallest


def test_what_is_remembered_is_of_the_same_objects_not_of_equal_ones() -> None:
    made: list[tuple[int, ...]] = []

    @remembered
    def make(first: list[int], second: list[int]) -> tuple[int, ...]:
        made.append((*first, *second))
        return made[-1]

    one, other = [1], [2]
    assert make(one, other) is make(one, other)
    assert make([1], [2]) == make(other, one)[::-1] == (1, 2)
    assert made == [(1, 2), (1, 2), (2, 1)]
    for number in range(1000):  # each gone before the next: their addresses are used again
        assert make([number], one) == (number, 1)
    assert make(one, other) == (1, 2)


@pytest.mark.parametrize(
    ("batched", "shape", "expected"),
    [
        (True, (1, 4), [[0, 1, 2, 3]]),
        (True, (2, 3), [[0, 1, 2], [3, 4, 5]]),
        (True, (1, 0), [[]]),
        (False, (3,), [[0, 1, 2]]),
        (False, (1,), [[0]]),
        (True, (2, 40_000), [[*range(40_000)], [*range(40_000, 80_000)]]),
    ],
)
def test_rows_of_a_request_outlast_its_memory(batched: bool, shape: tuple[int, ...], expected: list[list[int]]) -> None:
    wire = Wire("source_ids", FORMS[0], np.dtype(np.int32), batched)
    given = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    rows = wire.rows(given, "source_ids")
    given[...] = -1  # Triton has it back once a request is read
    assert [row.tolist() for row in rows] == expected
    assert {(row.ndim, row.dtype) for row in rows} == {(1, np.dtype(np.int64))}


@pytest.mark.parametrize("length", [0, 1, 4096, 4097])
def test_counting(length: int) -> None:
    assert counting(length).dtype == np.int32
    assert counting(length).tolist() == list(range(length))


@pytest.mark.parametrize("dtype", ["i1", "u1", "i4", "i8", "u8"])
@pytest.mark.parametrize("place", [0, 7, 299])
def test_largest_and_smallest(place: int, dtype: str) -> None:
    limits = np.iinfo(dtype)
    array = np.full(600, 5, dtype)[::2]
    for find, extreme in ((largest, limits.max), (smallest, limits.min)):
        assert find(array) == 5
        array[place] = extreme
        assert find(array) == extreme
        array[place] = 5


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (200, 100)])
def test_copy_is_of_its_own_and_takes_any_strides(shape: tuple[int, ...]) -> None:
    array = np.arange(2 * np.prod(shape), dtype=np.int64).reshape(*shape[:-1], 2 * shape[-1])[..., ::2]
    copy, expected = copied(array), array.tolist()
    array[...] = -1
    assert (copy.dtype, copy.tolist()) == (np.int64, expected)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("length", [0, 3, 500])
def test_integers_become_others_of_their_own(kind: type[np.generic], length: int) -> None:
    array = (np.arange(2 * length) % 99).astype(kind)[::2]
    numbers, expected = as_int32(array), array.tolist()
    array[...] = 1
    assert (numbers.dtype, numbers.tolist()) == (np.int32, expected)
    assert numbers.flags.c_contiguous


def test_arrays_are_joined_and_fill_others() -> None:
    records = np.zeros(3, [("a", np.int32), ("b", np.float64)])
    records["a"] = [1, 2, 3]
    assert joined([records[:1], records[1:]]).tolist() == records.tolist()
    with pytest.raises(AssertionError, match="of one type"):
        joined([np.zeros(2, np.int32), np.zeros(1, np.int64)])
    for size in (0, 5, 70_000):
        out = np.full(size + 2, -1, np.int32)
        fill(out[1:-1], np.arange(size, dtype=np.int32))
        assert out.tolist() == [-1, *range(size), -1]
