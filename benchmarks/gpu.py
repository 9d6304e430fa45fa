"""Decode steps on a GPU: microseconds a replay of the captured step, beside the time its bytes take at best.

python -m benchmarks.gpu [--precision fp16]
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend import ops
from lightseq_backend.config import DecodingOptions, EngineConfig, GptConfig, TransformerConfig
from lightseq_backend.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer

FLOOR_BANDWIDTH = 4.3e12  # bytes a second, a device copy on one H200


class Shape(NamedTuple):
    hidden: int
    inner: int
    heads: int
    layers: int
    vocabulary: int


BIG = Shape(1024, 4096, 16, 6, 30016)
BASE = Shape(512, 2048, 8, 6, 32000)
GPT2 = Shape(768, 3072, 12, 12, 50257)
XL = Shape(1600, 6400, 25, 48, 50257)


def transformer(shape: Shape) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    hidden, inner, heads, layers, vocabulary = shape
    config = TransformerConfig(
        hidden, inner, heads, layers, layers, vocabulary, vocabulary, 128, 0, 1, vocabulary - 1,
        extra_decode_length=2, decoding=DecodingOptions(beam_size=4),
    )  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    attention = (("qkv", hidden, 3 * hidden), ("output", hidden, hidden))
    for i in range(layers):
        _layer(arrays, f"encoder.{i}.", {"attention": attention}, hidden, inner)
        cross = (("query", hidden, hidden), ("kv", hidden, 2 * hidden), ("output", hidden, hidden))
        _layer(arrays, f"decoder.{i}.", {"self": attention, "cross": cross}, hidden, inner)
    for side in ("source", "target"):
        arrays[f"{side}.positions"] = _random(128, hidden)
    for stack in ("encoder", "decoder"):
        _norm(arrays, stack + ".norm", hidden)
    arrays["source.tokens"] = _random(vocabulary, hidden)
    arrays["output.weight"], arrays["output.bias"] = _random(hidden, vocabulary), np.zeros(vocabulary, np.float32)
    arrays["output.bias"][config.end_id] = -1e4  # every search takes all the steps there are
    arrays["target.tokens"] = arrays["output.weight"].T
    return config, arrays


def gpt(shape: Shape) -> tuple[GptConfig, dict[str, np.ndarray]]:
    hidden, inner, heads, layers, vocabulary = shape
    config = GptConfig(
        hidden, inner, heads, layers, vocabulary, 1024, vocabulary, vocabulary - 1,
        decoding=DecodingOptions("greedy"),
    )  # fmt: skip
    arrays: dict[str, np.ndarray] = {"tokens": _random(vocabulary, hidden), "positions": _random(1024, hidden)}
    attention = (("qkv", hidden, 3 * hidden), ("output", hidden, hidden))
    for i in range(layers):
        _layer(arrays, f"layer.{i}.", {"attention": attention}, hidden, inner)
    _norm(arrays, "norm", hidden)
    arrays["output.weight"] = arrays["tokens"].T
    return config, arrays


def _layer(arrays: dict[str, np.ndarray], prefix: str, blocks: dict[str, Any], hidden: int, inner: int) -> None:
    for name, products in {**blocks, "ffn": (("inner", hidden, inner), ("output", inner, hidden))}.items():
        _norm(arrays, f"{prefix}{name}_norm", hidden)
        for product, narrow, wide in products:
            arrays[f"{prefix}{name}_{product}.weight"] = _random(narrow, wide) / np.float32(np.sqrt(narrow))
            arrays[f"{prefix}{name}_{product}.bias"] = np.zeros(wide, np.float32)


def _norm(arrays: dict[str, np.ndarray], name: str, hidden: int) -> None:
    arrays[f"{name}.gain"], arrays[f"{name}.bias"] = np.ones(hidden, np.float32), np.zeros(hidden, np.float32)


_generator = np.random.default_rng(0)


def _random(rows: int, columns: int) -> np.ndarray:
    block = _generator.standard_normal(min(rows * columns, 1 << 22), dtype=np.float32)
    return np.resize(block, (rows, columns))  # the values do not matter to the time; making them would


def decoder_bytes(shape: Shape, cross: bool, size: int) -> int:
    """Weights that one step reads."""
    attention = 4 * shape.hidden**2 + (2 * shape.hidden**2 if cross else 0)
    return size * (shape.layers * (attention + 2 * shape.hidden * shape.inner) + shape.hidden * shape.vocabulary)


def step_us(engine: Engine, rows: list[np.ndarray], tokens: int, changes: dict[str, object]) -> tuple[float, float]:
    """Microseconds a replay with the caches filled, and milliseconds of a whole `answer`."""
    import cupy

    engine.answer(rows, changes=changes)
    totals = []
    for _ in range(5):
        start = time.perf_counter()
        engine.answer(rows, changes=changes)
        totals.append(time.perf_counter() - start)
    count = engine._steps.bucket(len(rows) * engine.options(changes).width)
    stream = engine._ops._stream
    medians = []
    for _ in range(20):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        for _ in range(20):
            engine._steps.run(count, True, False)
        end.record(stream)
        end.synchronize()
        medians.append(cupy.cuda.get_elapsed_time(begin, end) / 20 * 1e3)
    return float(np.median(medians)), float(np.median(totals)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--models", default="big,base,gpt2")
    options = parser.parse_args()
    size = 2 if options.precision == "fp16" else 4
    import cupy

    print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), "cupy", cupy.__version__, options.precision)
    for name, shape, make in (
        ("big", BIG, transformer),
        ("base", BASE, transformer),
        ("gpt2", GPT2, gpt),
        ("xl", XL, gpt),
    ):
        if name not in options.models.split(","):
            continue
        start = time.perf_counter()
        config, arrays = make(shape)
        made = time.perf_counter()
        backend = ops.load("cuda", 0, options.precision)
        cross = make is transformer
        model = Transformer(config, arrays, backend) if cross else Gpt(config, arrays, backend)
        slots = 128 if cross else 8
        engine = Engine(model, EngineConfig(slots=slots, max_beam_size=4, burst=8, prompt_tokens=2048), backend)
        print(f"{name}: weights made {made - start:.1f} s, loaded and captured {time.perf_counter() - made:.1f} s")
        floor = decoder_bytes(shape, cross, size) / FLOOR_BANDWIDTH * 1e6
        for batch in (1, 8, 32) if cross else (1, 8):
            rows = (
                [np.arange(3, 27) + i for i in range(batch)] if cross else [np.arange(3, 35) + i for i in range(batch)]
            )
            changes: dict[str, object] = {"max_new_tokens": 24}
            us, total = step_us(engine, rows, 24, changes)
            print(
                f"{name} batch {batch}: {us:7.1f} us/step  floor {floor:5.1f} ({floor / us:.0%})",
                f"24 tokens {total:.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
