"""Which weight file a path means and how it is read: a model directory's config.pbtxt says it, with a server or not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightseq_backend.errors import ConfigError
from lightseq_backend.weights import pbtxt
from lightseq_backend.weights.layout import GPT, KINDS, TRANSFORMER

CONFIG, CPU_CONFIG = "config.pbtxt", "configs/cpu.pbtxt"
SUFFIXES = (".pb", ".hdf5", ".safetensors")  # of weight files, in the order in which they are looked for
# The inputs that LightSeq's servers and clients use, V0's and those of the releases after it, by the kind of model.
INPUTS = {"source_ids": TRANSFORMER, "src_ids:0": TRANSFORMER, "token_ids": GPT, "inputs_ids": GPT}


@dataclass(frozen=True)
class Found:
    """A weight file and what its directory says of it.

    kind       "transformer" or "gpt", where its inputs tell
    precision  None: the device's default
    tokenizer  directories that may hold one
    """

    weights: Path
    tokenizer: tuple[Path, ...]
    dialect: str = "head"
    kind: str | None = None
    precision: str | None = None
    source_language: str | None = None


def find(path: str | Path, gpu: bool = False) -> Found:
    """What there is at a path: a weight file, or a directory with one.

    A directory's config.pbtxt is read as the server reads it: its parameters `weights`, `dialect`, `precision`,
    `tokenizer` and `source_language`, default_model_filename and the name. Without a GPU configs/cpu.pbtxt takes its
    place, where there is one. ConfigError when no weight file is there, or when it cannot be told which it is.
    """
    path = Path(path)
    if not path.is_dir():
        return Found(path, (path.parent,))
    places = (path / name for name in ((CONFIG,) if gpu else (CPU_CONFIG, CONFIG)))
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        weights = _only_weights(path)
        return Found(weights, (path,))
    config = _read_config(place)
    given = config.parameters
    kind = next((INPUTS[name] for name in config.inputs if name in INPUTS), None)
    faults: list[str] = []
    kinds = KINDS if kind is None else (kind,)
    name = config.name or path.resolve().name
    found = find_weights(path, name, kinds, given, config.filename, os.environ, faults)
    tokenizer = tokenizer_directories(path, given, found, faults)
    if found is None or faults:
        raise ConfigError("\n  ".join([f"{place} cannot be used:", *faults]))
    return Found(
        found, tokenizer, given.get("dialect", "head"), kind, given.get("precision"), given.get("source_language")
    )


def find_weights(
    directory: Path,
    model: str,
    kinds: Sequence[str],
    given: Mapping[str, str],
    filename: str,
    environment: Mapping[str, str],
    faults: list[str],
) -> Path | None:
    """The file that the parameter `weights` names, relative to the model's directory, or else the first found of
    default_model_filename, <kind>.pb, <model>.pb and the same with .hdf5 and .safetensors in that directory or, as
    LightSeq V0 has it, in $MODEL_ZOO/<model>. `faults` grows by a line where there is none."""
    if "weights" in given:
        candidates = [directory / given["weights"]]
    else:
        # For the Python backend this names the program; a LightSeq user's names the weights.
        names = [] if filename.endswith((".py", ".so")) or not filename else [filename]
        names += _names(kinds, model)
        zoo = [Path(environment["MODEL_ZOO"]) / model] if environment.get("MODEL_ZOO") else []
        candidates = [place / name for place in (directory, *zoo) for name in names]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    faults.append(f"no weights; looked for {', '.join(map(str, candidates))}")
    return None


def tokenizer_directories(
    directory: Path, given: Mapping[str, str], weights: Path | None, faults: list[str]
) -> tuple[Path, ...]:
    """The directory that the parameter `tokenizer` names, relative to the model's, or else the model's own and the one
    of its weights, which models may share."""
    if "tokenizer" not in given:
        return tuple(dict.fromkeys((directory, weights.parent))) if weights else (directory,)
    named = directory / given["tokenizer"]
    if not named.is_dir():
        faults.append(f"parameter tokenizer is {given['tokenizer']!r}, but {named} is not a directory")
    return (named,)


def _only_weights(directory: Path) -> Path:
    names = _names(KINDS, directory.resolve().name)
    found = [directory / name for name in names if (directory / name).is_file()]
    if len(found) != 1:
        there = f"{' and '.join(one.name for one in found)} are there" if found else "none is there"
        raise ConfigError(f"{directory} must hold {CONFIG}, or one weight file of {', '.join(names)}; {there}")
    return found[0]


def _names(kinds: Sequence[str], model: str) -> list[str]:
    return list(dict.fromkeys(f"{stem}{suffix}" for suffix in SUFFIXES for stem in (*kinds, model)))


@dataclass(frozen=True)
class _Config:
    name: str
    filename: str
    inputs: list[str]
    parameters: dict[str, str]


def _read_config(path: Path) -> _Config:
    """What of a config.pbtxt says where the weights are and what they are."""
    try:
        fields = pbtxt.parse(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{path} is no model configuration: {error}") from None
    parameters = {}
    for entry in _messages(fields, "parameters"):
        value = next(iter(_messages(entry, "value")), {})
        parameters[_text(entry, "key")] = _text(value, "string_value")
    inputs = [_text(tensor, "name") for tensor in _messages(fields, "input")]
    return _Config(_text(fields, "name"), _text(fields, "default_model_filename"), inputs, parameters)


def _messages(fields: pbtxt.Message, name: str) -> list[pbtxt.Message]:
    return [value for value in fields.get(name, []) if isinstance(value, dict)]


def _text(fields: pbtxt.Message, name: str) -> str:
    """The last value of that name, as protobuf has it."""
    return next((value for value in reversed(fields.get(name, [])) if isinstance(value, str)), "")
