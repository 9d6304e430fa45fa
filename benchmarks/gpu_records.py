"""Records of the GPU benchmarks: one JSON object a line, written as they come, so that a broken run keeps what it has.

A file holds lines of two kinds: what a program ran on ({"conditions": ...}) and what it measured ({"record": ...}).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

OURS = "this engine"


@dataclass(frozen=True)
class Record:
    """One figure.

    engine      whose: OURS or a peer's name
    batch       sequences, or rows for an operation; 0 where there are none
    length      tokens of a source, prompt or text; 0 where there are none
    bytes       what must be read and written at least, once each
    operations  multiplications and additions that it takes
    floor       in `unit`: the bytes at the bandwidth of a copy measured in the same run, or the operations at the rate
                of a large product where that takes longer
    note        anything that a reader of the figure must know
    more        further figures of the same thing, each with its unit in its name
    """

    engine: str
    model: str
    precision: str
    batch: int
    length: int
    what: str
    value: float
    unit: str
    bytes: int | None = None
    operations: int | None = None
    floor: float | None = None
    note: str = ""
    more: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        place = f"{self.model} {self.precision} batch {self.batch} length {self.length}"
        share = f" ({self.floor / self.value:.0%} of the floor, {self.floor:.4g})" if self.floor and self.value else ""
        more = "".join(f", {name} {value:.4g}" for name, value in self.more.items())
        return f"{place}: {self.engine}, {self.what}: {self.value:.4g} {self.unit}{share}{more}"


class Recorder:
    """Prints records, and appends them to a file if there is one."""

    def __init__(self, program: str, path: Path | None, conditions: dict[str, Any]):
        self._file: IO[str] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")
        self.conditions = {"program": program, "date": time.strftime("%F"), **conditions}
        print("\n".join(f"# {name}: {_short(value)}" for name, value in self.conditions.items()), flush=True)
        self._write({"conditions": self.conditions})

    def add(self, record: Record) -> None:
        print(record, flush=True)
        self._write({"record": {name: value for name, value in asdict(record).items() if value not in (None, "", {})}})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], list[Record]]:
    """Conditions and records of several files; of what was measured twice, the last."""
    conditions, records = [], {}
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a program that was killed
            if "conditions" in entry:
                conditions.append(entry["conditions"])
            else:
                record = Record(**entry["record"])
                key = (record.engine, record.model, record.precision, record.batch, record.length, record.what)
                records[key] = record
    return conditions, list(records.values())


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that all programs have."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--records", type=Path, help="file that records are appended to, a line of JSON each")
    made.add_argument("--quick", action="store_true", help="only what the README's table needs")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, to try the program")
    made.add_argument(
        "--precision", help="of fp16, fp32, int8, with commas between (default: fp16,fp32; --quick: fp16)"
    )
    return made


def precisions(options: argparse.Namespace) -> list[str]:
    asked: list[str] = (options.precision or ("fp16" if options.quick else "fp16,fp32")).split(",")
    if options.device == "cpu":
        return [precision for precision in asked if precision == "int8"] or ["fp32"]
    return asked


def versions(*packages: str) -> dict[str, str]:
    """Of those distributions that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
