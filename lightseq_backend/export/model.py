"""What every source is read into: the one description of a model that all writers take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightseq_backend.config import Config


@dataclass(frozen=True)
class Model:
    """A configuration, and arrays under the names of weights/layout.py, float32 or float16.

    notes            what of the source's generation settings this engine does not have, a line each
    source_language  which of several vocabularies is the source's, where that must be told
    """

    config: Config
    arrays: dict[str, np.ndarray]
    notes: list[str]
    source_language: str | None = None
