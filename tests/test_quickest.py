"""The choice between products that cuBLAS proposes, without a GPU: a library and a clock that do as they are told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightseq_backend.ops import cublas, quickest


class Clock:
    """cupy.cuda.runtime as far as events go; time passes where `passed` is raised."""

    def __init__(self) -> None:
        self.passed, self._made, self._at = 0.0, 0, {}  # type: tuple[float, int, dict[int, float]]

    def eventCreate(self) -> int:
        self._made += 1
        return self._made

    def eventRecord(self, event: int, stream: int) -> None:
        self._at[event] = self.passed

    def eventSynchronize(self, event: int) -> None:
        assert event in self._at

    def eventElapsedTime(self, start: int, end: int) -> float:
        return self._at[end] - self._at[start]

    def eventDestroy(self, event: int) -> None:
        self._made -= 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made, package = Clock(), ModuleType("cupy")
    package.cuda = ModuleType("cupy.cuda")  # type: ignore[attr-defined]
    package.cuda.runtime = made
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", package.cuda)
    return made


@pytest.mark.parametrize(
    ("times", "chosen"),
    [([5.0], 0), ([5.0, 6.0, 4.0], 2), ([5.0, 4.9], 0), ([5.0, 4.84], 1), ([4.0, 5.0, 6.0], 0), ([0.0, 0.0], 0)],
)
def test_first_is_taken_unless_another_is_clearly_quicker(times: list[float], chosen: int) -> None:
    assert quickest.clearly_quickest(times) == chosen


def test_ways_take_turns_and_the_first_turn_does_not_count(clock: Clock) -> None:
    done: list[str] = []

    def way(name: str, first: float, later: Sequence[float]) -> Any:
        """first: of its first turn, while it is loaded; later: of runs after it, again and again."""

        def run() -> None:
            own = done.count(name)
            clock.passed += first if own < 3 else later[own % len(later)]
            done.append(name)

        return run

    ways = [way("steady", 1, [10]), way("quick", 1000, [9, 9, 9, 30, 30, 30]), way("lazy", 0.1, [20])]
    assert quickest.quickest(ways, stream=0) == 1
    turn = [name for name in ("steady", "quick", "lazy") for _ in range(3)]
    assert done == turn * (len(done) // len(turn))
    assert len(done) > 2 * len(turn)
    assert clock._made == 0, "events are left"


class Array(SimpleNamespace):
    """What cublas.py reads of a CuPy array."""

    def __init__(self, shape: Any, dtype: Any = np.float16):
        shape = (shape,) if isinstance(shape, int) else shape
        self.memory = np.zeros(shape, dtype)
        super().__init__(
            shape=shape, strides=self.memory.strides, itemsize=self.memory.itemsize, dtype=self.memory.dtype,
            data=SimpleNamespace(ptr=self.memory.ctypes.data),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.memory)


class Lt:
    """cuBLASLt that proposes algorithms, numbered, and takes so long for each; `calls` has what ran where.

    times: of those with a workspace; without: of those without one, which are numbered on behind them
    """

    def __init__(
        self, clock: Clock, times: Sequence[float], unusable: Sequence[int] = (), without: Sequence[float] = ()
    ):
        self._clock, self._times, self._unusable, self._without = clock, times, unusable, without
        self.calls: list[tuple[int, int]] = []  # algorithm, address that it wrote to
        self.asked: list[int] = []  # bytes of workspace that proposals were asked for with
        self.workspaces: dict[int, int] = {}  # bytes that an algorithm had when it ran
        self._bias = 0
        self.biases: set[int] = set()  # addresses of what was added

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: 0

    def cublasLtMatmulDescSetAttribute(self, description: Any, attribute: int, value: Any, size: Any) -> int:
        if attribute == 8:  # CUBLASLT_MATMUL_DESC_BIAS_POINTER
            self._bias = value._obj.value
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, preference: Any, attribute: int, value: Any, size: Any) -> int:
        if attribute == 1:  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
            self.asked.append(value._obj.value)
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        *_, asked, found, count = arguments
        first, proposed = (0, self._times) if self.asked[-1] else (len(self._times), self._without)
        count._obj.value = min(asked, len(proposed))
        for i in range(count._obj.value):
            found[i].algorithm.data[0], found[i].state = first + i, 15 if first + i in self._unusable else 0
        return 0

    def cublasLtMatmul(self, *arguments: Any) -> int:
        to, algorithm, workspace = arguments[10], arguments[12]._obj.data[0], arguments[14]
        self.calls.append((algorithm, to.value))
        self.workspaces[algorithm] = workspace.value
        self.biases.add(self._bias)
        self._clock.passed += [*self._times, *self._without][algorithm]
        return 0


def product(
    monkeypatch: pytest.MonkeyPatch, lt: Lt, rows: int, residual: bool = False, again: int = 0
) -> tuple[cublas.Cublas, Array]:
    monkeypatch.setattr(cublas, "_library", lambda: lt)
    products, out, bias = cublas.Cublas(stream=0, workspace=0), Array((rows, 16)), Array(16)
    for _ in range(1 + again):
        products.product(Array((rows, 8)), Array((8, 16)), False, out, bias=bias, residual=out if residual else None)
    assert lt.biases == {bias.data.ptr}
    return products, out


def test_quickest_of_the_usable_proposals_computes_the_product(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    lt = Lt(clock, [9.0, 3.0, 7.0], unusable=[1])
    _, out = product(monkeypatch, lt, 512)
    assert {algorithm for algorithm, _ in lt.calls} == {0, 2}
    assert lt.calls[-1] == (2, out.data.ptr)


@pytest.mark.parametrize(("without", "chosen"), [([8.0, 2.0], 4), ([8.0, 4.0], 1), ([], 1)])
def test_proposals_without_a_workspace_are_measured_beside_the_others_and_get_none(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, without: list[float], chosen: int
) -> None:
    lt = Lt(clock, [9.0, 3.0, 7.0], without=without)
    _, out = product(monkeypatch, lt, 512)
    assert lt.calls[-1] == (chosen, out.data.ptr)
    assert lt.asked == [cublas.WORKSPACE, 0]
    given = [cublas.WORKSPACE] * 3 + [0] * len(without)
    assert lt.workspaces == dict(enumerate(given))


def test_proposals_are_measured_once(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    lt = Lt(clock, [9.0, 3.0, 7.0])
    product(monkeypatch, lt, 600)
    once = len(lt.calls)
    more = Lt(clock, [9.0, 3.0, 7.0])
    product(monkeypatch, more, 600, again=2)
    assert len(more.calls) == once + 2
    assert [algorithm for algorithm, _ in more.calls[-3:]] == [1, 1, 1]


def test_few_rows_take_the_first_proposal_unmeasured(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    lt = Lt(clock, [9.0, 3.0, 7.0], without=[1.0])
    _, out = product(monkeypatch, lt, 511)
    assert lt.calls == [(0, out.data.ptr)]
    assert lt.asked == [cublas.WORKSPACE]


def test_measuring_leaves_what_is_added_to_as_it_is(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    lt = Lt(clock, [9.0, 3.0, 7.0])
    _, out = product(monkeypatch, lt, 512, residual=True)
    assert [call for call in lt.calls if call[1] == out.data.ptr] == [(1, out.data.ptr)]


def test_first_proposal_stays_where_there_is_no_memory_to_try_others(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    make = Array.__init__

    def full(self: Array, shape: Any, dtype: Any = np.float16) -> None:
        if dtype is np.uint8:
            raise MemoryError("no bytes are left")
        make(self, shape, dtype)

    monkeypatch.setattr(Array, "__init__", full)
    lt = Lt(clock, [9.0, 3.0, 7.0])
    _, out = product(monkeypatch, lt, 512, residual=True)
    assert lt.calls == [(0, out.data.ptr)]
