"""LightSeq's protobuf files, transformer.pb and gpt.pb: read without a copy in between, written as a stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from lightseq_backend.config import Config, Dialect
from lightseq_backend.errors import WeightError
from lightseq_backend.weights import wire
from lightseq_backend.weights.layout import (
    GPT,
    KINDS,
    LAYOUTS,
    SIZE_NAMES,
    TRANSFORMER,
    Entry,
    Layout,
    Sizes,
    array_faults,
    entries,
    layers_of,
    layout_of,
    sizes_of,
)
from lightseq_backend.weights.schema import message_type
from lightseq_backend.weights.settings import read_config, write_config

FilePath = str | os.PathLike[str]
_AXIS_CUT = "N"


@dataclass(frozen=True)
class Located:
    """A tensor that was found whole: where its floats are and which shape they have in the file."""

    entry: Entry
    shape: tuple[int, ...]
    runs: list[wire.Floats]


@dataclass(frozen=True)
class Contents:
    """A file that passed every check. Nothing of its tensors has been read yet."""

    file: wire.MappedFile
    layout: Layout
    config: Config
    tensors: list[Located]


def examine(path: FilePath, dialect: Dialect, kind: str | None = None) -> Contents:
    """Everything about a file but its numbers. WeightError as in `load`."""
    try:
        return _examine(wire.MappedFile(path), os.path.basename(path), dialect, kind)
    except WeightError as error:
        raise _with_path("cannot be used", path, error) from None


def read_arrays(contents: Contents) -> dict[str, np.ndarray]:
    """The arrays of a file under our names, views included: float32."""
    arrays: dict[str, np.ndarray] = {}
    for located in contents.tensors:
        array = wire.copy_floats(contents.file, located.runs).reshape(located.shape)
        arrays.update(_split(located.entry, array))
    for name, of in contents.layout.views.items():
        arrays[name] = arrays[of].T
    return arrays


def write(path: FilePath, config: Config, arrays: dict[str, np.ndarray]) -> None:
    """Write a file that LightSeq and protobuf's own runtime read. WeightError as in `save`."""
    try:
        pieces = serialize(config, arrays)
    except WeightError as error:
        raise _with_path("cannot be written", path, error) from None
    # Whoever reads meanwhile finds the old file or the new one, never half of one.
    partial = f"{os.fspath(path)}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def serialize(config: Config, arrays: dict[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The bytes of a file, piece by piece, as protobuf's runtime would order them. WeightError as in `save`."""
    parts = _parts_to_write(config, arrays)
    return _pieces(layout_of(config), parts, write_config(config))


def _with_path(what: str, path: FilePath, error: WeightError) -> WeightError:
    lines = str(error).splitlines()
    count = "" if len(lines) == 1 else f" {len(lines)} faults"
    return WeightError("\n  ".join([f"{os.fspath(path)} {what}:{count}", *lines]))


def _examine(file: wire.MappedFile, name: str, dialect: Dialect, kind: str | None) -> Contents:
    if kind is not None and kind not in KINDS:
        raise WeightError(f"kind is {kind!r}; kinds are {', '.join(KINDS)}")
    found = _kind_in(file)
    if kind and found and kind != found:
        raise WeightError(f"this looks like a {found} file, not a {kind} file")
    layout = LAYOUTS[kind or found or (GPT if "gpt" in name.lower() else TRANSFORMER)]
    faults: list[str] = []
    message = wire.read_message(file, message_type(layout.message).DESCRIPTOR, faults)
    if not message.parts:
        raise WeightError(f"nothing in it is part of a LightSeq {layout.kind}; is it a weight file?")
    layers = {part.field: len(message.parts.get(part.field, ())) for part in layout.parts if part.repeated}
    sizes, tensors = _locate(layout, message, layers, faults)
    config = None
    conf = _read_conf(layout, message, faults)
    if conf is not None:
        config = read_config(layout.kind, conf, dialect, sizes, layers, faults)
    if config is None or faults:
        raise WeightError("\n".join(faults))
    file.release(0, len(file))
    return Contents(file, layout, config, tensors)


def _kind_in(file: wire.MappedFile) -> str | None:
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


