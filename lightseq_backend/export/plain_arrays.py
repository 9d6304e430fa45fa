"""Arrays of any program computed as their own settings have them: the names of docs/convert.md and the four habits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightseq_backend.config import Config, GptConfig
from lightseq_backend.export import plain as passes
from lightseq_backend.export.plain import Array, Function, Plain, Stack, Sublayer


def plain(settings: Mapping[str, Any], arrays: Mapping[str, Array], config: Config) -> Plain:
    made = _Arrays(settings, arrays, config.epsilon)
    if isinstance(config, GptConfig):
        stack = made.stack("layer", "", settings["layers"], "attention", False, "norm")
        return Plain(None, stack, passes.linear(made.projection("tokens"), None), *passes.decoding_of(config))
    post, own = bool(settings.get("post_norm", False)), settings.get("decoder_post_norm")
    encoder = made.stack("encoder", "source.", settings["encoder_layers"], "attention", post, "encoder.norm")
    decoder = made.stack(
        "decoder", "target.", settings["decoder_layers"], "self", post if own is None else own, "decoder.norm"
    )
    projection, bias = made.projection("target.tokens"), arrays.get("output.bias", np.zeros(1, np.float32))
    factor = np.float32(settings["hidden"] ** -0.5 if made.divides else 1)
    return Plain(encoder, decoder, lambda x: factor * (x @ projection) + bias, *passes.decoding_of(config))


class _Arrays:
    def __init__(self, settings: Mapping[str, Any], arrays: Mapping[str, Array], epsilon: float):
        self._settings, self._arrays, self._epsilon = settings, arrays, epsilon
        self._hidden, self._heads = settings["hidden"], settings["heads"]
        self._scale = 1.0 if settings.get("embedding_scale", 1) == 1 else math.sqrt(self._hidden)
        self._tied = settings.get("tied_output", True)

    @property
    def divides(self) -> bool:
        """Whether logits are divided by the scale that a tied table has where it goes in."""
        return bool(self._tied) if self._scale != 1 else bool(self._settings.get("scaled_embedding", True))

    def projection(self, table: str) -> Array:
        return self._scale * self._arrays[table].T if self._tied else self._arrays["output.weight"]

    def stack(self, prefix: str, side: str, depth: int, own: str, post: bool, last: str) -> Stack:
        order, kind = passes.LIGHTSEQ if post else passes.PRE, "self" if prefix == "encoder" else "causal"
        layers = []
        for name in (f"{prefix}.{number}" for number in range(depth)):
            inputs = self._split(f"{name}.{own}_qkv", 3)
            run = passes.attention(inputs, self._linear(f"{name}.{own}_output"), self._heads, kind)
            layers.append(Sublayer(order, self._norm(f"{name}.{own}_norm"), run))
            if prefix == "decoder":
                inputs = [self._linear(f"{name}.cross_query"), *self._split(f"{name}.cross_kv", 2)]
                run = passes.attention(inputs, self._linear(f"{name}.cross_output"), self._heads, "cross")
                layers.append(Sublayer(order, self._norm(f"{name}.cross_norm"), run))
            activation = self._settings.get("activation", "gelu" if prefix == "layer" else "relu")
            run = passes.feed_forward(self._linear(f"{name}.ffn_inner"), self._linear(f"{name}.ffn_output"), activation)
            layers.append(Sublayer(order, self._norm(f"{name}.ffn_norm"), run))
        return Stack(self._embed(side), layers, self._norm(last))

    def _embed(self, side: str) -> Callable[[Sequence[int]], Array]:
        tokens, table = self._arrays[f"{side}tokens"], self._arrays.get(f"{side}positions")
        after = self._norm(f"{side}norm") if side else (lambda x: x)
        kind, first = self._settings.get("positions", "table"), self._settings.get("position_offset", 0)
        made = {"sinusoids": passes.halves_of_sinusoids, "interleaved_sinusoids": passes.interleaved_sinusoids}.get(
            kind
        )

        def embed(ids: Sequence[int]) -> Array:
            if made is not None:
                positions = made(range(first, first + len(ids)), self._hidden)
            else:
                assert table is not None
                positions = table[: len(ids)]
            return after((self._scale * tokens[list(ids)] + positions).astype(np.float32))

        return embed

    def _norm(self, name: str) -> Function:
        """One that is not among the arrays is not there."""
        if f"{name}.gain" not in self._arrays:
            return lambda x: x
        return passes.layer_norm(self._arrays[f"{name}.gain"], self._arrays[f"{name}.bias"], self._epsilon)

    def _linear(self, name: str, columns: slice = slice(None)) -> Function:
        bias = self._arrays.get(f"{name}.bias")
        return passes.linear(self._arrays[f"{name}.weight"][:, columns], None if bias is None else bias[columns])

    def _split(self, name: str, count: int) -> list[Function]:
        return [self._linear(name, slice(i * self._hidden, (i + 1) * self._hidden)) for i in range(count)]
