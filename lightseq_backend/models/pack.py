"""A pack: the rows of several prompts, sources or texts laid end to end, without padding between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Array = Any


@dataclass(frozen=True)
class Pack:
    """What a pass over sequences reads, all of it in one int32 array: one copy brings it to a device.

    tokens, positions  [rows]: ids (negative for none) and rows of the position table
    lanes, steps       [rows]: where each row's keys and values are kept
    targets            [rows]: the ids that are scored
    starts             [rows + 1]: sequence b is rows starts[b] to starts[b + 1]; empty ones fill it up
    """

    tokens: Array
    positions: Array
    lanes: Array
    steps: Array
    targets: Array
    starts: Array

    @staticmethod
    def elements(rows: int) -> int:
        return 6 * rows + 1

    @classmethod
    def of(cls, memory: Array, rows: int) -> Pack:
        """The views of a pack of so many rows in int32 [elements(rows) or more]."""
        tokens, positions, lanes, steps, targets = (memory[i * rows : (i + 1) * rows] for i in range(5))
        return cls(tokens, positions, lanes, steps, targets, memory[5 * rows : cls.elements(rows)])
