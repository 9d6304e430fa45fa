"""Makes tests/checkpoints: tiny random models as transformers saves them, and what transformers computes with them.

Needs torch 2.13.0 and transformers 5.23.0: `python tests/make_convert_fixtures.py`. The weights are halves, to be
small; what is expected is computed in float32 from those.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from small_checkpoints import CHECKPOINTS, FOLDER, save

from lightseq_backend.export.huggingface import read
from lightseq_backend.export.original import Original
from lightseq_backend.proof import random_inputs

INPUTS, STEPS = 4, 16


def main() -> None:
    for name in CHECKPOINTS:
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        save(name, folder, half=True, **({"max_shard_size": "12KB"} if name == "bart" else {}))
        np.savez_compressed(folder / "expected.npz", **expected(folder))


def expected(folder: Path) -> dict[str, Any]:
    config = read(folder).config
    original = Original(folder, config)
    values: dict[str, Any] = {}
    for number, ids in enumerate(random_inputs(config, INPUTS, seed=1)):
        values[f"ids.{number}"] = np.array(ids, np.int16)
        values[f"logits.{number}"] = original.logits(ids)
        values[f"greedy.{number}"] = np.array(original.greedy(ids, STEPS), np.int16)
        if folder.name != "gpt2":
            values[f"encoder.{number}"] = original.encode(ids)
    return values


if __name__ == "__main__":
    main()
