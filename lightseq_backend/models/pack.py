"""A pack: the rows of several prompts or sources laid end to end, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Array = Any


@dataclass(frozen=True)
class Pack:
    """What a prefill pass reads, in device memory.

    tokens, positions  int32 [rows]: ids and rows of the position table
    lanes, steps       int32 [rows]: where each row's keys and values are kept
    starts             int32 [sequences + 1]: sequence b is rows starts[b] to starts[b + 1]
    """

    tokens: Array
    positions: Array
    lanes: Array
    steps: Array
    starts: Array

    @property
    def rows(self) -> int:
        return len(self.tokens)
