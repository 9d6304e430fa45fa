"""LightSeq's int8 files: what their bytes stand for, under which names, and what their model_conf means besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lightseq_backend.quantised import Rounded
from lightseq_backend.weights.files import aligned_empty
from lightseq_backend.weights.layout import TRANSFORMER, Entry, Layout
from lightseq_backend.weights.lightseq import Located, split

_ZERO = 127  # the byte that stands for 0, and how many steps clip_max is
_SHOWN = 3  # faults of one tensor's clip_max

Array = np.ndarray[Any, Any]


def settle(layout: Layout, conf: Any) -> None:
    """LightSeq multiplies an int8 Transformer's tables by sqrt(h) whatever no_scale_embedding says."""
    if layout.int8 and layout.kind == TRANSFORMER:
        conf.no_scale_embedding = False


def read_clips(
    tensors: list[Located], read: Callable[[Entry], Array], layers: dict[str, int], faults: list[str]
) -> dict[str, Array]:
    """What `read` gives for each tensor of bytes, by its path: the clip_max, float32 [1], of the projection for all
    layers [layers]. `faults` grows where there is none."""
    clips = {}
    for entry in (located.entry for located in tensors if located.entry.tensor.clip):
        clips[entry.path] = read(entry)
        _check(entry, clips[entry.path], layers["decoder_stack"] if "*" in entry.name else 1, faults)
    return clips


def _check(entry: Entry, clips: Array, count: int, faults: list[str]) -> None:
    if not clips.size:
        faults.append(f"{entry.clip_path} is missing")
    elif clips.size != count:
        faults.append(f"{entry.clip_path} has {clips.size} values; [{count}] takes {count}")
    bad = np.flatnonzero(~((clips > 0) & np.isfinite(clips)))
    for index in bad[:_SHOWN]:
        place = f"[{index}]" if "*" in entry.name else ""
        faults.append(f"{entry.clip_path}{place} is {clips[index]:g}; it must be a number over 0")


def arrays_of(
    located: Located, stored: Array, clips: Array, layout: Layout, hidden: int, rounded: bool
) -> Iterator[tuple[str, Array | Rounded]]:
    """The model's arrays in a tensor of bytes, uint8 [n], with a clip_max for each n / len(clips) of them.

    Embeddings of a Transformer, which such a file has without sqrt(h), are multiplied by it.

    rounded: products' weights stay rounded, unless their parts differ in clip_max; all else is float32, as LightSeq
    computes it: (byte - 127) * clip_max / 127. A byte of 255 counts as 254: there is no step beyond clip_max.
    """
    scaled = layout.kind == TRANSFORMER and located.entry.tensor.field == "token_embedding"
    gain = math.sqrt(hidden) if scaled else 1.0
    numbers = (np.minimum(stored, 2 * _ZERO) - np.uint8(_ZERO)).view(np.int8)
    if rounded and located.entry.name.endswith(".weight") and (clips == clips[0]).all():
        scale = np.float32(float(clips[0]) * gain / _ZERO)
        for name, part in split(located.entry, numbers.reshape(located.shape)):
            yield name, Rounded(part, np.full(part.shape[1], scale))
        return
    values = aligned_empty(numbers.size)
    for part, out, clip in zip(np.split(numbers, len(clips)), np.split(values, len(clips)), clips, strict=True):
        np.multiply(part, clip, out=out, dtype=np.float32)
        out /= np.float32(_ZERO)
    if scaled:
        values *= np.float32(gain)
    yield from split(located.entry, values.reshape(located.shape))
