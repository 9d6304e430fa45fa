"""A pack: the rows of several prompts, sources or texts laid end to end, without padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from lightseq_backend.small import counting, fill, joined

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

    def lay(
        self,
        texts: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        lanes: Sequence[int],
        nobody: int,
    ) -> None:
        """Lays texts, int32 and none of them empty, end to end; host memory. Rows behind them are filled up: lane
        `nobody`.

        Each text has its positions, int32 and as many, and its lane. Nothing is scored. The device waits for this: few
        calls are made.
        """
        lengths = [len(text) for text in texts]
        ends = list(accumulate(lengths))
        rows = ends[-1]
        if rows < len(self.tokens):
            self.tokens[rows:], self.positions[rows:] = -1, 0
            self.lanes[rows:], self.steps[rows:] = nobody, 0
        fill(self.tokens[:rows], joined(texts))
        fill(self.positions[:rows], joined(positions))
        fill(self.steps[:rows], joined(map(counting, lengths)))
        fill(self.lanes[:rows], np.repeat(np.array(lanes, np.int32), lengths))
        self.starts[:] = rows
        self.starts[: len(texts)] = [0, *ends[:-1]]
        self.targets[:] = 0

    def aim(self, lengths: Sequence[int], padding_id: int) -> None:
        """Each row is scored for the token after it, once texts of these lengths are laid; host memory."""
        ends = np.cumsum(lengths)
        rows = int(ends[-1])
        # LightSeq looks up padding between tokens by its own id where it is scored.
        following = self.tokens[1:rows]
        self.targets[: rows - 1] = np.where(following < 0, padding_id, following)
        self.targets[ends - 1] = 0  # nothing follows
