"""LightSeq's int8 files for tests: filled with protobuf's own runtime, and the same model's file of floats.

What bytes stand for is spelled out here once more, in float64, on purpose: it is the test's own reading of LightSeq.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import weight_files
from weight_files import DECODERS, HIDDEN

from lightseq_backend.weights.schema import message_type

MESSAGES = {"transformer": weight_files.transformer_message, "gpt": weight_files.gpt_message}
REQUIRED = {"transformer": "QuantTransformer", "gpt": "QuantGpt"}


def messages(kind: str, seed: int = 0, kv_clips: tuple[float, ...] = (0.5,) * DECODERS, **conf: Any) -> tuple[Any, Any]:
    """A model of int8 with random bytes, and as LightSeq's file of floats. conf: fields of model_conf."""
    random = np.random.default_rng(seed)
    floats: Any = MESSAGES[kind](seed, **conf)
    rounded: Any = message_type(REQUIRED[kind])()
    rounded.model_conf.CopyFrom(floats.model_conf)
    for name in ("src_embedding", "trg_embedding") if kind == "transformer" else ("src_embedding",):
        _fill(getattr(rounded, name), getattr(floats, name), kind, random, kv_clips)
    for name in ("encoder_stack", "decoder_stack") if kind == "transformer" else ("encoder_stack",):
        for layer in getattr(floats, name):
            _fill(getattr(rounded, name).add(), layer, kind, random, kv_clips)
    return rounded, floats


def hdf5(path: Path, message: Any) -> Path:
    """The message as LightSeq's exporters write it: uint8 datasets, and each clip_max in its group."""
    import h5py

    with h5py.File(path, "w") as file:
        for part, value in message.ListFields():
            if part.name == "model_conf":
                for field in value.DESCRIPTOR.fields:
                    one = getattr(value, field.name)
                    codes = np.frombuffer(one.encode(), np.int8) if isinstance(one, str) else one
                    file[f"model_conf/{field.name}"] = codes
                continue
            layers = value if part.name.endswith("_stack") else [value]
            for number, layer in enumerate(layers):
                group = f"{part.name}/{number}" if part.name.endswith("_stack") else part.name
                for field in layer.DESCRIPTOR.fields:  # zeros and empty ones as well
                    one = getattr(layer, field.name)
                    stored = np.frombuffer(one, np.uint8) if isinstance(one, bytes) else np.array(one, np.float32)
                    file[f"{group}/{field.name}"] = stored
            if part.name.endswith("_stack"):
                file[f"model_conf/n_{part.name}"] = len(layers)
    return path


def _fill(rounded: Any, floats: Any, kind: str, random: np.random.Generator, kv_clips: tuple[float, ...]) -> None:
    """Bytes instead of kernels and token tables, everything else as it is; `floats` gets what they stand for."""
    for field, values in floats.ListFields():
        if "kernel" not in field.name and field.name != "token_embedding":
            getattr(rounded, field.name).extend(values)
            continue
        stored = random.integers(0, 255, len(values), np.uint8)
        setattr(rounded, field.name, stored.tobytes())
        clips = _set_clips(rounded, field.name, random, kv_clips)
        meant = (stored.astype(np.float64).reshape(len(clips), -1) - 127) * np.array(clips)[:, None] / 127
        if field.name == "token_embedding":
            meant = meant.reshape(HIDDEN, -1).T if kind == "gpt" else meant * np.sqrt(HIDDEN)
        values[:] = meant.ravel()


def _set_clips(rounded: Any, field: str, random: np.random.Generator, kv_clips: tuple[float, ...]) -> list[float]:
    name = "emb_clip_max" if field == "token_embedding" else f"{field}_clip_max"
    if field == "encode_output_project_kernel_kv":
        getattr(rounded, name).extend(kv_clips)
        return list(kv_clips)
    setattr(rounded, name, random.uniform(0.1, 2))
    return [getattr(rounded, name)]  # as float32 has it
