"""The training loop that the examples with real text share: one model, one device, a budget of seconds or steps."""

from __future__ import annotations

import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
_DECAYS = ("cosine", "inverse_sqrt")
_LONGEST_CLIMB = 0.1  # of the budget


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. The loop ends at the first of `seconds` and `steps`.

    rate             the highest learning rate, reached by a straight climb
    warmup           steps of that climb, which a tenth of the budget ends in any case
    decay            "cosine": down to `last_rate` of it at the end; "inverse_sqrt": rate * sqrt(warmup / step)
    evaluate_every   share of the budget between two evaluations; the last is at the end
    averaged         how many of the last evaluations' states the result is the mean of
    """

    seconds: float
    rate: float
    warmup: int
    steps: int | None = None
    decay: str = "cosine"
    last_rate: float = 0.02
    evaluate_every: float = 0.05
    averaged: int = 4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0
    report_every: int = 100

    def __post_init__(self) -> None:
        faults = []
        if self.decay not in _DECAYS:
            faults.append(f"decay is {self.decay!r}; it may be {' or '.join(_DECAYS)}")
        if not 0 < self.evaluate_every <= 1:
            faults.append(f"evaluate_every is {self.evaluate_every}; it is a share of the budget, over 0 and at most 1")
        for name in ("seconds", "rate", "warmup", "averaged", "report_every"):
            if not getattr(self, name) > 0:
                faults.append(f"{name} is {getattr(self, name)}; it must be over 0")
        if faults:
            raise ValueError("; ".join(faults))

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the budget that is spent after `step` steps in `elapsed` seconds, at most 1."""
        return min(1.0, max(elapsed / self.seconds, step / self.steps if self.steps else 0.0))

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate of step `step`, counted from 1."""
        climb = max(step / self.warmup, progress / _LONGEST_CLIMB)
        if climb < 1:
            return self.rate * climb
        if self.decay == "inverse_sqrt":
            return self.rate * min(1.0, math.sqrt(self.warmup / step))
        return self.rate * (self.last_rate + (1 - self.last_rate) * (1 + math.cos(math.pi * progress)) / 2)


@dataclass(frozen=True)
class Trained:
    """state: the best of the averaged and the last; curves: what the log's lines say; scores: of `state`."""

    state: State
    scores: dict[str, float]
    curves: list[dict[str, Any]]
    steps: int
    seconds: float


def seed(number: int) -> None:
    """Seeds Python, NumPy and PyTorch, on every device."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def train(
    model: nn.Module,
    batches: Iterator[Any],
    loss: Callable[[Any], Tensor],
    evaluate: Callable[[], dict[str, float]],
    schedule: Schedule,
    log: Path | None = None,
) -> Trained:
    """Minimises loss(batch), a scalar of the model's, by AdamW, in bfloat16 where the model lies on a GPU.

    `evaluate` is called with the model in eval mode and without gradients; its "loss" says which state is better.
    Reports go to standard output and, a line of JSON each, to `log`. The host reads nothing from the device
    between two reports. The model ends up with the returned state.
    """
    device = next(model.parameters()).device
    optimiser = _optimiser(model, schedule, device)
    curves = _Curves(log)
    states: deque[State] = deque(maxlen=schedule.averaged)
    total, since, evaluated, step = torch.zeros((), device=device), 0, 0.0, 0
    progress, scores = 0.0, {"loss": math.inf}
    model.train()
    while progress < 1:
        step += 1
        rate = schedule.rate_at(step, progress)
        total += _step(model, optimiser, loss, next(batches), rate, schedule.clip)
        since += 1
        progress = schedule.progress(step, curves.elapsed())
        due = progress == 1 or progress - evaluated >= schedule.evaluate_every
        if due or step % schedule.report_every == 0:
            curves.add(step=step, rate=rate, loss=total.item() / since)
            total.zero_()
            since = 0
        if due:
            evaluated = progress
            scores = _evaluated(model, evaluate)
            states.append(_copied(model))
            curves.add(step=step, validation=scores)
            progress = schedule.progress(step, curves.elapsed())
    state, scores = _better(model, evaluate, states, scores)
    curves.add(step=step, kept=scores)
    return Trained(state, scores, curves.lines, step, curves.elapsed())


def average(states: list[State]) -> State:
    """The mean of every floating-point tensor, in float32; other tensors are the last state's."""
    return {
        name: torch.stack([state[name].float() for state in states]).mean(dim=0).to(last.dtype)
        if last.is_floating_point()
        else last
        for name, last in states[-1].items()
    }


class _Curves:
    """What is reported, with the seconds since the beginning."""

    def __init__(self, log: Path | None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._log = log
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("")

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def add(self, **values: Any) -> None:
        line = {"seconds": round(self.elapsed(), 1), **values}
        self.lines.append(line)
        text = json.dumps(line)
        print(text, flush=True)
        if self._log is not None:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")


def _optimiser(model: nn.Module, schedule: Schedule, device: torch.device) -> torch.optim.Optimizer:
    """AdamW that lets vectors (biases, gains) be and pulls matrices towards zero."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.rate, betas=schedule.betas, eps=1e-9, fused=device.type == "cuda")


def _step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss: Callable[[Any], Tensor],
    batch: Any,
    rate: float,
    clip: float,
) -> Tensor:
    """One step; the loss before it, on the device."""
    for group in optimiser.param_groups:
        group["lr"] = rate
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        value = loss(batch)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return value.detach().float()


@torch.no_grad()
def _evaluated(model: nn.Module, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
    model.eval()
    scores = evaluate()
    model.train()
    return scores


def _copied(model: nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _better(
    model: nn.Module, evaluate: Callable[[], dict[str, float]], states: deque[State], last: dict[str, float]
) -> tuple[State, dict[str, float]]:
    """The average or, where that is no better (a run too short for it), the last state."""
    state = average(list(states))
    model.load_state_dict(state)
    scores = _evaluated(model, evaluate)
    if not scores["loss"] <= last["loss"]:
        state, scores = states[-1], last
        model.load_state_dict(state)
    return state, scores