def _locate(
    layout: Layout, message: wire.Message, layers: dict[str, int], faults: list[str]
) -> tuple[dict[str, Sizes], list[Located]]:
    """The sizes of each side, and every tensor that is there and has the size it must have."""
    for part in layout.parts:
        if part.field not in message.parts:
            faults.append(f"{part.field} has no layers" if part.repeated else f"{part.field} is missing")
    expected = [entry for entry in entries(layout, layers) if entry.part in message.parts]
    counts = {entry.path: _part_of(message, entry).count(entry.tensor.field) for entry in expected}
    sizes = {
        side: _sizes_of_side(side, expected, counts, layers) for side in dict.fromkeys(p.side for p in layout.parts)
    }
    faults += _disagreements(sizes)
    tensors = []
    for entry in expected:
        shape, count = sizes[entry.side].shape(entry.tensor.shape), counts[entry.path]
        if not count:
            faults.append(f"{entry.path} is missing")
        elif shape is None:
            faults.append(f"{entry.path} has {count} values; they do not make [{_axes(entry)}]")
        elif count != prod(shape):
            hint = "; one byte a value, as in LightSeq's int8 files" if 4 * count == prod(shape) else ""
            sizes_text = ", ".join(map(str, shape))
            faults.append(f"{entry.path} has {count} values; [{sizes_text}] takes {prod(shape)}{hint}")
        else:
            tensors.append(Located(entry, shape, _part_of(message, entry).floats[entry.tensor.field]))
    return sizes, tensors


def _part_of(message: wire.Message, entry: Entry) -> wire.Message:
    return message.parts[entry.part][entry.index]


def _sizes_of_side(side: str, expected: list[Entry], counts: dict[str, int], layers: dict[str, int]) -> Sizes:
    own = [entry for entry in expected if entry.side == side]
    sizes = Sizes()
    if layers.get("decoder_stack"):
        sizes.values["N"] = layers["decoder_stack"]
    for letter in "hfVP":
        sizes.infer(letter, own, counts)
    return sizes


def _disagreements(sizes: dict[str, Sizes]) -> list[str]:
    """LightSeq takes the sizes from the source side (v0) or the target side (head): that is one if they agree."""
    if len(sizes) == 1:
        return []
    source, target = sizes["source"].values, sizes["target"].values
    return [
        f"source and target disagree on the {SIZE_NAMES[letter]}: {source[letter]} and {target[letter]}"
        for letter in "hfP"
        if letter in source and letter in target and source[letter] != target[letter]
    ]


def _axes(entry: Entry) -> str:
    return ", ".join(entry.tensor.shape.split())


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


def _split(entry: Entry, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The model's arrays in one of the file: itself, or a view for each decoder layer."""
    if "*" not in entry.name:
        yield entry.name, array
        return
    for layer, view in enumerate(np.moveaxis(array, entry.tensor.shape.split().index(_AXIS_CUT), 0)):
        yield entry.name.replace("*", str(layer)), view


def _parts_to_write(config: Config, arrays: dict[str, np.ndarray]) -> list[list[tuple[Entry, list[np.ndarray]]]]:
    """For each submessage its tensors, each as one array or as one a layer. WeightError names every bad array."""
    layout, sizes = layout_of(config), sizes_of(config)
    faults: list[str] = []
    parts: dict[tuple[str, int], list[tuple[Entry, list[np.ndarray]]]] = {}
    unused = set(arrays) - set(layout.views)
    for entry in entries(layout, layers_of(config)):
        shape = sizes[entry.side].shape(entry.tensor.shape)
        assert shape is not None
        names = [entry.name]
        if "*" in entry.name:
            axis = entry.tensor.shape.split().index(_AXIS_CUT)
            names = [entry.name.replace("*", str(layer)) for layer in range(shape[axis])]
            shape = shape[:axis] + shape[axis + 1 :]
        for name in names:
            unused.discard(name)
            faults += array_faults(name, arrays.get(name), shape)
        parts.setdefault((entry.part, entry.index), []).append(
            (entry, [arrays[name] for name in names if name in arrays])
        )
    faults += [f"{name} is no array of such a model" for name in sorted(unused)]
    if faults:
        raise WeightError("\n".join(faults))
    return list(parts.values())


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
            yield np.ascontiguousarray(_join(entry, arrays), "<f4").data.cast("B")
    yield wire.tag(top["model_conf"].number, wire.BYTES) + wire.varint(len(conf)) + conf


def _float_head(descriptor: Any, entry: Entry, arrays: list[np.ndarray]) -> bytes:
    number = descriptor.fields_by_name[entry.tensor.field].number
    return wire.tag(number, wire.BYTES) + wire.varint(sum(4 * array.size for array in arrays))


def _join(entry: Entry, arrays: list[np.ndarray]) -> np.ndarray:
    """What `_split` took apart."""
    if "*" not in entry.name:
        return arrays[0]
    return np.stack(arrays, axis=entry.tensor.shape.split().index(_AXIS_CUT))
