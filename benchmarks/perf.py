"""Measures a served model with Triton's own perf_analyzer: `make perf`.

perf_analyzer comes from the manylinux wheel of tritonclient 2.48.0, the last that runs with glibc older than 2.38
(Debian 12, Ubuntu 22.04); the two libraries it wants beside that are in the wheel of the embedded server.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

import tritonclient.grpc as triton

from benchmarks.server_run import TooShort
from lightseq_backend.serving.embedded import DEVICES, TRITON_VARIABLE, EmbeddedServer, find_triton
from lightseq_client.vocabulary import Words

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".venv" / "perf_analyzer"
WHEEL = "tritonclient==2.48.0"
LIBRARIES = ("libb64.so.0d", "libcudart.so.12")
_NOTHING = "No valid requests recorded within time interval"
# column of perf_analyzer's report -> heading of ours, in microseconds but the first
COLUMNS = {
    "Inferences/Second": "inferences/s",
    "p50 latency": "p50 us",
    "p95 latency": "p95 us",
    "p99 latency": "p99 us",
}


def main() -> None:
    arguments = _arguments()
    analyzer = install()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lightseq-perf-")))
        url = arguments.url
        if url is None:
            server = EmbeddedServer(arguments.repository, device=arguments.device, log_level="warning")
            if server.gpu_obstacle:
                print(f"no usable GPU found ({server.gpu_obstacle}): serving on the CPU")
            url = stack.enter_context(server).grpc
        data = arguments.input_data or write_rows(directory, url, arguments.repository, arguments.model)
        print(f"{arguments.model} at {url}, rows of {data.name}\n")
        print("concurrency" + "".join(f"{heading:>15}" for heading in COLUMNS.values()))
        for concurrency in arguments.concurrency:
            report = directory / f"{concurrency}.csv"
            row = measure(analyzer, url, arguments.model, data, concurrency, report)
            print(f"{concurrency:>11}" + "".join(f"{row[column]:>15}" for column in COLUMNS), flush=True)


def install() -> Path:
    """perf_analyzer's path: the one in an unpacked Triton (LIGHTSEQ_TRITON), or one that the first call fetches."""
    unpacked = Path(os.environ.get(TRITON_VARIABLE, "")) / "bin" / "perf_analyzer"
    if unpacked.is_absolute() and unpacked.exists():
        return unpacked
    binary = CACHE / "perf_analyzer"
    if binary.exists():
        return binary
    CACHE.mkdir(parents=True, exist_ok=True)
    machine = "manylinux1_x86_64" if platform.machine() == "x86_64" else "manylinux2014_aarch64"
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--python-version=3"]
    subprocess.run([*pip, f"--platform={machine}", f"--dest={CACHE}", WHEEL], check=True)
    (wheel,) = CACHE.glob("tritonclient-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/bin/perf_analyzer")]
        unfinished = binary.with_suffix(".part")
        unfinished.write_bytes(archive.read(member))
    wheel.unlink()
    # The server's wheel holds both under names with a hash: libb64-98cb6333.so.0d.
    held = [path for directory in find_triton().libraries for path in directory.iterdir()]
    for name in LIBRARIES:
        stem, version = name.split(".so.")
        for path in held:
            if path.name.startswith(f"{stem}-") and f".so.{version}" in path.name:
                (CACHE / name).unlink(missing_ok=True)
                (CACHE / name).symlink_to(path)
    unfinished.chmod(0o755)
    return unfinished.rename(binary)


def write_rows(directory: Path, url: str, repository: Path, model: str) -> Path:
    """Rows of ids for perf_analyzer: the held-out numbers, encoded with the vocabulary beside the weights."""
    metadata = triton.InferenceServerClient(url).get_model_metadata(model, as_json=True)
    input_name = metadata["inputs"][0]["name"]
    translates = any(repository.glob(f"{model}/**/source.vocab.txt"))
    vocabularies = [*repository.glob(f"{model}/**/*vocab.txt")]
    if not vocabularies:
        raise SystemExit(f"{repository / model} has no vocabulary; give rows with --input-data")
    make = Words.for_translation if translates else Words.for_generation
    words = make(vocabularies[0].parent)
    lines = (ROOT / "examples" / "numbers" / ("held_out.tsv" if translates else "counting.tsv")).read_text()
    rows = [words.encode(line.split("\t")[0]) for line in lines.splitlines()[:256]]
    path = directory / ("held_out.json" if translates else "counting.json")
    path.write_text(json.dumps({"data": [{input_name: {"content": row, "shape": [len(row)]}} for row in rows]}))
    return path


def measure(analyzer: Path, url: str, model: str, data: Path, concurrency: int, report: Path) -> dict[str, str]:
    """One row of perf_analyzer's report, column name -> value."""
    windows = ["--measurement-interval", "3000", "--stability-percentage", "15", "--max-trials", "6"]
    analyze(analyzer, url, model, data, concurrency, [*windows, "-f", str(report)])
    with report.open(newline="") as lines:
        return next(csv.DictReader(lines))


def analyze(analyzer: Path, url: str, model: str, data: Path, concurrency: int, more: list[str]) -> None:
    """Runs perf_analyzer over gRPC; more: its options that say for how long, and where to write what it found.

    TooShort: nothing was answered in one of its windows. SystemExit: it failed otherwise."""
    command = [
        str(analyzer),
        *("-m", model, "-u", url, "-i", "grpc", "--async", "-b", "1"),
        *("--input-data", str(data), "--concurrency-range", str(concurrency), *more),
    ]
    environment = dict(os.environ)
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(CACHE), *map(str, find_triton().libraries)])
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    if done.returncode:
        said = done.stdout.decode(errors="replace")
        raise (TooShort if _NOTHING in said else SystemExit)(f"{' '.join(command)}\n{said[:3000]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make perf", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="transformer")
    parser.add_argument("--url", help="gRPC address of a running server; without it one is started")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--input-data", type=Path, help="rows in perf_analyzer's JSON format")
    return parser.parse_args()


if __name__ == "__main__":
    main()
