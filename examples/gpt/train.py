"""Trains the GPT on what `examples.gpt.prepare` made, and writes it as a Hugging Face directory in halves.

    python -m examples.gpt.train [--data build/gpt/data] [--output build/gpt/model] [--seconds 480]

Beside config.json and the weights: training.log (the curves, a line of JSON each) and training.json (what was set, what
came of it). The tokenizer's files stay in --data.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from examples.common import loop
from examples.gpt import prepare

POSITIONS = 512
EVALUATED = {"cuda": 512, "cpu": 16}  # windows of validation, at most
SHAPE = {"n_embd": 320, "n_head": 5, "n_layer": 6, "n_inner": 1280}
SAMPLING = {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.15}
GENERATION = {**SAMPLING, "max_new_tokens": 64, "use_cache": True}
TINY = {"n_embd": 64, "n_head": 1, "n_layer": 2, "n_inner": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/gpt/data"))
    parser.add_argument("--output", type=Path, default=Path("build/gpt/model"))
    parser.add_argument("--seconds", type=float, default=480, help="all of it, loading and saving too")
    parser.add_argument("--seed", type=int, default=prepare.SEED)
    parser.add_argument("--windows", type=int, default=128, help=f"of {POSITIONS} tokens, a step")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.5 million parameters, to try the script")
    arguments = parser.parse_args()
    began = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    loop.seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = json.loads((arguments.data / "data.json").read_text())
    model = build(numbers, arguments.dropout, arguments.tiny).to(device)
    print(f"{model.num_parameters():,} parameters on {device}, torch {torch.__version__}", flush=True)
    training = on_device(prepare.read_training(arguments.data), device)
    validation = on_device(np.load(arguments.data / "validation.npy"), device)
    windows = min(arguments.windows, 8) if device.type == "cpu" else arguments.windows
    spent = time.monotonic() - began
    schedule = loop.Schedule(
        seconds=max(1.0, arguments.seconds - spent - min(20.0, arguments.seconds / 10)),
        rate=arguments.rate,
        warmup=500 if device.type == "cuda" else 20,
        weight_decay=0.1,
        betas=(0.9, 0.95),
    )
    trained = loop.train(
        model,
        drawn(training, windows, arguments.seed),
        lambda batch: loss_of(model, batch),
        evaluation(model, validation, numbers["validation"], 4 * windows),
        schedule,
        arguments.output / "training.log",
    )
    tokens = trained.steps * windows * POSITIONS
    settings = {**vars(arguments), "windows": windows, "device": device_name(device), "torch": torch.__version__}
    report = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
        "parameters": model.num_parameters(),
        "steps": trained.steps,
        "tokens_seen": tokens,
        "epochs": round(tokens / len(training), 2),
        "training_seconds": round(trained.seconds, 1),
        "validation": trained.scores,
        "data": numbers,
    }
    save(model, arguments.output, report)


def build(numbers: dict[str, Any], dropout: float, tiny: bool) -> Any:
    """A GPT-2 as transformers has it, untrained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=numbers["vocabulary"],
        n_positions=POSITIONS,
        bos_token_id=numbers["end_id"],
        eos_token_id=numbers["end_id"],
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        attn_implementation="sdpa",
        use_cache=False,
        **(TINY if tiny else SHAPE),
    )
    return GPT2LMHeadModel(config)


def on_device(ids: np.ndarray, device: torch.device) -> Tensor:
    """int32 [tokens]"""
    return torch.from_numpy(ids.astype(np.int32)).to(device)


def drawn(ids: Tensor, windows: int, seed: int) -> Iterator[Tensor]:
    """int64 [windows, POSITIONS + 1], from anywhere, drawn on the device."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    steps = torch.arange(POSITIONS + 1, device=ids.device)
    while True:
        first = torch.randint(len(ids) - POSITIONS, (windows, 1), generator=generator, device=ids.device)
        yield ids[first + steps].long()


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Mean cross-entropy of each token after the first."""
    logits = model(batch[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def evaluation(model: Any, ids: Tensor, numbers: dict[str, int], windows: int) -> Callable[[], dict[str, float]]:
    """Loss, perplexity and bits a byte of validation text, in windows side by side."""
    count = min(EVALUATED[ids.device.type], (len(ids) - 1) // POSITIONS)
    if count < 1:
        raise ValueError(f"validation has {len(ids)} tokens; a window takes {POSITIONS + 1}")
    rows = ids[: count * POSITIONS + 1].long().unfold(0, POSITIONS + 1, POSITIONS)

    def evaluate() -> dict[str, float]:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
            parts = [loss_of(model, part) * len(part) for part in rows.split(windows)]
        loss = float(torch.stack(parts).sum()) / count
        bits = loss / math.log(2) * numbers["tokens"] / numbers["bytes"]
        return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}

    return evaluate


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def save(model: Any, output: Path, report: dict[str, Any]) -> None:
    """Weights in halves and in shards of 10 MB, config.json, generation_config.json, training.json."""
    model.eval().half()
    model.config.use_cache = True
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(output, max_shard_size="10MB")
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
