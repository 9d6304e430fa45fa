"""Tests that need a GPU: `make test-gpu`. Elsewhere nothing here is collected."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def _has_gpu() -> bool:
    try:
        import cupy

        return bool(cupy.cuda.runtime.getDeviceCount())
    except Exception:  # no CuPy, no driver or no device: CuPy raises of its own for each
        return False


HAS_CLIENT = find_spec("tritonclient") is not None
collect_ignore = [] if HAS_CLIENT else ["test_triton_gpu.py"]
collect_ignore_glob = [] if _has_gpu() else ["test_*.py"]


def pytest_report_header() -> str | None:
    return None if HAS_CLIENT else "tritonclient is not installed (extra `client`): test_triton_gpu.py is left out"
