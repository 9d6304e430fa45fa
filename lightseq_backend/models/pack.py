"""A pack: the rows of several prompts, sources or texts laid end to end, without padding between them."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from lightseq_backend.small import counting, joined, smallest

Array = Any
_NONE = np.zeros(1, np.int32)


@dataclass(frozen=True, kw_only=True)  # of six arrays that are alike
class Pack:
    """What a pass over sequences reads, all of it in one int32 array: one copy brings it to a device.

    tokens, positions  [rows]: ids (negative for none) and rows of the position table
    targets            [rows]: the ids that are scored
    starts             [rows + 1]: sequence b is rows starts[b] to starts[b + 1]; empty ones fill it up
    lanes, steps       [rows]: where each row's keys and values are kept; behind the others, for nobody reads them where
                       none are
    """

    tokens: Array
    positions: Array
    targets: Array
    starts: Array
    lanes: Array
    steps: Array

    @staticmethod
    def elements(rows: int, keeps: bool = True) -> int:
        """Of the memory of a pack of so many rows. keeps: whether keys and values of its are kept."""
        return (6 if keeps else 4) * rows + 1

    @classmethod
    def of(cls, memory: Array, rows: int) -> Pack:
        """The views of a pack of so many rows in int32 [elements(rows) or more]."""
        tokens, positions, targets = (memory[i * rows : (i + 1) * rows] for i in range(3))
        behind = cls.elements(rows, keeps=False)
        lanes, steps = (memory[start : start + rows] for start in (behind, behind + rows))
        starts = memory[3 * rows : behind]
        return cls(tokens=tokens, positions=positions, targets=targets, starts=starts, lanes=lanes, steps=steps)

    @staticmethod
    def laid(
        rows: int,
        texts: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        lanes: Sequence[int] | None,
        nobody: int,
        targets: np.ndarray | None = None,
    ) -> np.ndarray:
        """The memory of a pack with texts, int32 and none of them empty, laid end to end; read-only. Rows behind them
        are filled up: lane `nobody`.

        Each text has its positions, int32 and as many, and its lane; without lanes nothing is kept. targets: int32, of
        all texts together; without, nothing is scored. The device waits for this: it is one call of NumPy's.
        """
        lengths = [len(text) for text in texts]
        ends = list(accumulate(lengths))
        more = rows - ends[-1]
        parts = [
            *(*texts, _word(-1) * more),
            *(*positions, _word(0) * more),
            *((_word(0) * rows,) if targets is None else (targets, _word(0) * more)),
            array("i", (0, *ends)),
            _word(ends[-1]) * (rows - len(texts)),
        ]
        if lanes is not None:
            parts += (_word(lane) * length for lane, length in zip(lanes, lengths, strict=True))
            parts += (_word(nobody) * more, *map(counting, lengths), _word(0) * more)
        return np.frombuffer(b"".join(parts), np.int32)  # type: ignore[arg-type]

    @staticmethod
    def targets_of(texts: Sequence[np.ndarray], padding_id: int) -> np.ndarray:
        """int32: each row's is the token after it; the last of a text has 0, for none. Padding between tokens, negative
        here, LightSeq looks up by its own id where it is scored."""
        targets = joined((*texts, _NONE))[1:].copy()
        if smallest(targets) < 0:
            targets[targets < 0] = padding_id
        targets[[end - 1 for end in accumulate(map(len, texts))]] = 0
        return targets


def _word(value: int) -> bytes:
    """An int32, as it lies in memory."""
    return value.to_bytes(4, sys.byteorder, signed=True)
