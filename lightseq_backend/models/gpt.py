"""The decoder-only model, GPT-2's form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from lightseq_backend.config import GptConfig
from lightseq_backend.models.cache import Cache, Plan
from lightseq_backend.models.layers import Arithmetic, Head, Reader, Weights, Work
from lightseq_backend.models.pack import Pack

Array = Any


class Gpt:
    """Built from a configuration, weights by name (listed in weights/__init__.py) and an ops module."""

    def __init__(self, config: GptConfig, weights: Weights, ops: ModuleType):
        self.config = config
        epsilon = config.epsilon
        self.arithmetic = Arithmetic(ops, config.heads, epsilon, config.activation, post_norm=False)
        read = Reader(weights, ops)
        self.tokens, self.positions = read.table("tokens"), read.table("positions")
        names = [f"layer.{i}" for i in range(config.layers)]
        self.layers = [(read.attention(name, "attention"), read.feed_forward(name)) for name in names]
        final = "norm" if config.final_norm else None
        self.head = Head(
            None if final is None else read.norm(final),
            read.vocabulary("output", final),
            config.logit_scale,
            config.banned_id,
            epsilon,
        )

    def cache_plan(self, lanes: int) -> Plan:
        config, ops = self.config, self.arithmetic.ops
        return Cache.plan(config.layers, 0, lanes, config.max_positions, config.hidden, ops.FLOAT)

    def prefill(self, pack: Pack, work: Work, cache: Cache) -> None:
        """Reads packed prompts and keeps their keys and values in cache.keys and cache.values."""
        hidden, ops = self.config.hidden, self.arithmetic.ops

        def keep(layer: int, qkv: Array) -> None:
            own = slice(layer, layer + 1)
            ops.store(qkv[:, hidden:], pack.lanes, pack.steps, cache.keys[own], cache.values[own])

        self._read(pack, work, keep)

    def read(self, pack: Pack, work: Work) -> None:
        """The hidden states of packed texts, into work.x; nothing is kept."""
        self._read(pack, work, lambda layer, qkv: None)

    def step(self, rows: Array, slots: Array, work: Work, cache: Cache) -> None:
        """One token a row, into work.x. rows: int32 [n], the slot of each; work has n rows."""
        arithmetic, ops = self.arithmetic, self.arithmetic.ops
        ops.embed_rows(rows, slots, self.tokens, self.positions, work.x)
        for layer, (attention, feed_forward) in enumerate(self.layers):
            arithmetic.attention(
                work,
                attention,
                partial(
                    ops.decode_attention,
                    rows=rows,
                    slots=slots,
                    ancestors=cache.ancestors,
                    keys=cache.keys[layer],
                    values=cache.values[layer],
                    heads=self.config.heads,
                ),
            )
            arithmetic.feed_forward(work, feed_forward)

    def _read(self, pack: Pack, work: Work, keep: Callable[[int, Array], None]) -> None:
        arithmetic, ops = self.arithmetic, self.arithmetic.ops
        ops.embed_tokens(pack.tokens, pack.positions, self.tokens, self.positions, work.x)
        for layer, (attention, feed_forward) in enumerate(self.layers):

            def attend(qkv: Array, out: Array, layer: int = layer) -> None:
                keep(layer, qkv)
                ops.packed_attention(qkv, starts=pack.starts, heads=self.config.heads, causal=True, out=out)

            arithmetic.attention(work, attention, attend)
            arithmetic.feed_forward(work, feed_forward)
