"""LightSeq's two models and its decoding once more: float64, one text at a time, everything computed anew.

No cache, no packing, no batch: padding stays in its columns and is masked, every step feeds the whole text again.
Beam search is lists and loops. Written from LightSeq's behaviour, not from the engine, and shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray
Ids = Sequence[int]
LogProbabilities = Callable[[tuple[int, ...]], Array]  # of the next token, after these

# Releases: what stands inside the square root of a LayerNorm, and the handicap of the beams but the first.
EPSILON = {"head": 1e-12, "v0": 1e-6}
HANDICAP = {"head": -1000.0, "v0": -5000.0}


# The arithmetic ------------------------------------------------------------------------------------------------------


def layer_norm(x: Array, gain: Array, bias: Array, epsilon: float) -> Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gain + bias


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: Array) -> Array:
    return np.vectorize(lambda one: one * 0.5 * (1 + math.erf(one / math.sqrt(2))), otypes=[np.float64])(x)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": relu,
    "gelu": gelu,
    "gelu_erf": gelu_erf,
    "silu": silu,
}


def log_softmax(x: Array) -> Array:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def attention(q: Array, k: Array, v: Array, heads: int, visible: Array) -> Array:
    """visible[i, j]: whether query i sees key j. A query that sees nothing gives zeros."""
    d = q.shape[1] // heads
    out = np.zeros(q.shape)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = q[:, part] @ k[:, part].T / math.sqrt(d)
        for i in range(len(q)):
            if visible[i].any():
                seen = scores[i][visible[i]]
                shares = np.exp(seen - seen.max())
                out[i, part] = shares / shares.sum() @ v[:, part][visible[i]]
    return out


# The models ----------------------------------------------------------------------------------------------------------


class _Model:
    """A sublayer: y = norm(x); then x + f(y), or y + f(y) in LightSeq's post-norm form."""

    def __init__(self, config: Any, arrays: dict[str, Array]):
        self.config = config
        self.arrays = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        self.epsilon = config.norm_epsilon or EPSILON[config.dialect.name]
        post = getattr(config, "post_norm", False)
        decoders = getattr(config, "decoder_post_norm", None)
        self._post = {"encoder": post, "decoder": post if decoders is None else decoders}

    def residual(self, name: str, x: Array, y: Array) -> Array:
        """What a sublayer of that name adds to, of its input and of that normalised."""
        return y if self._post.get(name.split(".")[0]) else x

    def norm(self, name: str, x: Array) -> Array:
        if f"{name}.gain" not in self.arrays:
            return x
        return layer_norm(x, self.arrays[f"{name}.gain"], self.arrays[f"{name}.bias"], self.epsilon)

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.arrays[f"{name}.weight"] + self.arrays[f"{name}.bias"]

    def self_attention(self, name: str, x: Array, visible: Array) -> Array:
        y = self.norm(f"{name}_norm", x)
        q, k, v = np.split(self.linear(f"{name}_qkv", y), 3, axis=1)
        context = attention(q, k, v, self.config.heads, visible)
        return self.residual(name, x, y) + self.linear(f"{name}_output", context)

    def feed_forward(self, name: str, x: Array) -> Array:
        y = self.norm(f"{name}.ffn_norm", x)
        inner = ACTIVATIONS[self.config.activation](self.linear(f"{name}.ffn_inner", y))
        return self.residual(name, x, y) + self.linear(f"{name}.ffn_output", inner)


