"""The models that are measured on a GPU: shapes, random weights, bytes and operations of a pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.config import Config, DecodingOptions, GptConfig, TransformerConfig

BEAMS = 4
PROMPT = 32  # tokens of a GPT prompt, and as many are generated
SIZES = {"fp16": 2, "fp32": 4, "int8": 2}  # bytes of a number, by precision
_WEIGHT_SIZES = SIZES | {"int8": 1}
_SCALE = 4  # bytes of a column's, in int8
_BLOCK = 4_194_301  # random numbers there are; a prime, so that no two rows of a table are equal
_NEVER = -1e4  # bias of the end id: every search takes all the steps it may


class Shape(NamedTuple):
    hidden: int
    inner: int
    heads: int
    layers: int  # of each stack
    vocabulary: int
    positions: int


class Model(NamedTuple):
    """name is for records and options, title for people."""

    name: str
    title: str
    shape: Shape
    translates: bool
    batches: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of a source, or of a prompt; as many are generated

    @property
    def beams(self) -> int:
        return BEAMS if self.translates else 1


_LENGTHS = (6, 24, 70)
MODELS = {
    model.name: model
    for model in (
        Model("big", "Transformer-big", Shape(1024, 4096, 16, 6, 30016, 128), True, (1, 8, 32), _LENGTHS),
        Model("base", "Transformer-base", Shape(512, 2048, 8, 6, 32000, 128), True, (1, 8, 32), _LENGTHS),
        Model("gpt2", "GPT-2 124M", Shape(768, 3072, 12, 12, 50257, 1024), False, (1, 8), (PROMPT,)),
        Model("xl", "GPT-2 XL", Shape(1600, 6400, 25, 48, 50257, 1024), False, (1, 8), (PROMPT,)),
    )
}
# For trying the programs on a machine without a GPU, where no time means anything.
TINY = {
    model.name: model
    for model in (
        Model("tiny", "a tiny Transformer", Shape(32, 64, 2, 2, 211, 48), True, (1, 3), (6, 24)),
        Model("tiny-gpt", "a tiny GPT", Shape(32, 64, 2, 2, 211, 96), False, (1, 3), (PROMPT,)),
    )
}


def build(model: Model) -> tuple[Config, dict[str, np.ndarray]]:
    """Configuration and float32 weights, named as weights.load names them; layers share their memory on the host."""
    return (_transformer if model.translates else _gpt)(model.shape)


def rows(model: Model, batch: int, length: int) -> list[np.ndarray]:
    """Sources or prompts, all different, without padding."""
    usable = model.shape.vocabulary - 4
    return [3 + (np.arange(length) + 7 * i) % usable for i in range(batch)]


def weight_bytes(narrow: int, wide: int, precision: str) -> int:
    """Of a matrix, with the scales that int8 has."""
    return narrow * wide * _WEIGHT_SIZES[precision] + (_SCALE * wide if precision == "int8" else 0)


def decoder_bytes(model: Model, precision: str) -> int:
    """Matrices that a decode step reads, once each."""
    hidden, _, _, layers, vocabulary, _ = model.shape
    cross = [(hidden, hidden)] * 2 if model.translates else []
    matrices = layers * (_layer_matrices(model) + cross) + [(hidden, vocabulary)]
    return sum(weight_bytes(*matrix, precision) for matrix in matrices)


def reading_bytes(model: Model, precision: str) -> int:
    """Matrices that reading sources or prompts takes: the encoder's and the decoder's memory, or all layers'."""
    return sum(weight_bytes(*matrix, precision) for matrix in _reading_matrices(model))


def reading_operations(model: Model, batch: int, length: int) -> int:
    """Multiplications and additions of that pass: its products with weights, and attention (half of it if causal)."""
    hidden, _, _, layers, _, _ = model.shape
    attention = 4 * batch * length**2 * hidden // (1 if model.translates else 2)
    products = sum(narrow * wide for narrow, wide in _reading_matrices(model))
    return 2 * batch * length * products + layers * attention


def scoring_operations(model: Model, batch: int, length: int) -> int:
    """Those of reading texts and of the logits of all their tokens."""
    logits = 2 * batch * length * model.shape.hidden * model.shape.vocabulary
    return reading_operations(model, batch, length) + logits


