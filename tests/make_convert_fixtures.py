"""Makes tests/checkpoints: tiny random models as transformers saves them, and what transformers computes with them.

Needs torch 2.13.0 and transformers 5.23.0: `python tests/make_convert_fixtures.py`. The weights are halves, to be
small; what is expected is computed in float32 from those.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import small_fairseq
import standard_cases
from safetensors.numpy import save_file
from small_checkpoints import CHECKPOINTS, FOLDER, save

from lightseq_backend.config import Config, GptConfig
from lightseq_backend.export import fairseq
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
        if name in standard_cases.FAMILIES:
            np.savez_compressed(folder / "standard.npz", **standard(folder))
    make_fairseq()


def make_fairseq() -> None:
    """Settings and arrays of checkpoints, apart, so that they are read without torch."""
    shutil.rmtree(small_fairseq.FOLDER, ignore_errors=True)
    small_fairseq.FOLDER.mkdir()
    for name in small_fairseq.COMMITTED:
        model = small_fairseq.original(name)
        for path, parameter in model.named_parameters():
            if "embed_positions" not in path:
                parameter.data = parameter.data.half().float()
        arrays = {path: tensor.half().numpy() for path, tensor in small_fairseq.state(name, model).items()}
        settings = small_fairseq.settings(name)
        (small_fairseq.FOLDER / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")
        save_file(arrays, small_fairseq.FOLDER / f"{name}.safetensors")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            config = fairseq.convert(settings, arrays, Path(name)).config
            values = computed(config, Original(folder, config))
        np.savez_compressed(small_fairseq.FOLDER / f"{name}.expected.npz", **values)


def expected(folder: Path) -> dict[str, Any]:
    config = read(folder).config
    return computed(config, Original(folder, config))


def computed(config: Config, original: Original) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for number, ids in enumerate(random_inputs(config, INPUTS, seed=1)):
        values[f"ids.{number}"] = np.array(ids, np.int16)
        values[f"logits.{number}"] = original.logits(ids)
        values[f"greedy.{number}"] = np.array(original.greedy(ids, STEPS), np.int16)
        if not isinstance(config, GptConfig):
            values[f"encoder.{number}"] = original.encode(ids)
    return values


def standard(folder: Path) -> dict[str, Any]:
    """What generate finds with each of the settings: tokens [settings, rows, hypotheses, steps], -1 behind the last,
    and scores [settings, rows, hypotheses]; there are as many hypotheses as MOST, empty beyond the beams."""
    config = read(folder).config
    model = standard_cases.original(folder)
    all_settings = [*standard_cases.SEARCHES.values(), *standard_cases.RULES.values()]
    rows = standard_cases.committed_rows(config)
    most = standard_cases.COMMITTED
    tokens = np.full((len(all_settings), len(rows), most, standard_cases.MOST), -1, np.int8)
    scores = np.full(tokens.shape[:3], np.nan, np.float32)
    for s, settings in enumerate(all_settings):
        for r, row in enumerate(rows):
            (found,) = standard_cases.generated(model, np.array([row]), settings, [])
            for k, (text, score) in enumerate(found[:most]):
                tokens[s, r, k, : len(text)], scores[s, r, k] = text, score
    return {"tokens": tokens, "scores": scores}


if __name__ == "__main__":
    main()
