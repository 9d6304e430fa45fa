"""The pieces both models are made of: weights grouped by use, the work space, one sublayer at a time.

A sublayer reads x, normalises it and adds its result to the residual. With pre-norm the residual is x itself; in
LightSeq's post-norm form it is the normalised x (lightseq_format.md 3.3). That is the only difference. A first
sublayer without a LayerNorm reads x as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.models.checks import check_folded, check_weights, room_missed
from lightseq_backend.quantised import Rounded, side_by_side

Array = Any  # of the ops module: numpy.ndarray or cupy.ndarray
Weights = Mapping[str, Any]


class Norm(NamedTuple):
    gain: Array
    bias: Array


class Linear(NamedTuple):
    weight: Array
    bias: Array | None


class Sublayer(NamedTuple):
    """A LayerNorm, the projection into the sublayer and the one out of it."""

    norm: Norm | None
    inner: Linear
    output: Linear


class Reader:
    """Hands weights to a model by name, in the form its ops want."""

    def __init__(self, weights: Weights, ops: ModuleType, post_norm: bool = False):
        """WeightError names every array the precision cannot hold; ConfigError says that memory is missing."""
        self._weights, self._ops, self._post_norm = weights, ops, post_norm
        check_weights(weights, ops)

    def of_order(self, post_norm: bool) -> Reader:
        """The same weights, for a stack of that order."""
        other = copy(self)
        other._post_norm = post_norm
        return other

    def norm(self, name: str) -> Norm:
        gain, bias = (self._placed(self._ops.vector, self._weights[f"{name}.{part}"]) for part in ("gain", "bias"))
        return Norm(gain, bias)

    def linear(self, name: str, norm: str | None = None) -> Linear:
        """norm: the LayerNorm always in front of it, whose result nothing else reads."""
        return self._linear(name, norm, self._ops.matrix)

    def vocabulary(self, name: str, norm: str | None) -> Linear:
        """What the operations of the vocabulary take, and no other. norm: None where none is in front of it."""
        return self._linear(name, norm, self._ops.vocabulary_matrix)

    def _linear(self, name: str, norm: str | None, matrix: Callable[..., Any]) -> Linear:
        weight, bias = self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")
        before = None
        if norm and not isinstance(weight, Rounded):  # which folding would round once more
            before = Norm(self._weights[f"{norm}.gain"], self._weights[f"{norm}.bias"])
        if before is not None:
            check_folded(f"{name}.weight", weight, f"{norm}.gain", before.gain, self._ops.FLOAT)
        placed = self._placed(matrix, weight, before)
        return Linear(placed, None if bias is None else self._placed(self._ops.vector, bias))

    def joined(self, names: Sequence[str]) -> Linear:
        """Several linears that read the same, side by side: one product."""
        weights, biases = ([self._weights[f"{name}.{part}"] for name in names] for part in ("weight", "bias"))
        weight = self._placed(self._ops.matrix, side_by_side(weights))
        return Linear(weight, self._placed(self._ops.vector, np.concatenate(biases)))

    def table(self, name: str) -> Array:
        return self._placed(self._ops.table, self._weights[name])

    def sublayer(self, layer: str, norm: str, inner: str, output: str, has_norm: bool = True) -> Sublayer:
        norm, inner, output = (f"{layer}.{name}" for name in (norm, inner, output))
        if not has_norm:
            return Sublayer(None, self.linear(inner), self.linear(output))
        return Sublayer(self.norm(norm), self.linear(inner, None if self._post_norm else norm), self.linear(output))

    def attention(self, layer: str, prefix: str, has_norm: bool = True) -> Sublayer:
        return self.sublayer(layer, f"{prefix}_norm", f"{prefix}_qkv", f"{prefix}_output", has_norm)

    def feed_forward(self, layer: str) -> Sublayer:
        return self.sublayer(layer, "ffn_norm", "ffn_inner", "ffn_output")

    def _placed(self, place: Callable[..., Array], *arrays: Any) -> Array:
        try:
            return place(*arrays)
        except MemoryError as error:
            raise room_missed(self._weights, self._ops, error) from error


@dataclass(frozen=True)
class Work:
    """Activations of one pass, float, [rows, ...]; reused by every layer and every pass.

    x, normed, context, query  [rows, hidden]
    qkv                        [rows, 3 * hidden]
    inner                      [rows, FFN size]
    memory                     [rows, decoder layers * 2 * hidden]: keys and values of a source; no columns without one
    """

    x: Array
    normed: Array
    context: Array
    query: Array
    qkv: Array
    inner: Array
    memory: Array

    @staticmethod
    def widths(hidden: int, inner: int, memory_layers: int) -> dict[str, int]:
        own = {"x": hidden, "normed": hidden, "context": hidden, "query": hidden, "qkv": 3 * hidden, "inner": inner}
        return {**own, "memory": memory_layers * 2 * hidden}

    def first(self, rows: int) -> Work:
        """The same memory, for that many rows."""
        return Work(*(getattr(self, field.name)[:rows] for field in fields(self)))


class Arithmetic(NamedTuple):
    """How a model's sublayers compute: the ops and the settings that never change."""

    ops: ModuleType
    heads: int
    epsilon: float
    activation: str
    post_norm: bool

    def attention(self, work: Work, block: Sublayer, attend: Callable[..., None]) -> None:
        """x = residual + attend(layer_norm(x) . W_qkv) . W_o; attend(qkv, out=) writes the context.

        The one sublayer that may have no LayerNorm.
        """
        residual = self._residual(work)
        if block.norm is None:
            residual = work.x
            self.ops.linear(work.x, block.inner, work.qkv)
        else:
            self.ops.norm_linear(work.x, block.norm, block.inner, self.epsilon, "none", work.normed, work.qkv)
        attend(work.qkv, out=work.context)
        self.ops.linear_residual(work.context, block.output, residual, work.x)

    def cross_attention(self, work: Work, block: Sublayer, attend: Callable[..., None]) -> None:
        """x = residual + attend(layer_norm(x) . W_q) . W_o; attend(query, out=) writes the context."""
        self.ops.norm_linear(work.x, block.norm, block.inner, self.epsilon, "none", work.normed, work.query)
        attend(work.query, out=work.context)
        self.ops.linear_residual(work.context, block.output, self._residual(work), work.x)

    def feed_forward(self, work: Work, block: Sublayer) -> None:
        """x = residual + activation(layer_norm(x) . W_1) . W_2."""
        self.ops.norm_linear(work.x, block.norm, block.inner, self.epsilon, self.activation, work.normed, work.inner)
        self.ops.linear_residual(work.inner, block.output, self._residual(work), work.x)

    def _residual(self, work: Work) -> Array:
        return work.normed if self.post_norm else work.x


class Head(NamedTuple):
    """From the last hidden states to scores over the vocabulary: final norm (or None), projection, scale, banned id (or
    -1)."""

    norm: Norm | None
    output: Linear
    scale: float
    banned: int
    epsilon: float
