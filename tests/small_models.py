"""Random small models: a configuration and arrays under the names that weights/layout.py lists.

The names and shapes are written out here once more, from lightseq's own layout: kernels are [in, out], the output
table is [hidden, vocabulary]. Sizes are chosen so that scores spread as those of a trained model do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from lightseq_backend.config import Config, EngineConfig, GptConfig, TransformerConfig
from lightseq_backend.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.ops import cpu

Arrays = dict[str, np.ndarray]
SPREAD = 2.5  # standard deviation of the logits, about


def transformer(seed: int = 0, **settings: Any) -> tuple[TransformerConfig, Arrays]:
    """A Transformer; `settings` are fields of TransformerConfig, and `end_bias` is added to the end id's logit.

    untied: the output projection is a matrix of its own.
    """
    end_bias, untied = settings.pop("end_bias", 0.0), settings.pop("untied", False)
    sizes: dict[str, Any] = {
        "hidden": 16,
        "inner": 24,
        "heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "source_vocabulary": 13,
        "target_vocabulary": 11,
        "max_positions": 12,
        "padding_id": 0,
        "start_id": 1,
        "end_id": 2,
        "extra_decode_length": 4,
    }
    config = TransformerConfig(**{**sizes, **settings})
    random = np.random.default_rng(seed)
    hidden, vocabulary = config.hidden, config.target_vocabulary
    # Tables that hold sqrt(hidden) have entries of size 1, others of size 1 / sqrt(hidden).
    size = 1.0 if config.scaled_embedding else hidden**-0.5
    arrays: Arrays = {
        "source.tokens": _normal(random, size, config.source_vocabulary, hidden),
        "source.positions": _normal(random, size, config.max_positions, hidden),
        "target.positions": _normal(random, size, config.max_positions, hidden),
        "output.weight": _normal(random, size, hidden, vocabulary),
        "output.bias": _normal(random, 0.3, vocabulary),
        **_norm(random, "encoder.norm", hidden),
        **_norm(random, "decoder.norm", hidden, SPREAD),
    }
    arrays["target.tokens"] = arrays["output.weight"].T
    arrays["output.bias"][config.end_id] += end_bias
    for layer in range(config.encoder_layers):
        arrays |= _attention(random, f"encoder.{layer}.attention", hidden)
        arrays |= _feed_forward(random, f"encoder.{layer}", hidden, config.inner)
    for layer in range(config.decoder_layers):
        name = f"decoder.{layer}"
        arrays |= _attention(random, f"{name}.self", hidden)
        arrays |= _norm(random, f"{name}.cross_norm", hidden)
        arrays |= _linear(random, f"{name}.cross_query", hidden, hidden)
        arrays |= _linear(random, f"{name}.cross_kv", hidden, 2 * hidden)
        arrays |= _linear(random, f"{name}.cross_output", hidden, hidden)
        arrays |= _feed_forward(random, name, hidden, config.inner)
    decoders_first = config.first_norm if config.decoder_first_norm is None else config.decoder_first_norm
    decoders_own = config.embedding_norm if config.decoder_embedding_norm is None else config.decoder_embedding_norm
    arrays |= _norm(random, "source.norm", hidden) if config.embedding_norm else {}
    arrays |= _norm(random, "target.norm", hidden) if decoders_own else {}
    kept = {
        "encoder.0.attention_norm": config.first_norm,
        "decoder.0.self_norm": decoders_first,
        "encoder.norm": config.encoder_final_norm,
        "decoder.norm": config.decoder_final_norm,
    }
    for name in [name for name, there in kept.items() if not there]:
        del arrays[f"{name}.gain"], arrays[f"{name}.bias"]
    if untied:
        arrays["target.tokens"] = _normal(random, size, vocabulary, hidden)
    return config, arrays


def gpt(seed: int = 0, **settings: Any) -> tuple[GptConfig, Arrays]:
    """A GPT; `settings` are fields of GptConfig."""
    sizes: dict[str, Any] = {
        "hidden": 16,
        "inner": 24,
        "heads": 2,
        "layers": 2,
        "vocabulary": 11,
        "max_positions": 12,
        "padding_id": 11,
        "end_id": 2,
    }
    config = GptConfig(**{**sizes, **settings})
    random = np.random.default_rng(seed)
    hidden = config.hidden
    arrays: Arrays = {
        "tokens": _normal(random, hidden**-0.5, config.vocabulary, hidden),
        "positions": _normal(random, hidden**-0.5, config.max_positions, hidden),
        **_norm(random, "norm", hidden, SPREAD),
    }
    arrays["output.weight"] = arrays["tokens"].T
    for layer in range(config.layers):
        arrays |= _attention(random, f"layer.{layer}.attention", hidden)
        arrays |= _feed_forward(random, f"layer.{layer}", hidden, config.inner)
    if not config.final_norm:
        del arrays["norm.gain"], arrays["norm.bias"]
    return config, arrays


def engine(config: Config, arrays: Arrays, backend: Any = cpu, **settings: Any) -> Engine:
    """An engine for a model on the CPU; `settings` are fields of EngineConfig."""
    model = Gpt(config, arrays, backend) if isinstance(config, GptConfig) else Transformer(config, arrays, backend)
    return Engine(model, EngineConfig(**settings), backend)


def cpu_but(**changes: Any) -> Any:
    """The CPU's operations with some members changed."""
    members = {name: getattr(cpu, name) for name in dir(cpu) if not name.startswith("__")}
    return SimpleNamespace(**(members | changes))


def _normal(random: np.random.Generator, size: float, *shape: int) -> np.ndarray:
    return (size * random.standard_normal(shape)).astype(np.float32)


def _norm(random: np.random.Generator, name: str, width: int, gain: float = 1.0) -> Arrays:
    return {
        f"{name}.gain": (gain * (1 + 0.3 * random.standard_normal(width))).astype(np.float32),
        f"{name}.bias": _normal(random, 0.2, width),
    }


def _linear(random: np.random.Generator, name: str, narrow: int, wide: int) -> Arrays:
    return {
        f"{name}.weight": _normal(random, narrow**-0.5, narrow, wide),
        f"{name}.bias": _normal(random, 0.2, wide),
    }


def _attention(random: np.random.Generator, name: str, hidden: int) -> Arrays:
    return (
        _norm(random, f"{name}_norm", hidden)
        | _linear(random, f"{name}_qkv", hidden, 3 * hidden)
        | _linear(random, f"{name}_output", hidden, hidden)
    )


def _feed_forward(random: np.random.Generator, name: str, hidden: int, inner: int) -> Arrays:
    return (
        _norm(random, f"{name}.ffn_norm", hidden)
        | _linear(random, f"{name}.ffn_inner", hidden, inner)
        | _linear(random, f"{name}.ffn_output", inner, hidden)
    )
