"""The engine's parts, launched by themselves: the only module of the GPU benchmarks that reaches into the engine.

What is built here runs on the CPU as well (ops "cpu"), where it shows that the programs work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu_device import clock, clock_of
from benchmarks.gpu_timing import device_seconds
from lightseq_backend import ops
from lightseq_backend.config import Config, EngineConfig, TransformerConfig
from lightseq_backend.engine import Engine
from lightseq_backend.engine.graphs import SEARCHING, _step
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops.cpu import Folded
from lightseq_backend.request import SCORE, Request, Sequence
from lightseq_backend.serving.settings import BURSTS

Rows = Ordered[Any]  # rows of ids, each a sequence or an array


class Loaded(NamedTuple):
    """An engine and the seconds that its two halves took, from arrays in host memory."""

    engine: Engine
    model_seconds: float  # weights uploaded, folded and packed
    engine_seconds: float  # memory taken, kernels compiled or found compiled, graphs captured


def load(config: Config, arrays: dict[str, np.ndarray], device: str, precision: str, **room: int) -> Loaded:
    """room: fields of EngineConfig; a burst is as long as serving makes it."""
    backend = ops.load(device, 0, precision)
    start = time.perf_counter()
    make: Any = Transformer if isinstance(config, TransformerConfig) else Gpt
    model = make(config, arrays, backend)
    clock_of(backend).wait()
    middle = time.perf_counter()
    engine = Engine(model, EngineConfig(**{"burst": BURSTS[device], **room}), backend)
    return Loaded(engine, middle - start, time.perf_counter() - middle)


def another(engine: Engine, **room: int) -> Engine:
    """An engine with other room for the same model."""
    return Engine(engine.model, EngineConfig(**{"burst": engine.config.burst, **room}), engine._ops)


def limits(engine: Engine) -> Any:
    """The linear_launch.Device that launches are planned for."""
    return engine._ops._limits


# A decode step --------------------------------------------------------------------------------------------------------


class Decoding:
    """Sequences in the midst of decoding: caches and records as a real request left them, wound back and alive.

    The caches keep what the request wrote, so a step may be run from any of its lengths on. `rewind` says from which.
    """

    def __init__(self, engine: Engine, rows: Rows, changes: dict[str, object]):
        """Answers the rows, which all take the same number of steps, in slots 0, 1, ... of an idle engine."""
        engine.answer(rows, changes=changes)
        self.engine, self._backend = engine, engine._ops
        self.rows = len(rows) * engine.options(changes).width
        state = engine._buffers.state
        self._records = np.array(self._backend.fetch(state.slots)())[: self.rows]
        width = self._records["width"]
        assert (width > 0).all(), "the rows did not all decode at the same time"
        assert (self._records["beam"] == np.arange(self.rows) % width).all(), "the engine was not idle"
        self.generated = int(self._records["generated"].max())
        self._start = int(self._records["length"].max()) - (self.generated - 1)  # tokens before the first new one
        self.bucket = engine._steps.bucket(self.rows)
        self._lanes = np.full(self.bucket, engine.config.slots, np.int32)  # that of nobody
        self._lanes[: self.rows] = np.arange(self.rows)

    def rewind(self, generated: int, **fields: object) -> None:
        """The next step is the one that generates token number `generated`, from 0. fields: of SLOT, to overwrite."""
        records = self._records.copy()
        records["generated"], records["length"] = generated, self._start + generated
        records["done"] = records["finished"] = 0
        records["limit"] = self.engine.model.config.max_positions
        for name, value in fields.items():
            records[name] = value
        state = self.engine._buffers.state
        self._backend.put(state.rows[: self.bucket], self._lanes)
        self._backend.put(state.slots[: self.rows], records)

    def step(self) -> None:
        """Queues the captured step."""
        self.engine._steps.run(self.bucket, SEARCHING)

    def capture_anew(self) -> None:
        """With what the engine would launch now. RuntimeError: a kernel cannot be launched."""
        engine, key = self.engine, (self.bucket, SEARCHING)
        run = _step(engine.model, engine._buffers, self.bucket, SEARCHING, self._backend)
        engine._steps._graphs[key] = self._backend.capture(run)

    def history_entries(self, steps: int) -> int:
        """Different entries of one layer's cache that a step reads whose rows have `steps` steps behind them."""
        ancestors = np.asarray(self._backend.fetch(self.engine._buffers.cache.ancestors)())[: self.rows, :steps]
        return sum(len(set(column)) for column in ancestors.T.tolist())

    def cache_bytes(self, generated: int) -> int:
        """Keys and values that the step for token number `generated` reads, a shared entry once, over all layers."""
        config, size = self.engine.model.config, self._backend.FLOAT.itemsize
        entries = self.history_entries(self._start + generated)
        if isinstance(config, TransformerConfig):
            leads = self._records["beam"] == 0
            entries += int(self._records["memory_length"][leads].sum())
            return 2 * entries * config.hidden * size * config.decoder_layers
        return 2 * entries * config.hidden * size * config.layers


