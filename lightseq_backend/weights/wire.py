"""Protobuf's wire format over a mapped file: where the floats of a message lie, without parsing them.

Protobuf's runtime would copy a whole file into memory, float by float, and stops at 2 GiB. Here a message is
walked by its descriptor, its repeated floats are only located, and everything small is left to the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

from lightseq_backend.errors import WeightError
from lightseq_backend.weights.files import MappedFile, aligned_empty

VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 = range(6)
_CHUNK = 4 << 20  # floats copied before their pages are given back
_GROUP_DEPTH = 100  # as protobuf's own parsers
_MOST_PARTS = 4096  # an empty layer takes 2 bytes in a file and far more here


class WireField(NamedTuple):
    """One field on the wire: its tag is in [tag_start, tag_end), its value in [start, end)."""

    number: int
    wire_type: int
    tag_start: int
    tag_end: int
    start: int
    end: int


@dataclass(frozen=True)
class Floats:
    """`count` floats of `stride` bytes each from `start`; the value is the last four of them (a tag may precede).

    With a stride of 1, bytes.
    """

    start: int
    count: int
    stride: int


@dataclass
class Message:
    """A message as found: its parts by field name, its floats and bytes located, its scalars still serialized.

    path is LightSeq's own, for example "decoder_stack[3]"; "" for the outermost.
    lone_floats: whether it has fields that are none of its descriptor's and have the form of a single float.
    """

    path: str
    descriptor: Any
    parts: dict[str, list[Message]] = field(default_factory=dict)
    floats: dict[str, list[Floats]] = field(default_factory=dict)
    scalars: bytearray = field(default_factory=bytearray)
    lone_floats: bool = False

    def count(self, name: str) -> int:
        """Floats, or bytes, stored under that field."""
        return sum(run.count for run in self.floats.get(name, ()))


def read_message(file: MappedFile, descriptor: Any, faults: list[str]) -> Message:
    """Walk the whole file as one message. `faults` grows by what is wrong with single fields.

    WeightError when the file is cut short or is no protobuf: nothing after such a place can be trusted.
    """
    message = Message("", descriptor)
    _walk(file, message, 0, len(file), faults)
    return message


def next_field(file: MappedFile, position: int, end: int) -> WireField:
    """The field whose tag is at `position` of a message that ends at `end`. WeightError if there is none."""
    tag, start = _varint(file, position, end)
    number, wire_type = tag >> 3, tag & 7
    if not 0 < number < 1 << 29:
        raise WeightError(f"byte {position}: {tag} is no field tag; the file is damaged or not a protobuf")
    return WireField(number, wire_type, position, start, *_value(file, wire_type, number, start, end))


def fields(file: MappedFile, start: int, end: int) -> Iterator[WireField]:
    """The fields of one message, in the order of the file."""
    while start < end:
        found = next_field(file, start, end)
        yield found
        start = found.end


def copy_floats(file: MappedFile, runs: list[Floats]) -> np.ndarray:
    """The floats of one field, in order: float32 [n], aligned, owned. Mapped pages are released on the way."""
    out = aligned_empty(sum(run.count for run in runs))
    target = out.view(np.uint8)
    at = 0
    for run in runs:
        for first in range(0, run.count, _CHUNK):
            count = min(_CHUNK, run.count - first)
            start = run.start + first * run.stride
            end = start + count * run.stride
            source = file.bytes[start:end]
            if run.stride == 4:
                target[at : at + 4 * count] = source
            else:
                values = source.reshape(count, run.stride)[:, -4:]
                target[at : at + 4 * count].reshape(count, 4)[:] = values
            file.release(start, end)
            at += 4 * count
    return out


def copy_bytes(file: MappedFile, runs: list[Floats]) -> np.ndarray:
    """The bytes of one field: uint8 [n], owned. Mapped pages are released."""
    (run,) = runs
    copy = file.bytes[run.start : run.start + run.count].copy()
    file.release(run.start, run.start + run.count)
    return copy


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def varint(value: int) -> bytes:
    """The base-128 form of a value from 0 up."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _walk(file: MappedFile, message: Message, position: int, end: int, faults: list[str]) -> None:
    known = message.descriptor.fields_by_number
    while position < end:
        try:
            found = next_field(file, position, end)
        except WeightError as error:
            raise WeightError(f"{_place(message, file, position, end)}{error}") from None
        position = found.end
        kind = known.get(found.number)
        if kind is None:
            message.lone_floats |= found.wire_type == FIXED32
            continue
        if kind.message_type is not None and found.wire_type == BYTES:
            _walk(file, _part(message, kind), found.start, found.end, faults)
        elif _is_floats(kind) and found.wire_type == BYTES:
            _add_packed(message, kind, found, faults)
        elif _is_floats(kind) and found.wire_type == FIXED32:
            position = _add_unpacked(file, message, kind, found, end)
        elif kind.type == FieldDescriptor.TYPE_BYTES and found.wire_type == BYTES:  # of several, the last counts
            message.floats[kind.name] = [Floats(found.start, found.end - found.start, 1)]
        elif not _is_repeated(kind):
            message.scalars += file[found.tag_start : found.end]


