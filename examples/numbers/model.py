"""LightSeq's two architectures in PyTorch, pre-LN, with parameters named and laid out as the exporter wants them.

Kernels are [in, out] and stand in `state_dict` under the names of `lightseq_backend.weights`, so that export is a
copy; only the token tables of the Transformer are scaled on the way (`Translator.arrays`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightseq_backend.config import GptConfig, TransformerConfig

NORM_EPSILON = 1e-6  # LightSeq adds 1e-6 or 1e-12, by release: far below the variances that occur here


class Norm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.gain, self.bias, NORM_EPSILON)


class Linear(nn.Module):
    """x . weight + bias, weight [in, out]."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * (gain / math.sqrt(inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.t(), self.bias)


class Tables(nn.Module):
    """Token and position tables of one side; positions are learned or sinusoids."""

    def __init__(self, vocabulary: int, positions: int, hidden: int, learned: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(vocabulary, hidden) / math.sqrt(hidden))
        self.positions: Tensor
        if learned:
            self.positions = nn.Parameter(torch.randn(positions, hidden) * 0.02)
        else:
            self.register_buffer("positions", sinusoids(positions, hidden))

    def forward(self, ids: Tensor, scale: float) -> Tensor:
        return functional.embedding(ids, self.tokens) * scale + self.positions[: ids.shape[1]]


class Layer(nn.Module):
    """Self-attention and feed-forward, each behind its LayerNorm: an encoder layer, and the whole of GPT-2's."""

    def __init__(self, config: TransformerConfig | GptConfig, depth: int) -> None:
        super().__init__()
        h, out_gain = config.hidden, 1 / math.sqrt(2 * depth)
        self.heads = config.heads
        self.activation = activation_named(config.activation)
        self.attention_norm = Norm(h)
        self.attention_qkv = Linear(h, 3 * h)
        self.attention_output = Linear(h, h, out_gain)
        self.ffn_norm = Norm(h)
        self.ffn_inner = Linear(h, config.inner)
        self.ffn_output = Linear(config.inner, h, out_gain)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = self.attention_qkv(self.attention_norm(x)).chunk(3, dim=-1)
        x = x + self.attention_output(attention(q, k, v, self.heads, mask, causal))
        return x + self.ffn_output(self.activation(self.ffn_inner(self.ffn_norm(x))))


class DecoderLayer(nn.Module):
    """Self-attention, attention over the source, feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        h, out_gain = config.hidden, 1 / math.sqrt(3 * config.decoder_layers)
        self.heads = config.heads
        self.activation = activation_named(config.activation)
        self.self_norm = Norm(h)
        self.self_qkv = Linear(h, 3 * h)
        self.self_output = Linear(h, h, out_gain)
        self.cross_norm = Norm(h)
        self.cross_query = Linear(h, h)
        self.cross_kv = Linear(h, 2 * h)
        self.cross_output = Linear(h, h, out_gain)
        self.ffn_norm = Norm(h)
        self.ffn_inner = Linear(h, config.inner)
        self.ffn_output = Linear(config.inner, h, out_gain)

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        q, k, v = self.self_qkv(self.self_norm(x)).chunk(3, dim=-1)
        x = x + self.self_output(attention(q, k, v, self.heads, None, causal=True))
        k, v = self.cross_kv(memory).chunk(2, dim=-1)
        q = self.cross_query(self.cross_norm(x))
        x = x + self.cross_output(attention(q, k, v, self.heads, memory_mask, causal=False))
        return x + self.ffn_output(self.activation(self.ffn_inner(self.ffn_norm(x))))


class Output(nn.Module):
    """The logits' own bias; their kernel is the target's token table."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))


class Translator(nn.Module):
    """The encoder-decoder. source int64 [batch, n], target int64 [batch, m] -> logits [batch, m, vocabulary]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        sides = config.max_positions, config.hidden
        self.source = Tables(config.source_vocabulary, *sides, learned=False)
        self.target = Tables(config.target_vocabulary, *sides, learned=False)
        self.output = Output(config.target_vocabulary)
        self.encoder = nn.ModuleList([Layer(config, config.encoder_layers) for _ in range(config.encoder_layers)])
        self.decoder = nn.ModuleList([DecoderLayer(config) for _ in range(config.decoder_layers)])
        self.encoder_norm = Norm(config.hidden)
        self.decoder_norm = Norm(config.hidden)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        scale = math.sqrt(self.config.hidden)
        seen = (source != self.config.padding_id)[:, None, None, :]
        x = self.source(source, scale)
        for layer in self.encoder:
            x = layer(x, seen)
        memory = self.encoder_norm(x)
        x = self.target(target, scale)
        for layer in self.decoder:
            x = layer(x, memory, seen)
        return functional.linear(self.decoder_norm(x), self.target.tokens, self.output.bias)

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the file. LightSeq keeps sqrt(hidden) in the token tables and takes it off the logits."""
        arrays = _arrays(self)
        scale = np.float32(math.sqrt(self.config.hidden))
        arrays["source.tokens"] *= scale
        arrays["output.weight"] = np.ascontiguousarray(arrays.pop("target.tokens").T) * scale
        for stack in ("encoder", "decoder"):
            for part in ("gain", "bias"):
                arrays[f"{stack}.norm.{part}"] = arrays.pop(f"{stack}_norm.{part}")
        return arrays


class Counter(nn.Module):
    """GPT-2: ids int64 [batch, n] -> logits [batch, n, vocabulary] of the ids that follow."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.tables = Tables(config.vocabulary, config.max_positions, config.hidden, learned=True)
        self.layer = nn.ModuleList([Layer(config, config.layers) for _ in range(config.layers)])
        self.norm = Norm(config.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tables(ids, 1.0)
        for layer in self.layer:
            x = layer(x, causal=True)
        return functional.linear(self.norm(x), self.tables.tokens)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name.removeprefix("tables."): array for name, array in _arrays(self).items()}


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, causal: bool) -> Tensor:
    """softmax(q . k / sqrt(d)) . v by head; q [batch, m, hidden], k and v [batch, n, hidden], mask True = seen."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    x = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return x.transpose(1, 2).flatten(2)


def activation_named(name: str) -> nn.Module:
    return nn.ReLU() if name == "relu" else nn.GELU(approximate="tanh")


def sinusoids(positions: int, hidden: int) -> Tensor:
    """Sines in the first half of the columns, cosines in the second; wavelengths from 2 pi to 10,000 * 2 pi."""
    half = hidden // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10_000) / (half - 1)))
    angles = torch.arange(positions)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().numpy().copy() for name, tensor in model.state_dict().items()}