def _layer_matrices(model: Model) -> list[tuple[int, int]]:
    """[inner, wide] of self-attention and FFN."""
    hidden, inner = model.shape.hidden, model.shape.inner
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]


def _reading_matrices(model: Model) -> list[tuple[int, int]]:
    memory = [(model.shape.hidden, 2 * model.shape.hidden)] if model.translates else []
    return model.shape.layers * (_layer_matrices(model) + memory)


def _transformer(shape: Shape) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    hidden, inner, heads, layers, vocabulary, positions = shape
    config = TransformerConfig(
        hidden, inner, heads, layers, layers, vocabulary, vocabulary, positions, 0, 1, vocabulary - 1,
        extra_decode_length=positions, decoding=DecodingOptions(beam_size=BEAMS),
    )  # fmt: skip
    arrays: dict[str, np.ndarray] = {}
    attention = (("qkv", hidden, 3 * hidden), ("output", hidden, hidden))
    cross = (("query", hidden, hidden), ("kv", hidden, 2 * hidden), ("output", hidden, hidden))
    for i in range(layers):
        arrays |= _layer(f"encoder.{i}.", {"attention": attention}, hidden, inner)
        arrays |= _layer(f"decoder.{i}.", {"self": attention, "cross": cross}, hidden, inner)
    for side, stack in (("source", "encoder"), ("target", "decoder")):
        arrays[f"{side}.positions"] = _random(positions, hidden)
        arrays |= _norm(f"{stack}.norm", hidden)
    arrays["source.tokens"] = _random(vocabulary, hidden)
    arrays["output.weight"], arrays["output.bias"] = _random(hidden, vocabulary), np.zeros(vocabulary, np.float32)
    arrays["output.bias"][config.end_id] = _NEVER
    arrays["target.tokens"] = arrays["output.weight"].T
    return config, arrays


def _gpt(shape: Shape) -> tuple[GptConfig, dict[str, np.ndarray]]:
    hidden, inner, heads, layers, vocabulary, positions = shape
    config = GptConfig(
        hidden, inner, heads, layers, vocabulary, positions, vocabulary, vocabulary - 1,
        decoding=DecodingOptions("greedy"),
    )  # fmt: skip
    # Small, as trained embeddings are: a token must not outweigh all layers, or the text repeats one token.
    tokens = _random(vocabulary, hidden, 0.02)
    tokens[config.end_id] = 0
    arrays = {"tokens": tokens, "positions": _random(positions, hidden, 0.02), "output.weight": tokens.T}
    attention = (("qkv", hidden, 3 * hidden), ("output", hidden, hidden))
    for i in range(layers):
        arrays |= _layer(f"layer.{i}.", {"attention": attention}, hidden, inner)
    return config, arrays | _norm("norm", hidden)


def _layer(prefix: str, blocks: dict[str, Any], hidden: int, inner: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, products in {**blocks, "ffn": (("inner", hidden, inner), ("output", inner, hidden))}.items():
        arrays |= _norm(f"{prefix}{name}_norm", hidden)
        for product, narrow, wide in products:
            arrays[f"{prefix}{name}_{product}.weight"] = _weight(narrow, wide)
            arrays[f"{prefix}{name}_{product}.bias"] = np.zeros(wide, np.float32)
    return arrays


def _norm(name: str, hidden: int) -> dict[str, np.ndarray]:
    return {f"{name}.gain": np.ones(hidden, np.float32), f"{name}.bias": np.zeros(hidden, np.float32)}


@functools.lru_cache(maxsize=8)
def _weight(narrow: int, wide: int) -> np.ndarray:
    """One for all layers: what a weight holds does not matter to the time, but making them all would."""
    return _random(narrow, wide, narrow**-0.5)


def _random(rows: int, columns: int, deviation: float = 1.0) -> np.ndarray:
    return np.concatenate([*_pieces(rows * columns, np.float32(deviation))]).reshape(rows, columns)


def _pieces(count: int, deviation: np.float32) -> Iterator[np.ndarray]:
    block = _block() if deviation == 1 else _block() * deviation
    yield from [block] * (count // len(block))
    yield block[: count % len(block)]


@functools.cache
def _block() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
