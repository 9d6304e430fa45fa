"""What each operation of a decode step takes on a GPU, in a graph of many calls over different weights.

python -m benchmarks.gpu_ops [--precision fp16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu import BIG, GPT2, Shape, gpt, transformer
from lightseq_backend import ops
from lightseq_backend.config import EngineConfig
from lightseq_backend.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer

REPEATS = 4  # passes over the layers in one graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rows", default="8,32,64,128")
    options = parser.parse_args()
    for name, shape, make in (("big", BIG, transformer), ("gpt2", GPT2, gpt)):
        _measure(name, shape, make, options.precision, [int(rows) for rows in options.rows.split(",")])


def _measure(name: str, shape: Shape, make: Callable[..., Any], precision: str, counts: list[int]) -> None:
    config, arrays = make(shape)
    backend = ops.load("cuda", 0, precision)
    translates = make is transformer
    model = (Transformer if translates else Gpt)(config, arrays, backend)
    engine = Engine(model, EngineConfig(slots=128, max_beam_size=4, burst=1, prompt_tokens=2048), backend)
    # Leaves caches, lengths and records as after 24 tokens of 32 sentences.
    rows = [np.arange(3, 27) + i for i in range(32)]
    engine.answer(rows, changes={"max_new_tokens": 24, "sampling_method": "beam_search", "beam_size": 4})
    for count in counts:
        times = {label: _time(backend, run) for label, run in _operations(engine, model, count, translates).items()}
        print(f"{name} {precision} rows {count:3d}: " + "  ".join(f"{label} {us:.2f}" for label, us in times.items()))


def _operations(engine: Engine, model: Any, count: int, translates: bool) -> dict[str, Callable[[], int]]:
    backend, buffers = engine._ops, engine._buffers
    work, state, cache, head = buffers.work.first(count), buffers.state, buffers.cache, model.head
    rows = state.rows[:count]
    layers = model.decoder if translates else model.layers
    arithmetic, heads = model.arithmetic, model.config.heads

    def over(call: Callable[[int, Any], None]) -> Callable[[], int]:
        def run() -> int:
            for _ in range(REPEATS):
                for i, layer in enumerate(layers):
                    call(i, layer)
            return REPEATS * len(layers)

        return run

    def norm_linear(block: Any, out: Any, activation: str = "none") -> None:
        backend.norm_linear(work.x, block.norm, block.inner, arithmetic.epsilon, activation, work.normed, out)

    def attend(i: int) -> None:
        backend.decode_attention(
            work.qkv, rows, state.slots, cache.ancestors, cache.keys[i], cache.values[i], heads, work.context
        )

    def once(call: Callable[[], None]) -> Callable[[], int]:
        def run() -> int:
            for _ in range(REPEATS):
                call()
            return REPEATS

        return run

    vocabulary = (work.x, head.norm, head.output, head.epsilon, head.scale, work.normed, state.logits[:count])
    ids, log_probabilities = state.ids[:count], state.log_probabilities[:count]
    found = backend.tile_results(count, head.output.weight.wide, ids.shape[1])  # part of vocabulary, and its end
    operations = {
        "qkv": over(lambda i, layer: norm_linear(layer[0], work.qkv)),
        "self": over(lambda i, layer: attend(i)),
        "out": over(lambda i, layer: backend.linear_residual(work.context, layer[0].output, work.x, work.x)),
        "ffn1": over(lambda i, layer: norm_linear(layer[-1], work.inner, "relu")),
        "ffn2": over(lambda i, layer: backend.linear_residual(work.inner, layer[-1].output, work.x, work.x)),
        "embed": once(lambda: backend.embed_rows(rows, state.slots, model.target_tokens if translates else model.tokens,
                                                 model.target_positions if translates else model.positions, work.x)),
        "vocabulary": once(lambda: backend.vocabulary_top(*vocabulary, head.banned, ids, log_probabilities)),
        "best": once(lambda: backend.merge_best(*found, ids, log_probabilities)),
        "beam": once(
            lambda: backend.beam_step(rows, state.slots, cache.ancestors, state.history, ids, log_probabilities)
        ),
    }  # fmt: skip
    if translates:
        operations["query"] = over(lambda i, layer: norm_linear(layer[1], work.query))
        operations["cross"] = over(
            lambda i, layer: backend.cross_attention(
                work.query, rows, state.slots, cache.memory_keys[i], cache.memory_values[i], heads, work.context
            )
        )
    return operations


def _time(backend: Any, run: Callable[[], int]) -> float:
    """Microseconds a call, median of 20 replays."""
    import cupy

    calls = run()
    replay = backend.capture(run)
    stream, times = backend._stream, []
    for _ in range(20):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        replay()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / calls)
    return float(np.median(times))


if __name__ == "__main__":
    main()
