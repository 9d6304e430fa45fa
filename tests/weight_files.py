"""Weight files for tests: the golden ones, and small ones that protobuf's own runtime fills and writes.

The sizes of every field are spelled out here once more on purpose: they are the test's own reading of LightSeq.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightseq_backend.weights.schema import message_type

GOLDEN = Path(os.environ.get("LIGHTSEQ_GOLDEN", Path(__file__).parent / "golden"))

# Sizes that all differ, so that no two fields can be mistaken for each other by their count.
HIDDEN, INNER, HEADS, POSITIONS, SOURCE, TARGET, ENCODERS, DECODERS = 8, 12, 2, 7, 11, 13, 2, 3

ENCODER_COUNTS = {
    "multihead_norm_scale": 8,
    "multihead_norm_bias": 8,
    "multihead_project_kernel_qkv": 8 * 3 * 8,
    "multihead_project_bias_qkv": 3 * 8,
    "multihead_project_kernel_output": 8 * 8,
    "multihead_project_bias_output": 8,
    "ffn_norm_scale": 8,
    "ffn_norm_bias": 8,
    "ffn_first_kernel": 8 * 12,
    "ffn_first_bias": 12,
    "ffn_second_kernel": 12 * 8,
    "ffn_second_bias": 8,
}
DECODER_COUNTS = {
    "self_norm_scale": 8,
    "self_norm_bias": 8,
    "self_project_kernel_qkv": 8 * 3 * 8,
    "self_project_bias_qkv": 3 * 8,
    "self_project_kernel_output": 8 * 8,
    "self_project_bias_output": 8,
    "encdec_norm_scale": 8,
    "encdec_norm_bias": 8,
    "encdec_project_kernel_q": 8 * 8,
    "encdec_project_bias_q": 8,
    "encdec_project_kernel_output": 8 * 8,
    "encdec_project_bias_output": 8,
    "ffn_norm_scale": 8,
    "ffn_norm_bias": 8,
    "ffn_first_kernel": 8 * 12,
    "ffn_first_bias": 12,
    "ffn_second_kernel": 12 * 8,
    "ffn_second_bias": 8,
}
SOURCE_COUNTS = {"token_embedding": 11 * 8, "position_embedding": 7 * 8, "norm_scale": 8, "norm_bias": 8}
TARGET_COUNTS = {
    "token_embedding": 8 * 13,
    "position_embedding": 7 * 8,
    "norm_scale": 8,
    "norm_bias": 8,
    "encode_output_project_kernel_kv": 8 * 3 * 2 * 8,
    "encode_output_project_bias_kv": 3 * 2 * 8,
    "shared_bias": 13,
}


def golden(name: str) -> Path:
    """The path of a golden file, which must be there: a test that skips itself proves nothing."""
    path = GOLDEN / name
    if not path.is_file():
        pytest.fail(f"{path} is missing; LIGHTSEQ_GOLDEN can name another folder")
    return path


def golden_names() -> list[str]:
    return sorted(path.name for path in GOLDEN.glob("*.pb")) or ["t01_base.pb"]


def transformer_message(seed: int = 0, **conf: Any) -> Any:
    """A whole Transformer message with random weights; `conf` are fields of model_conf."""
    random = np.random.default_rng(seed)
    message: Any = message_type("Transformer")()
    _fill(message.src_embedding, SOURCE_COUNTS, random)
    _fill(message.trg_embedding, TARGET_COUNTS, random)
    for _ in range(ENCODERS):
        _fill(message.encoder_stack.add(), ENCODER_COUNTS, random)
    for _ in range(DECODERS):
        _fill(message.decoder_stack.add(), DECODER_COUNTS, random)
    _configure(message.model_conf, {"head_num": HEADS, "beam_size": 4, "trg_start_id": 5, **conf})
    return message


def gpt_message(seed: int = 0, **conf: Any) -> Any:
    """A whole Gpt message with random weights; `conf` are fields of model_conf."""
    random = np.random.default_rng(seed)
    message: Any = message_type("Gpt")()
    _fill(message.src_embedding, SOURCE_COUNTS, random)
    for _ in range(ENCODERS):
        _fill(message.encoder_stack.add(), ENCODER_COUNTS, random)
    _configure(message.model_conf, {"head_num": HEADS, **conf})
    return message


def written(path: Path, message: Any) -> Path:
    """Write a message with protobuf's own runtime."""
    path.write_bytes(message.SerializeToString())
    return path


def _fill(part: Any, counts: dict[str, int], random: np.random.Generator) -> None:
    for field, count in counts.items():
        getattr(part, field).extend(random.standard_normal(count, dtype=np.float32))


def _configure(conf: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(conf, name, value)
