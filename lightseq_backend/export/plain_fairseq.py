"""A fairseq checkpoint computed from its own state dict: its names, [out, in], LayerNorms where its settings say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lightseq_backend.config import Config
from lightseq_backend.export import plain as passes
from lightseq_backend.export.plain import Array, Function, Plain, Stack, Sublayer

ACTIVATIONS = {"gelu": "gelu_erf", "gelu_fast": "gelu", "gelu_accurate": "gelu", "swish": "silu"}
FIRST_POSITION = 2  # behind padding, whose id is 1
EPSILON = 1e-5
OUTPUTS = ("decoder.output_projection.weight", "decoder.embed_out", "decoder.embed_tokens.weight")


def plain(settings: Mapping[str, Any], state: Mapping[str, Array], config: Config) -> Plain:
    output = next(state[name] for name in OUTPUTS if name in state)
    encoder, decoder = (_Stack(settings, state, side).built() for side in ("encoder", "decoder"))
    return Plain(encoder, decoder, lambda x: x @ np.asarray(output, np.float32).T, *passes.decoding_of(config))


class _Stack:
    def __init__(self, settings: Mapping[str, Any], state: Mapping[str, Array], side: str):
        self._settings, self._state, self._side = settings, state, side
        self._heads = int(settings[f"{side}_attention_heads"])
        self._order = passes.PRE if settings.get(f"{side}_normalize_before") else passes.POST

    def built(self) -> Stack:
        sublayers = [
            sublayer
            for layer in range(int(self._settings[f"{self._side}_layers"]))
            for sublayer in self._layer(f"{self._side}.layers.{layer}")
        ]
        without = self._order != passes.PRE or self._settings.get(f"no_{self._side}_final_norm")
        last = (lambda x: x) if without else self._norm(f"{self._side}.layer_norm")
        return Stack(self._embed(), sublayers, last)

    def _layer(self, name: str) -> list[Sublayer]:
        kinds = (
            [("self_attn", "self")] if self._side == "encoder" else [("self_attn", "causal"), ("encoder_attn", "cross")]
        )
        made = []
        for number, (each, kind) in enumerate(kinds):
            norm = self._norm(f"{name}.{each}_layer_norm", f"{name}.layer_norms.{number}")
            made.append(Sublayer(self._order, norm, self._attention(f"{name}.{each}", kind)))
        activation = self._settings.get("activation_fn") or "relu"
        wide = passes.feed_forward(
            self._linear(f"{name}.fc1"), self._linear(f"{name}.fc2"), ACTIVATIONS.get(activation, activation)
        )
        norm = self._norm(f"{name}.final_layer_norm", f"{name}.layer_norms.{len(kinds)}")
        return [*made, Sublayer(self._order, norm, wide)]

    def _embed(self) -> Callable[[Sequence[int]], Array]:
        tokens = self._state[f"{self._side}.embed_tokens.weight"]
        width = tokens.shape[1]
        scale = 1.0 if self._settings.get("no_scale_embedding") else math.sqrt(width)
        table = self._state.get(f"{self._side}.embed_positions.weight")
        learned = bool(self._settings.get(f"{self._side}_learned_pos"))
        after = self._norm(f"{self._side}.layernorm_embedding") if self._settings.get("layernorm_embedding") else None

        def embed(ids: Sequence[int]) -> Array:
            places = range(FIRST_POSITION, FIRST_POSITION + len(ids))
            positions = table[places] if learned and table is not None else passes.halves_of_sinusoids(places, width)
            x = (scale * tokens[list(ids)].astype(np.float32) + positions).astype(np.float32)
            return x if after is None else after(x)

        return embed

    def _attention(self, name: str, kind: str) -> Any:
        output, joined = self._linear(f"{name}.out_proj"), self._state.get(f"{name}.in_proj_weight")
        if joined is None:
            inputs = [self._linear(f"{name}.{part}_proj") for part in "qkv"]
        else:  # before 2019
            biases = np.split(self._state[f"{name}.in_proj_bias"], 3)
            inputs = [passes.linear(weight.T, bias) for weight, bias in zip(np.split(joined, 3), biases)]
        return passes.attention(inputs, output, self._heads, kind)

    def _norm(self, *names: str) -> Function:
        found = next(name for name in names if f"{name}.weight" in self._state)
        return passes.layer_norm(self._state[f"{found}.weight"], self._state[f"{found}.bias"], EPSILON)

    def _linear(self, name: str) -> Function:
        return passes.linear(self._state[f"{name}.weight"].T, self._state[f"{name}.bias"])
