"""What LightSeq's two formats have in common: which tensors make a file, their sizes, and the arrays they become."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from lightseq_backend.config import Config
from lightseq_backend.errors import WeightError
from lightseq_backend.weights.layout import (
    SIZE_NAMES,
    Entry,
    Layout,
    Sizes,
    array_faults,
    entries,
    layers_of,
    layout_of,
    sizes_of,
)

FilePath = str | os.PathLike[str]
_AXIS_CUT = "N"


@dataclass(frozen=True)
class Located:
    """A tensor that was found whole, and its shape in the file."""

    entry: Entry
    shape: tuple[int, ...]


def locate(
    layout: Layout, present: set[str], counts: Mapping[str, int], layers: dict[str, int], faults: list[str]
) -> tuple[dict[str, Sizes], list[Located]]:
    """The sizes of each side, and every tensor that is there and has the size it must have.

    present: the parts that the file has; counts: how many values each of their tensors has, by its path
    """
    for part in layout.parts:
        if part.field not in present:
            faults.append(f"{part.field} has no layers" if part.repeated else f"{part.field} is missing")
    expected = [entry for entry in entries(layout, layers) if entry.part in present]
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
            tensors.append(Located(entry, shape))
    return sizes, tensors


def split(entry: Entry, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The model's arrays in one of the file: itself, or a view for each decoder layer."""
    if "*" not in entry.name:
        yield entry.name, array
        return
    for layer, view in enumerate(np.moveaxis(array, entry.tensor.shape.split().index(_AXIS_CUT), 0)):
        yield entry.name.replace("*", str(layer)), view


def join(entry: Entry, arrays: list[np.ndarray]) -> np.ndarray:
    """What `split` took apart."""
    if "*" not in entry.name:
        return arrays[0]
    return np.stack(arrays, axis=entry.tensor.shape.split().index(_AXIS_CUT))


def parts_to_write(config: Config, arrays: Mapping[str, np.ndarray]) -> list[list[tuple[Entry, list[np.ndarray]]]]:
    """For each submessage its tensors, each as one array or as one a layer. WeightError names every bad array."""
    layout, sizes = layout_of(config), sizes_of(config)
    faults: list[str] = []
    parts: dict[tuple[str, int], list[tuple[Entry, list[np.ndarray]]]] = {}
    unused = set(arrays) - set(layout.views)
    faults += [
        f"{view} is not {of}, and LightSeq's formats have one array for both"
        for view, of in layout.views.items()
        if view in arrays and of in arrays and not _same(arrays[view], arrays[of].T)
    ]
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


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.ctypes.data == b.ctypes.data and a.strides == b.strides:
        return True
    return a.shape == b.shape and all(map(np.array_equal, a, b))


def unusable(what: str, path: FilePath, error: WeightError) -> WeightError:
    lines = str(error).splitlines()
    count = "" if len(lines) == 1 else f" {len(lines)} faults"
    return WeightError("\n  ".join([f"{os.fspath(path)} {what}:{count}", *lines]))


def _sizes_of_side(side: str, expected: list[Entry], counts: Mapping[str, int], layers: dict[str, int]) -> Sizes:
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