def _part(message: Message, kind: FieldDescriptor) -> Message:
    """The part to read into: a new one for a repeated field; a singular one that comes again is merged."""
    assert kind.message_type is not None
    parts = message.parts.setdefault(kind.name, [])
    prefix = f"{message.path}." if message.path else ""
    if len(parts) == _MOST_PARTS:
        raise WeightError(f"{prefix}{kind.name} has more than {_MOST_PARTS} entries; the file is damaged")
    if _is_repeated(kind):
        parts.append(Message(f"{prefix}{kind.name}[{len(parts)}]", kind.message_type))
    elif not parts:
        parts.append(Message(f"{prefix}{kind.name}", kind.message_type))
    return parts[-1]


def _add_packed(message: Message, kind: FieldDescriptor, found: WireField, faults: list[str]) -> None:
    count, rest = divmod(found.end - found.start, 4)
    if rest:
        faults.append(f"{message.path}.{kind.name}: {found.end - found.start} bytes are no whole number of floats")
    if count:
        message.floats.setdefault(kind.name, []).append(Floats(found.start, count, 4))


def _add_unpacked(file: MappedFile, message: Message, kind: FieldDescriptor, found: WireField, end: int) -> int:
    """Take this float and all that follow with the same tag at once; the position after them."""
    start, stride = found.tag_start, found.end - found.tag_start
    own_tag = file.bytes[start : found.tag_end]
    most = (end - start) // stride
    count, window = 0, 16
    while count < most:
        window = min(2 * window, most - count, _CHUNK)
        first = start + count * stride
        rows = file.bytes[first : first + window * stride].reshape(window, stride)
        same = (rows[:, : len(own_tag)] == own_tag).all(axis=1)
        length = window if same.all() else int(same.argmin())
        count += length
        file.release(first, first + window * stride)
        if length < window:
            break
    message.floats.setdefault(kind.name, []).append(Floats(start, count, stride))
    return start + count * stride


def _is_floats(kind: FieldDescriptor) -> bool:
    return _is_repeated(kind) and kind.type == FieldDescriptor.TYPE_FLOAT


def _is_repeated(kind: FieldDescriptor) -> bool:
    # Runtime 4 and 5 have only `label`, runtime 7 only `is_repeated`.
    if hasattr(kind, "is_repeated"):
        return bool(kind.is_repeated)
    return bool(getattr(kind, "label") == FieldDescriptor.LABEL_REPEATED)  # noqa: B009


def _place(message: Message, file: MappedFile, position: int, end: int) -> str:
    """Where the walk stopped, as "path: ", with the field's own name where its tag can still be read."""
    try:
        number = _varint(file, position, end)[0] >> 3
    except WeightError:
        number = 0
    kind = message.descriptor.fields_by_number.get(number)
    names = [message.path] if message.path else []
    if kind is not None:
        index = f"[{len(message.parts.get(kind.name, ()))}]" if kind.message_type and _is_repeated(kind) else ""
        names.append(kind.name + index)
    return ".".join(names) + ": " if names else ""


def _varint(file: MappedFile, position: int, end: int) -> tuple[int, int]:
    """The value at `position`, and the position after it."""
    value = 0
    for digit in range(10):
        if position + digit >= end:
            raise WeightError(f"the file is cut short, or damaged, at byte {end}")
        byte = file[position + digit]
        value |= (byte & 0x7F) << 7 * digit
        if byte < 0x80:
            return value, position + digit + 1
    raise WeightError(f"byte {position}: a number of more than 10 bytes; the file is damaged or not a protobuf")


def _value(file: MappedFile, wire_type: int, number: int, start: int, end: int) -> tuple[int, int]:
    """Where the value after a tag begins and ends. WeightError when that is past `end`."""
    if wire_type == VARINT:
        return start, _varint(file, start, end)[1]
    if wire_type == GROUP:
        return start, _group_end(file, number, start, end)
    if wire_type == BYTES:
        length, start = _varint(file, start, end)
    elif wire_type in (FIXED32, FIXED64):
        length = 4 if wire_type == FIXED32 else 8
    else:
        raise WeightError(f"byte {start}: wire type {wire_type}; the file is damaged or not a protobuf")
    if start + length > end:
        raise WeightError(
            f"{length} bytes are announced at byte {start} and {end - start} are left; the file is cut short or damaged"
        )
    return start, start + length


def _group_end(file: MappedFile, number: int, position: int, end: int) -> int:
    """The position after a group: a form of nesting that protobuf gave up and its readers still skip."""
    open_groups = [number]
    while open_groups:
        tag_value, after = _varint(file, position, end)
        inner, wire_type = tag_value >> 3, tag_value & 7
        if wire_type == GROUP_END and inner == open_groups[-1]:
            open_groups.pop()
        elif wire_type == GROUP and len(open_groups) < _GROUP_DEPTH:
            open_groups.append(inner)
        elif wire_type in (GROUP, GROUP_END):
            raise WeightError(f"byte {position}: groups do not nest; the file is damaged or not a protobuf")
        else:
            after = _value(file, wire_type, inner, after, end)[1]
        position = after
    return position
