"""What config.pbtxt asks of one model, read and checked: tensors, weights and engine."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightseq_backend.config import DIALECTS, Config, EngineConfig, GptConfig
from lightseq_backend.errors import ConfigError
from lightseq_backend.request import SCORE
from lightseq_backend.serving.wire import GPT, TRANSFORMER, Wire, read_wire
from lightseq_backend.weights.directory import find_weights, tokenizer_directories

DEVICES = {"CPU": "cpu", "GPU": "cuda"}  # by Triton's instance kind
INT8 = "int8"
PRECISIONS = {"cpu": ("fp32", INT8), "cuda": ("fp16", "fp32", INT8)}  # by device, the default first
# Fields of EngineConfig.
SIZES = ("slots", "max_beam_size", "queue", "queue_tokens", "queue_seconds", "prompt_tokens", "burst")
QUEUE_TOKENS, QUEUE_SECONDS = 1 << 18, 300  # by default, or a full batch of the longest rows
# Seconds: what a round of the engine may take before the instance counts as failed, and what is under way gets to
# finish when the model is unloaded.
TIMES = {"step_seconds": 60, "drain_seconds": 20}
BURSTS = {"cpu": 1, "cuda": 4}  # the host's part of a burst must fit into the device's
PARAMETERS = ("weights", "dialect", "precision", *SIZES, *TIMES, "tokenizer", "source_language")
# LightSeq's own parameter: what `model_type` may be. Its file says whether weights are int8.
MODEL_TYPES = {"Transformer": TRANSFORMER, "Gpt": GPT, "QuantTransformer": TRANSFORMER, "QuantGpt": GPT}
TRITON_PARAMETERS = ("FORCE_CPU_ONLY_INPUT_TENSORS", "EXECUTION_ENV_PATH")


@dataclass(frozen=True)
class Settings:
    """One model instance.

    device     name for ops.load, and Triton's number of the GPU
    weights    the weight file, which exists
    max_rows   of one request
    tokenizer  directories that may hold one, and the source's language for those of many
    sizes      the fields of EngineConfig that config.pbtxt gives
    times      seconds, by the names of TIMES
    """

    model: str
    instance: str
    version: str
    device: str
    device_id: int
    wire: Wire
    weights: Path
    dialect: str
    precision: str
    max_rows: int
    tokenizer: tuple[Path, ...]
    source_language: str | None
    sizes: dict[str, int]
    times: dict[str, int]

    def engine_config(self, config: Config) -> EngineConfig:
        """Room for what the model's file asks for by default, unless config.pbtxt says how much there is.

        ConfigError when a full batch of the longest rows does not fit into the queue: it could never be accepted.
        """
        sizes = dict(self.sizes)
        plain = EngineConfig()
        scores = self.wire.form.task == SCORE
        if scores and isinstance(config, GptConfig):  # a text needs no slots
            sizes.setdefault("slots", 1)
        beams = max(plain.max_beam_size, config.decoding.width)
        sizes.setdefault("slots", max(plain.slots, beams))
        sizes.setdefault("max_beam_size", min(beams, sizes["slots"]))
        sizes.setdefault("queue", max(plain.queue, self.max_rows))
        longest = self.max_rows * config.max_positions
        sizes.setdefault("queue_tokens", max(QUEUE_TOKENS, longest))
        sizes.setdefault("queue_seconds", QUEUE_SECONDS)
        sizes.setdefault("burst", BURSTS[self.device])
        if sizes["queue"] < self.max_rows:
            raise ConfigError(f"queue is {sizes['queue']}; max_batch_size lets a request have {self.max_rows} rows")
        if sizes["queue_tokens"] < longest:
            raise ConfigError(
                f"queue_tokens is {sizes['queue_tokens']}; a request may have {self.max_rows} rows of "
                f"{config.max_positions} tokens"
            )
        return EngineConfig(**sizes, scores=scores)


def read_settings(args: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> Settings:
    """From what Triton hands to `initialize`. ConfigError names every fault, one a line."""
    model_config = json.loads(args["model_config"])
    given = {key: entry["string_value"] for key, entry in model_config.get("parameters", {}).items()}
    faults: list[str] = []
    device = DEVICES.get(args["model_instance_kind"], "cpu")
    if args["model_instance_kind"] not in DEVICES:
        faults.append(f"instance kind is KIND_{args['model_instance_kind']}; kinds are KIND_CPU, KIND_GPU")
    wire = read_wire(model_config, faults)
    _check_parameters(given, device, wire, faults)
    sizes, times = _whole_numbers(given, SIZES, faults), _whole_numbers(given, tuple(TIMES), faults)
    _check_policies(model_config, faults)
    directory, model = Path(args["model_repository"]), args["model_name"]
    weights = None
    if wire:
        filename = model_config.get("default_model_filename", "")
        weights = find_weights(directory, model, (wire.form.kind,), given, filename, environment, faults)
    tokenizer = tokenizer_directories(directory, given, weights, faults)
    if faults:
        raise ConfigError("\n".join(faults))
    assert wire is not None
    assert weights is not None
    return Settings(
        model=model,
        instance=args["model_instance_name"],
        version=args["model_version"],
        device=device,
        device_id=int(args["model_instance_device_id"]),
        wire=wire,
        weights=weights,
        dialect=given.get("dialect", "head"),
        precision=given.get("precision", PRECISIONS[device][0]),
        max_rows=max(1, model_config.get("max_batch_size", 0)),
        tokenizer=tokenizer,
        source_language=given.get("source_language"),
        sizes=sizes,
        times=TIMES | times,
    )


def _check_parameters(given: Mapping[str, str], device: str, wire: Wire | None, faults: list[str]) -> None:
    for key in sorted(set(given) - {*PARAMETERS, *TRITON_PARAMETERS, "model_type"}):
        faults.append(f"parameter {key!r} is unknown; parameters are {', '.join(PARAMETERS)}")
    dialect, precision = given.get("dialect", "head"), given.get("precision", PRECISIONS[device][0])
    if dialect not in DIALECTS:
        faults.append(f"dialect is {dialect!r}; dialects are {', '.join(DIALECTS)}")
    if precision not in PRECISIONS[device]:
        where = "a CPU" if device == "cpu" else "a GPU"
        faults.append(f"precision is {precision!r}; {where} computes in {' or '.join(PRECISIONS[device])}")
    model_type = given.get("model_type")
    if model_type is None:
        return
    if model_type not in MODEL_TYPES:
        faults.append(f"model_type is {model_type!r}; this backend serves {', '.join(MODEL_TYPES)}")
    elif wire is not None and MODEL_TYPES[model_type] != wire.form.kind:
        faults.append(f"model_type is {model_type!r}, but input {wire.input} is of a {wire.form.kind} model")


def _whole_numbers(given: Mapping[str, str], keys: Sequence[str], faults: list[str]) -> dict[str, int]:
    numbers = {}
    for key in keys:
        if key not in given:
            continue
        if given[key].isascii() and given[key].isdigit() and int(given[key]) > 0:
            numbers[key] = int(given[key])
        else:
            faults.append(f"parameter {key} is {given[key]!r}; it must be a whole number from 1 up")
    return numbers


def _check_policies(model_config: Mapping[str, Any], faults: list[str]) -> None:
    if model_config.get("response_cache", {}).get("enable"):
        # The cache's key leaves a request's parameters out: one request would get the text of another's options.
        faults.append("response_cache is enabled; Triton's cache does not tell requests with different options apart")
