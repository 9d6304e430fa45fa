"""The processes of a real Triton's models: they end with their server, and several serve one model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from repositories import GPT, TRANSFORMER, ask_later, golden_cases, grpc, write_model
from test_embedded import group_of
from weight_files import golden

from lightseq_backend.serving.embedded import EmbeddedServer

CASES = golden_cases("t01_base")
PATIENCE = 20.0  # seconds; a guard looks once a second

# A server that starts a model that starts its guard; what each is is printed, then both stand still.
MODEL = "import os, time; from lightseq_backend.serving.guard import Guard; guard = Guard(); {then}"
SERVER = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {model!r}]); time.sleep(60)"


def until(holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(holds())


# A killed server -----------------------------------------------------------------------------------------------------


def test_guard_kills_a_model_whose_server_is_gone_and_ends() -> None:
    program = SERVER.format(model=MODEL.format(then="time.sleep(60)"))
    server = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    assert until(lambda: len(group_of(server.pid)) == 3)
    time.sleep(1.5)  # it has looked, and seen nothing amiss
    assert len(group_of(server.pid)) == 3
    server.kill()
    assert until(lambda: not group_of(server.pid))
    server.wait()


@pytest.mark.parametrize("then", ["guard.close(); time.sleep(60)", "os._exit(1)"])
def test_guard_ends_when_it_is_closed_or_its_model_has_ended(then: str) -> None:
    program = SERVER.format(model=MODEL.format(then=f"print(flush=True); {then}"))
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert until(lambda: len(group_of(server.pid)) == (2 if "close" in then else 1))
        os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.parametrize("busy", [False, True])
def test_killed_triton_takes_its_models_with_it(tmp_path: Path, busy: bool) -> None:
    """A busy one may hold a lock of the memory that it shares with them."""
    write_model(tmp_path, "head", golden("t01_base.pb"), TRANSFORMER)
    write_model(tmp_path, "text", golden("g01_base.pb"), GPT)
    with EmbeddedServer(tmp_path, device="cpu") as server, grpc(server.grpc) as client:
        group = server.pid
        assert len(group_of(group)) == 5  # two models and their guards
        if busy:
            answers = [ask_later(client, "head", "source_ids", CASES[0]["source_ids"]) for _ in range(200)]
            answers[0]()
        os.kill(group, signal.SIGKILL)
        assert until(lambda: not group_of(group))
