"""Time and bandwidth of every operation, on the cases of tests/op_cases.py.

    python -m benchmarks.ops [--op NAME] [--repeats N] [--results FOLDER]

Bytes are what any implementation must move at least once; small cases show what a call costs, not a bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import machine
from lightseq_backend import ops as devices

ROOT = Path(__file__).resolve().parents[1]
COPIED = 2**28  # bytes of the copy that everything is compared with: more than any cache holds


def main() -> None:
    arguments = _arguments()
    sys.path.insert(0, str(ROOT / "tests"))
    import op_cases

    ops = devices.load("cpu")
    ops.start()
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "numpy_blas": machine.blas(),
        "repeats": arguments.repeats,
        "copy_bytes_a_second": _copy_bandwidth(),
        "cases": [_measure(op_cases.run, ops, case, arguments.repeats) for case in op_cases.cases(arguments.op)],
    }
    text = _markdown(report)
    print(text)
    if arguments.op is None:
        arguments.results.mkdir(parents=True, exist_ok=True)
        stem = arguments.results / f"ops-{machine.file_name()}"
        stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        stem.with_suffix(".md").write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.split("\n")[0])
    parser.add_argument("--op", help="one operation only, and no report (default: all)")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each case (default: 7)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the report")
    return parser.parse_args()


def _measure(run: Callable[..., Any], ops: Any, case: Any, repeats: int) -> dict[str, Any]:
    """Every call gets its arguments placed anew: some operations advance what they are given."""
    taken: list[float] = []
    operation = getattr(ops, case.op)

    def timed(**arguments: Any) -> None:
        start = time.perf_counter()
        operation(**arguments)
        taken.append(time.perf_counter() - start)

    stopwatch = SimpleNamespace(**{**vars(ops), case.op: timed})
    for _ in range(repeats + 1):
        run(stopwatch, case)
    seconds = statistics.median(taken[1:])  # the first call warms scratch memory and threads up
    return {
        "op": case.op,
        "case": case.name,
        "bytes": case.bytes(ops.FLOAT.itemsize),
        "seconds": seconds,
        "fastest_seconds": min(taken[1:]),
    }


def _copy_bandwidth() -> float:
    """Bytes read and written a second by one thread that copies memory to memory; the best of five."""
    source, destination = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(destination, source)
        best = min(best, time.perf_counter() - start)
    return 2 * COPIED / best


def _markdown(report: dict[str, Any]) -> str:
    where, copy = report["machine"], report["copy_bytes_a_second"]
    lines = [
        "# Operations on the CPU",
        "",
        f"float32. {where['processor']}, {where['cores']} cores, load average {where['load_average_1min']}; Python "
        f"{where['python']}, numpy {where['packages']['numpy']} on {report['numpy_blas']}; {where['date']}.",
        "",
        f"Medians of {report['repeats']} calls after one to warm up, each on arguments just placed. Copy: one thread "
        f"copying {COPIED / 2**20:.0f} MiB reads and writes {copy / 1e9:.1f} GB/s; operations that fit in a cache may "
        "pass 100 %.",
        "",
        "| operation | case | us | GB/s | % of copy |",
        "|--|--|--:|--:|--:|",
    ]
    for one in report["cases"]:
        speed = one["bytes"] / one["seconds"]
        lines.append(
            f"| {one['op']} | {one['case']} | {one['seconds'] * 1e6:.1f} | {speed / 1e9:.2f} | {speed / copy:.1%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
