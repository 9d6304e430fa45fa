"""LightSeq's HDF5 files: the fields of its protobuf files as datasets. They need h5py, the extra `hdf5`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightseq_backend.config import Config, Dialect
from lightseq_backend.errors import ConfigError, WeightError
from lightseq_backend.weights import int8, lightseq
from lightseq_backend.weights.files import aligned_empty, replacing
from lightseq_backend.weights.layout import (
    GPT,
    INT8_LAYOUTS,
    KINDS,
    LAYOUTS,
    TRANSFORMER,
    Layout,
    entries,
    layers_of,
    layout_of,
)
from lightseq_backend.weights.schema import message_type
from lightseq_backend.weights.settings import read_config, write_config

FilePath = str | os.PathLike[str]
SUFFIX = ".hdf5"
# What LightSeq reads without a default: unlike a protobuf field, a dataset that is absent is not zero.
REQUIRED = {
    TRANSFORMER: (
        "head_num",
        "beam_size",
        "extra_decode_length",
        "length_penalty",
        "src_padding_id",
        "trg_start_id",
        "trg_end_id",
        "diverse_lambda",
        "sampling_method",
        "topk",
        "topp",
        "is_post_ln",
        "no_scale_embedding",
        "use_gelu",
    ),
    GPT: ("head_num", "src_padding_id", "sampling_method", "extra_decode_length", "topk", "topp", "eos_id"),
}
EXTRA = "extra_decode_length"  # LightSeq reads none for an int8 GPT
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class Contents:
    """A file that passed every check. Nothing of its tensors has been read yet."""

    layout: Layout
    config: Config
    tensors: list[lightseq.Located]
    clips: dict[str, np.ndarray]  # as of a protobuf file


def examine(path: FilePath, dialect: Dialect, kind: str | None = None) -> Contents:
    """Everything about a file but its numbers. WeightError as in `load`; ConfigError without h5py."""
    with _opened(path) as file:
        return _examine(file, os.path.basename(path), dialect, kind)


def load(
    path: FilePath, dialect: Dialect, kind: str | None = None, rounded: bool = False
) -> tuple[Config, dict[str, Any]]:
    """The configuration and the arrays under our names, views included: float32 whatever the file has, or Rounded."""
    arrays: dict[str, Any] = {}
    with _opened(path) as file:
        contents = _examine(file, os.path.basename(path), dialect, kind)
        for located in contents.tensors:
            dataset = file[_dataset_name(located.entry.path)]
            clips = contents.clips.get(located.entry.path)
            if clips is not None:
                stored, hidden = np.ravel(dataset[()]).astype(np.uint8), contents.config.hidden
                arrays.update(int8.arrays_of(located, stored, clips, contents.layout, hidden, rounded))
                continue
            flat = aligned_empty(dataset.size)
            dataset.read_direct(flat.reshape(dataset.shape))
            arrays.update(lightseq.split(located.entry, flat.reshape(located.shape)))
    for name, of in contents.layout.views.items():
        arrays[name] = arrays[of].T
    return contents.config, arrays


def write(path: FilePath, config: Config, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file that LightSeq reads; it appears under its name when it is whole. WeightError as in `save`."""
    h5py = _h5py(path)
    try:
        conf = message_type(layout_of(config).conf_message).FromString(write_config(config))
        parts = lightseq.parts_to_write(config, arrays)
    except WeightError as error:
        raise lightseq.unusable("cannot be written", path, error) from None
    with replacing(path) as partial, _Sink(partial, "w+") as sink:
        with h5py.File(sink, "w") as file:
            for part in parts:
                sink.check()
                for entry, pieces in part:
                    file[_dataset_name(entry.path)] = np.asarray(lightseq.join(entry, pieces), np.float32)
            for field, value in _conf_values(conf, layout_of(config).kind):
                file[f"model_conf/{field}"] = value
            for field, count in layers_of(config).items():
                file[f"model_conf/n_{field}"] = np.int32(count)
        sink.check()


class _Sink(io.FileIO):
    """A file that keeps the first error of a write for `check`: HDF5's library crashes where a write fails."""

    _error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        try:
            while view:
                view = view[super().write(view) :]
        except OSError as error:
            self._error = self._error or error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        if self._error is not None:
            raise self._error


@contextmanager
def _opened(path: FilePath) -> Iterator[Any]:
    """The file; whatever is found to be wrong with it becomes a WeightError that names it."""
    h5py = _h5py(path)
    try:
        if not os.path.isfile(path):
            raise WeightError("there is no such file")
        if not os.path.getsize(path):
            raise WeightError("the file is empty")
        with h5py.File(path, "r") as file:
            yield file
    except WeightError as error:
        raise lightseq.unusable("cannot be used", path, error) from None
    except (OSError, RuntimeError, KeyError) as error:  # what HDF5's library finds, now or at any dataset
        raise lightseq.unusable("cannot be used", path, WeightError(f"HDF5 says: {error}")) from None


def _h5py(path: FilePath) -> Any:
    try:
        import h5py
    except ImportError:
        raise ConfigError(f"{os.fspath(path)} needs the package h5py: install the extra `hdf5`") from None
    return h5py


def _dataset_name(path: str) -> str:
    """ "encoder_stack[3].ffn_norm_scale" is encoder_stack/3/ffn_norm_scale in the file."""
    return path.replace("[", "/").replace("].", "/").replace(".", "/")


