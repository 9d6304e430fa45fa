"""Whatever `lightseq convert` and `lightseq compare` are given, read into the one description of a model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lightseq_backend import weights
from lightseq_backend.config import Config, GptConfig
from lightseq_backend.errors import ConfigError
from lightseq_backend.export import (
    arrays_file,
    fairseq,
    huggingface,
    original_fairseq,
    plain_arrays,
    plain_fairseq,
    plain_lightseq,
)
from lightseq_backend.export.checkpoint import load_pickle, tensors_of
from lightseq_backend.export.model import Model
from lightseq_backend.export.plain import Plain
from lightseq_backend.weights import directory, protobuf
from lightseq_backend.weights.layout import layout_of

CHECKPOINT, ARRAYS = ".pt", ".npz"


def is_huggingface(source: Path) -> bool:
    return (source / "config.json").is_file()


def is_lightseqs(source: Path) -> bool:
    """Whether this is one of LightSeq's files, or a model directory with one: those leave open how they are read."""
    try:
        path = directory.find(source).weights
    except ConfigError:
        return False
    return path.suffix in (".pb", ".hdf5")


def plain(source: Path, config: Config) -> Plain | None:
    """A source's own computation, by a second way to read it; None where there is none (safetensors and HDF5, which
    have our names, int8, and protobuf files beyond its runtime). config: of the converted model."""
    source = _file_of(source)
    if source.suffix == CHECKPOINT:
        checkpoint = load_pickle(source, argparse.Namespace)
        return plain_fairseq.plain(fairseq.settings_of(checkpoint, source), tensors_of(checkpoint["model"]), config)
    if source.suffix == ARRAYS:
        return plain_arrays.plain(arrays_file.settings_beside(source), arrays_file.read_arrays(source), config)
    if source.suffix == ".pb" and source.stat().st_size < plain_lightseq.MOST:
        int8 = protobuf.examine(source, config.dialect, layout_of(config).kind).layout.int8
        return None if int8 else plain_lightseq.plain(source.read_bytes(), config)
    return None


def by_fairseq(source: Path, config: Config) -> tuple[original_fairseq.Original | None, str]:
    """The model of a checkpoint as fairseq itself runs it, and what that is called. None for another source and without
    fairseq, and where an installed one cannot run it: then with the reason. config: of the converted model."""
    path = _file_of(source)
    if path.suffix != CHECKPOINT or not original_fairseq.is_installed():
        return None, ""
    checkpoint = load_pickle(path, argparse.Namespace)
    return original_fairseq.build(fairseq.settings_of(checkpoint, path), checkpoint["model"], config)


def directory_of(source: Path) -> Path:
    """Where a source's tokenizer may lie."""
    return source if source.is_dir() else source.parent


def read(source: Path, forced_id: int | None = None, dialect: str | None = None, kind: str | None = None) -> Model:
    """The model of a Hugging Face directory, a fairseq checkpoint or a directory with one, arrays in an .npz file, a
    weight file or a model directory. dialect and kind: of LightSeq's files, as in weights.load; None is what the
    directory's config.pbtxt says.

    ConfigError where it is none of them or asks for what is not supported, WeightError for what is wrong with the file.
    """
    if is_huggingface(source):
        return huggingface.read(source, forced_id)
    model = _read(source, dialect, kind)
    if forced_id is None:
        return model
    if isinstance(model.config, GptConfig):
        raise ConfigError(f"{source} is a GPT: nothing is forced there")
    return replace(model, config=replace(model.config, forced_id=forced_id))


def _file_of(source: Path) -> Path:
    """What holds the arrays of a source that is no Hugging Face directory."""
    if not source.is_dir():
        return source
    return fairseq.find(source) if any(source.glob(f"*{CHECKPOINT}")) else directory.find(source).weights


def _read(source: Path, dialect: str | None, kind: str | None) -> Model:
    if not source.exists():
        raise ConfigError(f"{source} does not exist")
    if source.is_dir():
        if any(source.glob(f"*{CHECKPOINT}")):
            return fairseq.read(source)
        try:
            found = directory.find(source)
        except ConfigError as error:
            raise ConfigError(
                f"{source} has neither config.json (Hugging Face) nor a {CHECKPOINT} file (fairseq): {error}"
            ) from None
        return _read(found.weights, dialect or found.dialect, kind or found.kind)
    if source.suffix == CHECKPOINT:
        return fairseq.read(source)
    if source.suffix == ARRAYS:
        return arrays_file.read(source)
    if source.suffix in weights.SUFFIXES:
        return Model(*weights.load_stored(source, dialect or "head", kind), notes=[])
    known = ", ".join((CHECKPOINT, ARRAYS, *weights.SUFFIXES))
    raise ConfigError(f"{source} is no source: give a directory or a file that ends in {known}")
