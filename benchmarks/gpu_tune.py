"""Shapes of the products of few rows of a model: which make a whole decode step shortest.

    python -m benchmarks.gpu_tune [--models big,base,gpt2] [--precision fp16] [--processes 8] [--seconds 600]

One product after the other is given every shape there is while the others keep theirs, until none is better: how a
kernel does by itself says little, since the next one's weights come while it runs. Split and warps, which make the
order of a sum, are the same for any number of rows; the other parts of a shape are chosen for each. What is printed at
the end belongs into lightseq_backend/ops/linear_shapes.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product as combinations
from typing import NamedTuple

from benchmarks import gpu_device, gpu_engine, gpu_models
from benchmarks.gpu_engine import Decoding
from benchmarks.gpu_models import MODELS, Model
from benchmarks.gpu_timing import device_seconds
from lightseq_backend.ops import linear_launch, warpgroup_launch
from lightseq_backend.ops.linear_launch import Device, Plan
from lightseq_backend.ops.linear_shapes import BY_DEVICE, MOST_ROWS, Product, Shape, Shapes, Table

ROWS = (1, 4, 8, 16, 32, 64, 128)  # that steps are measured with, where a model has such batches
GAIN = 0.001  # of a step; what is less is none
Seconds = Callable[[int], float]  # that a step of so many rows takes; inf where it cannot be launched
_REGISTERS = 64 * 1024  # of a multiprocessor
_REPLAYS, _SAMPLES = 8, 6


class Numbers(NamedTuple):
    """What a product computes with. registers: of a lane, for the weights of a chunk and sixteen outputs."""

    half: bool
    int8: bool
    registers: int

    @property
    def bits(self) -> int:
        return linear_launch.weight_bits(self.half, self.int8)


PRECISIONS = {"fp16": Numbers(True, False, 8), "fp32": Numbers(False, False, 8), "int8": Numbers(True, True, 4)}


class Part(NamedTuple):
    """A product of a layer, and the Activation of kernels/common.cuh behind it."""

    name: str
    product: Product
    activation: int


def main() -> None:
    made = argparse.ArgumentParser("python -m benchmarks.gpu_tune", description=__doc__)
    made.formatter_class = argparse.RawTextHelpFormatter
    made.add_argument("--models", default="big,base,gpt2", help="names with commas between")
    made.add_argument("--precision", choices=PRECISIONS, default="fp16")
    made.add_argument("--processes", type=int, default=8, help="that compile")
    made.add_argument("--seconds", type=float, default=600, help="after which a model has no further round")
    options = made.parse_args()
    gpu_device.require("cuda")
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for name in options.models.split(","):
            _tune(MODELS[name], options.precision, pool, options.seconds)
            gpu_device.release("cuda")


def parts(model: Model) -> Iterator[Part]:
    """Those of a decoder's layer; one of two that are alike."""
    hidden, inner = model.shape.hidden, model.shape.inner
    yield Part("queries, keys and values", (hidden, 3 * hidden, True), 0)
    yield Part("output of attention", (hidden, hidden, False), 0)
    if model.translates:
        yield Part("query of cross attention", (hidden, hidden, True), 0)
    yield Part("FFN 1", (hidden, inner, True), 1 if model.translates else 2)
    yield Part("FFN 2", (inner, hidden, False), 0)