def _examine(file: Any, name: str, dialect: Dialect, kind: str | None) -> Contents:
    if kind is not None and kind not in KINDS:
        raise WeightError(f"kind is {kind!r}; kinds are {', '.join(KINDS)}")
    found = TRANSFORMER if {"trg_embedding", "decoder_stack"} & set(file) else GPT
    if kind is not None and kind != found:
        raise WeightError(f"this looks like a {found} file, not a {kind} file")
    layout = (INT8_LAYOUTS if _has_clips(file) else LAYOUTS)[found]
    present = {part.field for part in layout.parts} & set(file)
    if not present:
        raise WeightError("nothing in it is part of a LightSeq model; is it a weight file?")
    faults: list[str] = []
    layers = {part.field: _layers(file, part.field, faults) for part in layout.parts if part.repeated}
    expected = [entry for entry in entries(layout, layers) if entry.part in present]
    counts = {entry.path: _count(file, entry.path, bool(entry.tensor.clip), faults) for entry in expected}
    sizes, tensors = lightseq.locate(layout, present, counts, layers, faults)
    clips = int8.read_clips(tensors, lambda entry: _clips(file, entry.clip_path), layers, faults)
    conf = _read_conf(file, layout, faults)
    int8.settle(layout, conf)
    config = read_config(layout.kind, conf, dialect, sizes, layers, faults)
    if config is None or faults:
        raise WeightError("\n".join(faults))
    return Contents(layout, config, tensors, clips)


def _has_clips(file: Any) -> bool:
    """Whether an embedding or the first layer says what bytes stand for."""
    groups = (file.get(name) for name in ("src_embedding", "trg_embedding", "encoder_stack/0", "decoder_stack/0"))
    names = [name for group in groups if hasattr(group, "keys") for name in group]
    return any(isinstance(name, str) and name.endswith("_clip_max") for name in names)  # bytes where it is no UTF-8


def _layers(file: Any, field: str, faults: list[str]) -> int:
    dataset = file.get(f"model_conf/n_{field}")
    value = None if dataset is None else _scalar(dataset)
    if not isinstance(value, int) or not 0 < value <= _MOST_LAYERS:
        shown = "missing" if value is None else f"{value!r}; it must be a whole number from 1 to {_MOST_LAYERS}"
        faults.append(f"model_conf.n_{field} is {shown}")
        return 0
    return value


def _clips(file: Any, path: str) -> np.ndarray:
    dataset = file.get(_dataset_name(path))
    numbers = getattr(dataset, "dtype", np.dtype("V")).kind in "fiu"
    return np.ravel(dataset[()]).astype(np.float32) if numbers else np.zeros(0, np.float32)


def _count(file: Any, path: str, of_bytes: bool, faults: list[str]) -> int:
    """How many values a tensor has; 0 for one that is absent."""
    dataset = file.get(_dataset_name(path))
    if dataset is None:
        return 0
    if getattr(dataset, "dtype", np.dtype("V")).kind not in "fiu":
        faults.append(f"{path} is no dataset of numbers")
        return 0
    if of_bytes and dataset.dtype != np.uint8:
        faults.append(f"{path} is {dataset.dtype}; an int8 file has uint8")
    elif not of_bytes and dataset.dtype == np.uint8:
        faults.append(f"{path} has bytes, as LightSeq's int8 files, and nothing says what they stand for")
    return int(dataset.size)


def _read_conf(file: Any, layout: Layout, faults: list[str]) -> Any:
    """model_conf as a message. `faults` grows by what is missing or of another type."""
    conf = message_type(layout.conf_message)()
    for field in conf.DESCRIPTOR.fields:
        dataset = file.get(f"model_conf/{field.name}")
        if dataset is None:
            if field.name in REQUIRED[layout.kind] and not (layout.int8 and field.name == EXTRA):
                faults.append(f"model_conf.{field.name} is missing")
            continue
        value = _text(dataset) if isinstance(getattr(conf, field.name), str) else _scalar(dataset)
        try:
            setattr(conf, field.name, value)
        except (TypeError, ValueError):
            faults.append(f"model_conf.{field.name} is {value!r}, which it cannot be")
    return conf


def _scalar(dataset: Any) -> Any:
    """The one number of a dataset; None where it is not one."""
    if getattr(dataset, "size", None) != 1:
        return None
    return np.ravel(dataset[()])[0].item()


def _text(dataset: Any) -> str | None:
    """LightSeq keeps text as its ASCII codes, one int8 each; HDF5's own strings are read too."""
    value = dataset[()]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if np.asarray(value).dtype.kind not in "iu":
        return None
    return bytes(np.ravel(value).astype(np.uint8)).decode(errors="replace")


def _conf_values(conf: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """The fields of model_conf: the required ones even where they are zero, others only where they are not."""
    for field in conf.DESCRIPTOR.fields:
        value = getattr(conf, field.name)
        if not value and field.name not in REQUIRED[kind]:
            continue
        if isinstance(value, str):
            yield field.name, np.frombuffer(value.encode(), np.int8)
        elif isinstance(value, bool):
            yield field.name, np.bool_(value)
        else:
            yield field.name, np.float32(value) if isinstance(value, float) else np.int32(value)
