"""How long a server takes to load Transformer-big, in fresh processes: first without compiled kernels, then with.

    python -m benchmarks.gpu_load [--records FILE] [--precision fp16]

Each process loads as serving does, by its own function: `import` is Python and all modules, `file` is reading the
weights (from the page cache), `model` is uploading, folding and packing them, `capture` is the engine: memory, kernels,
graphs. What overlaps is counted in the part that waits for it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_device, gpu_models
from benchmarks.gpu_models import MODELS, TINY
from benchmarks.gpu_records import OURS, Record, Recorder, parser, precisions
from lightseq_backend import weights
from lightseq_backend.serving import loading
from lightseq_backend.serving.settings import read_settings

KINDS = {"cuda": "GPU", "cpu": "CPU"}  # Triton's names
RUNS = ("kernels not compiled", "kernels compiled", "kernels compiled, again")
PARTS = ("import", "file", "model", "capture")


def main() -> None:
    made = parser("gpu_load", __doc__)
    made.add_argument("--child", nargs=4, metavar=("FOLDER", "DEVICE", "PRECISION", "STARTED"), help="one load")
    options = made.parse_args()
    if options.child:
        folder, device, precision, started = options.child
        print(json.dumps(load(Path(folder), device, precision, float(started))))
        return
    gpu_device.require(options.device)
    model = MODELS["big"] if options.device == "cuda" else TINY["tiny"]
    with (
        tempfile.TemporaryDirectory(prefix="lightseq-load-") as folder,
        Recorder("load", options.records, gpu_device.conditions(options.device)) as recorder,
    ):
        path = Path(folder) / "transformer.pb"
        weights.save(path, *gpu_models.build(model))
        path.read_bytes()  # into the page cache
        for precision in precisions(options)[:1]:
            for run in RUNS:
                seconds = in_process(Path(folder), options.device, precision)
                for part, value in {**seconds, "all": sum(seconds.values())}.items():
                    recorder.add(Record(OURS, model.name, precision, 0, 0, f"load, {run}: {part}", value, "s"))


def in_process(folder: Path, device: str, precision: str) -> dict[str, float]:
    """Seconds of each part of a load in a process of its own; its compiled kernels are kept in the folder."""
    environment = {**os.environ, "CUPY_CACHE_DIR": str(folder / "kernels")}
    child = ["--child", str(folder), device, precision, repr(time.time())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_load", *child],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def load(folder: Path, device: str, precision: str, started: float) -> dict[str, float]:
    """Loads folder/transformer.pb as serving does. started: when this process was, by time.time()."""
    settings = read_settings(_arguments(folder, device, precision), {})
    if device == "cuda":
        importlib.import_module("cupy")
    seconds = dict.fromkeys(PARTS, 0.0)
    seconds["import"] = time.time() - started

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                seconds[part] += time.perf_counter() - start

        return run

    loading.weights.load = timed("file", loading.weights.load)
    loading.Transformer = timed("model", loading.Transformer)
    loading.Engine = timed("capture", loading.Engine)
    start = time.perf_counter()
    loading.load_engine(settings)
    # The device is opened before the weights are read: that belongs to none of the parts above.
    rest = time.perf_counter() - start - sum(seconds[part] for part in PARTS[1:])
    return {**seconds, "device": rest}


def _arguments(folder: Path, device: str, precision: str) -> dict[str, str]:
    """What Triton would hand to a model of that folder."""
    config = {
        "max_batch_size": 16,
        "input": [{"name": "source_ids", "data_type": "TYPE_INT32", "dims": [-1]}],
        "output": [
            {"name": "target_ids", "data_type": "TYPE_INT32", "dims": [-1, -1]},
            {"name": "target_scores", "data_type": "TYPE_FP32", "dims": [-1]},
        ],
        "parameters": {"precision": {"string_value": precision}},
    }
    return {
        "model_config": json.dumps(config),
        "model_name": "transformer",
        "model_version": "1",
        "model_instance_name": "transformer_0_0",
        "model_instance_kind": KINDS[device],
        "model_instance_device_id": "0",
        "model_repository": str(folder),
    }


if __name__ == "__main__":
    main()
