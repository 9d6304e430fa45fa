"""Weight files: `load` and `save`. One module a format: LightSeq's protobuf and HDF5, safetensors with our names."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from lightseq_backend.config import Config, dialect_named
from lightseq_backend.errors import ConfigError
from lightseq_backend.weights import hdf5, protobuf, safetensors

FilePath = str | os.PathLike[str]
SUFFIXES = (safetensors.SUFFIX, ".pb", hdf5.SUFFIX)


def load(
    path: FilePath, dialect: str = "head", kind: str | None = None, rounded: bool = False
) -> tuple[Config, dict[str, Any]]:
    """The configuration and the arrays of a weight file: .safetensors with its .json beside it, or one of LightSeq's,
    .hdf5 or of any other name for protobuf.

    The latter says everything itself, its dialect too, and what it has in float32 stays mapped. Of LightSeq's files:

    dialect  the release whose reading of the file holds, see config.DIALECTS
    kind     "transformer" or "gpt"; None takes it from the content: only a Transformer has the top-level
             fields 4 and 5, and field 3 holds numbers (model_conf) in a GPT, floats alone (an embedding) in a
             Transformer. Where a damaged file leaves both possible, "gpt" in the file's name decides.
    rounded  what an int8 file (one with a clip_max) has for products stays as it is, quantised.Rounded: the arrays
             "*.weight", but for a projection with a different clip_max in each part

    Other arrays are float32 under the names that weights/layout.py lists; kernels are [in, out]. "target.tokens" of a
    Transformer and "output.weight" of a GPT are transposed views, "decoder.{i}.cross_kv.*" views of what is one
    array in the file; all others are contiguous and 64-byte aligned. Peak memory is the arrays and a few pages.

    Of what a file may leave out: an end id of 0 is the last id of the vocabulary, for a GPT too, where LightSeq
    reads an uninitialised number; under "v0" it always is, and only the fields that v0.0.1 had count. A GPT's
    "ppl" method is read as top-k sampling: every GPT scores here.

    WeightError, with every fault of the file on a line of its own; ConfigError for an unknown dialect.
    """
    if _has(path, safetensors.SUFFIX):
        _check_plain(path, dialect)
        return safetensors.load(path, kind)
    if _has(path, hdf5.SUFFIX):
        return hdf5.load(path, dialect_named(dialect), kind, rounded)
    contents = protobuf.examine(path, dialect_named(dialect), kind)
    return contents.config, protobuf.read_arrays(contents, rounded)


def load_stored(path: FilePath, dialect: str = "head", kind: str | None = None) -> tuple[Config, dict[str, np.ndarray]]:
    """As `load`, but what a .safetensors file keeps as halves stays so, and mapped."""
    if not _has(path, safetensors.SUFFIX):
        return load(path, dialect, kind)
    _check_plain(path, dialect)
    config, stored, shared = safetensors.examine(path, kind)
    return config, safetensors.with_shared(stored, shared)


def save(path: FilePath, config: Config, arrays: dict[str, np.ndarray]) -> None:
    """Write a weight file that `load` reads back to the same configuration and arrays; its name says the format.

    arrays: float32 or float16, named as `load` names them; the transposed views may be there or not. LightSeq's formats
    make all float32. Nothing but the array being written is copied, and only if it is not contiguous; files over 2 GiB
    are fine here, though not for protobuf's own runtime. The file appears under its name when it is whole.

    WeightError names every array that is missing, superfluous or of a wrong shape or dtype, or else every
    setting that LightSeq's format cannot hold (a temperature, say).
    """
    if _has(path, safetensors.SUFFIX):
        safetensors.save(path, config, arrays)
    elif _has(path, hdf5.SUFFIX):
        hdf5.write(path, config, arrays)
    else:
        protobuf.write(path, config, arrays)


def _has(path: FilePath, suffix: str) -> bool:
    return os.fspath(path).endswith(suffix)


def _check_plain(path: FilePath, dialect: str) -> None:
    if dialect_named(dialect).name != "head":
        raise ConfigError(f"dialect is {dialect!r}; what {path} means is said in {safetensors.config_path(path)}")
