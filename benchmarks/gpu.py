"""Decode steps on a GPU: microseconds a replay of the captured step, beside the time its bytes take at best.

python -m benchmarks.gpu [--precision fp16]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend import ops
from lightseq_backend.config import DecodingOptions, EngineConfig, GptConfig, TransformerConfig
from lightseq_backend.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.request import SCORE, Request, Sequence

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


def step_us(engine: Engine, rows: list[np.ndarray], changes: dict[str, object]) -> tuple[float, float]:
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


def prefill_ms(engine: Engine, rows: list[np.ndarray]) -> float:
    """Milliseconds of one pass over sources or prompts, host included, until the device is done."""
    options = engine.options({"sampling_method": "greedy"})
    sequences = [Sequence.of(Request(row, options, lambda result: None), engine.model.config) for row in rows]
    for slot, sequence in enumerate(sequences):
        sequence.slots = [slot]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        pack = engine._pack(sequences, 0)
        engine.model.prefill(pack, engine._buffers.work.first(pack.rows), engine._buffers.cache)
        engine._ops._stream.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def perplexity_ms(engine: Engine, rows: list[np.ndarray]) -> float:
    """Milliseconds of scoring all rows in one pass."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        engine.answer(rows, SCORE)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


MODELS: dict[str, tuple[Shape, Callable[[Shape], Any]]] = {
    "big": (BIG, transformer),
    "base": (BASE, transformer),
    "gpt2": (GPT2, gpt),
    "xl": (XL, gpt),
}


def measure(name: str, precision: str) -> Iterator[dict[str, Any]]:
    """One record a batch size and figure: model, precision, batch, what, value, floor, unit."""
    shape, make = MODELS[name]
    config, arrays = make(shape)
    start = time.perf_counter()
    backend = ops.load("cuda", 0, precision)
    translates = make is transformer
    model = Transformer(config, arrays, backend) if translates else Gpt(config, arrays, backend)
    room = EngineConfig(slots=128 if translates else 8, max_beam_size=4, burst=8, prompt_tokens=4096)
    engine = Engine(model, room, backend)

    def record(what: str, batch: int, value: float, unit: str, floor: float | None = None) -> dict[str, Any]:
        return {
            "model": name, "precision": precision, "batch": batch, "what": what,
            "value": round(value, 3), "unit": unit, "floor": floor and round(floor, 1),
        }  # fmt: skip

    yield record("load and capture, weights in memory", 0, time.perf_counter() - start, "s")
    floor = decoder_bytes(shape, translates, 2 if precision == "fp16" else 4) / FLOOR_BANDWIDTH * 1e6
    for batch in (1, 8, 32) if translates else (1, 8):
        rows = [np.arange(3, 27 if translates else 35) + i for i in range(batch)]
        us, total = step_us(engine, rows, {"max_new_tokens": 24})
        yield record("decode step", batch, us, "us", floor)
        yield record("24 tokens, whole requests", batch, total, "ms")
        if translates:
            yield record("encoder, 24 columns", batch, prefill_ms(engine, rows), "ms")
    if not translates:
        yield record(
            "perplexity, 512 tokens", 8, perplexity_ms(engine, [np.arange(3, 515) + i for i in range(8)]), "ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp16,fp32")
    parser.add_argument("--models", default="big,base,gpt2,xl")
    parser.add_argument("--output", help="folder that takes <gpu>.json and <gpu>.md")
    options = parser.parse_args()
    import cupy

    gpu = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    conditions = {
        "gpu": gpu, "cupy": cupy.__version__, "CUDA driver": cupy.cuda.runtime.driverGetVersion(),
        "date": time.strftime("%F"),
    }  # fmt: skip
    print(conditions)
    records = []
    for precision in options.precision.split(","):
        for name in options.models.split(","):
            for one in measure(name, precision):
                records.append(one)
                print(line(one), flush=True)
    if options.output:
        write(Path(options.output), conditions, records)


def line(record: dict[str, Any]) -> str:
    floor = record["floor"]
    share = f"{floor} | {floor / record['value']:.0%}" if floor else " | "
    cells = ("model", "precision", "batch", "what")
    return f"| {' | '.join(str(record[cell]) for cell in cells)} | {record['value']} {record['unit']} | {share} |"


def write(folder: Path, conditions: dict[str, Any], records: list[dict[str, Any]]) -> None:
    stem = folder / f"gpu-{conditions['gpu'].lower().replace(' ', '-')}"
    stem.with_suffix(".json").write_text(json.dumps({"conditions": conditions, "records": records}, indent=1) + "\n")
    head = (
        "# Decoding on a GPU\n\n"
        + ", ".join(f"{key} {value}" for key, value in conditions.items())
        + ".\n\nRandom weights, beam 4 (GPT: greedy, prompt 32), 24 tokens. A step is the median of 20 times 20 replays"
        "\nof its graph with the caches full; the floor is the decoder's weights at 4.3 TB/s.\n\n"
        "| model | precision | batch | what | measured | floor | of the floor |\n|--|--|--:|--|--:|--:|--:|\n"
    )
    stem.with_suffix(".md").write_text(head + "\n".join(map(line, records)) + "\n")


if __name__ == "__main__":
    main()
