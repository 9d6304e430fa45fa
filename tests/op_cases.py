"""THE table of op cases: what every operation is tested and measured with, on whatever device.

A case is data alone: the operation's arguments as host arrays, which of them it writes, and how far from the truth
it may be. `run` places them with an ops module and returns what was written; tests compare that with float64 or with
ops/cpu.py, benchmarks divide `bytes` by the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops.slots import FAN_OUT, SAMPLE, SEARCH, SLOT

Array = np.ndarray
Arguments = dict[str, Any]  # arrays, Norm, Linear, Table, numbers and strings, by parameter name

# Largest |result - truth| / (1 + |truth|), by the precision of activations and weights.
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
ROWS = (1, 7, 19, 99, 257)
HIDDEN = (64, 768, 1000)
VOCABULARIES = (257, 1000, 30016)


class Table(NamedTuple):
    """An embedding table; `ops.table` takes it."""

    array: Array


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    build      fresh arguments, the same at every call; outputs that the operation must write in full hold NaN
    outputs    parameters that it writes
    elements   numbers of the working precision that must be moved at least once, `words` those of four bytes
    float32    parameters that stay float32 in every precision
    undefined  where an output means nothing: parameter -> index
    """

    name: str
    op: str
    build: Callable[[], Arguments]
    outputs: tuple[str, ...]
    elements: int = 0
    words: int = 0
    float32: frozenset[str] = frozenset()
    undefined: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=lambda: TOLERANCE)

    def __str__(self) -> str:
        return f"{self.op} {self.name}"

    def bytes(self, size: int = 4) -> int:
        """Bytes that any implementation moves, for a working precision of `size` bytes."""
        return self.elements * size + self.words * 4

    def meaningful(self, name: str, array: Array) -> Array:
        """An output without what is undefined in it."""
        if name in self.undefined:
            array = array.copy()
            array[self.undefined[name]] = np.zeros((), array.dtype)
        return array


def run(ops: ModuleType, case: Case) -> dict[str, Array]:
    """The outputs of a case, on the host, as computed by that ops module."""
    arguments = case.build()
    placed: dict[int, Any] = {}
    for name, value in arguments.items():
        # An array given twice (out = residual) stays one array.
        placed.setdefault(id(value), _place(ops, value, name in case.float32))
    getattr(ops, case.op)(**{name: placed[id(value)] for name, value in arguments.items()})
    return {name: ops.get(placed[id(arguments[name])]) for name in case.outputs}


def _place(ops: ModuleType, value: Any, float32: bool) -> Any:
    if isinstance(value, Norm):
        return Norm(ops.vector(value.gain), ops.vector(value.bias))
    if isinstance(value, Linear):
        return Linear(ops.matrix(value.weight), None if value.bias is None else ops.vector(value.bias))
    if isinstance(value, Table):
        return ops.table(value.array)
    if not isinstance(value, np.ndarray):
        return value
    dtype = ops.FLOAT if value.dtype == np.float32 and not float32 else value.dtype
    array = ops.view(ops.allocate(max(1, value.size * dtype.itemsize)), 0, value.shape, dtype)
    ops.put(array, value.astype(dtype))
    return array


# The cases -----------------------------------------------------------------------------------------------------------


def cases(op: str | None = None) -> list[Case]:
    """All cases, or those of one operation."""
    every = [case for family in FAMILIES for case in family()]
    return [case for case in every if op is None or case.op == op]


def _seeded(*shape: Any) -> np.random.Generator:
    """The same numbers for the same case, whichever others there are."""
    return np.random.default_rng([int(part) if not isinstance(part, str) else len(part) for part in shape])


def _floats(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, dtype=np.float32)


