"""Tests that need a GPU: `make test-gpu`. Elsewhere nothing here is collected."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def _has_gpu() -> bool:
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver or no device: CuPy raises of its own for each
        return False


collect_ignore_glob = [] if _has_gpu() else ["test_*.py"]
