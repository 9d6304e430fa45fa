"""THE table of op cases: what every operation is tested and measured with, on whatever device.

A case is data alone: the operation's arguments as host arrays, which of them it writes, and how far from the truth
it may be. `run` places them with an ops module and returns what was written; tests compare that with float64 or with
ops/cpu.py, benchmarks divide `bytes` by the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.models.layers import Linear, Norm
from lightseq_backend.ops.slots import (
    EMPTY,
    FAN_OUT,
    RULES,
    SAMPLE,
    SEARCH,
    SLOT,
    STANDARD,
    UNTIL_FULL,
    UNTIL_NO_BETTER,
    UNTIL_NONE_CAN_BE,
    ranks,
)

Array = np.ndarray
Arguments = dict[str, Any]  # arrays, Norm, Linear, Table, numbers and strings, by parameter name

# Largest |result - truth| / (1 + |truth|), by the precision of activations and weights.
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 8e-2}
WIDE = {**TOLERANCE, "float32": 4e-5}  # of sums over more than a thousand products
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
    folds      the weight is told which norm is in front of it (ops/cpu.py matrix)
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
    folds: bool = False

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
        norm = arguments["norm"] if case.folds else None
        matrix = ops.vocabulary_matrix if case.op.startswith("vocabulary") else ops.matrix
        placed.setdefault(id(value), _place(ops, value, name in case.float32, partial(matrix, norm=norm)))
    getattr(ops, case.op)(**{name: placed[id(value)] for name, value in arguments.items()})
    return {name: ops.fetch(placed[id(arguments[name])])() for name in case.outputs}


def _place(ops: ModuleType, value: Any, float32: bool, matrix: Callable[[Array], Any]) -> Any:
    if isinstance(value, Norm):
        return Norm(ops.vector(value.gain), ops.vector(value.bias))
    if isinstance(value, Linear):
        return Linear(matrix(value.weight), None if value.bias is None else ops.vector(value.bias))
    if isinstance(value, Table):
        return ops.table(value.array)
    if not isinstance(value, np.ndarray):
        return value
    dtype = ops.FLOAT if value.dtype == np.float32 and not float32 else value.dtype
    array = ops.view(ops.allocate(max(1, value.size * dtype.itemsize)), 0, value.shape, dtype)
    ops.put(array, value.astype(dtype))
    return array


# Shared by the families ----------------------------------------------------------------------------------------------


def cases(op: str | None = None) -> list[Case]:
    """All cases, or those of one operation."""
    every = [case for family in FAMILIES for case in family()]
    return [case for case in every if op is None or case.op == op]


def _seeded(*parts: int | str) -> np.random.Generator:
    """The same numbers for the same case, whichever others there are."""
    return np.random.default_rng([len(part) if isinstance(part, str) else part for part in parts])


def _floats(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, dtype=np.float32)


def _empty(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def _norm(random: np.random.Generator, width: int) -> Norm:
    return Norm(1 + 0.3 * _floats(random, width), 0.2 * _floats(random, width))


def _linear(random: np.random.Generator, narrow: int, wide: int, transposed: bool = False, bias: bool = True) -> Linear:
    weight = _floats(random, wide, narrow).T if transposed else _floats(random, narrow, wide)
    return Linear(weight * np.float32(narrow**-0.5), _floats(random, wide) if bias else None)


def _seat(random: np.random.Generator, widths: Sequence[int]) -> tuple[Array, list[list[int]], Array]:
    """Lanes in no order for sequences of so many rows.

    Returns empty records (four lanes more than needed, the last nobody's), the lanes of each sequence, and int32
    `rows`, which nobody's lane fills up to a multiple of eight.
    """
    count = sum(widths)
    slots, free = np.zeros(count + 4, SLOT), random.permutation(count + 3).tolist()
    lanes = [[free.pop() for _ in range(width)] for width in widths]
    used = [lane for own in lanes for lane in own]
    return slots, lanes, np.array([*used, *[count + 3] * (-count % 8)], np.int32)


# Embedding and normalisation -----------------------------------------------------------------------------------------


def _embed_tokens() -> Iterator[Case]:
    for rows, hidden, view in zip(ROWS, (64, 768, 1000, 64, 768), (False, False, True, True, False)):
        yield Case(
            f"{rows}x{hidden}" + " transposed table" * view,
            "embed_tokens",
            partial(_embed_tokens_arguments, rows, hidden, view),
            ("out",),
            elements=3 * rows * hidden,
            words=2 * rows,
        )


def _embed_tokens_arguments(rows: int, hidden: int, transposed: bool) -> Arguments:
    random = _seeded(rows, hidden)
    tokens = random.integers(0, 257, rows).astype(np.int32)
    tokens[3::5] = -1  # padding between tokens: zeros, whatever the position
    return {
        "tokens": tokens,
        "positions": random.integers(0, 99, rows).astype(np.int32),
        "token_table": Table(_floats(random, hidden, 257).T if transposed else _floats(random, 257, hidden)),
        "position_table": Table(_floats(random, 99, hidden)),
        "out": _empty(rows, hidden),
    }


def _embed_rows() -> Iterator[Case]:
    for rows, hidden in ((1, 64), (19, 768), (99, 1000)):
        yield Case(
            f"{rows}x{hidden}",
            "embed_rows",
            partial(_embed_rows_arguments, rows, hidden),
            ("out",),
            elements=3 * rows * hidden,
            words=3 * rows,
        )


def _embed_rows_arguments(rows: int, hidden: int) -> Arguments:
    random = _seeded(rows, hidden)
    slots, _, used = _seat(random, [1] * rows)
    slots["token"] = random.integers(-1, 257, slots.size)
    slots["length"] = random.integers(0, 99, slots.size)
    return {
        "rows": used,
        "slots": slots,
        "token_table": Table(_floats(random, hidden, 257).T),
        "position_table": Table(_floats(random, 99, hidden)),
        "out": _empty(used.size, hidden),
    }


NORMS: dict[str, Callable[[Array], Array]] = {
    "": lambda x: x,
    "far from zero": lambda x: 100 + x,
    "constant": lambda x: np.full_like(x, 3),
    "tiny": lambda x: x * np.float32(1e-6),
}


def _layer_norm() -> Iterator[Case]:
    plain = [(rows, hidden, "") for rows, hidden in zip(ROWS, (*HIDDEN, 1, 64))]
    others = [(19, 1000, "far from zero"), (7, 64, "constant"), (7, 768, "tiny"), (515, 72, "")]
    for rows, hidden, kind in plain + others:
        # 100 + x has lost seven bits of x before the operation sees it.
        far = {"float32": 1e-4, "float16": 0.2, "bfloat16": 2.0}
        yield Case(
            f"{rows}x{hidden} {kind}".strip(),
            "layer_norm",
            partial(_layer_norm_arguments, rows, hidden, kind),
            ("out",),
            elements=2 * rows * hidden + 2 * hidden,
            tolerance=far if kind == "far from zero" else TOLERANCE,
        )


def _layer_norm_arguments(rows: int, hidden: int, kind: str) -> Arguments:
    random = _seeded(rows, hidden, kind)
    return {
        "x": NORMS[kind](_floats(random, rows, hidden)),
        "norm": _norm(random, hidden),
        "epsilon": 1e-6 if kind == "tiny" else 1e-12,
        "out": _empty(rows, hidden),
    }


# Products ------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """x [rows, narrow] times a weight [narrow, wide], which may be the transposed view of another."""

    rows: int
    narrow: int
    wide: int
    transposed: bool = False
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.rows}x{self.narrow}x{self.wide}" + " transposed" * self.transposed

    @property
    def elements(self) -> int:
        """What a product reads and writes."""
        return self.rows * (self.narrow + self.wide) + self.narrow * self.wide + self.wide * self.bias

    def weight(self, random: np.random.Generator) -> Linear:
        return _linear(random, self.narrow, self.wide, self.transposed, self.bias)


PRODUCTS = (
    Shape(1, 64, 192),
    Shape(7, 768, 64, transposed=True),
    Shape(19, 1000, 257, bias=False),
    Shape(99, 64, 1000, transposed=True),
    Shape(257, 768, 768),
    Shape(241, 257, 99),
    Shape(7, 1, 19),
    Shape(19, 64, 1),
    Shape(50, 192, 5504, transposed=True),  # kernels/warpgroup.cu's, on Hopper
    Shape(63, 1024, 1088),
    Shape(99, 1024, 4096, bias=False),
    Shape(150, 1024, 1088),
)


def _products() -> Iterator[Case]:
    for shape in PRODUCTS:
        yield Case(str(shape), "linear", partial(_linear_arguments, shape), ("out",), elements=shape.elements)
        for activation in ("none", "relu", "gelu", "gelu_erf", "silu") if shape.rows in (7, 99) else ("gelu",):
            yield Case(
                f"{shape} {activation}",
                "norm_linear",
                partial(_norm_linear_arguments, shape, activation),
                ("normed", "out"),
                elements=shape.elements + shape.rows * shape.narrow + 2 * shape.narrow,
            )
        if shape.narrow > 1:  # a single column deviates from its mean by nothing but rounding
            yield Case(
                f"{shape} gelu folded",
                "norm_linear",
                partial(_norm_linear_arguments, shape, "gelu"),
                ("out",),
                elements=shape.elements + 2 * shape.narrow,
                folds=True,
            )
        for in_place in (True, False):
            yield Case(
                f"{shape} {'in place' if in_place else 'beside'}",
                "linear_residual",
                partial(_linear_residual_arguments, shape, in_place),
                ("out",),
                elements=shape.elements + shape.rows * shape.wide,
            )


def _linear_arguments(shape: Shape) -> Arguments:
    random = _seeded(*shape[:3])
    x = _floats(random, shape.rows, shape.narrow)
    return {"x": x, "linear": shape.weight(random), "out": _empty(shape.rows, shape.wide)}


def _norm_linear_arguments(shape: Shape, activation: str) -> Arguments:
    random = _seeded(*shape[:3], activation)
    return {
        "x": 3 * _floats(random, shape.rows, shape.narrow),
        "norm": _norm(random, shape.narrow),
        "linear": shape.weight(random),
        "epsilon": 1e-12,
        "activation": activation,
        "normed": _empty(shape.rows, shape.narrow),
        "out": _empty(shape.rows, shape.wide),
    }


def _linear_residual_arguments(shape: Shape, in_place: bool) -> Arguments:
    random = _seeded(*shape[:3], in_place)
    residual = _floats(random, shape.rows, shape.wide)
    return {
        "x": _floats(random, shape.rows, shape.narrow),
        "linear": shape.weight(random),
        "residual": residual,
        "out": residual if in_place else _empty(shape.rows, shape.wide),
    }


# Attention -----------------------------------------------------------------------------------------------------------

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
            yield Case(
                f"{'+'.join(map(str, lengths))} {hidden}/{heads}" + " causal" * causal,
                "packed_attention",
                partial(_packed_attention_arguments, lengths, hidden, heads, causal),
                ("out",),
                elements=4 * sum(lengths) * hidden,
                words=len(lengths) + 1,
            )


def _packed_attention_arguments(lengths: tuple[int, ...], hidden: int, heads: int, causal: bool) -> Arguments:
    random = _seeded(*lengths, hidden, heads)
    return {
        "qkv": 2 * _floats(random, sum(lengths), 3 * hidden),
        "starts": np.cumsum([0, *lengths]).astype(np.int32),
        "heads": heads,
        "causal": causal,
        "out": _empty(sum(lengths), hidden),
    }


def _decode_attention() -> Iterator[Case]:
    shapes = (
        *((1, 64, 4, 1), (7, 64, 64, 19), (19, 1000, 8, 99), (99, 768, 12, 40), (8, 64, 1, 257)),
        *((33, 128, 2, 70), (5, 64, 1, 40)),
    )
    for rows, hidden, heads, steps in shapes:
        build = partial(_decode_attention_arguments, rows, hidden, heads, steps)
        pasts = int(_decode_lengths(_seeded(rows, steps), rows, steps).sum())
        nobody = rows + 3
        yield Case(
            f"{rows} rows {hidden}/{heads} past {steps}",
            "decode_attention",
            build,
            ("out", "keys", "values", "ancestors"),
            elements=(2 * pasts + 6 * rows) * hidden,
            words=pasts + 3 * rows,
            undefined={"out": slice(rows, None), "keys": nobody, "values": nobody, "ancestors": nobody},
        )


def _decode_lengths(random: np.random.Generator, rows: int, steps: int) -> Array:
    """Tokens in the past of each row; one past is empty and one as long as can be."""
    lengths = random.integers(0, steps, rows)
    lengths[0], lengths[-1] = 0, steps - 1
    return lengths


def _decode_attention_arguments(rows: int, hidden: int, heads: int, steps: int) -> Arguments:
    random = _seeded(rows, hidden, heads, steps)
    slots, lanes, used = _seat(random, [1] * rows)
    own = [lane for (lane,) in lanes]
    slots["width"][own], slots["length"][own] = 1, _decode_lengths(_seeded(rows, steps), rows, steps)
    # A lane's past lies anywhere, as after many reorders; nobody's lane is nobody's past. No row may read what another
    # one writes in the same step: such steps lie in a lane that no row has.
    ancestors = random.integers(0, slots.size - 1, (slots.size, steps)).astype(np.int32)
    written = np.full(slots.size, -1)
    written[used] = slots["length"][used]
    ancestors[written[ancestors] == np.arange(steps)] = np.setdiff1d(np.arange(slots.size), used)[0]
    return {
        "qkv": 2 * _floats(random, used.size, 3 * hidden),
        "rows": used,
        "slots": slots,
        "ancestors": ancestors,
        "keys": _floats(random, slots.size, steps, hidden),
        "values": _floats(random, slots.size, steps, hidden),
        "heads": heads,
        "out": _empty(used.size, hidden),
    }


# (beams, source tokens) of each sequence, hidden, heads
SOURCES = (
    (((1, 1),), 64, 4),
    (((4, 19), (1, 257), (16, 7)), 768, 12),
    (((3, 99), (5, 1), (1, 40)), 1000, 8),
    (((2, 7), (2, 3)), 64, 64),
    (((9, 33), (17, 64), (1, 200)), 128, 2),
    (((4, 9), (2, 33)), 64, 1),
)


def _cross_attention() -> Iterator[Case]:
    for sequences, hidden, heads in SOURCES:
        rows = sum(width for width, _ in sequences)
        yield Case(
            f"{'+'.join(f'{width}x{length}' for width, length in sequences)} {hidden}/{heads}",
            "cross_attention",
            partial(_cross_attention_arguments, sequences, hidden, heads),
            ("out",),
            elements=2 * hidden * (rows + sum(length for _, length in sequences)),
            words=2 * rows,
        )
    yield Case(
        "targets 5+3+1 rows 64/2",
        "cross_attention",
        partial(_targets_arguments, (5, 3, 1), 64, 2),
        ("out",),
        elements=2 * 64 * (9 + 19 + 40 + 1),
        words=2 * 9,
    )


def _targets_arguments(targets: tuple[int, ...], hidden: int, heads: int) -> Arguments:
    """Rows of one target each have its one slot, as when targets are scored."""
    arguments = _cross_attention_arguments(((1, 19), (1, 40), (1, 1)), hidden, heads)
    own = arguments["rows"][arguments["slots"]["width"][arguments["rows"]] > 0]
    nobody = [slot for slot in arguments["rows"] if slot not in own]
    rows = np.array([*np.repeat(own, targets), *nobody], np.int32)
    random = _seeded(*targets)
    return arguments | {
        "rows": rows,
        "query": 2 * _floats(random, rows.size, hidden),
        "out": _empty(rows.size, hidden),
    }


def _cross_attention_arguments(sequences: tuple[tuple[int, int], ...], hidden: int, heads: int) -> Arguments:
    random = _seeded(len(sequences), hidden, heads)
    slots, lanes, used = _seat(random, [width for width, _ in sequences])
    for method, own, (width, length) in zip((SEARCH, SAMPLE, FAN_OUT), lanes, sequences):
        slots["method"][own], slots["width"][own], slots["beam"][own] = method, width, range(width)
        slots["memory"][own], slots["memory_length"][own] = own[0], length
    steps = max(length for _, length in sequences)
    return {
        "query": 2 * _floats(random, used.size, hidden),
        "rows": used,
        "slots": slots,
        "keys": _floats(random, slots.size, steps, hidden),
        "values": _floats(random, slots.size, steps, hidden),
        "heads": heads,
        "out": _empty(used.size, hidden),
    }


def _store() -> Iterator[Case]:
    for rows, hidden, layers in ((1, 64, 1), (19, 768, 3), (99, 1000, 1)):
        yield Case(
            f"{rows}x{hidden} of {layers} layers",
            "store",
            partial(_store_arguments, rows, hidden, layers),
            ("keys", "values"),
            elements=4 * rows * hidden * layers,
            words=2 * rows,
        )


def _store_arguments(rows: int, hidden: int, layers: int) -> Arguments:
    random = _seeded(rows, hidden)
    places = random.permutation(5 * 99)[:rows]
    return {
        "key_values": _floats(random, rows, layers * 2 * hidden),
        "lanes": (places // 99).astype(np.int32),
        "steps": (places % 99).astype(np.int32),
        "keys": _floats(random, layers, 5, 99, hidden),
        "values": _floats(random, layers, 5, 99, hidden),
    }


# The vocabulary ------------------------------------------------------------------------------------------------------

HEADS = (
    Shape(1, 64, 257),
    Shape(7, 768, 1000, transposed=True, bias=False),
    Shape(19, 1000, 257),
    Shape(99, 64, 30016, transposed=True, bias=False),
    Shape(40, 1024, 500),
    Shape(70, 256, 50257),
)  # with a bias: a Transformer, whose logits are scaled; without: a GPT


def _vocabulary() -> Iterator[Case]:
    for shape in HEADS:
        rows, hidden, vocabulary = shape[:3]
        moved = rows * hidden + hidden * vocabulary + vocabulary * shape.bias + 2 * hidden
        yield Case(
            str(shape),
            "vocabulary_logits",
            partial(_vocabulary_logits_arguments, shape),
            ("normed", "logits"),
            elements=moved + rows * hidden,
            words=rows * vocabulary,
            float32=frozenset({"logits"}),
            tolerance=WIDE if hidden > 1000 else TOLERANCE,
            folds=True,
        )
        yield Case(
            str(shape),
            "vocabulary_scores",
            partial(_vocabulary_scores_arguments, shape),
            ("out",),
            elements=moved,
            words=2 * rows,
            float32=frozenset({"logits", "out"}),
            folds=True,
        )
        for width, banned in ((1, -1), (4, vocabulary - 3), (16, -1)):
            yield Case(
                f"{shape} beams {width}" + (f" without {banned}" if banned >= 0 else ""),
                "vocabulary_search",
                partial(_vocabulary_search_arguments, shape, width, banned),
                ("slots", "ancestors", "history", "details"),
                elements=moved,
                words=2 * rows * SLOT.itemsize // 4,
                float32=frozenset({"logits", "log_probabilities", "details"}),
                folds=True,
            )


def _scores_of_many() -> Iterator[Case]:
    """With work space for some of the rows."""
    for shape in (
        Shape(19, 64, 257),
        Shape(300, 128, 1000, transposed=True, bias=False),  # kernels/warpgroup_scores.cu's, on Hopper
        Shape(700, 64, 257, transposed=True),
    ):
        rows, hidden, vocabulary = shape[:3]
        yield Case(
            f"{shape} in parts",
            "vocabulary_scores",
            partial(_scores_of_many_arguments, shape),
            ("out",),
            elements=rows * hidden + hidden * vocabulary + vocabulary * shape.bias + 2 * hidden,
            words=2 * rows,
            float32=frozenset({"logits", "out"}),
            folds=True,
        )


def _scores_of_many_arguments(shape: Shape) -> Arguments:
    arguments = _vocabulary_scores_arguments(shape)
    return {**arguments, "logits": arguments["logits"][: shape.rows // 2]}


def _vocabulary_without_norm() -> Iterator[Case]:
    for shape in (Shape(7, 64, 257), Shape(40, 768, 1000, transposed=True, bias=False)):
        rows, hidden, vocabulary = shape[:3]
        yield Case(
            f"{shape} without a norm",
            "vocabulary_logits",
            partial(_vocabulary_without_norm_arguments, shape),
            ("normed", "logits"),
            elements=rows * hidden + hidden * vocabulary + vocabulary * shape.bias,
            words=rows * vocabulary,
            float32=frozenset({"logits"}),
            folds=True,
        )


def _vocabulary_without_norm_arguments(shape: Shape) -> Arguments:
    return {**_vocabulary_logits_arguments(shape), "norm": None}


def _vocabulary_logits_arguments(shape: Shape) -> Arguments:
    random = _seeded(*shape[:3])
    scale = float(shape.narrow**-0.5) if shape.bias else 1.0
    weight, bias = shape.weight(random)
    return {
        "x": 3 * _floats(random, shape.rows, shape.narrow),
        "norm": _norm(random, shape.narrow),
        "output": Linear(weight * np.float32(1 / scale), bias),
        "epsilon": 1e-12,
        "scale": scale,
        "normed": _empty(shape.rows, shape.narrow),
        "logits": _empty(shape.rows, shape.wide),
    }


def _vocabulary_scores_arguments(shape: Shape) -> Arguments:
    targets = _seeded(*shape[:3], 1).integers(0, shape.wide, shape.rows).astype(np.int32)
    return {**_vocabulary_logits_arguments(shape), "targets": targets, "out": _empty(shape.rows)}


def _vocabulary_search_arguments(shape: Shape, width: int, banned: int) -> Arguments:
    """At least shape.rows rows, of sequences that have that many beams, one of them narrower."""
    widths = [width] * -(-shape.rows // width)
    widths[-1] = max(1, width - 1)
    state = _search_state([Searching(own) for own in widths], _seeded(*shape[:3], width))
    head = _vocabulary_logits_arguments(shape._replace(rows=state["rows"].size))
    return {**head, "banned": banned, **_room_for_best(state["rows"].size, width), **state}


def _room_for_best(rows: int, count: int) -> Arguments:
    return {"ids": np.full((rows, count), -7, np.int32), "log_probabilities": _empty(rows, count)}


LOGITS: dict[str, Callable[[Array], Array]] = {
    "": lambda logits: logits,
    "ties": np.round,
    "all equal": lambda logits: np.full_like(logits, 1.5),
    "extreme": lambda logits: logits * np.float32(1e4),
    "best first": lambda logits: -np.sort(-logits, axis=1),
}


def _top() -> Iterator[Case]:
    for rows, vocabulary, count, banned, kind in (
        (1, 1, 1, -1, ""),
        (7, 19, 19, -1, ""),
        (7, 19, 18, 5, ""),
        (7, 257, 16, -1, "ties"),
        (7, 257, 4, 254, "all equal"),
        (19, 1000, 1, -1, "extreme"),
        (19, 1000, 5, 0, "best first"),
        (99, 30016, 4, 30013, "ties"),
        (7, 30016, 32, -1, ""),
    ):
        yield Case(
            f"{count} of {rows}x{vocabulary}" + (f" without {banned}" if banned >= 0 else "") + f" {kind}".rstrip(),
            "top",
            partial(_top_arguments, rows, vocabulary, count, banned, kind),
            ("ids", "log_probabilities"),
            words=rows * (vocabulary + 2 * count),
            float32=frozenset({"logits", "log_probabilities"}),
        )


def _top_arguments(rows: int, vocabulary: int, count: int, banned: int, kind: str) -> Arguments:
    logits = LOGITS[kind](4 * _floats(_seeded(rows, vocabulary, count), rows, vocabulary))
    if banned >= 0:
        logits[: rows // 2, banned] = 40  # it would win, and it counts in the normalisation
    return {"logits": logits, "banned": banned, **_room_for_best(rows, count)}


def _target_log_probabilities() -> Iterator[Case]:
    for rows, vocabulary, kind in ((1, 1, ""), (7, 257, "extreme"), (19, 1000, ""), (99, 30016, "")):
        yield Case(
            f"{rows}x{vocabulary} {kind}".strip(),
            "target_log_probabilities",
            partial(_target_arguments, rows, vocabulary, kind),
            ("out",),
            words=rows * (vocabulary + 2),
            float32=frozenset({"logits", "out"}),
        )


def _target_arguments(rows: int, vocabulary: int, kind: str) -> Arguments:
    random = _seeded(rows, vocabulary)
    return {
        "logits": LOGITS[kind](4 * _floats(random, rows, vocabulary)),
        "targets": random.integers(0, vocabulary, rows).astype(np.int32),
        "out": _empty(rows),
    }


# Decoding ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Searching:
    """A sequence in the middle of a search. behind: what its beams have lost so far, about; more: further end ids."""

    width: int
    generated: int = 3
    limit: int = 99
    method: int = SEARCH
    penalty: float = 0.6
    diverse_lambda: float = 0.0
    finished: tuple[int, ...] = ()
    done: bool = False
    behind: float = 2.0
    detailed: bool = False
    more: tuple[int, ...] = ()


SEARCHES: dict[str, list[Searching]] = {
    "one beam": [Searching(1)],
    "first step": [Searching(4, generated=0), Searching(16, generated=0, penalty=1.0)],
    "some finished": [Searching(4, finished=(0, 2)), Searching(5, finished=(4,), penalty=0.0)],
    "all but one finished": [Searching(4, finished=(0, 1, 2))],
    "finished ones far behind": [Searching(4, finished=(0, 1), behind=500), Searching(3, finished=(2,), behind=300)],
    "negative penalty": [Searching(4, finished=(1,), penalty=-1.0)],
    "at the limit": [Searching(2, generated=6, limit=7), Searching(3, generated=5, limit=7)],
    "done": [Searching(4, done=True, finished=(0, 1, 2, 3)), Searching(2)],
    "fan out": [Searching(4, generated=0, method=FAN_OUT), Searching(4, method=FAN_OUT, finished=(3,))],
    "diverse": [Searching(4, diverse_lambda=0.7, finished=(1,)), Searching(3, diverse_lambda=2.0, generated=0)],
    "detailed": [Searching(4, finished=(0, 2), detailed=True), Searching(3, generated=0, detailed=True), Searching(2)],
    "several end ids": [
        Searching(4, more=tuple(range(3, 10)), finished=(1,)),
        Searching(3, generated=0, more=tuple(range(10, 16))),
        Searching(2, finished=(0,), more=(4,), detailed=True),
        Searching(1, more=(20, 21)),
    ],
    "many": [Searching(1 + i % 16, generated=i % 7, penalty=i / 10, detailed=i % 2 > 0) for i in range(19)],
}


def _beam_step() -> Iterator[Case]:
    for name, searches in SEARCHES.items():
        rows = sum(search.width for search in searches)
        texts = sum(search.width * 2 * (2 * search.generated + 2) for search in searches)
        # LightSeq sorts the beams of a diverse search 2000 apart and keeps the rounding.
        tolerance = 1e-3 if name == "diverse" else TOLERANCE["float32"]
        yield Case(
            name,
            "beam_step",
            partial(_beam_step_arguments, name),
            ("slots", "ancestors", "history", "details"),
            words=sum(2 * search.width**2 for search in searches) + texts + 2 * rows * SLOT.itemsize // 4,
            float32=frozenset({"log_probabilities", "details"}),
            tolerance=dict.fromkeys(TOLERANCE, tolerance),
        )


def _beam_step_arguments(name: str) -> Arguments:
    searches = SEARCHES[name]
    random = _seeded(name, len(searches))
    state = _search_state(searches, random)
    count, rows = max(search.width for search in searches) + 2, state["rows"].size
    return {
        **state,
        "ids": np.stack([random.permutation(31)[:count] for _ in range(rows)]).astype(np.int32),
        "log_probabilities": -np.sort(random.exponential(3, (rows, count)).astype(np.float32), axis=1),
    }


def _search_state(searches: list[Searching], random: np.random.Generator) -> Arguments:
    slots, lanes, used = _seat(random, [search.width for search in searches])
    for own, search in zip(lanes, searches):
        _begin(slots, own, search, random)
    steps = 12
    return {
        "rows": used,
        "slots": slots,
        "ancestors": random.integers(0, slots.size - 1, (slots.size, steps)).astype(np.int32),
        "history": random.integers(3, 31, (slots.size, steps)).astype(np.int32),
        "details": _floats(random, slots.size, steps),
    }


def _begin(slots: Array, own: list[int], search: Searching, random: np.random.Generator) -> None:
    width = search.width
    slots["method"][own], slots["beam"][own], slots["width"][own] = search.method, range(width), width
    slots["generated"][own], slots["length"][own] = search.generated, search.generated + 1
    slots["limit"][own], slots["end_id"][own], slots["done"][own] = search.limit, 2, search.done
    slots["length_penalty"][own], slots["diverse_lambda"][own] = search.penalty, search.diverse_lambda
    totals = (
        -random.exponential(2, width) - search.behind if search.generated else np.array([0.0, *[-1000.0] * (width - 1)])
    )
    slots["log_probability"][own] = totals
    slots["score"][own] = totals / 2 if search.behind < 100 else totals - 99
    slots["finished"][[own[beam] for beam in search.finished]] = 1
    slots["detailed"][own] = search.detailed
    slots["more"][own], slots["more_ends"][own, : len(search.more)] = len(search.more), search.more
    slots["looked_at"][own] = ranks(width, len(search.more)) if search.method == STANDARD else width


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
    detailed: bool = False
    more: tuple[int, ...] = ()


SAMPLINGS: dict[str, list[Sampling]] = {
    "whole distribution": [Sampling(1), Sampling(4, seed=2**63 - 1, stream=3 * 65536)],
    "top_k": [Sampling(1, top_k=1), Sampling(3, top_k=5), Sampling(2, top_k=10_000)],
    "top_p": [Sampling(1, top_p=1e-6), Sampling(3, top_p=0.5), Sampling(2, top_p=0.95, top_k=7)],
    "temperature": [Sampling(2, temperature=0.001), Sampling(2, temperature=3.0), Sampling(2, temperature=1000.0)],
    "finished": [Sampling(3, finished=(1,)), Sampling(1, generated=6, limit=7), Sampling(2, done=True)],
    "detailed": [Sampling(3, finished=(1,), detailed=True), Sampling(1)],
    "several end ids": [
        Sampling(4, more=tuple(range(3, 10)), finished=(2,)),
        Sampling(2, more=tuple(range(10, 17)), seed=6),
        Sampling(3, more=(18,), finished=(0, 1)),
    ],
}


def _sample_step() -> Iterator[Case]:
    for vocabulary, banned in ((19, -1), (1000, 997)):
        for name, samplings in SAMPLINGS.items():
            rows = sum(sampling.width for sampling in samplings)
            yield Case(
                f"{name} of {vocabulary}",
                "sample_step",
                partial(_sample_step_arguments, name, vocabulary, banned),
                ("slots", "history", "details"),
                words=rows * (vocabulary + 2 * SLOT.itemsize // 4),
                float32=frozenset({"logits", "details"}),
                tolerance=dict.fromkeys(TOLERANCE, TOLERANCE["float32"]),
            )


def _sample_step_arguments(name: str, vocabulary: int, banned: int) -> Arguments:
    samplings = SAMPLINGS[name]
    random = _seeded(name, len(samplings), vocabulary)
    slots, lanes, used = _seat(random, [sampling.width for sampling in samplings])
    for own, one in zip(lanes, samplings):
        search = Searching(
            one.width, one.generated, one.limit, SAMPLE,
            finished=one.finished, done=one.done, detailed=one.detailed, more=one.more,
        )  # fmt: skip
        _begin(slots, own, search, random)
        slots["seed"][own], slots["stream"][own] = one.seed, one.stream + np.arange(one.width)
        slots["top_k"][own], slots["top_p"][own], slots["temperature"][own] = one.top_k, one.top_p, one.temperature
    logits = 4 * _floats(random, used.size, vocabulary)
    if banned >= 0:
        logits[::2, banned] = 40  # it would win
    return {
        "rows": used,
        "slots": slots,
        "history": random.integers(3, 19, (slots.size, 12)).astype(np.int32),
        "details": _floats(random, slots.size, 12),
        "logits": logits,
        "banned": banned,
    }


@dataclass(frozen=True)
class Standard:
    """A sequence in the middle of a standard search. pooled: scores of the hypotheses it has, by place.

    ends: beams that end first of all; behind: what the beams have lost so far, about; more: further end ids, with which
    the same beams would end next.
    """

    width: int
    generated: int = 3
    limit: int = 99
    penalty: float = 1.0
    stopping: int = UNTIL_NO_BETTER
    counted: int = 0
    pooled: tuple[tuple[int, float], ...] = ()
    ends: tuple[int, ...] = ()
    done: bool = False
    detailed: bool = True
    behind: float = 2.0
    more: tuple[int, ...] = ()


MORE = tuple(range(50, 58))
STANDARDS: dict[str, list[Standard]] = {
    "one beam": [Standard(1, stopping=UNTIL_FULL), Standard(1, stopping=UNTIL_FULL, ends=(0,))],
    "first step": [Standard(4, generated=0), Standard(16, generated=0, ends=(0,)), Standard(3, generated=0, counted=1)],
    "some end": [Standard(4, ends=(0, 2)), Standard(5, ends=(0, 1, 2, 3, 4), penalty=0.0), Standard(2, ends=(1,))],
    "full pool": [
        Standard(3, pooled=((0, -0.4), (1, -5.0), (2, -0.3)), ends=(0, 1)),
        Standard(2, pooled=((0, -90.0), (1, -80.0)), ends=(0, 1), penalty=2.0),
    ],
    "ends when full": [
        Standard(2, pooled=((1, -0.9),), ends=(0,), stopping=UNTIL_FULL),
        Standard(3, pooled=((2, -0.9),), ends=(0,), stopping=UNTIL_FULL),
    ],
    "ends when none is better": [
        Standard(2, pooled=((0, -0.1), (1, -0.2)), behind=9.0),
        Standard(2, pooled=((0, -0.1), (1, -0.2)), behind=9.0, stopping=UNTIL_NONE_CAN_BE, limit=12, counted=1),
        Standard(2, pooled=((0, -0.1), (1, -0.2)), behind=9.0, stopping=UNTIL_NONE_CAN_BE, penalty=-1.0),
    ],
    "at the limit": [Standard(4, generated=6, limit=7, ends=(1,)), Standard(2, generated=4, limit=7, counted=2)],
    "done": [Standard(4, done=True), Standard(2, detailed=False)],
    "several end ids": [
        Standard(4, more=MORE, ends=(0, 1, 2, 3)),
        Standard(1, more=MORE, ends=(0,), stopping=UNTIL_FULL),
        Standard(3, more=MORE[:2], ends=(1, 2), pooled=((0, -0.4), (2, -9.0))),
        Standard(16, more=MORE, ends=(2, 5)),
        Standard(2, more=MORE[:1], generated=6, limit=7),
    ],
    "without details": [Standard(3, detailed=False, ends=(0, 1)), Standard(2, ends=(0, 1))],
    "many": [
        Standard(1 + i % 16, generated=i % 7, penalty=i / 10 - 0.5, stopping=i % 3, ends=(0, 1)[: i % 3])
        for i in range(19)
    ],
}


def _standard_step() -> Iterator[Case]:
    for name, searches in STANDARDS.items():
        rows = sum(search.width for search in searches)
        texts = sum(search.width * 2 * (4 * search.generated + 2) for search in searches)
        yield Case(
            name,
            "standard_step",
            partial(_standard_step_arguments, name),
            ("slots", "ancestors", "history", "details", "pool", "pool_details"),
            words=sum(4 * search.width**2 for search in searches) + texts + 2 * rows * SLOT.itemsize // 4,
            float32=frozenset({"log_probabilities", "details", "pool_details"}),
            tolerance=dict.fromkeys(TOLERANCE, TOLERANCE["float32"]),
        )


def _standard_step_arguments(name: str) -> Arguments:
    searches = STANDARDS[name]
    random = _seeded(name, len(searches), 1)
    state = _standard_state(searches, random)
    count = max(ranks(search.width, len(search.more)) for search in searches)
    rows = state["rows"].size
    ids = np.stack([3 + random.permutation(40)[:count] for _ in range(rows)]).astype(np.int32)
    first = 0
    for search in searches:
        for beam in search.ends:
            ids[first + beam, : 1 + len(search.more)] = 2, *search.more
        first += search.width
    chances = -np.sort(random.exponential(3, (rows, count)).astype(np.float32), axis=1)
    return {**state, "ids": ids, "log_probabilities": chances}


def _standard_state(searches: Sequence[Standard], random: np.random.Generator) -> Arguments:
    slots, lanes, used = _seat(random, [search.width for search in searches])
    for own, search in zip(lanes, searches):
        begun = Searching(search.width, search.generated, search.limit, STANDARD, search.penalty, more=search.more)
        _begin(slots, own, begun, random)
        slots["score"][own] = 0
        slots["log_probability"][own] -= search.behind if search.generated else 0
        slots["stopping"][own], slots["counted"][own] = search.stopping, search.counted
        slots["detailed"][own], slots["done"][own] = search.detailed, search.done
        slots["pool_score"][own] = EMPTY
        for place, score in search.pooled:
            slots["pool_score"][own[place]], slots["pool_length"][own[place]] = score, 2
    steps = 12
    integers = {name: random.integers(3, 31, (slots.size, steps)).astype(np.int32) for name in ("history", "pool")}
    floats = {name: _floats(random, slots.size, steps) for name in ("details", "pool_details")}
    ancestors = random.integers(0, slots.size - 1, (slots.size, steps)).astype(np.int32)
    return {"rows": used, "slots": slots, "ancestors": ancestors, **integers, **floats}


def _vocabulary_standard_search() -> Iterator[Case]:
    for shape in HEADS:
        for width, banned in ((1, -1), (4, shape.wide - 3), (16, -1)):
            rows = shape.rows + width
            yield Case(
                f"{shape} beams {width}" + (f" without {banned}" if banned >= 0 else ""),
                "vocabulary_standard_search",
                partial(_vocabulary_standard_search_arguments, shape, width, banned),
                ("slots", "ancestors", "history", "details", "pool", "pool_details"),
                elements=rows * shape.narrow + shape.narrow * shape.wide,
                words=2 * rows * SLOT.itemsize // 4,
                float32=frozenset({"logits", "log_probabilities", "details", "pool_details"}),
                folds=True,
            )


def _vocabulary_standard_search_arguments(shape: Shape, width: int, banned: int) -> Arguments:
    """At least shape.rows rows, of sequences that have that many beams, one of them narrower."""
    widths = [width] * -(-shape.rows // width)
    widths[-1] = max(1, width - 1)
    more = tuple(range(3, 10)) if width == 4 else ()
    state = _standard_state([Standard(own, more=more) for own in widths], _seeded(*shape[:3], width, 1))
    head = _vocabulary_logits_arguments(shape._replace(rows=state["rows"].size))
    return {**head, "banned": banned, **_room_for_best(state["rows"].size, ranks(width, len(more))), **state}


@dataclass(frozen=True)
class Ruled:
    """A sequence whose rows have rules. context: what it has read; listed: suppressed, suppressed first, words."""

    width: int = 2
    method: int = STANDARD
    generated: int = 4
    limit: int = 99
    context: tuple[int, ...] = (1,)
    penalty: float = 1.0
    no_repeat: int = 0
    least: int = 0
    forced_end: int = -1
    suppressed: tuple[int, ...] = ()
    first: tuple[int, ...] = ()
    words: tuple[tuple[int, ...], ...] = ()
    done: bool = False
    ruled: bool = True
    more: tuple[int, ...] = ()


LONG = tuple(3 + i * i % 7 for i in range(1100))  # more tokens than a block has threads
RULED: dict[str, list[Ruled]] = {
    "no rules": [Ruled(ruled=False), Ruled(1, done=True, penalty=2.0)],
    "repetition": [Ruled(penalty=1.5), Ruled(3, penalty=0.5, context=(4, 4, -1, 5)), Ruled(1, penalty=1.5)],
    "repetition when sampling": [Ruled(2, SAMPLE, penalty=3.0, context=(5, 6, 7))],
    "long repetition": [Ruled(2, penalty=1.7, context=LONG, no_repeat=4)],
    "n-grams": [Ruled(no_repeat=1), Ruled(4, no_repeat=2, context=(3, 4, 3)), Ruled(1, no_repeat=3, generated=9)],
    "n-grams longer than the past": [Ruled(no_repeat=6), Ruled(no_repeat=5), Ruled(no_repeat=2**31 - 1)],
    "words": [Ruled(words=((5,), (3, 4), (4, 3), (1, 3, 3, 3, 3, 8), (9, 9, 9, 9, 9, 9, 9))), Ruled(generated=0)],
    "lengths": [Ruled(least=5), Ruled(least=4), Ruled(forced_end=7, limit=5), Ruled(forced_end=7, limit=6)],
    "lengths of several end ids": [Ruled(least=5, more=(3, 18)), Ruled(least=4, more=(3, 18))],
    "suppressed": [Ruled(suppressed=(0, 5, 18), first=(6, 7)), Ruled(generated=0, suppressed=(4,), first=(6, 7, 8))],
    "all together": [
        Ruled(3, penalty=1.3, no_repeat=2, least=9, forced_end=5, limit=5, suppressed=(4,), first=(6,), words=((3,),)),
        Ruled(2, generated=0, penalty=0.9, least=1, first=(6,), words=((1, 7), (3,)), suppressed=(9, 10)),
    ],
}


def _apply_rules() -> Iterator[Case]:
    for name, sequences in RULED.items():
        for vocabulary in (19, 1003):
            yield Case(
                f"{name} of {vocabulary}",
                "apply_rules",
                partial(_apply_rules_arguments, name, vocabulary),
                ("logits", "normalisations"),
                words=vocabulary * sum(one.width for one in sequences if one.ruled and not one.done),
                float32=frozenset({"logits", "normalisations"}),
                undefined={"normalisations": _without_rules(sequences)},
                tolerance=dict.fromkeys(TOLERANCE, TOLERANCE["float32"]),
            )


def _without_rules(sequences: Sequence[Ruled]) -> Array:
    """Which rows have none, those of nobody included."""
    none = [not one.ruled or one.done for one in sequences for _ in range(one.width)]
    return np.array([*none, *[True] * (-len(none) % 8)])


def _apply_rules_arguments(name: str, vocabulary: int) -> Arguments:
    sequences = RULED[name]
    random = _seeded(name, len(sequences), vocabulary)
    slots, lanes, used = _seat(random, [one.width for one in sequences])
    steps, room = 1200, 40
    contexts, listed = np.full((slots.size, steps), 2, np.int32), np.full((slots.size, room), 2, np.int32)
    rules = np.zeros(slots.size, RULES)
    for own, one in zip(lanes, sequences):
        begun = Searching(one.width, one.generated, one.limit, one.method, done=one.done, more=one.more)
        _begin(slots, own, begun, random)
        slots["ruled"][own] = one.ruled
        numbers = [*one.suppressed, *one.first, *(number for word in one.words for number in (len(word), *word))]
        contexts[own[0], : len(one.context)], listed[own[0], : len(numbers)] = one.context, numbers
        rules[own[0]] = (
            one.penalty, one.no_repeat, one.least, one.forced_end,
            len(one.context), len(one.suppressed), len(one.first), len(one.words),
        )  # fmt: skip
    return {
        "rows": used,
        "slots": slots,
        "rules": rules,
        "listed": listed,
        "contexts": contexts,
        "history": random.integers(3, 6, (slots.size, steps)).astype(np.int32),
        "logits": 4 * _floats(random, used.size, vocabulary),
        "normalisations": np.zeros(used.size, np.float32),
    }


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
    _scores_of_many,
    _vocabulary_without_norm,
    _top,
    _target_log_probabilities,
    _beam_step,
    _sample_step,
    _standard_step,
    _vocabulary_standard_search,
    _apply_rules,
)