# Encoder, prompts, whole requests ------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """A pass over sequences: from what the host is given to the end, and the device's part, over the same again."""

    whole: Callable[[], Any]
    device: Callable[[], Any]


def reading(engine: Engine, rows: Rows, changes: dict[str, object]) -> Pass:
    """Sources or prompts into the caches, as `Engine._begin` does when it admits them."""
    options = engine.options(changes)
    requests = [Request(np.asarray(row), options, lambda result: None) for row in rows]
    sequences = [Sequence.of(request, engine.model.config) for request in requests]
    for i, sequence in enumerate(sequences):
        sequence.slots = list(range(i * options.width, (i + 1) * options.width))
    held_back = 0 if isinstance(engine.model.config, TransformerConfig) else 1
    read = [sequence.tokens[: len(sequence.tokens) - held_back] for sequence in sequences]
    size = engine._passes.size(sum(map(len, read)))
    return Pass(lambda: engine._read(sequences, read), lambda: engine._passes.prefill(size))


def scoring(engine: Engine, rows: Rows) -> Pass:
    """Perplexity of all rows, in one pass."""
    size = engine._passes.size(sum(map(len, rows)))
    return Pass(lambda: engine.answer(rows, SCORE), lambda: engine._passes.score(size))


def answer(engine: Engine, rows: Rows, changes: dict[str, object]) -> None:
    """A whole request, from submitting to the answer."""
    engine.answer(rows, changes=changes)


class Bursts(NamedTuple):
    """Seconds a burst, of a long decode."""

    loop: float  # on the device's clock, from burst to burst, as the engine's loop runs
    device: float  # the same steps queued without the loop, back to back
    host: float  # what the loop's own work takes of the host when it need not wait for the device


def bursts(engine: Engine, rows: Rows, changes: dict[str, object], tokens: int) -> Bursts:
    """tokens: so many are generated; the first bursts, which overlap with reading, and the last are left out."""
    length, time_by = engine.config.burst, clock(engine)
    changes = {**changes, "max_new_tokens": tokens}
    count = tokens // length - 4
    assert count > 0, "too few tokens for a look at the loop"
    with _Underway(engine, rows, changes):
        start = time_by.mark()
        for _ in range(count):
            engine.step()
        loop = time_by.seconds(start, time_by.mark()) / count
    host = []
    with _Underway(engine, rows, changes):
        for _ in range(count):
            time_by.wait()
            before = time.perf_counter()
            engine.step()
            host.append(time.perf_counter() - before)

    decoding = Decoding(engine, rows, changes)
    device = device_seconds(
        time_by, decoding.step, count * length, samples=3, before=lambda: decoding.rewind(2 * length - 1)
    )
    return Bursts(loop, device * length, float(np.median(host)))


class _Underway:
    """Requests that have decoded for two bursts when the block begins; they are finished behind it."""

    def __init__(self, engine: Engine, rows: Rows, changes: dict[str, object]):
        self._engine = engine
        self._results: list[Any] = []
        options = engine.options(changes)
        requests = [Request(np.asarray(row), options, self._results.append, stream=i) for i, row in enumerate(rows)]
        engine.submit(requests)

    def __enter__(self) -> None:
        self._engine.step()
        self._engine.step()

    def __exit__(self, *error: object) -> None:
        while not self._engine.idle:
            self._engine.step()
        for result in self._results:
            if isinstance(result, Exception):
                raise result


# Operations ----------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What the operations of a step over `count` rows are called with."""

    ops: Any
    model: Any
    layers: list[Any]  # sublayers of each decoder layer: self-attention, cross-attention if there is one, FFN
    work: Any
    state: Any
    cache: Any
    logits: Any
    ids: Any
    log_probabilities: Any