class TransformerReference(_Model):
    def __init__(self, config: Any, arrays: dict[str, Array], row: Ids):
        """For one source row, padding included."""
        super().__init__(config, arrays)
        self.row = list(row)
        self.real = np.array([token != config.padding_id for token in row])
        self._known: dict[tuple[int, ...], Array] = {}

    @cached_property
    def memory(self) -> Array:
        """The encoder's output, [columns, hidden]; what stands in padded columns means nothing."""
        x = np.zeros((len(self.row), self.config.hidden))
        for column, token in enumerate(self.row):
            if self.real[column]:
                x[column] = self.arrays["source.tokens"][token] + self.arrays["source.positions"][column]
        x = self.norm("source.norm", x)
        visible = np.tile(self.real, (len(self.row), 1))
        for layer in range(self.config.encoder_layers):
            x = self.self_attention(f"encoder.{layer}.attention", x, visible)
            x = self.feed_forward(f"encoder.{layer}", x)
        return self.norm("encoder.norm", x)

    def logits(self, tokens: Ids) -> Array:
        """[1 + tokens, vocabulary]: scores of the next token after the start token and after each of `tokens`."""
        fed = [self.config.start_id, *tokens]
        x = self.arrays["target.tokens"][fed] + self.arrays["target.positions"][: len(fed)]
        x = self.norm("target.norm", x)
        past = np.tril(np.ones((len(fed), len(fed)), bool))
        source = np.tile(self.real, (len(fed), 1))
        for layer in range(self.config.decoder_layers):
            name = f"decoder.{layer}"
            x = self.self_attention(f"{name}.self", x, past)
            y = self.norm(f"{name}.cross_norm", x)
            k, v = np.split(self.linear(f"{name}.cross_kv", self.memory), 2, axis=1)
            context = attention(self.linear(f"{name}.cross_query", y), k, v, self.config.heads, source)
            x = self.residual(name, x, y) + self.linear(f"{name}.cross_output", context)
            x = self.feed_forward(name, x)
        scale = 1 / math.sqrt(self.config.hidden) if self.config.scaled_embedding else 1.0
        return scale * (self.norm("decoder.norm", x) @ self.arrays["output.weight"]) + self.arrays["output.bias"]

    def next(self, tokens: tuple[int, ...]) -> Array:
        """Log-probabilities of what follows `tokens`."""
        if tokens not in self._known:
            self._known[tokens] = log_softmax(self.logits(tokens)[-1])
        return self._known[tokens]


class GptReference(_Model):
    def __init__(self, config: Any, arrays: dict[str, Array], prompt: Ids = ()):
        super().__init__(config, arrays)
        self.prompt = tuple(prompt)
        self._known: dict[tuple[int, ...], Array] = {}

    def logits(self, tokens: Ids) -> Array:
        """[tokens, vocabulary]: scores of the next token after each of `tokens`; a padding token is all zeros."""
        x = np.zeros((len(tokens), self.config.hidden))
        for column, token in enumerate(tokens):
            if token != self.config.padding_id:
                x[column] = self.arrays["tokens"][token] + self.arrays["positions"][column]
        past = np.tril(np.ones((len(tokens), len(tokens)), bool))
        for layer in range(self.config.layers):
            x = self.self_attention(f"layer.{layer}.attention", x, past)
            x = self.feed_forward(f"layer.{layer}", x)
        return self.norm("norm", x) @ self.arrays["output.weight"]

    def next(self, tokens: tuple[int, ...]) -> Array:
        """Log-probabilities of what follows the prompt and `tokens`."""
        if tokens not in self._known:
            self._known[tokens] = log_softmax(self.logits([*self.prompt, *tokens])[-1])
        return self._known[tokens]

    def loss(self, tokens: Ids) -> float:
        """Mean negative log-likelihood of all tokens but the first; 0 for a single one."""
        if len(tokens) < 2:
            return 0.0
        scores = log_softmax(self.logits(tokens))
        return -sum(scores[i, token] for i, token in enumerate(tokens[1:])) / (len(tokens) - 1)


# Beam search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beam:
    tokens: tuple[int, ...]
    total: float  # sum of log-probabilities
    score: float  # normalised; what it competes with once it has ended
    finished: bool = False


@dataclass(frozen=True)
class Search:
    """beams: best first; gap: how close the closest decision was, so that a test can leave out a tie."""

    beams: list[Beam]
    steps: int
    gap: float


def length_norm(tokens: int, penalty: float) -> float:
    return 1.0 if penalty < 0 else ((5 + tokens) / 6) ** -penalty


