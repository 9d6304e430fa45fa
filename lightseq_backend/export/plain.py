"""What a source's own arrays compute, in plain NumPy and by the source's conventions: a second way to the same numbers.

Nothing here knows our description of a model, so that a mistake in it shows. Everything is recomputed for each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lightseq_backend.config import Config, GptConfig

Array = np.ndarray[Any, Any]
Function = Callable[[Array], Array]
Mixing = Callable[[Array, Array], Array]  # of hidden states and the encoder's output
Ids = Sequence[int]

# Where a sublayer has its LayerNorm: before it, behind the sum, or before it and with the sum going on from there.
PRE, POST, LIGHTSEQ = "pre", "post", "lightseq"


class Sublayer(NamedTuple):
    order: str
    norm: Function
    run: Mixing

    def __call__(self, x: Array, memory: Array) -> Array:
        if self.order == POST:
            return self.norm(x + self.run(x, memory))
        normed = self.norm(x)
        return (normed if self.order == LIGHTSEQ else x) + self.run(normed, memory)


@dataclass(frozen=True)
class Stack:
    """embed: ids to float [ids, hidden], positions included; last: what follows the last sublayer."""

    embed: Callable[[Ids], Array]
    sublayers: list[Sublayer]
    last: Function

    def __call__(self, ids: Ids, memory: Array) -> Array:
        x = self.embed(ids)
        for sublayer in self.sublayers:
            x = sublayer(x, memory)
        return self.last(x)


@dataclass(frozen=True)
class Plain:
    """A source's model; it has what export/original.py's Original has.

    encoder   None for a GPT
    score     the last hidden states to logits
    start     what the decoder is fed before it generates; ends: ids that end a text; never: one never generated, or -1
    """

    encoder: Stack | None
    decoder: Stack
    score: Function
    start: tuple[int, ...]
    ends: tuple[int, ...]
    never: int

    def encode(self, ids: Ids) -> Array:
        """The encoder's output, float32 [ids, hidden]."""
        nothing = np.zeros((0, 0), np.float32)
        return nothing if self.encoder is None else self.encoder(ids, nothing)

    def logits(self, ids: Ids, grown: Ids = ()) -> Array:
        """Scores of the token after ids (or what the decoder is fed) and what has grown: float32 [vocabulary]."""
        return self._next(ids, self.encode(ids), grown)

    def greedy(self, ids: Ids, steps: int) -> list[int]:
        """The best token after the best token, at most so many, up to and with an end id."""
        memory = self.encode(ids)
        grown: list[int] = []
        while len(grown) < steps and not (grown and grown[-1] in self.ends):
            scores = self._next(ids, memory, grown)
            if self.never >= 0:
                scores[self.never] = -np.inf
            grown.append(int(scores.argmax()))
        return grown

    def _next(self, ids: Ids, memory: Array, grown: Ids) -> Array:
        fed = [*(ids if self.encoder is None else self.start), *grown]
        return self.score(self.decoder(fed, memory)[-1:])[0]


def layer_norm(gain: Array, bias: Array, epsilon: float) -> Function:
    def normed(x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(epsilon)) * gain + bias

    return normed


def linear(weight: Array, bias: Array | None) -> Function:
    """weight: [in, out]."""

    def product(x: Array) -> Array:
        out = x @ np.asarray(weight, np.float32)
        return out if bias is None else out + np.asarray(bias, np.float32)

    return product


def attention(inputs: Sequence[Function], output: Function, heads: int, kind: str) -> Mixing:
    """inputs: query, key, value; kind: "self" (of an encoder), "causal" or "cross". Scores are divided by the root of a
    head's width."""
    query, key, value = inputs

    def attend(x: Array, memory: Array) -> Array:
        q, k, v = query(x), key(memory if kind == "cross" else x), value(memory if kind == "cross" else x)
        context, width = np.empty_like(q), q.shape[1] // heads
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / np.float32(math.sqrt(width))
            if kind == "causal":
                scores = np.where(np.tril(np.ones(scores.shape, bool)), scores, np.float32(-np.inf))
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            context[:, part] = shares / shares.sum(axis=1, keepdims=True) @ v[:, part]
        return output(context)

    return attend


def halves_of_sinusoids(places: range, width: int) -> Array:
    """tensor2tensor's and fairseq's positions: sines, then cosines, of frequencies from 1 to 1 / 10000."""
    half = width // 2
    angles = np.array(places)[:, None] * np.exp(np.arange(half) * -(math.log(10000) / (half - 1)))
    return np.pad(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), [(0, 0), (0, width - 2 * half)])


def interleaved_sinusoids(places: range, width: int) -> Array:
    """Marian's positions: Vaswani et al. 2017, first the sines of the even features, then the odd ones' cosines."""
    angles = np.array(places)[:, None] / 10000 ** (2 * np.arange((width + 1) // 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles[:, : width // 2])], axis=1)


def decoding_of(config: Config) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """start, ends and never of a Plain: what of a converted model's configuration is no arithmetic."""
    ends = (config.end_id, *config.decoding.end_ids)
    if isinstance(config, GptConfig):
        return (), ends, config.banned_id
    forced = () if config.forced_id is None else (config.forced_id,)
    return (config.start_id, *forced), ends, config.banned_id


def feed_forward(inner: Function, outer: Function, activation: str) -> Mixing:
    """activation: as ACTIVATIONS has it."""
    function = ACTIVATIONS[activation]
    return lambda x, memory: outer(function(inner(x)))


def _gelu(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


def _gelu_erf(x: Array) -> Array:
    phi = np.fromiter((math.erf(value) for value in (x / math.sqrt(2)).flat), np.float32, x.size)
    return x / 2 * (1 + phi.reshape(x.shape))


ACTIVATIONS: dict[str, Function] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "gelu_erf": _gelu_erf,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
