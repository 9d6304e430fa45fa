"""The encoder-decoder Transformer: the encoder is its prefill, the decoder its step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from lightseq_backend.config import TransformerConfig
from lightseq_backend.models.cache import Cache, Plan
from lightseq_backend.models.layers import Arithmetic, Head, Reader, Weights, Work
from lightseq_backend.models.pack import Pack

Array = Any


class Transformer:
    """Built from a configuration, weights by name (listed in weights/__init__.py) and an ops module."""

    def __init__(self, config: TransformerConfig, weights: Weights, ops: ModuleType):
        self.config = config
        epsilon = config.epsilon
        first, second = config.encoder_norms, config.decoder_norms
        self.arithmetic = Arithmetic(ops, config.heads, epsilon, config.activation, first.post)
        self.decoding = self.arithmetic._replace(post_norm=second.post)
        read = Reader(weights, ops, first.post)
        decoders = read.of_order(second.post)
        self.source_tokens, self.source_positions = read.table("source.tokens"), read.table("source.positions")
        self.target_tokens, self.target_positions = read.table("target.tokens"), read.table("target.positions")
        encoder = [f"encoder.{i}" for i in range(config.encoder_layers)]
        decoder = [f"decoder.{i}" for i in range(config.decoder_layers)]
        self.encoder = [
            (read.attention(name, "attention", first.first or layer > 0), read.feed_forward(name))
            for layer, name in enumerate(encoder)
        ]
        self.decoder = [
            (
                decoders.attention(name, "self", second.first or layer > 0),
                decoders.sublayer(name, "cross_norm", "cross_query", "cross_output"),
                decoders.feed_forward(name),
            )
            for layer, name in enumerate(decoder)
        ]
        self.source_norm = read.norm("source.norm") if first.embedding else None
        self.target_norm = read.norm("target.norm") if second.embedding else None
        self.memory = read.joined([f"{name}.cross_kv" for name in decoder])
        self.encoder_norm = read.norm("encoder.norm") if config.encoder_final_norm else None
        final = "decoder.norm" if config.decoder_final_norm else None
        self.head = Head(
            None if final is None else read.norm(final),
            read.vocabulary("output", final),
            config.logit_scale,
            config.banned_id,
            epsilon,
        )

    def cache_plan(self, lanes: int) -> Plan:
        config, ops = self.config, self.arithmetic.ops
        layers = config.decoder_layers
        return Cache.plan(layers, layers, lanes, config.max_positions, config.hidden, ops.FLOAT)

    def prefill(self, pack: Pack, work: Work, cache: Cache) -> None:
        """Encodes packed sources and keeps every decoder layer's keys and values of them in cache.memory_*."""
        arithmetic, ops = self.arithmetic, self.arithmetic.ops
        embedded = work.x if self.source_norm is None else work.query
        ops.embed_tokens(pack.tokens, pack.positions, self.source_tokens, self.source_positions, embedded)
        if self.source_norm is not None:
            ops.layer_norm(embedded, self.source_norm, arithmetic.epsilon, work.x)
        attend = partial(ops.packed_attention, starts=pack.starts, heads=self.config.heads, causal=False)
        for attention, feed_forward in self.encoder:
            arithmetic.attention(work, attention, attend)
            arithmetic.feed_forward(work, feed_forward)
        ops.linear(self.encoded(work), self.memory, work.memory)
        ops.store(work.memory, pack.lanes, pack.steps, cache.memory_keys, cache.memory_values)

    def encoded(self, work: Work) -> Array:
        """What the decoder reads of the last encoder layer's hidden states, in work.x."""
        if self.encoder_norm is None:
            return work.x
        self.arithmetic.ops.layer_norm(work.x, self.encoder_norm, self.arithmetic.epsilon, work.normed)
        return work.normed

    def step(self, rows: Array, slots: Array, work: Work, cache: Cache) -> None:
        """One decoder token a row, into work.x. rows: int32 [n], the slot of each; work has n rows."""
        ops = self.arithmetic.ops

        def attend(layer: int) -> Callable[..., None]:
            return partial(
                ops.decode_attention,
                rows=rows,
                slots=slots,
                ancestors=cache.ancestors,
                keys=cache.keys[layer],
                values=cache.values[layer],
                heads=self.config.heads,
            )

        self._embed_target(partial(ops.embed_rows, rows, slots), work)
        self._decode(attend, rows, slots, work, cache)

    def read_targets(self, pack: Pack, slots: Array, work: Work, cache: Cache) -> None:
        """The decoder's hidden states of packed targets, into work.x; no keys or values of theirs are kept.

        A row attends to the source of its lane's record, which is of one beam.
        """
        ops = self.arithmetic.ops
        attend = partial(ops.packed_attention, starts=pack.starts, heads=self.config.heads, causal=True)
        self._embed_target(partial(ops.embed_tokens, pack.tokens, pack.positions), work)
        self._decode(lambda layer: attend, pack.lanes, slots, work, cache)

    def _embed_target(self, embed: Callable[..., None], work: Work) -> None:
        arithmetic = self.arithmetic
        embedded = work.x if self.target_norm is None else work.query
        embed(self.target_tokens, self.target_positions, embedded)
        if self.target_norm is not None:
            arithmetic.ops.layer_norm(embedded, self.target_norm, arithmetic.epsilon, work.x)

    def _decode(
        self, attend: Callable[[int], Callable[..., None]], rows: Array, slots: Array, work: Work, cache: Cache
    ) -> None:
        """The decoder's layers; attend(layer) is the self-attention of one. rows: int32 [n], the slot of each."""
        arithmetic = self.decoding
        for layer, (self_attention, cross_attention, feed_forward) in enumerate(self.decoder):
            arithmetic.attention(work, self_attention, attend(layer))
            arithmetic.cross_attention(
                work,
                cross_attention,
                partial(
                    arithmetic.ops.cross_attention,
                    rows=rows,
                    slots=slots,
                    keys=cache.memory_keys[layer],
                    values=cache.memory_values[layer],
                    heads=self.config.heads,
                ),
            )
            arithmetic.feed_forward(work, feed_forward)
