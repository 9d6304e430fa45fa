"""A file of LightSeq's computed from the fields that protobuf's own runtime reads: its names, its axes, [in, out]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lightseq_backend.config import Config, GptConfig
from lightseq_backend.export import plain as passes
from lightseq_backend.export.plain import Array, Function, Plain, Stack, Sublayer
from lightseq_backend.weights.schema import message_type

MOST = 1 << 31  # bytes of a file that protobuf's runtime reads


def plain(content: bytes, config: Config) -> Plain:
    """content: of a file of floats, not of int8."""
    gpt = isinstance(config, GptConfig)
    message = message_type("Gpt" if gpt else "Transformer").FromString(content)
    return _Gpt(message, config).built() if gpt else _Transformer(message, config).built()


class _Message:
    def __init__(self, message: Any, config: Config):
        self._message, self._config, self._epsilon = message, config, config.epsilon
        self._hidden, self._heads = len(message.src_embedding.norm_scale), message.model_conf.head_num
        self._order, self._activation = passes.PRE, "gelu"

    def _field(self, part: Any, name: str, *shape: int) -> Array:
        return np.array(getattr(part, name), np.float32).reshape(shape)

    def _vector(self, part: Any, name: str) -> Array:
        return self._field(part, name, -1)

    def _norm(self, part: Any, name: str) -> Function:
        return passes.layer_norm(self._vector(part, f"{name}_scale"), self._vector(part, f"{name}_bias"), self._epsilon)

    def _linear(self, part: Any, name: str, end: str = "") -> Function:
        """The fields <name>_kernel<end>, of which the last axis is the wide one, and <name>_bias<end>."""
        bias = self._vector(part, f"{name}_bias{end}")
        return passes.linear(self._field(part, f"{name}_kernel{end}", -1, bias.size), bias)

    def _wide(self, part: Any) -> Sublayer:
        run = passes.feed_forward(self._linear(part, "ffn_first"), self._linear(part, "ffn_second"), self._activation)
        return Sublayer(self._order, self._norm(part, "ffn_norm"), run)

    def _attention(self, part: Any, prefix: str, kind: str) -> Sublayer:
        hidden = self._hidden
        kernel = self._field(part, f"{prefix}_project_kernel_qkv", hidden, 3, hidden)
        bias = self._field(part, f"{prefix}_project_bias_qkv", 3, hidden)
        inputs = [passes.linear(kernel[:, i], bias[i]) for i in range(3)]
        run = passes.attention(inputs, self._linear(part, f"{prefix}_project", "_output"), self._heads, kind)
        return Sublayer(self._order, self._norm(part, f"{prefix}_norm"), run)

    def _embed(self, tokens: Array, part: Any) -> Callable[[Sequence[int]], Array]:
        positions = self._field(part, "position_embedding", -1, self._hidden)
        return lambda ids: tokens[list(ids)] + positions[: len(ids)]

    def _first(self, kind: str) -> tuple[Array, Stack]:
        part = self._message.src_embedding
        tokens = self._field(part, "token_embedding", -1, self._hidden)
        layers = [
            sublayer
            for layer in self._message.encoder_stack
            for sublayer in (self._attention(layer, "multihead", kind), self._wide(layer))
        ]
        return tokens, Stack(self._embed(tokens, part), layers, self._norm(part, "norm"))


class _Gpt(_Message):
    def built(self) -> Plain:
        tokens, stack = self._first("causal")
        return Plain(None, stack, lambda x: x @ tokens.T, *passes.decoding_of(self._config))


class _Transformer(_Message):
    def __init__(self, message: Any, config: Config):
        super().__init__(message, config)
        conf = message.model_conf
        self._order = passes.LIGHTSEQ if conf.is_post_ln else passes.PRE
        self._activation = "gelu" if conf.use_gelu else "relu"
        self._scale = np.float32(1 if conf.no_scale_embedding else self._hidden**-0.5)

    def built(self) -> Plain:
        target = self._message.trg_embedding
        projection, bias = self._field(target, "token_embedding", self._hidden, -1), self._vector(target, "shared_bias")
        layers = [sublayer for number in range(len(self._message.decoder_stack)) for sublayer in self._layer(number)]
        decoder = Stack(self._embed(projection.T, target), layers, self._norm(target, "norm"))
        _, encoder = self._first("self")
        return Plain(
            encoder, decoder, lambda x: self._scale * (x @ projection) + bias, *passes.decoding_of(self._config)
        )

    def _layer(self, number: int) -> list[Sublayer]:
        part, target = self._message.decoder_stack[number], self._message.trg_embedding
        hidden, depth = self._hidden, len(self._message.decoder_stack)
        kernels = self._field(target, "encode_output_project_kernel_kv", hidden, depth, 2, hidden)[:, number]
        biases = self._field(target, "encode_output_project_bias_kv", depth, 2, hidden)[number]
        inputs = [
            self._linear(part, "encdec_project", "_q"),
            *(passes.linear(kernels[:, i], biases[i]) for i in range(2)),
        ]
        run = passes.attention(inputs, self._linear(part, "encdec_project", "_output"), self._heads, "cross")
        cross = Sublayer(self._order, self._norm(part, "encdec_norm"), run)
        return [self._attention(part, "self", "causal"), cross, self._wide(part)]
