"""What a server adds to the engine, and what continuous batching gains: `make bench-server`.

    python -m benchmarks.server [--device auto] [--quick] [--repeats N] [--concurrency 1 16 ...] [--results FOLDER]

One model, a Transformer with random weights and 4 beams, answers sources of 4 to 100 tokens (log-normal) with as many
tokens: the engine alone, the served model, the same engine behind Triton's dynamic batching, the model as a
stream (greedy), and a model that does nothing. Triton's perf_analyzer keeps so many requests under way.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks import gpu_device, perf, server_models, server_report
from benchmarks.server_engine import EngineAlone
from benchmarks.server_models import NOOP, NOOP_LATER, SERVED, SHORT, STATIC, STREAM
from benchmarks.server_report import AWAKE, ENGINE
from benchmarks.server_run import Run, TooShort, middle, read_export
from lightseq_backend.errors import ConfigError
from lightseq_backend.serving.cores import cores_awake, usable_cpus
from lightseq_backend.serving.device import DEVICES, choose_device
from lightseq_backend.serving.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[1]
WINDOWS = 3  # of perf_analyzer's, all of which count
INTERVAL, QUICK_INTERVAL = 3.0, 0.5  # seconds of a window
LONGEST_INTERVAL = 10.0  # that is made longer where nothing was answered
CONCURRENCIES, QUICK_CONCURRENCIES = (1, 4, 16, 64, 256), (1, 16, 256)
GREEDY = ["--streaming", "--request-parameter", "sampling_method:greedy:string"]


def main() -> None:
    options = _arguments()
    device, obstacle = choose_device(options.device)
    if obstacle:
        print(f"no usable GPU found ({obstacle}): measuring on the CPU")
    began = time.monotonic()
    with Bench(device, QUICK_INTERVAL if options.quick else INTERVAL) as bench:
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        chosen = options.concurrency or (QUICK_CONCURRENCIES if options.quick else CONCURRENCIES)
        runs = [(each, middled(lambda: bench.all_ways(each), options.repeats)) for each in chosen]  # noqa: B023
        alone = middled(bench.short, max(3, options.repeats))
        report = {
            "machine": gpu_device.machine_with(device),
            "load": bench.described(),
            "repeats": options.repeats,
            "seconds": WINDOWS * bench.interval,  # at least
            "runs": [{"concurrency": each, **_json(ways)} for each, ways in runs],
            "short": _json(alone),
            "awake": bench.awake,
        }
    for path in server_report.write(options.results, report):
        print(f"written: {path}")
    print(server_report.markdown(report))
    print(f"{time.monotonic() - began:.0f} s in all")


def middled(measure: Callable[[], dict[str, Run]], repeats: int) -> dict[str, Run]:
    """Medians of so many rounds, in each of which all ways take their turn."""
    rounds = [measure() for _ in range(repeats)]
    return {name: middle([one[name] for one in rounds]) for name in rounds[0]}


class Bench:
    """A server, an engine beside it, and requests for both. awake: how cores were kept from sleeping."""

    def __init__(self, device: str, interval: float):
        self.device, self.interval, self._opened = device, interval, ExitStack()
        self._load, self.awake = server_models.LOADS[device], ""

    def __enter__(self) -> Bench:
        folder = Path(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="lightseq-bench-")))
        self._export = folder / "export.json"
        self._analyzer = perf.install()
        self._lengths = server_models.lengths()
        self._rows = server_models.sources(self._load, self._lengths)
        self._short = server_models.sources(self._load, self._lengths[:1] * 0 + SHORT)
        self._files = {
            len(rows): server_models.write_rows(folder / f"{len(rows)}.json", rows)
            for rows in (self._rows, self._short)
        }
        weights = server_models.write_weights(folder / "weights.safetensors", self._load)
        server_models.write_repository(folder / "models", weights, self._load, self.device)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(usable_cpus()))
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._server = self._opened.enter_context(
            EmbeddedServer(
                folder / "models", device=self.device, environment={"PYTHONPATH": paths}, start_timeout=300,
                shm_bytes=64 << 20,
            )
        )  # fmt: skip
        self._engine = self._opened.enter_context(
            EngineAlone(weights, self.device, self._load.slots, {**os.environ, "PYTHONPATH": paths, **threads})
        )
        self._engine.measure(self._short, 1, 0.5)
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def described(self) -> dict[str, Any]:
        counts = self._lengths
        return {
            "model": self._load.model.title,
            **self._load.model.shape._asdict(),
            "beams": self._load.model.beams,
            "slots": self._load.slots,
            "device": self.device,
            "tokens of a source, mean": float(counts.mean()),
            "tokens of a source, least to most": [int(counts.min()), int(counts.max())],
        }

    def all_ways(self, concurrency: int) -> dict[str, Run]:
        """Mixed lengths, each way in turn."""
        found = {ENGINE: self._engine.measure(self._rows, concurrency, WINDOWS * self.interval)}
        for name in (SERVED, STATIC, STREAM, NOOP):
            wait = 0.0 if name == NOOP else concurrency / found[ENGINE].requests
            found[name] = self._served(name, self._rows, concurrency, wait)
        tell(concurrency, found)
        return found

    def short(self) -> dict[str, Run]:
        """One source again and again, one request at a time: what is added to it shows. As the machine is, then with
        cores that do not fall asleep between two requests, as `lightseq serve --awake` keeps them, if that may be."""
        found = self._in_turn()
        with ExitStack() as opened:
            try:
                self.awake = opened.enter_context(cores_awake())
            except ConfigError as error:
                print(error)
                return found
            return found | {name + AWAKE: run for name, run in self._in_turn().items()}

    def _in_turn(self) -> dict[str, Run]:
        found = {ENGINE: self._engine.measure(self._short, 1, WINDOWS * self.interval)}
        for name in (SERVED, NOOP, NOOP_LATER):
            found[name] = self._served(name, self._short, 1, 0.0)
        return found

    def _served(self, name: str, rows: list[list[int]], concurrency: int, wait: float) -> Run:
        """wait: seconds that an answer takes, about; perf_analyzer counts nothing that takes longer than a window."""
        interval = max(self.interval, 2 * wait)
        while True:
            try:
                return self._analysed(name, rows, concurrency, interval)
            except TooShort:  # others use the machine, too
                if interval > LONGEST_INTERVAL:
                    raise
                interval *= 4

    def _analysed(self, name: str, rows: list[list[int]], concurrency: int, interval: float) -> Run:
        windows = ["--measurement-interval", f"{interval * 1e3:.0f}", "--max-trials", str(WINDOWS)]
        more = [*windows, "--stability-percentage", "1000000", "--profile-export-file", str(self._export)]
        more += GREEDY if name == STREAM else []
        self._export.unlink(missing_ok=True)
        with cores_used(self._server.pid) as cores:
            perf.analyze(self._analyzer, self._server.grpc, name, self._files[len(rows)], concurrency, more)
        return read_export(self._export, {row[0]: len(row) for row in rows}, cores)


def tell(concurrency: int, ways: dict[str, Run]) -> None:
    print(f"concurrency {concurrency}: " + ", ".join(f"{name} {run.tokens:.0f} tokens/s" for name, run in ways.items()))


@contextmanager
def cores_used(server: int) -> Iterator[dict[str, float]]:
    """Cores in use meanwhile, once it is over: by Triton, by its models and their engines, by the callers."""
    triton = psutil.Process(server)
    processes = [triton, *triton.children(recursive=True)]
    found: dict[str, float] = {}
    start, before, called = time.monotonic(), [_used(one) for one in processes], os.times()
    yield found
    seconds, after, now = time.monotonic() - start, [_used(one) for one in processes], os.times()
    each = [(b - a) / seconds for a, b in zip(before, after)]
    callers = now.children_user + now.children_system - called.children_user - called.children_system
    found |= {"triton": each[0], "models": sum(each[1:]), "callers": callers / seconds}


def _used(process: psutil.Process) -> float:
    """Processor seconds of a process so far."""
    times = process.cpu_times()
    return times.user + times.system


def _json(ways: dict[str, Run]) -> dict[str, Any]:
    return {name: run._asdict() for name, run in ways.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU where one is usable")
    parser.add_argument("--quick", action="store_true", help="short windows, few concurrencies")
    parser.add_argument("--repeats", type=int, default=1, help="rounds; medians are reported (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, nargs="+", help="requests under way at once")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
