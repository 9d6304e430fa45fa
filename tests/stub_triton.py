"""Modules that run inside Triton's stub, imported without it and forgotten again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import MagicMock

UTILITIES, PACKAGE = "triton_python_backend_utils", "lightseq_backend.serving"


@contextmanager
def inside_triton(*names: str) -> Iterator[list[ModuleType]]:
    """Those modules of lightseq_backend.serving; what they import of Triton takes any call."""
    package, before = importlib.import_module(PACKAGE), set(sys.modules)
    sys.modules[UTILITIES] = MagicMock()
    try:
        yield [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    finally:
        for name in {name for name in set(sys.modules) - before if name.startswith(f"{PACKAGE}.")}:
            del sys.modules[name]
            delattr(package, name.rpartition(".")[2])
        del sys.modules[UTILITIES]
