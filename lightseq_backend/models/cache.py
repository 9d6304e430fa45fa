"""Keys and values of everything in flight, and the memory plan they and the activations come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
Plan = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]  # name -> shape and dtype, before anything is allocated


@dataclass(frozen=True)
class Cache:
    """One lane a slot; the last lane belongs to nobody and takes what padding rows write.

    keys, values                [layers, lanes, steps, hidden]: a lane's own tokens
    ancestors                   int32 [lanes, steps]: the lane that holds step t of this lane's past; beams share
                                their past through it, so a reorder moves these integers and no keys or values
    memory_keys, memory_values  [layers, lanes, steps, hidden]: the source a lane's sequence attends to, kept once in
                                the lane of its beam 0; no layers for decoder-only models
    """

    keys: Array
    values: Array
    ancestors: Array
    memory_keys: Array
    memory_values: Array

    @staticmethod
    def plan(layers: int, memory_layers: int, lanes: int, steps: int, hidden: int, dtype: np.dtype[Any]) -> Plan:
        own, memory = (layers, lanes, steps, hidden), (memory_layers, lanes, steps, hidden)
        return {
            "keys": (own, dtype),
            "values": (own, dtype),
            "ancestors": ((lanes, steps), np.dtype(np.int32)),
            "memory_keys": (memory, dtype),
            "memory_values": (memory, dtype),
        }
