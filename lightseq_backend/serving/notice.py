"""How a server that is to end tells its models: a file that holds the seconds they have left. Without Triton."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NOTICE_VARIABLE = "LIGHTSEQ_STOP_NOTICE"  # names the file


def seconds_left(environment: Mapping[str, str] = os.environ) -> float | None:
    """What a stopping server gives to what is under way; None while it goes on."""
    path = environment.get(NOTICE_VARIABLE)
    try:
        return float(Path(path).read_text()) if path else None
    except (OSError, ValueError):
        return None
