"""A checkpoint's arrays under our names: what the sources have in common.

A post-norm model becomes LightSeq's form, a LayerNorm before each sublayer: every LayerNorm behind a sublayer is the
one before the next, the last is the final one, and the first is the embeddings' (BART) or none (Marian).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lightseq_backend.config import INTERLEAVED, SINUSOIDS, GptConfig, TransformerConfig
from lightseq_backend.export.checkpoint import Arrays

EPSILON = 1e-5  # torch.nn.LayerNorm's, which all encoder-decoder sources here use


def gpt2(config: GptConfig, source: Arrays, output: str) -> dict[str, np.ndarray]:
    """Every array of a GPT. output: what the output projection is called where it is kept; it must be the tokens."""
    hidden, inner = config.hidden, config.inner
    made = {
        "tokens": source.take("wte.weight", config.vocabulary, hidden),
        "positions": source.take("wpe.weight", config.max_positions, hidden),
        **_norm(source, "norm", "ln_f", hidden),
    }
    source.alike("tie_word_embeddings", "wte.weight", output)
    made["output.weight"] = made["tokens"].T
    for layer in range(config.layers):
        ours, theirs = f"layer.{layer}", f"h.{layer}"
        made |= _norm(source, f"{ours}.attention_norm", f"{theirs}.ln_1", hidden)
        made |= _norm(source, f"{ours}.ffn_norm", f"{theirs}.ln_2", hidden)
        for name, of, narrow, wide in (
            ("attention_qkv", "attn.c_attn", hidden, 3 * hidden),
            ("attention_output", "attn.c_proj", hidden, hidden),
            ("ffn_inner", "mlp.c_fc", hidden, inner),
            ("ffn_output", "mlp.c_proj", inner, hidden),
        ):
            made[f"{ours}.{name}.weight"] = source.take(f"{theirs}.{of}.weight", narrow, wide)  # Conv1D: as ours
            made[f"{ours}.{name}.bias"] = source.take(f"{theirs}.{of}.bias", wide)
    return made


def layers(config: TransformerConfig, source: Arrays) -> dict[str, np.ndarray]:
    """Both stacks of an encoder-decoder model, with all their LayerNorms, in the names of fairseq and its heirs."""
    hidden = config.hidden
    made: dict[str, np.ndarray] = {}
    for stack, first in (("encoder", "attention"), ("decoder", "self")):
        sublayers: list[tuple[str, str]] = []  # a sublayer's LayerNorm here, and its name there
        for layer in range(config.encoder_layers if stack == "encoder" else config.decoder_layers):
            ours, theirs = f"{stack}.{layer}", f"{stack}.layers.{layer}"
            sublayers.append((f"{ours}.{first}_norm", f"{theirs}.self_attn_layer_norm"))
            made |= _joined(source, f"{ours}.{first}_qkv", f"{theirs}.self_attn", "qkv", hidden)
            made |= _linear(source, f"{ours}.{first}_output", f"{theirs}.self_attn.out_proj", hidden, hidden)
            if stack == "decoder":
                sublayers.append((f"{ours}.cross_norm", f"{theirs}.encoder_attn_layer_norm"))
                made |= _joined(source, f"{ours}.cross_query", f"{theirs}.encoder_attn", "q", hidden)
                made |= _joined(source, f"{ours}.cross_kv", f"{theirs}.encoder_attn", "kv", hidden)
                made |= _linear(source, f"{ours}.cross_output", f"{theirs}.encoder_attn.out_proj", hidden, hidden)
            sublayers.append((f"{ours}.ffn_norm", f"{theirs}.final_layer_norm"))
            made |= _linear(source, f"{ours}.ffn_inner", f"{theirs}.fc1", hidden, config.inner)
            made |= _linear(source, f"{ours}.ffn_output", f"{theirs}.fc2", config.inner, hidden)
        for our_name, their_name in _placed_norms(stack, sublayers, config):
            made |= _norm(source, our_name, their_name, hidden)
    return made


def _placed_norms(stack: str, sublayers: list[tuple[str, str]], config: TransformerConfig) -> list[tuple[str, str]]:
    """Our LayerNorms of a stack and theirs, one moved on where theirs stand behind their sublayers."""
    ours, theirs = [name for name, _ in sublayers], [name for _, name in sublayers]
    final = f"{stack}.norm"
    of_embedding = f"{stack}.layernorm_embedding"
    norms = config.encoder_norms if stack == "encoder" else config.decoder_norms
    if norms.post:
        placed = list(zip([*ours[1:], final], theirs))
        return [(ours[0], of_embedding), *placed] if norms.first else placed
    has_final = config.encoder_final_norm if stack == "encoder" else config.decoder_final_norm
    placed = [*sublayers, *([(final, f"{stack}.layer_norm")] if has_final else [])]
    side = "source" if stack == "encoder" else "target"
    return [(f"{side}.norm", of_embedding), *placed] if norms.embedding else placed


def tables(
    config: TransformerConfig, source: Arrays, names: tuple[str, str, str], scale: float, tied: bool
) -> dict[str, np.ndarray]:
    """Token tables times the embedding's scale. names: of the encoder's, the decoder's and the output projection.

    Where the output is tied to the decoder's it is scaled as well, and logit_scale takes that off again.
    """
    hidden = config.hidden
    of_source, of_target, of_output = names
    made: dict[tuple[str, float], np.ndarray] = {}

    def table(name: str, rows: int, factor: float) -> np.ndarray:
        if (name, factor) not in made:  # tables that are shared stay so
            array = source.take(name, rows, hidden)
            made[name, factor] = array if factor == 1 else scaled(array, factor)
        return made[name, factor]

    return {
        "source.tokens": table(of_source, config.source_vocabulary, scale),
        "target.tokens": table(of_target, config.target_vocabulary, scale),
        "output.weight": table(of_output, config.target_vocabulary, scale if tied else 1.0).T,
    }


def scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """array * factor: as halves where those stay exact, else float32."""
    exact = math.frexp(factor)[0] == 0.5 and factor >= 1
    if array.dtype == np.float16 and exact:
        with np.errstate(over="ignore"):
            halves = array * np.float16(factor)
        if np.isfinite(halves.max()) and np.isfinite(halves.min()):
            return halves
    return np.multiply(array, np.float32(factor), dtype=np.float32)


def learned_positions(source: Arrays, stack: str, rows: int, width: int, offset: int) -> np.ndarray:
    """A stack's table. offset: rows in front that no token uses, since positions were counted behind padding's id."""
    return source.take(f"{stack}.embed_positions.weight", offset + rows, width)[offset:]


def interleaved_sinusoids(rows: int, width: int) -> np.ndarray:
    """Vaswani et al. 2017, the sines in the first half and the cosines in the second: float32 [rows, width]."""
    features = np.arange(width)
    angles = np.arange(rows)[:, None] / 10000.0 ** (2 * (features // 2) / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)


def fairseq_sinusoids(rows: int, width: int) -> np.ndarray:
    """tensor2tensor's form: sines, then cosines, of frequencies from 1 down to 1 / 10000; an odd width ends in zeros.

    The angles are float32, as there.
    """
    half = width // 2
    step = np.float32(math.log(10000) / (half - 1))
    frequencies = np.exp(-np.arange(half, dtype=np.float32) * step)
    angles = np.arange(rows, dtype=np.float32)[:, None] * frequencies
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, [(0, 0), (0, width - 2 * half)]).astype(np.float32)


SINUSOIDAL = {SINUSOIDS: fairseq_sinusoids, INTERLEAVED: interleaved_sinusoids}  # a kind of positions: its table


def _norm(source: Arrays, ours: str, theirs: str, width: int) -> dict[str, np.ndarray]:
    return {
        f"{ours}.gain": source.take(f"{theirs}.weight", width),
        f"{ours}.bias": source.take(f"{theirs}.bias", width),
    }


def _linear(source: Arrays, ours: str, theirs: str, narrow: int, wide: int) -> dict[str, np.ndarray]:
    """torch.nn.Linear keeps [out, in]; kernels here are [in, out]."""
    return {
        f"{ours}.weight": source.take(f"{theirs}.weight", wide, narrow).T,
        f"{ours}.bias": source.take(f"{theirs}.bias", wide),
    }


def _joined(source: Arrays, ours: str, theirs: str, parts: str, hidden: int) -> dict[str, np.ndarray]:
    """The projections q, k, v of an attention that are read together, side by side."""
    pieces: list[Mapping[str, np.ndarray]] = [
        _linear(source, part, f"{theirs}.{part}_proj", hidden, hidden) for part in parts
    ]
    weights = [piece[f"{part}.weight"] for piece, part in zip(pieces, parts)]
    biases = [piece[f"{part}.bias"] for piece, part in zip(pieces, parts)]
    return {f"{ours}.weight": np.concatenate(weights, axis=1), f"{ours}.bias": np.concatenate(biases)}
