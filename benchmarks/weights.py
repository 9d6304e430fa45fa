"""How fast a weight file is loaded, and the memory it takes.

    python -m benchmarks.weights [--size MIB] [--repeats N] [--results FOLDER]

Writes a Transformer of about that size to a temporary file and loads it from the page cache, each time in a process of
its own. A copy of the same bytes within memory shows what the machine could do.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, transformer_base
from benchmarks.transformer_base import CONFIG
from lightseq_backend import weights

WANTED_SPEED = 1e9  # bytes a second
ALLOWED_MEMORY = 200 * 2**20  # beside the arrays


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transformer.pb"
        _write(path, arguments.size * 2**20)
        path.read_bytes()  # into the page cache
        loads = [_in_process(_load, path) for _ in range(arguments.repeats)]
        copies = [_in_process(_copy, path.stat().st_size) for _ in range(arguments.repeats)]
        report: dict[str, Any] = {
            "machine": machine.describe(),
            "file_bytes": path.stat().st_size,
            "repeats": arguments.repeats,
            "array_bytes": loads[0]["arrays"],
            "seconds": statistics.median(one["seconds"] for one in loads),
            "copy_seconds": statistics.median(copies),
            "peak_bytes_beside_arrays": max(one["beside_arrays"] for one in loads),
        }
    text = _markdown(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / f"weights-{machine.file_name()}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="MiB of the file (default: 1024)")
    parser.add_argument("--repeats", type=int, default=5, help="loads (default: 5)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the report")
    return parser.parse_args()


def _write(path: Path, size: int) -> None:
    """Transformer-base with as many ids as make it that large; the numbers are all ones."""
    smallest = replace(CONFIG, source_vocabulary=4, target_vocabulary=4, end_id=3)
    rest = sum(4 * math.prod(shape) for _, shape in transformer_base.shapes(smallest))
    ids = 4 + max(0, size - rest) // (2 * 4 * CONFIG.hidden)
    config = replace(CONFIG, source_vocabulary=ids, target_vocabulary=ids, end_id=ids - 1)
    arrays = {name: np.ones(shape, np.float32) for name, shape in transformer_base.shapes(config)}
    weights.save(path, config, arrays)


def _in_process(measure: Callable[[Any], Any], argument: Any) -> Any:
    """What `measure` returns in a new process, whose memory nothing else has touched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (argument,))


def _load(path: Path) -> dict[str, float]:
    before = machine.peak_memory()
    start = time.perf_counter()
    _, arrays = weights.load(path)
    seconds = time.perf_counter() - start
    size = transformer_base.parameters(arrays)
    return {"seconds": seconds, "arrays": size, "beside_arrays": machine.peak_memory() - before - size}


def _copy(size: int) -> float:
    """Seconds to copy `size` bytes into memory that was never touched, which is what a load has to do."""
    source = np.ones(size, np.uint8)
    start = time.perf_counter()
    source.copy()
    return time.perf_counter() - start


def _markdown(report: dict[str, Any]) -> str:
    where, size = report["machine"], report["file_bytes"]
    speed, copy = size / report["seconds"], size / report["copy_seconds"]
    beside = report["peak_bytes_beside_arrays"]
    fast, small = ("met" if good else "MISSED" for good in (speed >= WANTED_SPEED, beside <= ALLOWED_MEMORY))
    return f"""# Loading weights

A transformer.pb of {size / 2**20:.0f} MiB in the page cache, arrays {report["array_bytes"] / 2**20:.0f} MiB; medians
of {report["repeats"]} loads, each in a new process. {where["processor"]}, {where["cores"]} cores, load average
{where["load_average_1min"]}; Python {where["python"]}, numpy {where["packages"]["numpy"]}; {where["date"]}.

| | |
|--|--:|
| load | {report["seconds"]:.2f} s, {speed / 1e6:.0f} MB/s (wanted: {WANTED_SPEED / 1e6:.0f}; {fast}) |
| copying as many bytes within memory | {report["copy_seconds"]:.2f} s, {copy / 1e6:.0f} MB/s |
| peak memory beside the arrays | {beside / 2**20:.0f} MiB (allowed: {ALLOWED_MEMORY / 2**20:.0f}; {small}) |
"""


if __name__ == "__main__":
    main()
