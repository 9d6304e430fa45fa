"""Our own files: the arrays in a safetensors file, the configuration in a JSON file of the same name beside it.

Both are read and written here, without the package of that name: the format is eight bytes of length, a JSON header
and the arrays end to end, and what is read stays mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lightseq_backend.config import Config
from lightseq_backend.errors import WeightError
from lightseq_backend.weights import description
from lightseq_backend.weights.files import ALIGNMENT, MappedFile, aligned_empty, write_file
from lightseq_backend.weights.layout import TRANSFORMER, array_faults, layout_of, shapes_of

FilePath = str | os.PathLike[str]
Shared = dict[str, tuple[str, bool]]  # an array that is another one: name -> (the other, transposed)
SUFFIX = ".safetensors"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_MOST_HEADER = 100 << 20  # bytes; the limit of the format's own library


def config_path(path: FilePath) -> Path:
    """Where the configuration of a weight file is."""
    return Path(path).with_suffix(".json")


def load(path: FilePath, kind: str | None = None) -> tuple[Config, dict[str, np.ndarray]]:
    """The configuration and the arrays, float32: mapped, or copies of what the file keeps as halves.

    WeightError with every fault on a line of its own.
    """
    config, stored, shared = examine(path, kind)
    for name, array in stored.items():
        if array.dtype == np.float16:
            stored[name] = aligned_empty(array.size).reshape(array.shape)
            stored[name][...] = array
    return config, with_shared(stored, shared)


def examine(path: FilePath, kind: str | None = None) -> tuple[Config, dict[str, np.ndarray], Shared]:
    """The configuration, the arrays as they are stored, mapped, and those that are another one. Errors as in `load`."""
    config, shared = load_config(path)
    faults = []
    if kind is not None and kind != layout_of(config).kind:
        faults.append(f"this is a {layout_of(config).kind} file, not a {kind} file")
    stored = read_tensors(path)
    for name, (of, _) in shared.items():
        if name in stored or of not in stored:
            faults.append(f"{name} is said to be {of}, but the file {'has' if name in stored else 'lacks'} it")
    if not faults:
        faults = _array_faults(config, with_shared(stored, shared))
    if faults:
        raise _unusable(path, faults)
    return config, stored, shared


def with_shared(stored: Mapping[str, np.ndarray], shared: Shared) -> dict[str, np.ndarray]:
    """All arrays: the stored ones, and the views of them."""
    return {**stored, **{name: stored[of].T if transposed else stored[of] for name, (of, transposed) in shared.items()}}


def load_config(path: FilePath) -> tuple[Config, Shared]:
    """The configuration of a weight file, and its arrays that are another one."""
    beside = config_path(path)
    try:
        values = json.loads(beside.read_text())
    except OSError as error:
        raise _unusable(path, [f"its configuration {beside} cannot be read: {error.strerror}"]) from None
    except ValueError as error:
        raise _unusable(beside, [f"it is no JSON: {error}"]) from None
    if not isinstance(values, dict):
        raise _unusable(beside, ["it is no JSON object"])
    faults: list[str] = []
    shared = _read_shared(values.pop("shared", {}), faults)
    config = description.read(values, _is_tied(values.get("kind"), shared), faults)
    if config is None or faults:
        raise _unusable(beside, faults)
    return config, shared


def _is_tied(kind: Any, shared: Shared) -> bool:
    """Whether the output projection and the tokens that go in are one array."""
    table, output = ("target.tokens" if kind == TRANSFORMER else "tokens"), "output.weight"
    roots = [shared.get(name, (name, False))[0] for name in (table, output)]
    return roots[0] == roots[1]


def save(path: FilePath, config: Config, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes both files; each appears when it is whole. Arrays that are the same memory are written once, and float16
    as such.

    WeightError names every array that is missing, superfluous or of a wrong shape or dtype; the transposed views of a
    layout may be left out.
    """
    arrays = {**{name: arrays[of].T for name, of in layout_of(config).views.items() if of in arrays}, **arrays}
    faults = _array_faults(config, arrays)
    if faults:
        raise WeightError("\n".join(faults))
    stored, shared = _told_apart(arrays)
    values = description.write(config, _is_tied(layout_of(config).kind, shared))
    values["shared"] = {name: {"of": of, "transposed": transposed} for name, (of, transposed) in shared.items()}
    write_file(path, _pieces(stored))
    write_file(config_path(path), iter([json.dumps(values, indent=2).encode() + b"\n"]))


