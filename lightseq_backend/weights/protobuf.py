"""LightSeq's protobuf files, of floats or int8: read without a copy in between; those of floats written as a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from lightseq_backend.config import Config, Dialect
from lightseq_backend.errors import WeightError
from lightseq_backend.weights import int8, lightseq, wire
from lightseq_backend.weights.files import MappedFile, write_file
from lightseq_backend.weights.layout import (
    GPT,
    INT8_LAYOUTS,
    KINDS,
    LAYOUTS,
    TRANSFORMER,
    Entry,
    Layout,
    entries,
    layout_of,
)
from lightseq_backend.weights.lightseq import Located
from lightseq_backend.weights.schema import message_type
from lightseq_backend.weights.settings import read_config, write_config

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Contents:
    """A file that passed every check. Nothing of its tensors has been read yet.

    runs   where each lies, by its path
    clips  float32 [n], by the path of a tensor of bytes: its clip_max, one or one a part
    """

    file: MappedFile
    layout: Layout
    config: Config
    tensors: list[Located]
    runs: dict[str, list[wire.Floats]]
    clips: dict[str, np.ndarray]


def examine(path: FilePath, dialect: Dialect, kind: str | None = None) -> Contents:
    """Everything about a file but its numbers. WeightError as in `load`."""
    try:
        return _examine(MappedFile(path), os.path.basename(path), dialect, kind)
    except WeightError as error:
        raise lightseq.unusable("cannot be used", path, error) from None


def read_arrays(contents: Contents, rounded: bool = False) -> dict[str, Any]:
    """The arrays of a file under our names, views included: float32, or Rounded as `load` says."""
    arrays: dict[str, Any] = {}
    for located in contents.tensors:
        path = located.entry.path
        if path in contents.clips:
            stored, hidden = wire.copy_bytes(contents.file, contents.runs[path]), contents.config.hidden
            arrays.update(int8.arrays_of(located, stored, contents.clips[path], contents.layout, hidden, rounded))
            continue
        array = wire.copy_floats(contents.file, contents.runs[path]).reshape(located.shape)
        arrays.update(lightseq.split(located.entry, array))
    for name, of in contents.layout.views.items():
        arrays[name] = arrays[of].T
    return arrays


def write(path: FilePath, config: Config, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a file that LightSeq and protobuf's own runtime read. WeightError as in `save`."""
    try:
        pieces = serialize(config, arrays)
    except WeightError as error:
        raise lightseq.unusable("cannot be written", path, error) from None
    write_file(path, pieces)


def serialize(config: Config, arrays: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The bytes of a file, piece by piece, as protobuf's runtime would order them. WeightError as in `save`."""
    conf = write_config(config)
    return _pieces(layout_of(config), lightseq.parts_to_write(config, arrays), conf)


def _examine(file: MappedFile, name: str, dialect: Dialect, kind: str | None) -> Contents:
    if kind is not None and kind not in KINDS:
        raise WeightError(f"kind is {kind!r}; kinds are {', '.join(KINDS)}")
    found = _kind_in(file)
    if kind and found and kind != found:
        raise WeightError(f"this looks like a {found} file, not a {kind} file")
    layout = LAYOUTS[kind or found or (GPT if "gpt" in name.lower() else TRANSFORMER)]
    faults: list[str] = []
    message = wire.read_message(file, message_type(layout.message).DESCRIPTOR, faults)
    if any(found.lone_floats for part in layout.parts for found in message.parts.get(part.field, ())):  # clip_max
        layout, faults = INT8_LAYOUTS[layout.kind], []
        message = wire.read_message(file, message_type(layout.message).DESCRIPTOR, faults)
    if not message.parts:
        raise WeightError(f"nothing in it is part of a LightSeq {layout.kind}; is it a weight file?")
    layers = {part.field: len(message.parts.get(part.field, ())) for part in layout.parts if part.repeated}
    expected = [entry for entry in entries(layout, layers) if entry.part in message.parts]
    counts = {entry.path: _part_of(message, entry).count(entry.tensor.field) for entry in expected}
    sizes, tensors = lightseq.locate(layout, set(message.parts), counts, layers, faults)
    clips = int8.read_clips(tensors, lambda entry: _clips(file, message, entry), layers, faults)
    config = None
    conf = _read_conf(layout, message, faults)
    if conf is not None:
        int8.settle(layout, conf)
        config = read_config(layout.kind, conf, dialect, sizes, layers, faults)
    if config is None or faults:
        raise WeightError("\n".join(faults))
    file.release(0, len(file))
    runs = {each.entry.path: _part_of(message, each.entry).floats[each.entry.tensor.field] for each in tensors}
    return Contents(file, layout, config, tensors, runs, clips)


def _kind_in(file: MappedFile) -> str | None:
    """What the content says the file is, or None where both kinds fit.

    Only a Transformer has fields 4 and 5. Field 3 is an embedding in a Transformer, all of it floats; in a GPT
    it is model_conf, which has numbers. A file that is cut short is judged by what there is.
    """
    numbers = set()
    try:
        for found in wire.fields(file, 0, len(file)):
            numbers.add(found.number)
            if found.number in (4, 5):
                return TRANSFORMER
            if found.number == 3 and found.wire_type == wire.BYTES:
                inner = {each.wire_type for each in wire.fields(file, found.start, found.end)}
                return GPT if wire.VARINT in inner else TRANSFORMER
    except WeightError:
        pass
    return None


def _part_of(message: wire.Message, entry: Entry) -> wire.Message:
    return message.parts[entry.part][entry.index]


def _clips(file: MappedFile, message: wire.Message, entry: Entry) -> np.ndarray:
    part, name = _part_of(message, entry), entry.tensor.clip
    if name in part.floats:
        return wire.copy_floats(file, part.floats[name])
    values = message_type(part.descriptor.name).FromString(bytes(part.scalars))
    return np.array(getattr(values, name), np.float32).reshape(-1)  # one that is absent is zero


def _read_conf(layout: Layout, message: wire.Message, faults: list[str]) -> Any:
    found = message.parts.get("model_conf")
    if not found:
        faults.append("model_conf is missing")
        return None
    try:
        return message_type(layout.conf_message).FromString(bytes(found[0].scalars))
    except (DecodeError, UnicodeDecodeError) as error:  # the latter from protobuf without its C library
        faults.append(f"model_conf cannot be read: {error}")
        return None


def _pieces(
    layout: Layout, parts: list[list[tuple[Entry, list[np.ndarray]]]], conf: bytes
) -> Iterator[bytes | memoryview]:
    top = message_type(layout.message).DESCRIPTOR.fields_by_name
    for part in parts:
        field = top[part[0][0].part]
        heads = [_float_head(field.message_type, entry, arrays) for entry, arrays in part]
        floats = sum(4 * array.size for _, arrays in part for array in arrays)
        yield wire.tag(field.number, wire.BYTES) + wire.varint(sum(map(len, heads)) + floats)
        for head, (entry, arrays) in zip(heads, part):
            yield head
            yield np.ascontiguousarray(lightseq.join(entry, arrays), "<f4").data.cast("B")
    yield wire.tag(top["model_conf"].number, wire.BYTES) + wire.varint(len(conf)) + conf


def _float_head(descriptor: Any, entry: Entry, arrays: list[np.ndarray]) -> bytes:
    number = descriptor.fields_by_name[entry.tensor.field].number
    return wire.tag(number, wire.BYTES) + wire.varint(sum(4 * array.size for array in arrays))
