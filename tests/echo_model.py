"""A tiny model of no meaning for tests of the server alone: y = x + 1, half = x / 2, and what it saw of its process."""

from __future__ import annotations

from pathlib import Path

CONFIG = """
name: "echo"
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_INT32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_INT32 dims: [ -1 ] }, { name: "half" data_type: TYPE_FP32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_GPU count: 1 } ]
"""

MODEL = """
import json, os, sys
import numpy as np
import triton_python_backend_utils as pb_utils
from lightseq_backend.serving.tensors import to_numpy, to_tensor

class TritonPythonModel:
    def initialize(self, args):
        facts = {
            "kind": args["model_instance_kind"],
            "python": sys.version_info[:3],
            "prefix": sys.prefix,
            "environment": dict(os.environ),
        }
        print("FACTS", json.dumps(facts), flush=True)

    def execute(self, requests):
        responses = []
        for request in requests:
            x = to_numpy(pb_utils.get_input_tensor_by_name(request, "x"))
            wider = np.zeros((x.shape[0], x.shape[1] + 3), np.float32)  # a part of it has strides of its own
            wider[:, : x.shape[1]] = x / 2
            outputs = [to_tensor("y", x + 1), to_tensor("half", wider[:, : x.shape[1]])]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""


def write(repository: Path, *, cpu: bool = True, before_ready: str = "") -> Path:
    """The model's directory in `repository`, with a configuration for the CPU or for the GPU alone."""
    directory = repository / "echo"
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(CONFIG)
    (directory / "1" / "model.py").write_text(MODEL.replace("facts = {", f"{before_ready}\n        facts = {{", 1))
    if cpu:
        (directory / "configs").mkdir()
        (directory / "configs" / "cpu.pbtxt").write_text(CONFIG.replace("KIND_GPU", "KIND_CPU"))
    return repository
