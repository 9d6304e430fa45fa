"""Hugging Face directories: GPT-2, MarianMT, BART, mBART, M2M100 or NLLB and Pegasus, from their settings to ours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightseq_backend.config import (
    INTERLEAVED,
    LEARNED,
    SINUSOIDS,
    GptConfig,
    TransformerConfig,
)
from lightseq_backend.errors import ConfigError
from lightseq_backend.export import arrays
from lightseq_backend.export.checkpoint import Arrays, read_arrays, read_json
from lightseq_backend.export.generation import ENDS, decoding
from lightseq_backend.export.model import Model

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "silu": "silu",
    "swish": "silu",
}
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """One kind of encoder-decoder checkpoint.

    positions        LEARNED (two rows in front), INTERLEAVED (Marian, Pegasus) or SINUSOIDS (M2M100)
    post_norm        LayerNorms stand behind the sublayers
    embedding_norm   layernorm_embedding is there
    fixed            settings that must be as here where config.json has them
    """

    positions: str
    post_norm: bool
    embedding_norm: bool
    fixed: dict[str, Any]


FAMILIES = {
    "marian": Family(INTERLEAVED, True, False, {"normalize_before": False, "normalize_embedding": False}),
    "bart": Family(LEARNED, True, True, {"normalize_before": False, "normalize_embedding": True}),
    "mbart": Family(LEARNED, False, True, {"normalize_before": True, "normalize_embedding": True}),
    "m2m_100": Family(SINUSOIDS, False, False, {"normalize_before": True}),
    "pegasus": Family(
        INTERLEAVED, False, False,
        {"normalize_before": True, "normalize_embedding": False, "add_final_layer_norm": True},
    ),
}  # fmt: skip
GPT2_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Anywhere: what changes the arithmetic and is not done here.
NEVER = ("adapters", "adapter_config", "quantization_config", "rope_scaling")


def read(source: str | Path, forced_id: int | None = None) -> Model:
    """A directory's model. forced_id: instead of the directory's forced_bos_token_id.

    ConfigError names every setting that is not supported, WeightError every faulty array.
    """
    source = Path(source)
    settings = Settings(source)
    kind = settings.get("model_type")
    if kind != "gpt2" and kind not in FAMILIES:
        known = ", ".join(["gpt2", *FAMILIES])
        raise ConfigError(f"{source / 'config.json'}: model_type is {kind!r}; this converts {known}")
    if kind == "gpt2" and forced_id is not None:
        raise ConfigError(f"{source} is a GPT-2 model: nothing is forced there")
    for key in NEVER:
        settings.must_be(key)
    settings.must_be("position_embedding_type", "absolute")
    config = _gpt2_config(settings) if kind == "gpt2" else _encoder_decoder_config(settings, FAMILIES[kind], forced_id)
    stored = Arrays(read_arrays(source), "transformer." if kind == "gpt2" else "model.")
    if isinstance(config, GptConfig):
        made = arrays.gpt2(config, stored, HEAD)
    else:
        made = _encoder_decoder_arrays(config, FAMILIES[kind], settings, stored)
    stored.finish(source, _known_to_be_spare)
    return Model(config, made, settings.notes)


def _known_to_be_spare(name: str) -> bool:
    """Masks, and tables of positions that are computed here."""
    return bool(re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias|(en|de)coder\.embed_positions\.weights?", name))


class Settings:
    """config.json and generation_config.json of a directory: what is asked of them, and what they ask for in vain."""

    def __init__(self, source: Path):
        self._path = source / "config.json"
        self._values = read_json(self._path)
        generation = source / "generation_config.json"
        self._generation = read_json(generation) if generation.is_file() else {}
        self.faults: list[str] = []
        self.notes: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def generation(self, key: str, default: Any = None) -> Any:
        """How text is chosen; older directories say so in config.json."""
        value = self._generation.get(key, self._values.get(key))
        return default if value is None else value

    def must_be(self, key: str, *allowed: Any) -> None:
        """A fault where the key is there with another value."""
        value = self._values.get(key)
        if value is not None and value not in allowed:
            supported = f"only {' or '.join(map(repr, allowed))} is" if allowed else "that is not"
            self.faults.append(f"{key} is {value!r}; {supported} supported")

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number; a fault and 1 where it is none."""
        value = self.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self.faults.append(f"{key} is {value!r}; it must be a whole number")
        return 1

    def token(self, key: str) -> int:
        """The id of a special token; the first of a list, of which those of eos_token_id become options."""
        value = self.generation(key)
        if isinstance(value, list) and value:
            if len(value) > 1 and key != ENDS:
                self.notes.append(f"{key} is {value}: only {value[0]} counts here")
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self.faults.append(f"{key} is {value!r}; it must be an id")
        return 0

    def activation(self, key: str) -> str:
        value = self.get(key)
        if value in ACTIVATIONS:
            return ACTIVATIONS[value]
        self.faults.append(f"{key} is {value!r}; supported are {', '.join(ACTIVATIONS)}")
        return "relu"

    def build(self, made: Callable[..., Any], **values: Any) -> Any:
        """The configuration; ConfigError with every fault so far and those that it finds itself."""
        try:
            config = None if self.faults else made(**values)
        except ConfigError as error:
            self.faults += str(error).splitlines()
        if self.faults:
            raise ConfigError("\n  ".join([f"{self._path} cannot be converted:", *self.faults]))
        return config


# GPT-2 ---------------------------------------------------------------------------------------------------------------


