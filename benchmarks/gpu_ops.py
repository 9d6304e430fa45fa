"""Every operation of a decode step on a GPU: microseconds, GB/s, share of the bandwidth measured in the same run.

    python -m benchmarks.gpu_ops [--quick] [--rows 8,32] [--models gpt2] [--precision fp16] [--records FILE]

An operation is timed in a graph of many calls, each with other weights: those of the layers, and copies of them until
no cache of the device holds them all, as in a step the other operations' weights come in between. Attention goes over
the caches of 128 rows in turn; what is shorter than the device's cache is read from there. Beside an operation with
weights stands a chain of kernels in such a graph that only read the same weights. Times are medians of 20 replays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import gpu_device, gpu_engine, gpu_models
from benchmarks.gpu_device import Rates
from benchmarks.gpu_engine import Decoding, Engine
from benchmarks.gpu_models import MODELS, SIZES, TINY, Model, weight_bytes
from benchmarks.gpu_records import OURS, Record, Recorder, parser, precisions
from benchmarks.gpu_timing import device_seconds
from lightseq_backend.ops.slots import SAMPLE, SLOT

ROWS = 128
COUNTS = (4, 8, 32, 64, 128)
USUAL = ("big", "gpt2")  # models
LENGTH = 24  # tokens of a source and generated; a GPT has PROMPT of each
SAMPLES = 20
CALLS = 24  # in a graph, at least
ADVANCING = 8  # calls in a graph of what moves the sequences on


class Operation(NamedTuple):
    """per_step: calls in a decode step, 0 for one that only sampling has; size: bytes of a call at least."""

    name: str
    per_step: int
    size: int
    call: Callable[[int], Any]  # takes the number of the call in the chain
    chain: int  # calls with different arguments
    before: Callable[[], Any] | None = None  # each replay of what moves the sequences on


def main() -> None:
    made = parser("gpu_ops", __doc__)
    made.add_argument("--rows", help=f"numbers with commas between (default: {','.join(map(str, COUNTS))})")
    made.add_argument("--models", help=f"names with commas between (default: {','.join(USUAL)})")
    options = made.parse_args()
    gpu_device.require(options.device)
    models = {name: MODELS[name] for name in USUAL} if options.device == "cuda" else TINY
    names = options.models.split(",") if options.models else list(models)
    counts = [int(count) for count in options.rows.split(",")] if options.rows else (32,) if options.quick else COUNTS
    rates = gpu_device.measure(options.device, ())
    conditions = gpu_device.conditions(options.device) | {"copy_bytes_a_second": rates.bytes}
    with Recorder("operations", options.records, conditions) as recorder:
        for name in names:
            model = (MODELS | TINY)[name]
            config, arrays = gpu_models.build(model)
            for precision in precisions(options):
                for record in Subject(model, precision, options.device, rates, config, arrays).records(counts):
                    recorder.add(record)
                gpu_device.release(options.device)


class Subject:
    """One model in one precision, decoding on as many rows as there are."""

    def __init__(self, model: Model, precision: str, device: str, rates: Rates, config: Any, arrays: dict[str, Any]):
        self.model, self.precision, self._rates = model, precision, rates
        room = {"slots": ROWS, "max_beam_size": gpu_models.BEAMS, "prompt_tokens": ROWS * gpu_models.PROMPT}
        self.engine: Engine = gpu_engine.load(config, arrays, device, precision, **room).engine
        self.length = LENGTH if model.translates else gpu_models.PROMPT
        rows = gpu_models.rows(model, ROWS // model.beams, self.length)
        self.decoding = Decoding(self.engine, rows, {"max_new_tokens": self.length})
        self._samples = SAMPLES if device == "cuda" else 2
        size = 3 * gpu_device.cache_size(device)
        self.chains = {name: gpu_engine.copies(found, size) for name, found in self._linears().items()}

    def _linears(self) -> dict[str, list[Any]]:
        parts = gpu_engine.parts(self.engine, ROWS)
        own, ffn = ([layer[at] for layer in parts.layers] for at in (0, -1))
        found = {
            "qkv": [block.inner for block in own],
            "output": [block.output for block in own],
            "FFN 1": [block.inner for block in ffn],
            "FFN 2": [block.output for block in ffn],
            "vocabulary": [parts.model.head.output],
        }
        if self.model.translates:
            found["query"] = [layer[1].inner for layer in parts.layers]
        return found

    @property
    def steps(self) -> int:
        """In the cache before the last token of a request."""
        return self.length - 1 + (0 if self.model.translates else self.length - 1)

    def records(self, counts: Sequence[int]) -> Iterator[Record]:
        streams = {name: self._stream_seconds(linears) for name, linears in self.chains.items()}
        streams["vocabulary search"] = streams["logits"] = streams["vocabulary"]
        for count in counts:
            total = 0.0
            for operation in Operations(self, count):
                seconds = self._seconds(operation, count)
                total += operation.per_step * seconds
                more: dict[str, float] = {"per_step": operation.per_step}
                if stream := streams.get(operation.name):
                    more["stream_us"] = stream * 1e6
                yield self._record(count, f"operation {operation.name}", seconds, operation.size, more)
            yield self._record(count, "all operations of a step", total, None, {})

    def _seconds(self, operation: Operation, count: int) -> float:
        passes = 1 if operation.before else -(-CALLS // operation.chain)

        def run() -> None:
            for _ in range(passes):
                for i in range(operation.chain):
                    operation.call(i)

        gpu_engine.fill(self.engine, count)
        self.decoding.rewind(self.length - 1)
        if operation.before:
            operation.before()
        replay = gpu_engine.capture(self.engine, run)
        clock = gpu_device.clock(self.engine)
        return device_seconds(clock, replay, 1, self._samples, operation.before) / (passes * operation.chain)

    def _stream_seconds(self, linears: Sequence[Any]) -> float | None:
        clock, passes = gpu_device.clock(self.engine), -(-CALLS // len(linears))
        found = []
        for run in gpu_engine.streams(self.engine, list(linears) * passes):
            replay = gpu_engine.capture(self.engine, run)
            found.append(device_seconds(clock, replay, 1, self._samples) / (passes * len(linears)))
        return min(found, default=None)

    def _record(self, count: int, what: str, seconds: float, size: int | None, more: dict[str, float]) -> Record:
        floor = size / self._rates.bytes * 1e6 if size else None
        return Record(
            OURS, self.model.name, self.precision, count, self.length, what, seconds * 1e6, "us", size, None, floor,
            more=more,
        )  # fmt: skip


class Operations:
    """Those of a step over `count` rows, in its order; a GPT's sampling behind them."""

    def __init__(self, subject: Subject, count: int):
        self._subject, self._count, self._translates = subject, count, subject.model.translates
        self._parts = gpu_engine.parts(subject.engine, count)
        self._groups = gpu_engine.groups(subject.engine, count, ROWS)
        self._layers, self._size = len(self._parts.layers), SIZES[subject.precision]

    def __iter__(self) -> Iterator[Operation]:
        work, activation = self._parts.work, self._parts.model.arithmetic.activation
        yield self._embed()
        yield self._norm_linear("qkv", 0, work.qkv)
        yield self._self_attention()
        yield self._residual("output", (2 if self._translates else 1) * self._layers, work.context)
        if self._translates:
            yield self._norm_linear("query", 1, work.query)
            yield self._cross_attention()
        yield self._norm_linear("FFN 1", -1, work.inner, activation)
        yield self._residual("FFN 2", self._layers, work.inner)
        yield self._search()
        if not self._translates:
            yield self._logits()
            yield self._sample_step()

    def _embed(self) -> Operation:
        model, parts = self._parts.model, self._parts
        prefix = "target_" if self._translates else ""
        tables = getattr(model, f"{prefix}tokens"), getattr(model, f"{prefix}positions")

        def call(i: int) -> None:
            parts.ops.embed_rows(self._groups[i], parts.state.slots, *tables, parts.work.x)

        return Operation("embed", 1, 3 * self._size * parts.work.x.size, call, len(self._groups))

    def _norm_linear(self, name: str, block: int, out: Any, activation: str = "none") -> Operation:
        parts, norm, epsilon = self._parts, self._parts.layers[0][block].norm, self._parts.model.arithmetic.epsilon
        work = parts.work
        return self._product(
            name, self._layers, work.x, out.shape[1],
            lambda linear: parts.ops.norm_linear(work.x, norm, linear, epsilon, activation, work.normed, out),
        )  # fmt: skip

    def _residual(self, name: str, per_step: int, x: Any) -> Operation:
        parts, out = self._parts, self._parts.work.x
        product = self._product(
            name, per_step, x, out.shape[1], lambda linear: parts.ops.linear_residual(x, linear, out, out)
        )
        return product._replace(size=product.size + self._size * out.size)

    def _product(self, name: str, per_step: int, x: Any, wide: int, call: Callable[[Any], Any]) -> Operation:
        """Weights, x and the result."""
        linears, narrow = self._subject.chains[name], x.shape[1]
        size = weight_bytes(narrow, wide, self._subject.precision) + self._size * self._count * (narrow + wide)
        return Operation(name, per_step, size, lambda i: call(linears[i]), len(linears))

    def _self_attention(self) -> Operation:
        """Reads the history of one layer, what beams share once, and qkv; writes keys, values and the result."""
        parts, heads, subject = self._parts, self._subject.model.shape.heads, self._subject
        hidden, steps = subject.model.shape.hidden, subject.steps
        entries = subject.decoding.history_entries(steps) * self._count // ROWS
        size = self._size * hidden * (2 * entries + 6 * self._count) + 4 * self._count * steps

        def call(i: int) -> None:
            rows, layer, cache = self._groups[i // self._layers], i % self._layers, parts.cache
            parts.ops.decode_attention(
                parts.work.qkv, rows, parts.state.slots, cache.ancestors, cache.keys[layer], cache.values[layer],
                heads, parts.work.context,
            )  # fmt: skip

        return Operation("self-attention", self._layers, size, call, len(self._groups) * self._layers)

    def _cross_attention(self) -> Operation:
        """Reads each sentence's keys and values once, and the queries; writes the result."""
        parts, heads, hidden = self._parts, self._subject.model.shape.heads, self._subject.model.shape.hidden
        memory = self._count // gpu_models.BEAMS * self._subject.length

        def call(i: int) -> None:
            rows, layer, cache = self._groups[i // self._layers], i % self._layers, parts.cache
            parts.ops.cross_attention(
                parts.work.query, rows, parts.state.slots, cache.memory_keys[layer], cache.memory_values[layer],
                heads, parts.work.context,
            )  # fmt: skip

        size = 2 * self._size * hidden * (self._count + memory)
        return Operation("cross-attention", self._layers, size, call, len(self._groups) * self._layers)

    def _search(self) -> Operation:
        """Norm, product, the best ids and the beam step. Logits need not be written."""
        parts, head, work = self._parts, self._parts.model.head, self._parts.work
        linears, state, best = self._subject.chains["vocabulary"], parts.state, parts.ids
        target = (parts.cache.ancestors, state.history, state.details)

        def call(i: int) -> None:
            product = (
                work.x,
                head.norm,
                linears[i % len(linears)],
                head.epsilon,
                head.scale,
                work.normed,
                parts.logits,
            )
            found = (head.banned, best, parts.log_probabilities)
            parts.ops.vocabulary_search(*product, *found, self._groups[0], state.slots, *target)

        size = self._logits().size - 4 * parts.logits.size + self._record_bytes()
        return Operation("vocabulary search", 1, size, call, ADVANCING, self._rewind)

    def _logits(self) -> Operation:
        """Logits are float32 in either precision."""
        head, work, room, ops = self._parts.model.head, self._parts.work, self._parts.logits, self._parts.ops

        def call(linear: Any) -> None:
            ops.vocabulary_logits(work.x, head.norm, linear, head.epsilon, head.scale, work.normed, room)

        product = self._product("vocabulary", 0, work.x, room.shape[1], call)
        return product._replace(name="logits", size=product.size + (4 - self._size) * room.size)

    def _sample_step(self) -> Operation:
        parts = self._parts

        def call(i: int) -> None:
            state = parts.state
            parts.ops.sample_step(
                self._groups[0], state.slots, state.history, state.details, parts.logits, parts.model.head.banned
            )

        def before() -> None:
            self._rewind(method=SAMPLE, top_k=4, temperature=1, top_p=1)

        size = self._record_bytes() + 4 * parts.logits.size
        return Operation("sample of the best 4", 0, size, call, ADVANCING, before)

    def _record_bytes(self) -> int:
        """Records in and out; ancestors and history in and out."""
        return self._count * (2 * SLOT.itemsize + 2 * 4 * 2 * self._subject.length)

    def _rewind(self, **fields: object) -> None:
        """So far back that a replay ahead and half of the next come before the last token of a request."""
        self._subject.decoding.rewind(self._subject.length - ADVANCING - ADVANCING // 2, **fields)


if __name__ == "__main__":
    main()