def parts(engine: Engine, count: int) -> Parts:
    """The engine's own buffers for that many rows."""
    buffers, model = engine._buffers, engine.model
    layers = model.decoder if isinstance(model, Transformer) else model.layers
    state = buffers.state
    found = (array[:count] for array in (state.logits, state.ids, state.log_probabilities))
    return Parts(engine._ops, model, layers, buffers.work.first(count), state, buffers.cache, *found)


def fill(engine: Engine, count: int) -> None:
    """Random numbers into the activations: some operations add to them, and a benchmark calls them often."""
    work = engine._buffers.work.first(count)
    random = np.random.default_rng(count)
    for field in fields(work):
        array = getattr(work, field.name)
        engine._ops.put(array, random.standard_normal(array.shape, dtype=np.float32))


def groups(engine: Engine, count: int, rows: int) -> list[Any]:
    """Slots 0 to `rows` in groups of `count`, on the device: operations over different groups read different caches."""
    numbers = np.arange(rows // count * count, dtype=np.int32).reshape(-1, count)
    if engine._ops.NAME == "cpu":
        return list(numbers)
    import cupy

    return [cupy.asarray(group) for group in numbers]


def capture(engine: Engine, run: Callable[[], None]) -> Callable[[], None]:
    """Runs once; what comes back replays it."""
    return engine._ops.capture(run)  # type: ignore[no-any-return]


def copies(linears: Ordered[Any], size: int) -> list[Any]:
    """The weights of several layers, and copies of them until there are `size` bytes of each form of a weight."""
    found = list(linears)
    each = max(1, _streamed(found[0]).nbytes)
    while len(found) * each < size:
        linear = found[len(found) % len(linears)]
        found.append(linear._replace(weight=_copy(linear.weight)))
    return found


def _copy(weight: Any) -> Any:
    if isinstance(weight, np.ndarray):
        return weight.copy()
    arrays = {field.name: getattr(weight, field.name) for field in fields(weight)}
    return replace(weight, **{name: array.copy() for name, array in arrays.items() if hasattr(array, "nbytes")})


def _streamed(linear: Any) -> Any:
    """The array of a weight that a product of few rows reads."""
    weight = linear.weight
    if isinstance(weight, Folded):
        return weight.weight
    forms = (getattr(weight, form, None) for form in ("packed", "grouped", "plain"))
    return next((array for array in forms if array is not None), weight)


_STREAM = """
// stream: reads sixteen bytes `pieces` times, many at once, and keeps nothing of them
//   any grid, any block; bytes moved 16 * pieces. As the engine's kernels do, it lets the kernel behind it begin at
//   once and reads its own weights before it waits for the kernel in front.
extern "C" __global__ void stream(const uint4* __restrict__ source, int pieces, unsigned* sink) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const int depth = 8, stride = gridDim.x * blockDim.x;
    unsigned sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < pieces; i += depth * stride) {
        uint4 held[depth];
#pragma unroll
        for (int k = 0; k < depth; k++)
            held[k] = i + k * stride < pieces ? source[i + k * stride] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < depth; k++) sum += held[k].x ^ held[k].y ^ held[k].z ^ held[k].w;
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (sum == 0x9e3779b9u) *sink = sum;  // so that the loads are not for nothing
}
"""
_STREAM_SHAPES = ((1, 512), (2, 512), (4, 256))  # blocks a multiprocessor, threads: what is fastest depends on the size


def streams(engine: Engine, linears: Ordered[Any]) -> list[Callable[[], None]]:
    """Chains of kernels that only read these weights, launched as the engine launches its own; [] on a CPU.

    Each is one way to do so; the fastest is the floor of a chain of products that wait for each other.
    """
    backend = engine._ops
    if backend.NAME == "cpu":
        return []
    import cupy

    from lightseq_backend.ops.launch import Kernel

    kernel = Kernel("embed", "stream", ())
    kernel._kernel = cupy.RawKernel(_STREAM, "stream", options=("-std=c++17",))  # instead of one of the engine's
    sink = cupy.zeros(1, cupy.uint32)
    processors = backend._device.attributes["MultiProcessorCount"]
    arrays = [_streamed(linear) for linear in linears]

    def chain(blocks: int, threads: int) -> Callable[[], None]:
        def run() -> None:
            for array in arrays:
                arguments = (array, array.nbytes // 16, sink)
                kernel((blocks * processors,), threads, arguments, stream=backend._stream.ptr, early=backend._early)

        return run

    return [chain(blocks, threads) for blocks, threads in _STREAM_SHAPES]