def _gpt2_config(settings: Settings) -> GptConfig:
    for key, value in GPT2_FIXED.items():
        settings.must_be(key, value)
    hidden, vocabulary = settings.number("n_embd", 768), settings.number("vocab_size", 50257)
    built: GptConfig = settings.build(
        GptConfig,
        hidden=hidden,
        inner=settings.number("n_inner", 4 * hidden),
        heads=settings.number("n_head", 12),
        layers=settings.number("n_layer", 12),
        vocabulary=vocabulary,
        max_positions=settings.number("n_positions", settings.get("n_ctx", 1024)),
        padding_id=vocabulary,  # GPT-2 has none: an id that no text contains
        end_id=settings.token(ENDS),
        activation=settings.activation("activation_function"),
        norm_epsilon=float(settings.get("layer_norm_epsilon", 1e-5)),
        positions=LEARNED,
        decoding=decoding(settings),
    )
    return built


# Encoder and decoder -------------------------------------------------------------------------------------------------


def _encoder_decoder_config(settings: Settings, family: Family, forced_id: int | None) -> TransformerConfig:
    for key, value in family.fixed.items():
        settings.must_be(key, value)
    settings.must_be("static_position_embeddings", family.positions != LEARNED)
    for side in ("attention_heads", "ffn_dim"):
        settings.must_be(f"decoder_{side}", settings.get(f"encoder_{side}"))
    settings.must_be("is_encoder_decoder", True)
    vocabulary, positions = settings.number("vocab_size"), settings.number("max_position_embeddings", 1024)
    never_id = _never_id(settings)
    forced_id = _forced_id(settings) if forced_id is None else forced_id
    built: TransformerConfig = settings.build(
        TransformerConfig,
        hidden=settings.number("d_model"),
        inner=settings.number("encoder_ffn_dim"),
        heads=settings.number("encoder_attention_heads"),
        encoder_layers=settings.number("encoder_layers"),
        decoder_layers=settings.number("decoder_layers"),
        source_vocabulary=vocabulary,
        target_vocabulary=settings.number("decoder_vocab_size", vocabulary),
        max_positions=positions,
        padding_id=settings.number("pad_token_id"),
        start_id=settings.token("decoder_start_token_id"),
        end_id=settings.token(ENDS),
        extra_decode_length=positions,
        post_norm=family.post_norm,
        activation=settings.activation("activation_function"),
        scaled_embedding=_scales(settings) and _ties(settings),
        norm_epsilon=arrays.EPSILON,
        first_norm=family.embedding_norm or not family.post_norm,
        embedding_norm=family.embedding_norm and not family.post_norm,
        positions=family.positions,
        # fairseq, where all but Marian's come from, counts positions behind padding's id; BART kept the first two.
        position_offset={INTERLEAVED: 0, LEARNED: 2, SINUSOIDS: settings.number("pad_token_id") + 1}[family.positions],
        never_id=never_id,
        forced_id=forced_id,
        decoding=decoding(settings, forced_id is not None, never_id),
    )
    return built


def _scales(settings: Settings) -> bool:
    """Whether embeddings are multiplied by sqrt(hidden)."""
    return bool(settings.get("scale_embedding", settings.get("model_type") == "m2m_100"))


def _ties(settings: Settings) -> bool:
    """Whether the decoder's token table is the output projection too."""
    return bool(settings.get("tie_word_embeddings", True))


def _never_id(settings: Settings) -> int | None:
    """The first bad word of one id (OPUS-MT's padding): never generated by any method, and for nothing."""
    return next((int(word[0]) for word in settings.generation("bad_words_ids", []) if len(word) == 1), None)


def _forced_id(settings: Settings) -> int | None:
    return None if settings.generation("forced_bos_token_id") is None else settings.token("forced_bos_token_id")


def _encoder_decoder_arrays(
    config: TransformerConfig, family: Family, settings: Settings, source: Arrays
) -> dict[str, np.ndarray]:
    scale = math.sqrt(config.hidden) if _scales(settings) else 1.0
    made = arrays.tables(config, source, _table_names(settings, source), scale, _ties(settings))
    made |= _positions(config, source)
    made["output.bias"] = np.zeros(config.target_vocabulary, np.float32)
    if "final_logits_bias" in source:
        made["output.bias"] = source.take("final_logits_bias", 1, config.target_vocabulary)[0]
    return made | arrays.layers(config, source)


def _positions(config: TransformerConfig, source: Arrays) -> dict[str, np.ndarray]:
    # A file may keep Marian's and Pegasus's sinusoids, and transformers then takes them from there.
    rows, width, offset = config.max_positions, config.hidden, config.position_offset
    kept = config.positions == INTERLEAVED and "encoder.embed_positions.weight" in source
    if config.positions == LEARNED or kept:
        return {
            f"{side}.positions": arrays.learned_positions(source, stack, rows, width, offset)
            for side, stack in (("source", "encoder"), ("target", "decoder"))
        }
    table = arrays.SINUSOIDAL[config.positions](offset + rows, width)[offset:]
    return {"source.positions": table, "target.positions": table}


def _table_names(settings: Settings, source: Arrays) -> tuple[str, str, str]:
    """Where the encoder's tokens, the decoder's and the output projection are. A file may name a shared table often;
    a fault where those then differ."""
    shared, encoder, decoder, output = (
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        HEAD,
    )
    if not _ties(settings):
        source.asked.add(shared)  # of no use where both stacks have their own
        return source.first(encoder, shared), source.first(decoder, shared), output
    if not settings.get("share_encoder_decoder_embeddings", True):
        target = source.alike("tie_word_embeddings", decoder, output)
        return encoder, target, target
    table = source.alike("tie_word_embeddings", shared, encoder, decoder, output)
    return table, table, table
