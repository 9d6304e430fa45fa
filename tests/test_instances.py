"""The processes of a real Triton's models: they end with their server, and several serve one model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from repositories import GPT, TRANSFORMER, ask, ask_later, golden_cases, grpc, write_model
from test_embedded import group_of
from test_operations import metrics_page
from test_serving import triton_arguments
from weight_files import golden

from lightseq_backend import ops
from lightseq_backend.serving.embedded import EmbeddedServer
from lightseq_backend.serving.loading import load_engine
from lightseq_backend.serving.settings import read_settings

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
        assert len(group_of(group)) == 7  # two models, their engines and guards
        if busy:
            answers = [ask_later(client, "head", "source_ids", CASES[0]["source_ids"]) for _ in range(200)]
            answers[0]()
        os.kill(group, signal.SIGKILL)
        assert until(lambda: not group_of(group))


# Several of one model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    root = tmp_path_factory.mktemp("repository")
    for name, count in (("pair", 2), ("single", 1)):
        write_model(root, name, golden("t01_base.pb"), TRANSFORMER, count=count)
    with EmbeddedServer(root, device="cpu", stop_timeout=5) as running:
        yield running


def of_instances(server: EmbeddedServer, name: str, model: str = "pair") -> dict[str, float]:
    """A metric of a model's instances, by their names."""
    labels = rf'instance="({model}_\d_\d)",model="{model}"(?:,outcome="answered")?,version="1"'
    found = re.findall(rf"^lightseq_{name}\{{{labels}\}} (\S+)$", metrics_page(server), re.MULTILINE)
    return {instance: float(value) for instance, value in found}


def test_both_instances_answer_as_one_does_and_metrics_tell_them_apart(pair: EmbeddedServer) -> None:
    before = sum(of_instances(pair, "requests_total").values())
    with grpc(pair.grpc) as client:
        for case in CASES:
            answers = [ask_later(client, "pair", "source_ids", case["source_ids"]) for _ in range(6)]
            single = ask(client, "single", "source_ids", case["source_ids"])
            for answer in answers:
                assert {name: array.tolist() for name, array in answer().items()} == {
                    name: array.tolist() for name, array in single.items()
                }
    sent = before + 6 * len(CASES)
    assert until(lambda: sum(of_instances(pair, "requests_total").values()) == sent)
    assert set(of_instances(pair, "requests_total")) == {"pair_0_0", "pair_0_1"}
    assert min(of_instances(pair, "requests_total").values()) > 0
    assert of_instances(pair, "ready") == {"pair_0_0": 1, "pair_0_1": 1}
    assert until(lambda: min(of_instances(pair, "steps_total").values()) > 0)  # each tells once a second


@pytest.mark.parametrize("number", [0, 3])
def test_each_instance_takes_the_gpu_that_triton_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """As for instance_group [ { kind: KIND_GPU, gpus: [ 0, 3 ] } ]."""
    taken: list[Any] = []

    def load(*device: Any) -> Any:
        taken.append(device)
        raise KeyboardInterrupt  # that is all

    monkeypatch.setattr(ops, "load", load)
    (tmp_path / "transformer.pb").touch()
    arguments = triton_arguments(tmp_path, model_instance_kind="GPU", model_instance_device_id=str(number))
    with pytest.raises(KeyboardInterrupt):
        load_engine(read_settings(arguments))
    assert taken == [("cuda", number, "fp16")]
