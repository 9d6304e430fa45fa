"""Decode steps written by hand in PyTorch, with the same weights: what a careful user gets without this engine.

A step is one chain of tensor operations over static buffers, so that all of it fits in one CUDA graph: a static cache
that attention reads up to a mask, token choice and bookkeeping on the device, nothing waits for the host. Beam search
moves the whole cache: a step reads one of two caches and leaves the survivors' history in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightseq_backend.config import GptConfig, TransformerConfig

Arrays = Mapping[str, np.ndarray]


class Norm(NamedTuple):
    gain: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain, self.bias, self.epsilon)


class Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Sublayer(NamedTuple):
    norm: Norm
    inner: Linear
    output: Linear


class Reader:
    """Our arrays as PyTorch wants them, on the device; each is brought there once."""

    def __init__(self, arrays: Arrays, epsilon: float, device: str, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._arrays, self._epsilon = arrays, epsilon
        self._there: dict[str, Tensor] = {}

    def table(self, name: str) -> Tensor:
        if name not in self._there:
            self._there[name] = torch.from_numpy(np.ascontiguousarray(self._arrays[name])).to(self.device, self.dtype)
        return self._there[name]

    def norm(self, name: str) -> Norm:
        return Norm(self.table(f"{name}.gain"), self.table(f"{name}.bias"), self._epsilon)

    def linear(self, name: str) -> Linear:
        weight = f"{name}.weight"
        if weight not in self._there:
            self._there[weight] = torch.from_numpy(self._arrays[weight]).to(self.device, self.dtype).T.contiguous()
        return Linear(self._there[weight], self.table(f"{name}.bias"))

    def attention(self, layer: str, prefix: str, inner: str = "qkv") -> Sublayer:
        return self._sublayer(layer, f"{prefix}_norm", f"{prefix}_{inner}", f"{prefix}_output")

    def feed_forward(self, layer: str) -> Sublayer:
        return self._sublayer(layer, "ffn_norm", "ffn_inner", "ffn_output")

    def _sublayer(self, layer: str, norm: str, inner: str, output: str) -> Sublayer:
        return Sublayer(
            *(self.norm(f"{layer}.{norm}"), self.linear(f"{layer}.{inner}"), self.linear(f"{layer}.{output}"))
        )


class Heads(NamedTuple):
    """How rows are taken apart for attention, and what comes behind the first product of an FFN."""

    number: int
    activation: Callable[[Tensor], Tensor]

    def split(self, x: Tensor) -> Tensor:
        """[..., rows, hidden] as [..., heads, rows, d]."""
        return x.unflatten(-1, (self.number, -1)).transpose(-2, -3)

    def join(self, x: Tensor) -> Tensor:
        """[..., heads, rows, d] as [..., rows, hidden]."""
        return x.transpose(-2, -3).flatten(-2)

    def feed_forward(self, x: Tensor, block: Sublayer) -> Tensor:
        return x + block.output(self.activation(block.inner(block.norm(x))))

    def static_attention(self, x: Tensor, block: Sublayer, cache: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """One token a row. cache: [2, rows, heads, steps, d], which takes the token's keys and values at `position`."""
        q, k, v = (self.split(part[:, None]) for part in block.inner(block.norm(x)).chunk(3, -1))
        cache[0].index_copy_(2, position, k)
        cache[1].index_copy_(2, position, v)
        context = F.scaled_dot_product_attention(q, cache[0], cache[1], mask)
        return x + block.output(self.join(context)[:, 0])


