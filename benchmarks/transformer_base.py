"""Transformer-base with random weights, and the sources to translate: what every engine of models.py is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lightseq_backend import weights
from lightseq_backend.config import DecodingOptions, TransformerConfig
from lightseq_backend.weights.layout import entries, layers_of, layout_of, sizes_of

HIDDEN, INNER, HEADS, LAYERS, VOCABULARY = 512, 2048, 8, 6, 32_000
START, PADDING, END = 2, 1, VOCABULARY - 1
SENTENCES, SOURCE_TOKENS, NEW_TOKENS, BEAMS = 8, 24, 24, 4
LENGTH_PENALTY = 0.6
SEED = 1

# Neither is ever chosen: every engine takes exactly NEW_TOKENS steps, and Hugging Face, which gives padding no
# position of its own even in what it generated, computes the same function.
NEVER = -10_000.0

CONFIG = TransformerConfig(
    hidden=HIDDEN,
    inner=INNER,
    heads=HEADS,
    encoder_layers=LAYERS,
    decoder_layers=LAYERS,
    source_vocabulary=VOCABULARY,
    target_vocabulary=VOCABULARY,
    max_positions=128,
    padding_id=PADDING,
    start_id=START,
    end_id=END,
    activation="relu",
    decoding=DecodingOptions(beam_size=BEAMS, length_penalty=LENGTH_PENALTY),
)


def write(path: Path) -> None:
    """Writes the weights as a transformer.pb. Both sides share one embedding, as Hugging Face's class does."""
    arrays = random_arrays(CONFIG)
    tokens = np.random.default_rng(SEED + 1).standard_normal((VOCABULARY, HIDDEN), dtype=np.float32)
    # LightSeq's tables hold sqrt(hidden) already; logits spread by about 2.
    tokens *= 0.1 * np.sqrt(HIDDEN)
    arrays["source.tokens"], arrays["output.weight"] = tokens, tokens.T
    arrays["target.positions"] = arrays["source.positions"]
    arrays["output.bias"][[PADDING, END]] = NEVER
    weights.save(path, CONFIG, arrays)


def sources() -> np.ndarray:
    """int64 [SENTENCES, SOURCE_TOKENS], no padding."""
    return np.random.default_rng(SEED).integers(START + 1, END, (SENTENCES, SOURCE_TOKENS))


def parameters(arrays: dict[str, np.ndarray]) -> int:
    """Bytes of a model's weights; views of other weights count once."""
    return sum(array.nbytes for name, array in arrays.items() if name != "target.tokens")


def shapes(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every array that a model of this configuration is saved with."""
    for entry in entries(layout_of(config), layers_of(config)):
        sizes = sizes_of(config)[entry.side]
        for layer in range(config.decoder_layers) if "*" in entry.name else (0,):
            # "h N 2h" of the file is one [h, 2h] for each decoder layer here.
            shape = sizes.shape(entry.tensor.shape.replace("N ", ""))
            assert shape is not None
            yield entry.name.replace("*", str(layer)), shape


def random_arrays(config: TransformerConfig) -> dict[str, np.ndarray]:
    """Weights of which scores come out neither flat nor sharp; float32."""
    random = np.random.default_rng(SEED)
    arrays = {}
    for name, shape in shapes(config):
        values = random.standard_normal(shape, dtype=np.float32)
        if name.endswith(".weight"):
            values /= np.sqrt(np.float32(shape[0]))
        elif name.endswith(".gain"):
            values = 1 + np.float32(0.1) * values
        elif name.endswith(".bias"):
            values *= np.float32(0.1)
        arrays[name] = values
    return arrays