def _empty(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def _norm(random: np.random.Generator, width: int) -> Norm:
    return Norm(1 + 0.3 * _floats(random, width), 0.2 * _floats(random, width))


def _linear(random: np.random.Generator, narrow: int, wide: int, transposed: bool = False, bias: bool = True) -> Linear:
    weight = _floats(random, wide, narrow).T if transposed else _floats(random, narrow, wide)
    return Linear(weight * np.float32(narrow**-0.5), _floats(random, wide) if bias else None)


def _embed_tokens() -> Iterator[Case]:
    for rows, hidden, transposed in ((1, 64, False), (7, 768, False), (19, 1000, True), (99, 64, True), (257, 768, False)):

        def build(rows: int = rows, hidden: int = hidden, transposed: bool = transposed) -> Arguments:
            random = _seeded(rows, hidden)
            tokens = random.integers(0, 257, rows).astype(np.int32)
            tokens[3::5] = -1  # padding between tokens: zeros, whatever the position
            table = _floats(random, hidden, 257).T if transposed else _floats(random, 257, hidden)
            return {
                "tokens": tokens,
                "positions": random.integers(0, 99, rows).astype(np.int32),
                "token_table": Table(table),
                "position_table": Table(_floats(random, 99, hidden)),
                "out": _empty(rows, hidden),
            }

        name = f"{rows}x{hidden}" + (" transposed table" if transposed else "")
        yield Case(name, "embed_tokens", build, ("out",), elements=3 * rows * hidden, words=2 * rows)


def _embed_rows() -> Iterator[Case]:
    for rows, hidden in ((1, 64), (19, 768), (99, 1000)):

        def build(rows: int = rows, hidden: int = hidden) -> Arguments:
            random = _seeded(rows, hidden)
            slots = np.zeros(rows + 3, SLOT)
            slots["token"] = random.integers(0, 257, slots.size)
            slots["length"] = random.integers(0, 99, slots.size)
            return {
                "rows": random.permutation(slots.size)[:rows].astype(np.int32),
                "slots": slots,
                "token_table": Table(_floats(random, hidden, 257).T),
                "position_table": Table(_floats(random, 99, hidden)),
                "out": _empty(rows, hidden),
            }

        yield Case(f"{rows}x{hidden}", "embed_rows", build, ("out",), elements=3 * rows * hidden, words=3 * rows)


def _layer_norm() -> Iterator[Case]:
    kinds: dict[str, Callable[[Array], Array]] = {
        "": lambda x: x,
        "far from zero": lambda x: 100 + x,
        "constant": lambda x: np.full_like(x, 3),
        "tiny": lambda x: x * np.float32(1e-6),
    }
    plain = [(rows, hidden, "") for rows, hidden in zip(ROWS, (*HIDDEN, 1, 64))]
    for rows, hidden, kind in [*plain, (19, 1000, "far from zero"), (7, 64, "constant"), (7, 768, "tiny")]:

        def build(rows: int = rows, hidden: int = hidden, kind: str = kind) -> Arguments:
            random = _seeded(rows, hidden, kind)
            return {
                "x": kinds[kind](_floats(random, rows, hidden)),
                "norm": _norm(random, hidden),
                "epsilon": 1e-6 if kind == "tiny" else 1e-12,
                "out": _empty(rows, hidden),
            }

        # 100 + x has lost seven bits of x before the operation sees it.
        tolerance = {"float32": 1e-4, "float16": 0.2, "bfloat16": 2.0} if kind == "far from zero" else TOLERANCE
        yield Case(
            f"{rows}x{hidden} {kind}".strip(), "layer_norm", build, ("out",),
            elements=2 * rows * hidden + 2 * hidden, tolerance=tolerance,
        )  # fmt: skip


# rows, in, out, weight as a transposed view
PRODUCTS = (
    (1, 64, 192, False),
    (7, 768, 64, True),
    (19, 1000, 257, False),
    (99, 64, 1000, True),
    (257, 768, 768, False),
    (241, 257, 99, False),
    (7, 1, 19, False),
    (19, 64, 1, False),
)


def _products() -> Iterator[Case]:
    for rows, narrow, wide, transposed in PRODUCTS:
        shape = f"{rows}x{narrow}x{wide}" + (" transposed" if transposed else "")
        moved = rows * (narrow + wide) + narrow * wide + wide

        def linear(rows: int = rows, narrow: int = narrow, wide: int = wide, transposed: bool = transposed) -> Arguments:
            random = _seeded(rows, narrow, wide)
            return {
                "x": _floats(random, rows, narrow),
                "linear": _linear(random, narrow, wide, transposed, bias=rows != 19),
                "out": _empty(rows, wide),
            }

        yield Case(shape, "linear", linear, ("out",), elements=moved)

        for activation in ("none", "relu", "gelu") if rows in (7, 99) else ("gelu",):

            def norm_linear(
                rows: int = rows,
                narrow: int = narrow,
                wide: int = wide,
                transposed: bool = transposed,
                activation: str = activation,
            ) -> Arguments:
                random = _seeded(rows, narrow, wide, activation)
                return {
                    "x": 3 * _floats(random, rows, narrow),
                    "norm": _norm(random, narrow),
                    "linear": _linear(random, narrow, wide, transposed),
                    "epsilon": 1e-12,
                    "activation": activation,
                    "normed": _empty(rows, narrow),
                    "out": _empty(rows, wide),
                }

            outputs = ("normed", "out")
            yield Case(f"{shape} {activation}", "norm_linear", norm_linear, outputs, elements=moved + 2 * narrow)

        for place in ("in place", "beside"):

            def linear_residual(
                rows: int = rows, narrow: int = narrow, wide: int = wide, transposed: bool = transposed, place: str = place
            ) -> Arguments:
                random = _seeded(rows, narrow, wide, place)
                residual = _floats(random, rows, wide)
                return {
                    "x": _floats(random, rows, narrow),
                    "linear": _linear(random, narrow, wide, transposed),
                    "residual": residual,
                    "out": residual if place == "in place" else _empty(rows, wide),
                }

            yield Case(f"{shape} {place}", "linear_residual", linear_residual, ("out",), elements=moved + rows * wide)


# lengths of the packed sequences, hidden, heads
PACKS = (
    ((1,), 64, 4),
    ((7, 1, 19), 64, 64),
    ((0, 5, 0, 0, 2, 0), 64, 4),
    ((99, 257, 3), 768, 12),
    ((300,), 64, 1),
    ((19, 40), 1000, 8),
)


def _packed_attention() -> Iterator[Case]:
    for lengths, hidden, heads in PACKS:
        for causal in (False, True):

            def build(
                lengths: tuple[int, ...] = lengths, hidden: int = hidden, heads: int = heads, causal: bool = causal
            ) -> Arguments:
                random = _seeded(*lengths, hidden, heads)
                return {
                    "qkv": 2 * _floats(random, sum(lengths), 3 * hidden),
                    "starts": np.cumsum([0, *lengths]).astype(np.int32),
                    "heads": heads,
                    "causal": causal,
                    "out": _empty(sum(lengths), hidden),
                }

            name = f"{'+'.join(map(str, lengths))} {hidden}/{heads}" + (" causal" if causal else "")
            yield Case(
                name, "packed_attention", build, ("out",), elements=4 * sum(lengths) * hidden, words=len(lengths) + 1
            )


def _decode_attention() -> Iterator[Case]:
    for rows, hidden, heads, steps in ((1, 64, 4, 1), (7, 64, 64, 19), (19, 1000, 8, 99), (99, 768, 12, 40), (8, 64, 1, 257)):
        padding = -rows % 8  # rows of the lane that belongs to nobody
        lanes = rows + 4

        def build(
            rows: int = rows, hidden: int = hidden, heads: int = heads, steps: int = steps,
            padding: int = padding, lanes: int = lanes,
        ) -> Arguments:  # fmt: skip
            random = _seeded(rows, hidden, heads, steps)
            slots = np.zeros(lanes, SLOT)
            slots["length"] = random.integers(0, steps, lanes)
            slots["length"][:2] = 0, steps - 1
            slots["width"] = 1
            slots[-1] = np.zeros((), SLOT)
            slots_of_rows = random.permutation(lanes - 1)[:rows]
            return {
                "qkv": 2 * _floats(random, rows + padding, 3 * hidden),
                "rows": np.array([*slots_of_rows, *[lanes - 1] * padding], np.int32),
                "slots": slots,
                "ancestors": random.integers(0, lanes - 1, (lanes, steps)).astype(np.int32),
                "keys": _floats(random, lanes, steps, hidden),
                "values": _floats(random, lanes, steps, hidden),
                "heads": heads,
                "out": _empty(rows + padding, hidden),
            }

        lengths = build()["slots"]["length"][build()["rows"][:rows]]
        yield Case(
            f"{rows} rows {hidden}/{heads} past {steps}", "decode_attention", build, ("out", "keys", "values", "ancestors"),
            elements=int(2 * lengths.sum() + 6 * rows) * hidden, words=int(lengths.sum() + 2 * rows),
            undefined={"out": slice(rows, None), "keys": lanes - 1, "values": lanes - 1, "ancestors": lanes - 1},
        )  # fmt: skip


def _cross_attention() -> Iterator[Case]:
    for shapes, hidden, heads in (
        (((1, 1),), 64, 4),
        (((4, 19), (1, 257), (16, 7)), 768, 12),
        (((3, 99), (5, 1), (1, 40)), 1000, 8),
        (((2, 7), (2, 3)), 64, 64),
    ):  # (beams, source tokens) of each sequence
        rows = sum(width for width, _ in shapes)
        steps = max(length for _, length in shapes)

        def build(
            shapes: tuple[tuple[int, int], ...] = shapes, hidden: int = hidden, heads: int = heads,
            rows: int = rows, steps: int = steps,
        ) -> Arguments:  # fmt: skip
            random = _seeded(rows, hidden, heads, steps)
            lanes = rows + 3
            slots, free = np.zeros(lanes, SLOT), random.permutation(lanes - 1).tolist()
            slots_of_rows = []
            for method, (width, length) in zip((SEARCH, SAMPLE, FAN_OUT), shapes):
                own = [free.pop() for _ in range(width)]
                slots_of_rows += own
                slots["method"][own], slots["width"][own], slots["beam"][own] = method, width, range(width)
                slots["memory"][own], slots["memory_length"][own] = own[0], length
            padding = -rows % 8
            return {
                "query": 2 * _floats(random, rows + padding, hidden),
                "rows": np.array([*slots_of_rows, *[lanes - 1] * padding], np.int32),
                "slots": slots,
                "keys": _floats(random, lanes, steps, hidden),
                "values": _floats(random, lanes, steps, hidden),
                "heads": heads,
                "out": _empty(rows + padding, hidden),
            }

        name = "+".join(f"{width}x{length}" for width, length in shapes)
        elements = 2 * hidden * (rows + sum(length for _, length in shapes))
        yield Case(f"{name} {hidden}/{heads}", "cross_attention", build, ("out",), elements=elements, words=2 * rows)


def _store() -> Iterator[Case]:
    for rows, hidden in ((1, 64), (19, 1000), (257, 768)):

        def build(rows: int = rows, hidden: int = hidden) -> Arguments:
            random = _seeded(rows, hidden)
            places = random.permutation(5 * 99)[:rows]
            return {
                "key_values": _floats(random, rows, 2 * hidden),
                "lanes": (places // 99).astype(np.int32),
                "steps": (places % 99).astype(np.int32),
                "keys": _floats(random, 5, 99, hidden),
                "values": _floats(random, 5, 99, hidden),
            }

        yield Case(f"{rows}x{hidden}", "store", build, ("keys", "values"), elements=4 * rows * hidden, words=2 * rows)


def _vocabulary() -> Iterator[Case]:
    for rows, hidden, vocabulary, transposed, scaled in (
        (1, 64, 257, False, True),
        (7, 768, 1000, True, False),
        (19, 1000, 257, False, True),
        (99, 64, 30016, True, False),
    ):
        moved = rows * hidden + hidden * vocabulary + 2 * hidden

        def logits(
            rows: int = rows, hidden: int = hidden, vocabulary: int = vocabulary, transposed: bool = transposed,
            scaled: bool = scaled,
        ) -> Arguments:  # fmt: skip
            random = _seeded(rows, hidden, vocabulary)
            return {
                "x": 3 * _floats(random, rows, hidden),
                "norm": _norm(random, hidden),
                "output": Linear(4 * _linear(random, hidden, vocabulary, transposed).weight, _floats(random, vocabulary))
                if scaled
                else _linear(random, hidden, vocabulary, transposed, bias=False),
                "epsilon": 1e-12,
                "scale": hidden**-0.5 if scaled else 1.0,
                "normed": _empty(rows, hidden),
                "logits": _empty(rows, vocabulary),
            }

        shape = f"{rows}x{hidden}x{vocabulary}"
        yield Case(
            shape, "vocabulary_logits", logits, ("normed", "logits"),
            elements=moved + rows * hidden, words=rows * vocabulary, float32=frozenset({"logits"}),
        )  # fmt: skip

        for count, banned in ((1, -1), (4, vocabulary - 3), (16, -1)):

            def vocabulary_top(
                logits: Callable[[], Arguments] = logits, rows: int = rows, count: int = count, banned: int = banned
            ) -> Arguments:
                return {**logits(), "banned": banned, **_room_for_best(rows, count)}

            yield Case(
                f"{shape} best {count}" + (f" without {banned}" if banned >= 0 else ""),
                "vocabulary_top", vocabulary_top, ("ids", "log_probabilities"),
                elements=moved, words=2 * rows * count, float32=frozenset({"logits", "log_probabilities"}),
            )  # fmt: skip


def _room_for_best(rows: int, count: int) -> Arguments:
    return {"ids": np.full((rows, count), -7, np.int32), "log_probabilities": _empty(rows, count)}


def _logits(random: np.random.Generator, kind: str, rows: int, vocabulary: int) -> Array:
    logits = 4 * _floats(random, rows, vocabulary)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "all equal":
        logits[:] = 1.5
    elif kind == "extreme":
        logits *= np.float32(1e4)
    elif kind == "sorted down":
        logits = -np.sort(-logits, axis=1)
    return logits


def _top() -> Iterator[Case]:
    for rows, vocabulary, count, banned, kind in (
        (1, 1, 1, -1, ""),
        (7, 19, 19, -1, ""),
        (7, 19, 18, 5, ""),
        (7, 257, 16, -1, "ties"),
        (7, 257, 4, 254, "all equal"),
        (19, 1000, 1, -1, "extreme"),
        (19, 1000, 5, 0, "sorted down"),
        (99, 30016, 4, 30013, "ties"),
        (7, 30016, 32, -1, ""),
    ):

        def build(
            rows: int = rows, vocabulary: int = vocabulary, count: int = count, banned: int = banned, kind: str = kind
        ) -> Arguments:
            logits = _logits(_seeded(rows, vocabulary, count), kind, rows, vocabulary)
            if banned >= 0:
                logits[: rows // 2, banned] = 40  # it would win, and it counts in the normalisation
            return {"logits": logits, "banned": banned, **_room_for_best(rows, count)}

        name = f"{count} of {rows}x{vocabulary}" + (f" without {banned}" if banned >= 0 else "") + f" {kind}".rstrip()
        yield Case(
            name, "top", build, ("ids", "log_probabilities"), words=rows * (vocabulary + 2 * count),
            float32=frozenset({"logits", "log_probabilities"}),
        )  # fmt: skip


def _target_log_probabilities() -> Iterator[Case]:
    for rows, vocabulary, kind in ((1, 1, ""), (7, 257, "extreme"), (19, 1000, ""), (99, 30016, "")):

        def build(rows: int = rows, vocabulary: int = vocabulary, kind: str = kind) -> Arguments:
            random = _seeded(rows, vocabulary)
            return {
                "logits": _logits(random, kind, rows, vocabulary),
                "targets": random.integers(0, vocabulary, rows).astype(np.int32),
                "out": _empty(rows),
            }

        yield Case(
            f"{rows}x{vocabulary} {kind}".strip(), "target_log_probabilities", build, ("out",),
            words=rows * (vocabulary + 2), float32=frozenset({"logits", "out"}),
        )  # fmt: skip


@dataclass(frozen=True)
class Searching:
    """A sequence in the middle of a search."""

    width: int
    generated: int = 3
    limit: int = 99
    method: int = SEARCH
    penalty: float = 0.6
    diverse_lambda: float = 0.0
    finished: tuple[int, ...] = ()
    done: bool = False


SEARCHES = {
    "one beam": [Searching(1)],
    "first step": [Searching(4, generated=0), Searching(16, generated=0, penalty=1.0)],
    "some finished": [Searching(4, finished=(0, 2)), Searching(5, finished=(4,), penalty=0.0)],
    "all but one finished": [Searching(4, finished=(0, 1, 2))],
    "negative penalty": [Searching(4, finished=(1,), penalty=-1.0)],
    "at the limit": [Searching(2, generated=6, limit=7), Searching(3, generated=5, limit=7)],
    "done": [Searching(4, done=True, finished=(0, 1, 2, 3)), Searching(2)],
    "fan out": [Searching(4, generated=0, method=FAN_OUT), Searching(4, method=FAN_OUT, finished=(3,))],
    "diverse": [Searching(4, diverse_lambda=0.7, finished=(1,)), Searching(3, diverse_lambda=2.0, generated=0)],
    "many": [Searching(1 + i % 16, generated=i % 7, penalty=i / 10) for i in range(19)],
}


def _beam_step() -> Iterator[Case]:
    for name, searches in SEARCHES.items():

        def build(name: str = name, searches: list[Searching] = searches) -> Arguments:
            random = _seeded(name, len(searches))
            rows = sum(search.width for search in searches)
            padding, most, steps, lanes = -rows % 8, max(search.width for search in searches), 12, rows + 4
            slots, free, used = np.zeros(lanes, SLOT), random.permutation(lanes - 1).tolist(), []
            for search in searches:
                own = [free.pop() for _ in range(search.width)]
                used += own
                _begin(slots, own, search, random)
            count = most + 2
            log_probabilities = -np.sort(random.exponential(3, (rows + padding, count)).astype(np.float32), axis=1)
            ids = np.stack([random.permutation(31)[:count] for _ in range(rows + padding)]).astype(np.int32)
            return {
                "rows": np.array([*used, *[lanes - 1] * padding], np.int32),
                "slots": slots,
                "ancestors": random.integers(0, lanes - 1, (lanes, steps)).astype(np.int32),
                "history": random.integers(3, 31, (lanes, steps)).astype(np.int32),
                "ids": ids,
                "log_probabilities": log_probabilities,
            }

        rows = sum(search.width for search in searches)
        # LightSeq sorts the beams of a diverse search 2000 apart and keeps the rounding.
        tolerance = dict.fromkeys(TOLERANCE, 1e-3) if name == "diverse" else dict.fromkeys(TOLERANCE, 2e-5)
        moved = sum(s.width * (2 * s.width + 2 * (2 * s.generated + 2)) for s in searches) + 2 * rows * SLOT.itemsize // 4
        yield Case(
            name, "beam_step", build, ("slots", "ancestors", "history"), words=moved,
            float32=frozenset({"log_probabilities"}), tolerance=tolerance,
        )  # fmt: skip


def _begin(slots: Array, own: list[int], search: Searching, random: np.random.Generator) -> None:
    width = search.width
    slots["method"][own], slots["beam"][own], slots["width"][own] = search.method, range(width), width
    slots["generated"][own], slots["length"][own] = search.generated, search.generated + 1
    slots["limit"][own], slots["end_id"][own], slots["done"][own] = search.limit, 2, search.done
    slots["length_penalty"][own], slots["diverse_lambda"][own] = search.penalty, search.diverse_lambda
    totals = -random.exponential(2, width) if search.generated else np.array([0.0, *[-1000.0] * (width - 1)])
    slots["log_probability"][own] = totals
    slots["score"][own] = totals / 2
    slots["finished"][[own[beam] for beam in search.finished]] = 1


@dataclass(frozen=True)
class Sampling:
    """A sequence in the middle of being sampled."""

    width: int
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    generated: int = 2
    limit: int = 99
    seed: int = 5
    stream: int = 0
    finished: tuple[int, ...] = ()
    done: bool = False


SAMPLINGS = {
    "whole distribution": [Sampling(1), Sampling(4, seed=2**63 - 1)],
    "top_k": [Sampling(1, top_k=1), Sampling(3, top_k=5), Sampling(2, top_k=10_000)],
    "top_p": [Sampling(1, top_p=1e-6), Sampling(3, top_p=0.5), Sampling(2, top_p=0.95, top_k=7)],
    "temperature": [Sampling(2, temperature=0.001), Sampling(2, temperature=3.0), Sampling(2, temperature=1000.0)],
    "finished": [Sampling(3, finished=(1,)), Sampling(1, generated=6, limit=7), Sampling(2, done=True)],
}


def _sample_step() -> Iterator[Case]:
    for vocabulary, banned in ((19, -1), (1000, 997)):
        for name, samplings in SAMPLINGS.items():

            def build(
                name: str = name, samplings: list[Sampling] = samplings, vocabulary: int = vocabulary, banned: int = banned
            ) -> Arguments:
                random = _seeded(name, len(samplings), vocabulary)
                rows = sum(sampling.width for sampling in samplings)
                padding, lanes = -rows % 8, rows + 4
                slots, free, used = np.zeros(lanes, SLOT), random.permutation(lanes - 1).tolist(), []
                for sampling in samplings:
                    own = [free.pop() for _ in range(sampling.width)]
                    used += own
                    _begin(slots, own, Searching(sampling.width, sampling.generated, sampling.limit, SAMPLE), random)
                    slots["seed"][own], slots["top_k"][own] = sampling.seed, sampling.top_k
                    slots["top_p"][own], slots["temperature"][own] = sampling.top_p, sampling.temperature
                    slots["stream"][own] = sampling.stream * 65536 + np.arange(sampling.width)
                    slots["finished"][[own[sample] for sample in sampling.finished]] = 1
                    slots["done"][own] = sampling.done
                logits = 4 * _floats(random, rows + padding, vocabulary)
                if banned >= 0:
                    logits[::2, banned] = 40  # it would win
                return {
                    "rows": np.array([*used, *[lanes - 1] * padding], np.int32),
                    "slots": slots,
                    "history": random.integers(3, 19, (lanes, 12)).astype(np.int32),
                    "logits": logits,
                    "banned": banned,
                }

            rows = sum(sampling.width for sampling in samplings)
            yield Case(
                f"{name} of {vocabulary}", "sample_step", build, ("slots", "history"),
                words=rows * (vocabulary + 2 * SLOT.itemsize // 4), float32=frozenset({"logits"}),
                tolerance=dict.fromkeys(TOLERANCE, TOLERANCE["float32"]),
            )  # fmt: skip


FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (
    _embed_tokens,
    _embed_rows,
    _layer_norm,
    _products,
    _packed_attention,
    _decode_attention,
    _cross_attention,
    _store,
    _vocabulary,
    _top,
    _target_log_probabilities,
    _beam_step,
    _sample_step,
)
