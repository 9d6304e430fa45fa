"""Whether the memory of `lightseq translate` stays the same over a very long file.

    python -m benchmarks.bulk [--lines N] [--seconds S] [--folder DIR] [--results FOLDER]

Writes N lines of ids, 10 million by default, and translates them with a model of one layer, a token a line, so that the
commands' own work is what is left. The process is sampled from outside; after S seconds it is interrupted as by Ctrl-C,
and the report says how far it came.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from benchmarks import machine, transformer_base
from lightseq_backend import weights

SIZES = {"hidden": 16, "inner": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "max_positions": 16}
VOCABULARIES = {"source_vocabulary": 64, "target_vocabulary": 64, "padding_id": 0, "start_id": 1, "end_id": 2}
CONFIG = replace(transformer_base.CONFIG, **SIZES, **VOCABULARIES)
OPTIONS = (
    "--ids",
    "--sampling-method",
    "greedy",
    "--max-new-tokens",
    "1",
    "--slots",
    "256",
    "--device",
    "cpu",
    "--quiet",
)
LONGEST = 8  # ids a line
AT_ONCE = 10_000  # lines written with one call
WARM_UP = 100_000  # lines until what a run needs once is there, on however busy a machine
PERIOD = 0.5  # seconds between two samples
KEPT = 40  # samples in the report, beside the largest
PATIENCE = 30.0  # seconds for the end of a run that was interrupted
ALLOWED_GROWTH = 4 * 2**20  # bytes


class Sample(NamedTuple):
    """How far a run was: seconds since its start, lines of its output, bytes of its process in memory."""

    seconds: float
    lines: int
    memory: int


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model, lines, output = (Path(folder) / name for name in ("transformer.pb", "lines", "answers"))
        weights.save(model, CONFIG, transformer_base.random_arrays(CONFIG))
        with lines.open("wb") as file:
            write_lines(file, arguments.lines)
        where, size = machine.describe(), lines.stat().st_size
        samples, code = measure(model, lines, output, arguments.seconds)
    report = {"machine": where, "lines": arguments.lines, "file_bytes": size, "exit_code": code, **summary(samples)}
    text = markdown(report)
    print(text)
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = arguments.results / f"bulk-{machine.file_name()}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)


def write_lines(file: BinaryIO, lines: int) -> None:
    """Lines of 1 to LONGEST ids, each time the same; no more than AT_ONCE of them are in memory."""
    ids = random.Random(1)
    words = [str(id_) for id_ in range(CONFIG.end_id + 1, CONFIG.source_vocabulary)]
    for done in range(0, lines, AT_ONCE):
        rows = (ids.choices(words, k=ids.randint(1, LONGEST)) for _ in range(min(AT_ONCE, lines - done)))
        file.write("".join(f"{' '.join(row)}\n" for row in rows).encode())


def measure(model: Path, lines: Path, output: Path, seconds: float) -> tuple[list[Sample], int]:
    """Samples of a run, the last of them while it was still at work, and its exit code: 130 where `seconds` were over
    before the lines."""
    command = [sys.executable, "-m", "lightseq_backend", "translate", model, lines, "--output", output, *OPTIONS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, preexec_fn=_heed_interrupts)
    try:
        samples = list(_samples(process, output, seconds))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE)
    finally:
        process.kill()
    return samples, code


def _heed_interrupts() -> None:
    """A shell's background jobs ignore them, and what they start does too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _samples(process: subprocess.Popen[bytes], output: Path, seconds: float) -> Iterator[Sample]:
    started, lines, offset = time.monotonic(), 0, 0
    while process.poll() is None and (elapsed := time.monotonic() - started) < seconds:
        if output.exists():
            with output.open("rb") as file:
                file.seek(offset)
                while chunk := file.read(1 << 20):
                    lines += chunk.count(b"\n")
                    offset += len(chunk)
        memory = _resident(process.pid)
        if memory:
            yield Sample(elapsed, lines, memory)
        time.sleep(PERIOD)


def _resident(process: int) -> int:
    """Bytes in memory; 0 of a process that has ended."""
    with open(f"/proc/{process}/status") as fields:
        return next((int(line.split()[1]) for line in fields if line.startswith("VmRSS")), 0) * 1024


def summary(samples: list[Sample]) -> dict[str, Any]:
    """What is reported of a run: from its warm-up on, and in all."""
    warm = [sample for sample in samples if sample.lines >= WARM_UP]
    if len(warm) < 2:
        raise SystemExit(f"its warm-up, {WARM_UP:,} lines, was not over: give the run more lines or seconds")
    first, last = warm[0], warm[-1]
    return {
        "seconds": last.seconds,
        "lines_done": last.lines,
        "lines_a_second": (last.lines - first.lines) / (last.seconds - first.seconds),
        "warm": first._asdict(),
        "end": last._asdict(),
        "largest": max(warm, key=lambda sample: sample.memory)._asdict(),
        "samples": [sample._asdict() for sample in warm[:: max(1, len(warm) // KEPT)]],
    }


def markdown(report: dict[str, Any]) -> str:
    where, warm, end, largest = (report[name] for name in ("machine", "warm", "end", "largest"))
    met = "met" if largest["memory"] - warm["memory"] <= ALLOWED_GROWTH else "MISSED"
    how = "to the end" if report["exit_code"] == 0 else f"interrupted, exit code {report['exit_code']}"
    rows = "\n".join(
        f"| {name} | {at['seconds']:.0f} | {at['lines']:,} | {at['memory'] / 2**20:.1f} |"
        for name, at in (("after warm-up", warm), ("at the end", end), ("the largest", largest))
    )
    return f"""# Memory of `lightseq translate` over a long file

{report["lines"]:,} lines ({report["file_bytes"] / 2**20:.0f} MiB of ids), a model of one layer, a token a line:
{report["lines_done"]:,} lines in {report["seconds"]:.0f} s ({how}), {report["lines_a_second"]:,.0f} lines/s.
{where["processor"]}, {where["cores"]} cores, load average {where["load_average_1min"]}; Python {where["python"]},
numpy {where["packages"]["numpy"]}; {where["date"]}.

| | s | lines | MiB in memory |
|--|--:|--:|--:|
{rows}

Growth from the warm-up to the largest: {(largest["memory"] - warm["memory"]) / 2**20:.1f} MiB
(allowed: {ALLOWED_GROWTH / 2**20:.0f}; {met}).
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk", description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=10_000_000, help="of the file (default: 10 million)")
    parser.add_argument("--seconds", type=float, default=3600, help="after which it is interrupted (default: 3600)")
    parser.add_argument("--folder", type=Path, help="where the files lie while it runs (default: temporary files)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
