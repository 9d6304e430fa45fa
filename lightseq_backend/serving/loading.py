"""What a model's settings ask for, made: its engine, its tokenizer."""

from __future__ import annotations

from lightseq_backend import ops, text, weights
from lightseq_backend.config import Config, TransformerConfig
from lightseq_backend.engine.engine import Engine
from lightseq_backend.models.gpt import Gpt
from lightseq_backend.models.transformer import Transformer
from lightseq_backend.serving.settings import INT8, Settings


def load_engine(settings: Settings) -> Engine:
    """ConfigError or WeightError names every fault that was found."""
    module = ops.load(settings.device, settings.device_id, settings.precision)
    config, arrays = weights.load(
        settings.weights, settings.dialect, settings.wire.form.kind, rounded=settings.precision == INT8
    )
    if isinstance(config, TransformerConfig):
        return Engine(Transformer(config, arrays, module), settings.engine_config(config), module)
    return Engine(Gpt(config, arrays, module), settings.engine_config(config), module)


def takes_text(settings: Settings) -> bool:
    wire = settings.wire
    return bool(wire.text_input or wire.target_text or wire.text_output)


def load_tokenizer(settings: Settings, config: Config) -> text.Tokenizer | None:
    """None where there is none."""
    return text.load(settings.tokenizer, config, settings.source_language)
