"""What a weight file holds, as text: the lines that `lightseq inspect` prints. Reads no weights, so it is instant."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from lightseq_backend.config import DecodingOptions, Dialect, dialect_named
from lightseq_backend.weights import hdf5, protobuf, safetensors
from lightseq_backend.weights.layout import layout_of

FilePath = str | os.PathLike[str]
# Bytes of a value in a matrix, and in a norm or a bias: int8 keeps those in half precision.
PRECISIONS = {"fp32": (4, 4), "fp16": (2, 2), "int8": (1, 2)}


def describe(path: FilePath, dialect: str = "head", kind: str | None = None) -> list[str]:
    """Configuration, tensors, number of parameters and the memory they take, one line each. Errors as in `load`."""
    if os.fspath(path).endswith(safetensors.SUFFIX):
        config, stored, _ = safetensors.examine(path, kind)
        form = layout_of(config).kind
        tensors = [(name, name, array.shape) for name, array in stored.items()]
    else:
        reader: Any = hdf5 if os.fspath(path).endswith(hdf5.SUFFIX) else protobuf
        contents = reader.examine(path, dialect_named(dialect), kind)
        form = (
            f"{contents.layout.kind} of int8 (LightSeq's {contents.layout.message})"
            if contents.layout.int8
            else contents.layout.kind
        )
        config, tensors = contents.config, [(each.entry.path, each.entry.name, each.shape) for each in contents.tensors]
    return [
        f"{os.fspath(path)}: {form}, {os.path.getsize(path):,} bytes",
        "",
        "configuration",
        *_columns(_settings(config)),
        "",
        "tensors (in the file, here, shape in the file)",
        *_columns((path, name, f"[{', '.join(map(str, shape))}]") for path, name, shape in tensors),
        "",
        f"parameters  {sum(prod(shape) for _, _, shape in tensors):,}",
        "",
        "memory for the weights",
        *_columns((name, *_amount(_memory(tensors, name))) for name in PRECISIONS),
    ]


def _settings(config: object) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, DecodingOptions):
            yield from ((f"decoding.{name}", text) for name, text in _settings(value))
        else:
            yield field.name, value.name if isinstance(value, Dialect) else str(value)


def _memory(tensors: list[tuple[str, str, tuple[int, ...]]], precision: str) -> int:
    matrix, vector = PRECISIONS[precision]
    return sum(prod(shape) * (matrix if _is_matrix(name) else vector) for _, name, shape in tensors)


def _is_matrix(name: str) -> bool:
    # By name: the biases of cross_kv have two axes in the file as well.
    return not name.endswith((".bias", ".gain"))


def _amount(count: int) -> tuple[str, str]:
    return f"{count:,} bytes", f"{count / 2**20:,.1f} MiB"


def _columns(rows_of_cells: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows_of_cells)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
