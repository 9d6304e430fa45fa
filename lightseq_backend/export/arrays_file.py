"""Arrays of any program in an .npz file, under our names, and their configuration in a .json file beside it.

Beyond that configuration the .json says what the program's habits leave to be done here: docs/convert.md lists it.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from lightseq_backend.config import Config, TransformerConfig
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.export.arrays import SINUSOIDAL, scaled
from lightseq_backend.export.checkpoint import Arrays, read_json
from lightseq_backend.export.model import Model
from lightseq_backend.weights import description
from lightseq_backend.weights.layout import shapes_of

ROOT = "sqrt(hidden)"
# What may be asked for, by key: the values that it may have, the default first.
HABITS: dict[str, tuple[Any, ...]] = {
    "embedding_scale": (1, ROOT),
    "tied_output": (True, False),
    "zero_biases": (False, True),
}


def read(path: Path) -> Model:
    """ConfigError for the settings, WeightError naming every array that is missing, superfluous or of a wrong shape."""
    config, habits = _read_settings(path.with_suffix(".json"))
    source = Arrays(read_arrays(path), "")
    scale = math.sqrt(config.hidden) if habits["embedding_scale"] == ROOT else 1.0
    made: dict[str, np.ndarray] = {}
    shapes = shapes_of(config)
    for name, shape in shapes.items():
        if name == "output.weight" and habits["tied_output"]:
            continue
        if name.endswith("positions") and config.positions in SINUSOIDAL:
            first, (rows, width) = config.position_offset, shape
            made[name] = SINUSOIDAL[config.positions](first + rows, width)[first:]
        elif habits["zero_biases"] and name not in source and _is_bias(name, shapes):
            made[name] = np.zeros(shape, np.float32)
        else:
            array = source.take(name, *shape)
            made[name] = scaled(array, scale) if name.endswith("tokens") and scale != 1 else array
    if habits["tied_output"]:
        made["output.weight"] = made["target.tokens" if isinstance(config, TransformerConfig) else "tokens"].T
    source.finish(path, lambda name: False)
    return Model(config, made, [])


def settings_beside(path: Path) -> dict[str, Any]:
    """What the .json beside some arrays says, unchecked."""
    return read_json(path.with_suffix(".json"))


def _read_settings(path: Path) -> tuple[Config, dict[str, Any]]:
    values = read_json(path)
    faults: list[str] = []
    habits = {key: values.pop(key, allowed[0]) for key, allowed in HABITS.items()}
    for key, value in habits.items():
        if value not in HABITS[key]:
            faults.append(f"{key} is {value!r}; it may be {' or '.join(map(repr, HABITS[key]))}")
    scales, ties = habits["embedding_scale"] == ROOT, bool(habits["tied_output"])
    if values.get("kind") == "transformer":
        # Logits are divided by the scale that a table has which goes in and comes out.
        if scales and "scaled_embedding" in values:
            faults.append(f"scaled_embedding follows from embedding_scale, {ROOT!r}: leave it out")
        if scales:
            values["scaled_embedding"] = ties
    elif scales:
        faults.append(f"embedding_scale is {ROOT!r}; that is for transformers alone")
    config = description.read(values, ties, faults)
    if config is None or faults:
        raise ConfigError("\n  ".join([f"{path} cannot be used:", *faults]))
    return config, habits


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise WeightError(f"{path} cannot be read: {error}") from None


def _is_bias(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Of a projection, not of a LayerNorm."""
    return name.endswith(".bias") and f"{name.removesuffix('bias')}gain" not in shapes
