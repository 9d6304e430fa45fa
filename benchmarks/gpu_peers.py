"""What else could decode the same models on the same GPU: Hugging Face, and a step written by hand in PyTorch.

    python -m benchmarks.gpu_peers [--quick] [--models big,gpt2] [--compile] [--precision fp16] [--records FILE]

Shapes and lengths are those of benchmarks.gpu, weights are random, times are medians. Hugging Face runs `generate`,
eager, with the length forced: whole requests, the encoder included, and a step by the difference between requests for
n tokens and for one. The step by hand (gpu_torch.py) is one CUDA graph with this engine's weights and is timed as this
engine's own is. Without PyTorch there is nothing to do, and the program says so.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import gpu_device, gpu_models
from benchmarks.gpu import TEXT_LENGTH, TEXTS
from benchmarks.gpu_device import COPIED
from benchmarks.gpu_models import MODELS, TINY, Model
from benchmarks.gpu_records import Record, Recorder, parser, precisions, versions
from benchmarks.gpu_timing import Clock, HostClock, TorchClock, device_seconds, wall_seconds
from lightseq_backend.config import Config, TransformerConfig

HUGGING_FACE = "Hugging Face generate"
GRAPH = "PyTorch by hand, one CUDA graph"
COMPILED = "PyTorch by hand, one CUDA graph, torch.compile"
REPLAYS = 8


def main() -> None:
    made = parser("gpu_peers", __doc__)
    made.add_argument("--models", help=f"names with commas between (default: {','.join(MODELS)})")
    made.add_argument(
        "--compile", action="store_true", help="also the step by hand under torch.compile: minutes a model"
    )
    options = made.parse_args()
    if obstacle := _obstacle(options.device):
        print(f"no peers: {obstacle}")
        return
    import torch

    torch.set_grad_enabled(False)
    models = MODELS if options.device == "cuda" else TINY
    names = options.models.split(",") if options.models else list(models)
    with Recorder("peers", options.records, _conditions(options.device)) as recorder:
        for name in names:
            config, arrays = gpu_models.build(models[name])
            for precision in (each for each in precisions(options) if each != "int8"):  # which they do not have
                for record in _records(models[name], config, arrays, precision, options):
                    recorder.add(record)


def _obstacle(device: str) -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return "PyTorch finds no GPU" if device == "cuda" and not torch.cuda.is_available() else None


def _records(
    model: Model, config: Config, arrays: dict[str, np.ndarray], precision: str, options: argparse.Namespace
) -> Iterator[Record]:
    device, quick = options.device, options.quick
    if importlib.util.find_spec("transformers") is None:
        print("no Hugging Face: transformers is not installed")
    else:
        yield from _hugging_face(model, config, precision, device, quick)
        _release(device)
    from benchmarks.gpu_torch import Reader

    read = Reader(arrays, config.dialect.norm_epsilon, device, _type(precision))
    for name in (GRAPH, COMPILED) if options.compile else (GRAPH,):
        for batch in model.batches:
            for length in _lengths(model, quick or name == COMPILED):
                seconds = step_seconds(model, config, read, batch, length, name == COMPILED)
                yield Record(name, model.name, precision, batch, length, "decode step", seconds * 1e6, "us")
                _release(device)


def _lengths(model: Model, quick: bool) -> tuple[int, ...]:
    return tuple(length for length in model.lengths if not quick or length in (24, gpu_models.PROMPT))


# Hugging Face --------------------------------------------------------------------------------------------------------


def _hugging_face(model: Model, config: Config, precision: str, device: str, quick: bool) -> Iterator[Record]:
    import torch

    network = hugging_face_model(config, device, precision)
    clock = _clock(device)

    def record(batch: int, length: int, what: str, value: float, unit: str, note: str = "") -> Record:
        return Record(HUGGING_FACE, model.name, precision, batch, length, what, value, unit, note=note)

    for batch in model.batches:
        for length in _lengths(model, quick):
            rows = torch.from_numpy(np.stack(gpu_models.rows(model, batch, length))).to(device)
            whole, first = (
                wall_seconds(clock, partial(generate, network, rows, model.beams, tokens), 3) for tokens in (length, 1)
            )
            step = (whole - first) / (length - 1)
            yield record(batch, length, "decode step", step * 1e6, "us", "(time for n tokens - time for 1) / (n - 1)")
            yield record(batch, length, "whole requests", whole * 1e3, "ms")
    if not model.translates:
        texts, tokens = (TEXTS, TEXT_LENGTH) if device == "cuda" else (2, model.shape.positions)
        ids = torch.from_numpy(np.stack(gpu_models.rows(model, texts, tokens))).to(device)
        seconds = wall_seconds(clock, lambda: network(input_ids=ids, labels=ids, use_cache=False).loss.item(), 5)
        yield record(texts, tokens, "perplexity", seconds * 1e3, "ms")


def hugging_face_model(config: Config, device: str, precision: str) -> Any:
    """M2M100 (pre-norm, ReLU, as ours) or GPT-2 of that shape, random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, M2M100ForConditionalGeneration

    from benchmarks.peers import m2m100_config

    with torch.device(device):
        if isinstance(config, TransformerConfig):
            network: Any = M2M100ForConditionalGeneration(m2m100_config(config))
        else:
            network = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=config.vocabulary, n_positions=config.max_positions, n_embd=config.hidden,
                    n_layer=config.layers, n_head=config.heads, n_inner=config.inner,
                    bos_token_id=config.end_id, eos_token_id=config.end_id, pad_token_id=config.end_id,
                )
            )  # fmt: skip
    return network.to(device, _type(precision)).eval()