def read_tensors(path: FilePath) -> dict[str, np.ndarray]:
    """Every array of a safetensors file, mapped and read-only; bfloat16, which NumPy lacks, as a float32 copy."""
    try:
        file = MappedFile(path)
        header, start = _header(file)
        return {name: _tensor(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"}
    except WeightError as error:
        raise _unusable(path, str(error).splitlines()) from None


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or length > min(_MOST_HEADER, len(file) - 8):
        raise WeightError("the file is cut short or no safetensors file")
    try:
        header = json.loads(file[8 : 8 + length])
    except ValueError as error:
        raise WeightError(f"its header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise WeightError("its header is no JSON object")
    return header, 8 + length


def _tensor(file: MappedFile, start: int, name: str, entry: Any) -> np.ndarray:
    try:
        shape, (first, last) = tuple(map(int, entry["shape"])), map(int, entry["data_offsets"])
        kind = entry["dtype"]
    except (KeyError, TypeError, ValueError):
        raise WeightError(f"the header's entry for {name} cannot be read: {entry!r}") from None
    if kind not in _DTYPES:
        raise WeightError(f"{name} is {kind}; this reads {', '.join(_DTYPES)}")
    dtype = np.dtype(_DTYPES[kind])
    if min(shape, default=0) < 0 or first < 0 or last - first != prod(shape) * dtype.itemsize:
        raise WeightError(f"{name} is {kind} {list(shape)} and takes {last - first} bytes of the file")
    if start + last > len(file):
        raise WeightError(f"{name} ends at byte {start + last} of {len(file)}: the file is cut short")
    array = file.bytes[start + first : start + last].view(dtype).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if kind == "BF16" else array


def _read_shared(values: Any, faults: list[str]) -> Shared:
    try:
        return {name: (str(entry["of"]), bool(entry["transposed"])) for name, entry in values.items()}
    except (AttributeError, KeyError, TypeError):
        faults.append(f"shared is {values!r}; it must say which array each is `of` and whether it is `transposed`")
        return {}


def _array_faults(config: Config, arrays: Mapping[str, np.ndarray]) -> list[str]:
    wanted = shapes_of(config)
    faults = [fault for name, shape in wanted.items() for fault in array_faults(name, arrays.get(name), shape)]
    return faults + [f"{name} is no array of such a model" for name in sorted(set(arrays) - set(wanted))]


def _told_apart(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Shared]:
    """What must be written, and what is another array's memory."""
    stored: dict[str, np.ndarray] = {}
    shared: Shared = {}
    seen: dict[tuple[Any, ...], str] = {}
    # Token tables first: they are looked up by rows, so those are what should lie together.
    for name in sorted(arrays, key=lambda name: (name.endswith("output.weight"), name)):
        array = arrays[name]
        straight, turned = ((each.ctypes.data, each.shape, each.strides) for each in (array, array.T))
        if straight in seen:
            shared[name] = seen[straight], False
        elif turned in seen:
            shared[name] = seen[turned], True
        else:
            stored[name] = array
            seen[straight] = name
    return stored, shared


def _pieces(arrays: dict[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    # What would leave those behind it unaligned comes last.
    names = sorted(arrays, key=lambda name: arrays[name].nbytes % ALIGNMENT != 0)
    header, offset = {}, 0
    for name in names:
        end = offset + arrays[name].nbytes
        kind = "F16" if arrays[name].dtype == np.float16 else "F32"
        header[name] = {"dtype": kind, "shape": list(arrays[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield np.ascontiguousarray(arrays[name], arrays[name].dtype.newbyteorder("<")).data.cast("B")


def _unusable(path: FilePath, faults: list[str]) -> WeightError:
    count = "" if len(faults) == 1 else f" {len(faults)} faults"
    return WeightError("\n  ".join([f"{os.fspath(path)} cannot be used:{count}", *faults]))