class BeamStep:
    """Beam search over equally long sources with a pre-norm Transformer, LightSeq's way (`beam` candidates a beam).

    state     tokens, scores and finished flags of rows = sources * beams; history; position of the next token
    caches    two of [layers, 2, rows, heads, steps, d]
    memory    [layers, 2, sources, heads, source tokens, d]
    """

    def __init__(self, config: TransformerConfig, read: Reader, sources: np.ndarray, beams: int, steps: int):
        """sources: int [sources, tokens], encoded here."""
        assert not config.post_norm
        device, dtype = read.device, read.dtype
        self._config, self.beams, self.steps = config, beams, steps
        self._heads = Heads(config.heads, F.relu if config.activation == "relu" else _gelu)
        self._tokens, self._positions = read.table("target.tokens"), read.table("target.positions")
        names = [f"decoder.{i}" for i in range(config.decoder_layers)]
        self._layers = [
            (read.attention(name, "self"), read.attention(name, "cross", "query"), read.feed_forward(name))
            for name in names
        ]
        output = read.linear("output")
        self._norm, self._output = read.norm("decoder.norm"), output._replace(weight=output.weight * config.logit_scale)
        self._memory = self._encode(read, torch.from_numpy(sources).to(device))
        count, size = len(sources), config.hidden // config.heads
        rows = count * beams
        self.caches = [
            torch.zeros(config.decoder_layers, 2, rows, config.heads, steps, size, device=device, dtype=dtype)
            for _ in range(2)
        ]
        self._first = torch.arange(0, rows, beams, device=device)[:, None]
        self._ladder = torch.arange(steps, device=device)
        self.token = torch.full((rows,), config.start_id, device=device)
        self.score = torch.zeros(rows, device=device)
        self.score.view(count, beams)[:, 1:] = config.dialect.other_beams
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.history = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, source: int) -> None:
        """One token for every row: reads caches[source], leaves the new history in the other."""
        self._choose(self.logits(source), source)

    def rewind(self, position: int) -> None:
        self.position.fill_(position)

    def logits(self, source: int) -> Tensor:
        """[rows, vocabulary]; writes the token's keys and values into caches[source]."""
        heads, cache = self._heads, self.caches[source]
        mask = (self._ladder <= self.position)[None, None, None]
        x = self._tokens[self.token] + self._positions[self.position]
        for layer, (attention, cross, feed_forward) in enumerate(self._layers):
            x = heads.static_attention(x, attention, cache[layer], self.position, mask)
            x = x + cross.output(self._attend(cross.inner(cross.norm(x)), *self._memory[layer]))
            x = heads.feed_forward(x, feed_forward)
        return self._output(self._norm(x))

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All beams of a source attend to its memory together."""
        sources = len(keys)
        context = F.scaled_dot_product_attention(self._heads.split(query.unflatten(0, (sources, -1))), keys, values)
        return self._heads.join(context).flatten(0, 1)

    def _choose(self, logits: Tensor, source: int) -> None:
        beams, end = self.beams, self._config.end_id
        best, ids = torch.log_softmax(logits, -1, dtype=torch.float32).topk(beams, -1)
        # A finished beam offers itself, once.
        itself = torch.full_like(best, -torch.inf)
        itself[:, 0] = 0
        offers = self.score[:, None] + torch.where(self.finished[:, None], itself, best)
        ids = torch.where(self.finished[:, None], end, ids)
        chosen = offers.view(-1, beams * beams).topk(beams, -1).indices
        parents = (self._first + chosen // beams).flatten()
        token = ids.view(-1, beams * beams).gather(1, chosen).flatten()
        self.score.copy_(offers.view(-1, beams * beams).gather(1, chosen).flatten())
        self.finished.copy_(self.finished[parents] | (token == end))
        self.token.copy_(token)
        self.history.copy_(self.history[parents].index_copy(1, self.position, token[:, None]))
        self.caches[1 - source].copy_(self.caches[source].index_select(2, parents))
        self.position += 1

    def _encode(self, read: Reader, sources: Tensor) -> Tensor:
        config, heads = self._config, self._heads
        x = read.table("source.tokens")[sources] + read.table("source.positions")[: sources.shape[1]]
        for i in range(config.encoder_layers):
            block = read.attention(f"encoder.{i}", "attention")
            q, k, v = (heads.split(part) for part in block.inner(block.norm(x)).chunk(3, -1))
            x = x + block.output(heads.join(F.scaled_dot_product_attention(q, k, v)))
            x = heads.feed_forward(x, read.feed_forward(f"encoder.{i}"))
        x = read.norm("encoder.norm")(x)
        linears = [read.linear(f"decoder.{i}.cross_kv") for i in range(config.decoder_layers)]
        return torch.stack([torch.stack([heads.split(part) for part in kv(x).chunk(2, -1)]) for kv in linears])


class GreedyStep:
    """Greedy decoding with GPT-2: the best token of every row, appended to its history."""

    beams = 1

    def __init__(self, config: GptConfig, read: Reader, prompts: np.ndarray, beams: int, steps: int):
        """prompts: int [rows, tokens]; all but the last are read here, the last is the next step's."""
        assert beams == 1
        device, dtype = read.device, read.dtype
        self._config, self.steps = config, steps
        self._heads = Heads(config.heads, F.relu if config.activation == "relu" else _gelu)
        self._tokens, self._positions = read.table("tokens"), read.table("positions")
        # As users of PyTorch do: cuBLAS is slow with an odd number of columns.
        self._output = F.pad(self._tokens, (0, 0, 0, -len(self._tokens) % 64))
        names = [f"layer.{i}" for i in range(config.layers)]
        self._layers = [(read.attention(name, "attention"), read.feed_forward(name)) for name in names]
        self._norm = read.norm("norm")
        rows, size = len(prompts), config.hidden // config.heads
        self.cache = torch.zeros(config.layers, 2, rows, config.heads, steps, size, device=device, dtype=dtype)
        self._ladder = torch.arange(steps, device=device)
        self.history = torch.zeros(rows, steps, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        given = torch.from_numpy(prompts).to(device)
        self.token = given[:, 0].clone()
        for column in range(1, given.shape[1]):
            self(0)
            self.token.copy_(given[:, column])

    def __call__(self, source: int) -> None:
        """One token for every row; there is one cache, whatever `source` says."""
        token = self.logits(source).argmax(-1)
        self.history.index_copy_(1, self.position, token[:, None])
        self.token.copy_(token)
        self.position += 1

    def rewind(self, position: int) -> None:
        self.position.fill_(position)

    def logits(self, source: int) -> Tensor:
        """[rows, vocabulary]"""
        heads = self._heads
        mask = (self._ladder <= self.position)[None, None, None]
        x = self._tokens[self.token] + self._positions[self.position]
        for layer, (attention, feed_forward) in enumerate(self._layers):
            x = heads.static_attention(x, attention, self.cache[layer], self.position, mask)
            x = heads.feed_forward(x, feed_forward)
        return F.linear(self._norm(x), self._output)[:, : self._config.vocabulary]


class Replay:
    """A step as one CUDA graph for either cache; calls alternate between the two. On a CPU it is called as it is."""

    def __init__(self, step: BeamStep | GreedyStep, compiled: bool = False):
        if compiled:
            torch._dynamo.reset()  # it compiles one function a few times only, then runs it as it is
        run = torch.compile(step.__call__, dynamic=False) if compiled else step
        self._turn = 0
        if step.position.device.type == "cpu":
            self._runs: list[Callable[[], Any]] = [lambda: run(0), lambda: run(1)]
            return
        before = int(step.position)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries and kernels set themselves up outside the capture
            for source in (0, 1, 0, 1):
                step.rewind(before)
                run(source)
        torch.cuda.current_stream().wait_stream(aside)
        self._graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        for source, graph in enumerate(self._graphs):
            with torch.cuda.graph(graph):
                run(source)
        self._runs = [graph.replay for graph in self._graphs]
        step.rewind(before)

    def __call__(self) -> None:
        self._runs[self._turn]()
        self._turn = 1 - self._turn


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
