"""LightSeq's Transformer and GPT-2 inference: `load` a model here, or serve it with Triton (docs/)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightseq_backend.loaded import Model


def load(
    path: str | Path,
    *,
    device: str = "auto",
    precision: str | None = None,
    dialect: str | None = None,
    tokenizer: str | Path | None = None,
    source_language: str | None = None,
    slots: int = 64,
    window: int = 512,
) -> Model:
    """A model to call: see `lightseq_backend.loaded.Model` and docs/python.md.

    path             a weight file, or a model directory, whose config.pbtxt says what is not said here; one without
                     that holds transformer.pb, gpt.safetensors, ...
    device           "cpu", "gpu" or "auto": the GPU where one can be used, else the CPU
    precision        "fp16" (GPU), "fp32" or "int8" (weights); fp16 on a GPU and fp32 on a CPU where it is not said
    dialect          "head" or "v0": the LightSeq release whose reading of the file holds
    tokenizer        directory of the tokenizer's files; that of the weights where it is not said
    source_language  for tokenizers of many languages
    slots            rows that decode at the same time: beams and samples of all sequences
    window           rows that are read ahead of the answers, sorted by length and sent together

    ConfigError or WeightError says what is wrong with the files or the device.
    """
    from lightseq_backend.loaded import Model

    return Model(
        path,
        device=device,
        precision=precision,
        dialect=dialect,
        tokenizer=tokenizer,
        source_language=source_language,
        slots=slots,
        window=window,
    )
