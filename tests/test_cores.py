"""serving/cores.py: how many cores there are for us, and processes that keep them from falling asleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import echo_model
import pytest

from lightseq_backend import __main__ as command_line
from lightseq_backend.errors import ConfigError
from lightseq_backend.serving import cores, embedded

# Counts the caller's processes that spin, and writes how many to a file.
COUNT = """
import os, pathlib, sys
def spins(pid):
    try:
        return os.sched_getscheduler(int(pid)) == os.SCHED_IDLE
    except ProcessLookupError:
        return False
(task,) = pathlib.Path(f"/proc/{os.getppid()}/task").glob(str(os.getppid()))
pathlib.Path(sys.argv[1]).write_text(str(sum(map(spins, (task / "children").read_text().split()))))
"""


@pytest.fixture
def unlimited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU quota, whatever this machine has."""
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "none")


def quota(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(cores, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))


def lives(process: int) -> bool:
    return Path(f"/proc/{process}/exe").exists()


def until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


@pytest.mark.parametrize(
    ("text", "usable"),
    [("max 100000\n", 8), ("50000 100000\n", 1), ("350000 100000\n", 3), ("1600000 100000\n", 8), ("", 8)],
)
def test_cpus_are_at_most_the_affinity_and_the_quota(
    text: str, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota(text, tmp_path, monkeypatch)
    assert cores.usable_cpus() == usable


@pytest.mark.usefixtures("unlimited")
def test_every_core_has_a_process_that_gives_way_to_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Started(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            started.append(self)

    monkeypatch.setattr(cores.subprocess, "Popen", Started)
    with cores.cores_awake() as how:
        assert len(started) == len(os.sched_getaffinity(0))
        assert until(lambda: {os.sched_getscheduler(one.pid) for one in started} == {os.SCHED_IDLE})
        assert [one.poll() for one in started] == [None] * len(started)
    assert how == f"{len(started)} processes of SCHED_IDLE that spin"
    assert None not in [one.returncode for one in started]


def test_they_end_with_who_started_them_however_that_ends() -> None:
    program = (
        "import pathlib, time; from lightseq_backend.serving import cores; cores.CPU_MAX = pathlib.Path('/none')\n"
        "with cores.cores_awake():\n"
        "    print(open('/proc/self/task/%d/children' % __import__('os').getpid()).read(), flush=True)\n"
        "    time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    spinning = [int(one) for one in owner.stdout.readline().split()]
    assert len(spinning) == len(os.sched_getaffinity(0))
    assert until(lambda: {os.sched_getscheduler(one) for one in spinning} == {os.SCHED_IDLE})
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    try:
        assert until(lambda: not any(map(lives, spinning)))
    finally:
        for one in filter(lives, spinning):
            os.kill(one, signal.SIGKILL)


def test_quota_that_they_would_use_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota("350000 100000\n", tmp_path, monkeypatch)
    monkeypatch.setattr(cores.subprocess, "Popen", None)
    with pytest.raises(ConfigError, match="CPU quota of 3 for 8 cores"), cores.cores_awake():
        pass


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("awake", [False, True])
def test_server_keeps_cores_awake_when_told_to(awake: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = tmp_path / "counted"
    options = ["serve", "--repository", str(echo_model.write(tmp_path)), "--device", "cpu"]
    options += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", *(["--awake"] if awake else [])]
    monkeypatch.setattr(signal, "signal", lambda *given: None)  # the tests' own stays
    assert command_line.main([*options, "--run", sys.executable, "-c", COUNT, str(counted)]) == 0
    assert int(counted.read_text()) == (len(os.sched_getaffinity(0)) if awake else 0)


def test_server_that_must_not_keep_cores_awake_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = echo_model.write(tmp_path)
    quota("350000 100000\n", tmp_path, monkeypatch)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    monkeypatch.setattr(embedded.EmbeddedServer, "__enter__", lambda self: pytest.fail("it was started"))
    assert command_line.main(["serve", "--repository", str(repository), "--device", "cpu", "--awake"]) == 2
    said = capsys.readouterr()
    assert "CPU quota of 3 for 8 cores" in said.err
    assert "ready" not in said.out
