"""What the engine brings to the device: texts to read, and the first records of sequences and their rules."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from lightseq_backend.config import Config, GptConfig
from lightseq_backend.decoding import standard
from lightseq_backend.engine.buffers import Buffers
from lightseq_backend.engine.graphs import Passes, Steps
from lightseq_backend.models.pack import Pack
from lightseq_backend.request import Sequence
from lightseq_backend.small import joined


class Uploads:
    """Of one engine, for its thread."""

    def __init__(self, config: Config, buffers: Buffers, passes: Passes, steps: Steps, nobody: int, ops: ModuleType):
        """nobody: the lane that padding rows work on."""
        self._config, self._buffers, self._passes, self._steps = config, buffers, passes, steps
        self._nobody, self._ops = nobody, ops
        # Made once: to cut a device's array takes long.
        self._prompts = {
            (size, keeps): buffers.prompt[: Pack.elements(size, keeps)]
            for size in passes.sizes
            for keeps in (True, False)
        }
        self._rows = {count: buffers.state.rows[:count] for count in steps.buckets}

    def pack(
        self, sequences: list[Sequence], texts: list[np.ndarray], positions: list[np.ndarray], scored: bool = False
    ) -> int:
        """Brings a text of each sequence, none empty, to the device as a pack; returns the pack's rows.

        scored: whether every row is to be scored for the token after it.
        """
        size = self._passes.size(sum(map(len, texts)))
        keeps = bool(sequences[0].slots)  # a scored text of a GPT's has none: keys and values are gone with their layer
        lanes = [one.slots[0] for one in sequences] if keeps else None
        targets = Pack.targets_of(texts, self._config.padding_id) if scored else None
        self._ops.put(self._prompts[size, keeps], Pack.laid(size, texts, positions, lanes, self._nobody, targets))
        return size

    def rules(self, sequences: list[Sequence]) -> None:
        """What changes the scores of the sequences' rows."""
        state = self._buffers.state
        for sequence in sequences:
            lead = sequence.slots[0]
            record, listed, context = standard.rules(sequence, self._config)
            self._ops.put(state.rules[lead : lead + 1], record)
            self._ops.put(state.listed[lead], listed)
            self._ops.put(state.contexts[lead, : len(context)], context)

    def records(self, sequences: list[Sequence], records_of: Callable[[Sequence], np.ndarray]) -> None:
        """The records of the sequences' slots and, of prompts, in whose lane their past is; a transfer of each for
        every run of neighbouring slots."""
        taken = [(slot, one.slots[0]) for one in sequences for slot in one.slots]
        records = joined(map(records_of, sequences))
        order = sorted(range(len(taken)), key=taken.__getitem__)
        slots, leads = zip(*(taken[i] for i in order))
        # As bytes, for NumPy takes long to gather such records.
        records = records.view(np.uint8).reshape(len(order), -1)[order].view(records.dtype)[:, 0]
        state, ancestors = self._buffers.state, self._buffers.cache.ancestors
        starts = [i for i, slot in enumerate(slots) if i == 0 or slot > slots[i - 1] + 1]
        for start, end in zip(starts, [*starts[1:], len(slots)], strict=True):
            run = slice(slots[start], slots[end - 1] + 1)
            self._ops.put(state.slots[run], records[start:end])
            if isinstance(self._config, GptConfig):  # all columns: steps write theirs before it is read
                past = np.repeat(np.array(leads[start:end], np.int32)[:, None], ancestors.shape[1], axis=1)
                self._ops.put(ancestors[run], past)

    def rows(self, sequences: list[Sequence]) -> int:
        """Brings the slots of sequences to the device; rows of nobody fill the bucket, whose size is returned."""
        slots = [slot for sequence in sequences for slot in sequence.slots]
        count = self._steps.bucket(len(slots)) if slots else 0
        rows = np.full(count, self._nobody, np.int32)
        rows[: len(slots)] = slots
        if count:
            self._ops.put(self._rows[count], rows)
        return count
