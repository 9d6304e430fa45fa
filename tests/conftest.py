"""Real Triton servers for the tests that need one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lightseq_backend.serving.embedded import EmbeddedServer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """The shipped model repository, served on the CPU on free ports of the loopback; one for the whole run."""
    with EmbeddedServer(ROOT / "model_repository", device="cpu", stop_timeout=5) as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Callable[..., EmbeddedServer]]:
    """serve(model_repository, **settings of EmbeddedServer) -> a running server, stopped after the test."""
    with ExitStack() as running:

        def start(model_repository: Path, **settings: object) -> EmbeddedServer:
            return running.enter_context(
                EmbeddedServer(model_repository, **{"device": "cpu", "stop_timeout": 5, **settings})
            )

        yield start
