"""What is looked at behind a burst: of those that report their progress, that a stop word may end, or that are done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from lightseq_backend.decoding import methods
from lightseq_backend.decoding.state import DecodingState
from lightseq_backend.request import Sequence

log = logging.getLogger(__name__)


@dataclass
class Look:
    """The decoding state of some neighbouring lanes, as it was behind a burst.

    lanes   from the lowest to the one behind the highest
    arrays  by name; calling one waits for it
    """

    lanes: range
    arrays: dict[str, Callable[[], np.ndarray]]

    @classmethod
    def at(
        cls,
        sequences: list[Sequence],
        names: Callable[[list[Sequence]], Iterable[str]],
        state: DecodingState,
        ops: ModuleType,
    ) -> Look:
        """Queues copies of the arrays of those names over the sequences' lanes; of none, nothing is copied."""
        if not sequences:
            return cls(range(0), {})
        slots = [slot for one in sequences for slot in one.slots]
        first, end = min(slots), max(slots) + 1
        return cls(range(first, end), {name: ops.fetch(getattr(state, name)[first:end]) for name in names(sequences)})

    def covers(self, sequences: list[Sequence], names: Iterable[str]) -> bool:
        """Whether it has those arrays over all lanes of the sequences."""
        ends = [slot for one in sequences for slot in (one.slots[0], one.slots[-1])]
        return set(names) <= set(self.arrays) and all(slot in self.lanes for slot in ends)

    def read(self) -> dict[str, np.ndarray]:
        return {name: wait() for name, wait in self.arrays.items()}


def follow(sequence: Sequence, records: np.ndarray, lanes: dict[str, np.ndarray]) -> bool:
    """Reports what a sequence that goes on has found; whether every one of its texts has ended, by a stop or by itself.

    records: SLOT [width]; lanes: its rows of what methods.looked_at names.
    """
    texts = methods.begun(sequence, records, lanes)
    stops = sequence.stops
    if stops is not None:
        over = records["finished"].astype(bool).tolist()
        found = [stops.look(row, text) for row, text in enumerate(texts)]
        if all(stop is not None or ended for stop, ended in zip(found, over, strict=True)):
            return True
        ends = [
            stop.kept if stop is not None else len(text) if ended else stops.safe(text)
            for stop, ended, text in zip(found, over, texts, strict=True)
        ]
        texts = [text[:end] for text, end in zip(texts, ends)]
    if sequence.request.progress is not None:
        try:
            sequence.request.progress(tuple(text.copy() for text in texts))
        except Exception:
            log.exception("progress could not be reported")
    return False