class Search:
    """The shapes of `table` that make steps shortest."""

    def __init__(
        self, found: Iterable[Part], device: Device, numbers: Numbers, table: Table, rows: Iterable[int],
        seconds: Seconds,
    ):  # fmt: skip
        """rows: what steps are measured with, by `seconds`, which heeds what the table has."""
        self._device, self._numbers, self._table = device, numbers, table
        self._counts, self._seconds = list(rows), seconds
        self.parts = {part: list(self._shapes(part)) for part in found}
        self._first = {count: seconds(count) for count in self._counts}

    def builds(self) -> list[tuple[tuple[str, int], ...]]:
        """Definitions of every kernel that may be launched."""
        found = set()
        for part in self.parts:
            for most in {min(most, 32) for most in self._classes(part)}:
                for shape in self._fitting(part, most):
                    made = {
                        **dict(self._plan(part, most, shape).definitions),
                        "FOURS": 1,
                        "ACTIVATION": part.activation,
                    }
                    found.add(tuple(sorted(made.items())))
        return sorted(found)

    def go_round(self) -> bool:
        """Tries every shape of every product; whether one became better."""
        improved = [self._improve(part) for part in self.parts]
        return any(improved)

    def _improve(self, part: Part) -> bool:
        """The best order of a sum and, for each number of rows, the best shape with it."""
        before, classes = self._table.get(part.product, {}), self._classes(part)
        limit = (1 - GAIN) * self._cost(classes)
        costs: dict[int, dict[Shape, float]] = {most: {} for most in classes}
        for most in classes:
            for shape in self._fitting(part, most):
                self._set(part, {**before, most: shape})
                costs[most][shape] = self._cost([most])
        self._set(part, before)
        best = before
        for order in {_order(shape) for shape in self.parts[part]}:
            fitting = {most: [shape for shape in costs[most] if _order(shape) == order] for most in classes}
            if not all(fitting.values()):
                continue
            chosen = {most: min(shapes, key=costs[most].__getitem__) for most, shapes in fitting.items()}
            total = sum(costs[most][shape] for most, shape in chosen.items())
            if total < limit:
                best, limit = chosen, total
        if best == before:
            return False
        limit = (1 - GAIN) * self._cost(classes)
        self._set(part, best)
        if self._cost(classes) < limit:  # once more: the least of dozens of times may be so by chance
            return True
        self._set(part, before)
        return False

    def _cost(self, classes: Iterable[int]) -> float:
        """Time of those classes' steps, each in parts of what it took at first."""
        counts = [self._rows(most) for most in classes]
        return sum(sum(self._seconds(count) / self._first[count] for count in of) / len(of) for of in counts)

    def _set(self, part: Part, shapes: Shapes) -> None:
        self._table.pop(part.product, None)
        if shapes:
            self._table[part.product] = shapes

    def _classes(self, part: Part) -> list[int]:
        """Those of linear_shapes.MOST_ROWS in which a step is measured and this product is linear.cu's, at the fewest
        rows at least."""
        inner, wide, norm = part.product
        measured = [most for most in MOST_ROWS if self._rows(most)]
        if self._numbers.int8:  # for which there is no other kernel
            return measured
        half = self._numbers.half
        grouped = warpgroup_launch.can(self._device, inner, wide, half)

        def is_its(rows: int) -> bool:
            if grouped and warpgroup_launch.pays(self._device, rows, inner, wide, norm):
                return False
            return linear_launch.pays(self._device, rows, inner, wide, half)

        return [most for most in measured if is_its(self._rows(most)[0])]

    def _rows(self, most: int) -> list[int]:
        least = max((other for other in MOST_ROWS if other < most), default=0)
        return [count for count in self._counts if least < count <= most]

    def _shapes(self, part: Part) -> Iterator[Shape]:
        inner, wide, _ = part.product
        half, each = self._numbers.half, self._numbers.registers
        chunks, found = linear_launch.chunks(inner, half), set()
        for outputs, split, warps, registers in combinations((32, 48, 64), (1, 2, 4, 8), (4, 8), (64, 96, 128)):
            blocks = split * -(-wide // outputs)
            if chunks % split or chunks < split * warps or not 30 <= blocks <= 2 * self._device.multiprocessors:
                continue
            all_of_it = linear_launch.share(Shape(outputs, split, warps, 0, False), inner, half)
            found.add((outputs, split, warps, min(all_of_it, registers // each // (outputs // 16))))
        yield from (Shape(*one, late) for one in sorted(found) for late in (False, True))

    def _fitting(self, part: Part, most: int) -> list[Shape]:
        """As far as can be said without compiling: registers (those of weights, sums and x, and some 60; compilers
        manage with a little fewer, of 255 at most) and shared memory beside that of another block."""
        rows = min(most, 32)

        def fits(shape: Shape) -> bool:
            tiles = shape.outputs // 16
            weights = self._numbers.registers * shape.depth * tiles
            registers = 60 + weights + tiles * rows // 2 + (32 if rows == 32 else 8)
            room = self._plan(part, rows, shape).shared <= self._device.shared // 2
            return room and registers <= min(280, _REGISTERS // (32 * shape.warps))

        return [shape for shape in self.parts[part] if fits(shape)]

    def _plan(self, part: Part, rows: int, shape: Shape) -> Plan:
        inner, wide, norm = part.product
        half, int8, _ = self._numbers
        return linear_launch.build(self._device, shape, rows, inner, wide, half, norm, True, int8)


def _order(shape: Shape) -> tuple[int, int]:
    return shape.split, shape.warps


def _tune(model: Model, precision: str, pool: ProcessPoolExecutor, seconds: float) -> None:
    begun, most, numbers = time.monotonic(), 128 if model.translates else 32, PRECISIONS[precision]
    counts = [count for count in ROWS if count % model.beams == 0 and count <= most]
    length = 24 if model.translates else gpu_models.PROMPT
    changes = {"max_new_tokens": length, **({"beam_size": gpu_models.BEAMS} if model.translates else {})}
    room = {"slots": most, "max_beam_size": gpu_models.BEAMS, "prompt_tokens": most * length}
    engine = gpu_engine.load(*gpu_models.build(model), "cuda", precision, **room).engine
    clock, device = gpu_device.clock(engine), gpu_engine.limits(engine)
    steps = {count: Decoding(engine, gpu_models.rows(model, count // model.beams, length), changes) for count in counts}

    def taken(rows: int, samples: int = _SAMPLES) -> float:
        step = steps[rows]
        try:
            step.capture_anew()
        except RuntimeError:  # more registers or shared memory than there are
            return float("inf")
        return device_seconds(
            clock, step.step, _REPLAYS, samples, lambda: step.rewind(step.generated - 2 - _REPLAYS // 2)
        )

    def say(what: str) -> None:
        times = "".join(f"  {count} rows {taken(count, 20) * 1e6:.1f} us" for count in counts)
        print(f"{time.monotonic() - begun:6.1f} s  {model.title}, {precision}, {what}:{times}", flush=True)

    table = BY_DEVICE.setdefault((device.capability, device.multiprocessors), {}).setdefault(numbers.bits, {})
    search = Search(parts(model), device, numbers, table, counts, taken)
    say("as it is")
    builds = search.builds()
    list(pool.map(_compile, builds, chunksize=4))
    print(f"{time.monotonic() - begun:6.1f} s  {len(builds)} kernels compiled", flush=True)
    while search.go_round() and time.monotonic() - begun < seconds:
        say("after a round")
    say("at last")
    for part in search.parts:
        print(f"    {part.product}: {{  # {model.title}: {part.name}")
        for rows, shape in table.get(part.product, {}).items():
            print(f"        {rows}: Shape{tuple(shape if shape.ahead else shape[:-1])},")
        print("    },", flush=True)


def _compile(definitions: tuple[tuple[str, int], ...]) -> None:
    """Leaves the kernel in CuPy's cache on disk."""
    from lightseq_backend.ops.launch import Kernel

    Kernel("linear", "linear", definitions)._handle  # noqa: B018


if __name__ == "__main__":
    main()
