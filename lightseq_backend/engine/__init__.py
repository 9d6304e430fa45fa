"""Continuous batching: one loop, one thread, one device. `Engine` is all that serving needs."""

from lightseq_backend.engine.engine import Engine

__all__ = ["Engine"]