def beam_search(
    next_tokens: LogProbabilities,
    beams: int,
    limit: int,
    ends: Collection[int],
    penalty: float,
    diverse_lambda: float = 0.0,
    fan_out: bool = False,
    banned_id: int = -1,
    handicap: float = -1000.0,
) -> Search:
    """fan_out: only the first step is a search, then every beam goes on with its best token (topk_greedy)."""
    alive = [Beam((), 0.0 if number == 0 else handicap, 0.0) for number in range(beams)]
    steps, gap = 0, math.inf
    while steps < limit and not all(beam.finished for beam in alive):
        offers = [
            _offers(beam, next_tokens, beams, steps + 1, ends, penalty, diverse_lambda, banned_id) for beam in alive
        ]
        if fan_out and steps > 0:
            alive = [ranked[0][1] for ranked in offers]
            gap = min([gap, *(ranked[0][0] - ranked[1][0] for ranked in offers if len(ranked) > 1)])
        else:
            every = sorted((offer for ranked in offers for offer in ranked), key=lambda offer: -offer[0])
            alive = [beam for _, beam in every[:beams]]
            deciding = [score for score, _ in every[: beams + 1]]
            gap = min([gap, *(better - worse for better, worse in pairwise(deciding))])
        steps += 1
    if penalty < 0:
        alive = [Beam(one.tokens, one.total, _mean(one, ends), one.finished) for one in alive]
        alive.sort(key=lambda beam: -beam.score)
        gap = min([gap, *(better.score - worse.score for better, worse in pairwise(alive))])
    return Search(alive, steps, gap)


def _offers(
    beam: Beam,
    next_tokens: LogProbabilities,
    count: int,
    length: int,
    ends: Collection[int],
    penalty: float,
    diverse_lambda: float,
    banned_id: int,
) -> list[tuple[float, Beam]]:
    """What a beam puts into the sort: (score while choosing, what it would become), its best first."""
    if beam.finished:
        return [(beam.score - diverse_lambda, beam)]
    scores = next_tokens(beam.tokens)
    ids = sorted((token for token in range(len(scores)) if token != banned_id), key=lambda token: -scores[token])
    offers = []
    for rank, token in enumerate(ids[: count + 1]):  # one more than can be taken, to see how close it was
        total = beam.total + scores[token]
        score = total * length_norm(length, penalty)
        grown = Beam((*beam.tokens, token), total, score, token in ends)
        offers.append((score - diverse_lambda * (rank + 1), grown))
    return offers


def _mean(beam: Beam, ends: Collection[int]) -> float:
    tokens = sum(token not in ends for token in beam.tokens)
    return beam.total / (tokens or 1e-6)


# Sampling ------------------------------------------------------------------------------------------------------------


def distribution(scores: Array, top_k: int, top_p: float, temperature: float, banned_id: int = -1) -> Array:
    """The textbook: divide by the temperature, keep the k best, then the fewest that hold p of what is left."""
    ids = sorted((token for token in range(len(scores)) if token != banned_id), key=lambda token: -scores[token])
    if top_k:
        ids = ids[:top_k]
    weights = [math.exp((scores[token] - scores[ids[0]]) / temperature) for token in ids]
    kept, held = 0, 0.0
    while held < top_p * sum(weights) and kept < len(ids):
        held += weights[kept]
        kept += 1
    out = np.zeros(len(scores))
    for token, weight in zip(ids[:kept], weights):
        out[token] = weight / held
    return out


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python's integers (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(c[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def gumbel(seed: int, stream: int, step: int, token: int) -> float:
    """Token i takes word i % 4 of counter (i // 4, step, stream, 0): -log(-log(1 - (word + 0.5) / 2^32))."""
    word = philox((token // 4, step, stream, 0), (seed % 2**32, seed // 2**32))[token % 4]
    return -math.log(-math.log1p(-min((word + 0.5) / 2**32, 1 - 2.0**-24)))
