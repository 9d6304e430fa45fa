"""Paragraphs of packages that the English model never saw, with what transformers makes of them.

gpt_en.json holds their ids and the sums of the log-probabilities of all ids but the first, computed in float32 from the
weights of model_repository/gpt_en (`python -m examples.gpt.evaluate --fixture tests/gpt_en.json`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightseq_backend

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "model_repository" / "gpt_en"
HELD_OUT: list[dict[str, Any]] = json.loads((ROOT / "tests" / "gpt_en.json").read_text(encoding="utf-8"))
WITHIN = 1e-3  # of PyTorch's perplexity, in any precision


def perplexity(log_probabilities: list[float]) -> float:
    """Of all paragraphs together, by token."""
    return math.exp(-sum(log_probabilities) / sum(len(one["ids"]) - 1 for one in HELD_OUT))


def pytorch_perplexity() -> float:
    return perplexity([one["log_probability"] for one in HELD_OUT])


def engine_perplexity(device: str, precision: str) -> float:
    """That of the engine, without a server."""
    with lightseq_backend.load(MODEL, device=device, precision=precision) as model:
        return perplexity([score.total for score in model.score([one["ids"] for one in HELD_OUT])])
