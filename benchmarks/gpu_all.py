"""All GPU benchmarks, one after another, and their report: `make bench-gpu`.

    python -m benchmarks.gpu_all [--quick] [--compile] [--only models,peers] [--precision fp16]
        [--records FOLDER] [--results FOLDER]

Each is a program of its own. What one has measured is in the folder of records even if it breaks; the report is written
of what there is, and the exit status says whether all went well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import gpu_device, gpu_report

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"models": "gpu", "peers": "gpu_peers", "operations": "gpu_ops", "load": "gpu_load"}
NOT_QUICK = ("operations", "load")


def main() -> None:
    options = _arguments()
    gpu_device.require(options.device)
    names = options.only.split(",") if options.only else [*PROGRAMS]
    if options.quick and not options.only:
        names = [name for name in names if name not in NOT_QUICK]
    passed_on = ["--device", options.device, *(["--quick"] if options.quick else [])]
    passed_on += ["--precision", options.precision] if options.precision else []
    options.records.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        records = options.records.resolve() / f"{PROGRAMS[name]}.jsonl"
        records.unlink(missing_ok=True)
        extra = ["--compile"] if options.compile and name == "peers" else []
        command = [sys.executable, "-m", f"benchmarks.{PROGRAMS[name]}", "--records", str(records), *passed_on, *extra]
        print(f"\n== {name}: {' '.join(command[1:])}", flush=True)
        start = time.perf_counter()
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
    files = sorted(options.records.glob("*.jsonl"))
    if not files:
        raise SystemExit("nothing was measured")
    for path in gpu_report.write(options.results, *gpu_report.read(files)):
        print(f"written: {path}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the report has what was measured before")


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_all", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="what the README's table needs: models and peers, fp16")
    made.add_argument("--compile", action="store_true", help="peers also under torch.compile: minutes a model")
    made.add_argument(
        "--precision", help="of fp16, fp32, int8, with commas between (default: fp16,fp32; --quick: fp16)"
    )
    made.add_argument("--only", help=f"programs with commas between: {','.join(PROGRAMS)}")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny models, to try the programs")
    made.add_argument("--records", type=Path, default=ROOT / "build" / "gpu_records", help="folder of records")
    made.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the report")
    return made.parse_args()


if __name__ == "__main__":
    main()