def generate(network: Any, rows: Any, beams: int, tokens: int) -> Any:
    """Ids, int [rows * beams, start + tokens]: so many new ones behind the start token or the prompt."""
    import torch

    search = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.6} if beams > 1 else {}
    found = network.generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), do_sample=False, min_new_tokens=tokens,
        max_new_tokens=tokens, **search,
    )  # fmt: skip
    start = 1 if network.config.is_encoder_decoder else rows.shape[1]
    assert found.shape == (len(rows) * beams, start + tokens), found.shape
    return found


# By hand -------------------------------------------------------------------------------------------------------------


def step_seconds(model: Model, config: Any, read: Any, batch: int, length: int, compiled: bool = False) -> float:
    """Seconds a step with the cache as long as such a request needs it, in whole eights; the cache is read in full."""
    from benchmarks.gpu_torch import BeamStep, GreedyStep, Replay

    rows = np.stack(gpu_models.rows(model, batch, length))
    steps = -(-(length if model.translates else 2 * length - 1) // 8) * 8
    step = (BeamStep if model.translates else GreedyStep)(config, read, rows, model.beams, steps)
    replay = Replay(step, compiled)
    times = min(REPLAYS, steps - 1)
    return device_seconds(_clock(read.device), replay, times, 30, before=lambda: step.rewind(steps - 1 - times))


# The device ----------------------------------------------------------------------------------------------------------


def _conditions(device: str) -> dict[str, Any]:
    packages = versions("torch", "transformers")
    if device == "cpu":
        return {"gpu": "no GPU", **packages}
    import torch

    source, destination = (torch.ones(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = device_seconds(TorchClock(), lambda: destination.copy_(source), 4, 10)
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": gpu_device.driver(),
        "CUDA of torch": torch.version.cuda,
        **packages,
        "copy_bytes_a_second": 2 * COPIED / seconds,
    }


def _clock(device: str) -> Clock:
    return HostClock() if device == "cpu" else TorchClock()


def _type(precision: str) -> Any:
    import torch

    return {"fp16": torch.float16, "fp32": torch.float32}[precision]


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
