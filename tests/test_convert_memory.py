"""A large checkpoint is converted array by array: peak memory stays well under twice its size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lightseq_backend.weights.safetensors import read_tensors

HIDDEN, INNER, LAYERS, VOCABULARY = 1024, 4096, 12, 256206  # NLLB-200-distilled-600M
SETTINGS = {
    "model_type": "m2m_100",
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "activation_function": "relu",
    "scale_embedding": True,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
    "eos_token_id": 2,
}
# Runs the command with what follows, and prints the most memory it took, in bytes.
MEASURED = """
import resource, sys
from lightseq_backend.__main__ import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.shared.weight", (VOCABULARY, HIDDEN)
    for stack, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for layer in range(LAYERS):
            prefix = f"model.{stack}.layers.{layer}"
            for attention in attentions:
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    yield f"{prefix}.{attention}.{part}.weight", (HIDDEN, HIDDEN)
                    yield f"{prefix}.{attention}.{part}.bias", (HIDDEN,)
            for name, wide, narrow in (("fc1", INNER, HIDDEN), ("fc2", HIDDEN, INNER)):
                yield f"{prefix}.{name}.weight", (wide, narrow)
                yield f"{prefix}.{name}.bias", (wide,)
            for norm in (*(f"{attention}_layer_norm" for attention in attentions), "final_layer_norm"):
                yield f"{prefix}.{norm}.weight", (HIDDEN,)
                yield f"{prefix}.{norm}.bias", (HIDDEN,)
        yield f"model.{stack}.layer_norm.weight", (HIDDEN,)
        yield f"model.{stack}.layer_norm.bias", (HIDDEN,)


def write_checkpoint(folder: Path) -> int:
    """Halves in two shards, all of one random block; returns the bytes of both."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    block = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float16)
    first, *rest = shapes()
    places = {}
    for file, entries in (("model-1.safetensors", [first]), ("model-2.safetensors", rest)):
        header, offset = {}, 0
        for name, shape in entries:
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
            places[name], offset = file, end
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, offset, block.nbytes):
                out.write(block.tobytes()[: min(block.nbytes, offset - start)])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_conversion_takes_less_than_twice_the_checkpoint(tmp_path: Path) -> None:
    source, target = tmp_path / "nllb", tmp_path / "model"
    size = write_checkpoint(source)
    assert size > 1.2e9
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, "convert", str(source), str(target), "--no-check"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak = int(done.stdout.split()[-1])
        assert peak < 2 * size, f"peak {peak / 2**20:.0f} MiB, checkpoint {size / 2**20:.0f} MiB"
        stored = read_tensors(target / "transformer.safetensors")
        assert {array.dtype for array in stored.values() if array.size > 1 << 20} == {np.dtype(np.float16)}
    finally:
        for path in (*source.glob("*.safetensors"), *target.glob("*.safetensors")):
            path.unlink()
