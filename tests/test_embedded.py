"""The embedded Triton: it starts, serves, says why when it cannot, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import echo_model
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from lightseq_backend.errors import ConfigError
from lightseq_backend.serving import embedded
from lightseq_backend.serving.device import choose_device
from lightseq_backend.serving.embedded import EmbeddedServer, ServerFailed


@pytest.fixture(scope="module")
def echo_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return echo_model.write(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def echo(echo_repository: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(echo_repository, device="cpu", environment={"OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture(scope="module")
def facts(echo: EmbeddedServer) -> dict:
    """What the model saw of the process it lives in."""
    (line,) = [line for line in echo.log.splitlines() if line.startswith("FACTS ")]
    return json.loads(line.removeprefix("FACTS "))


def ask(protocol, address: str, values: np.ndarray):
    tensor = protocol.InferInput("x", list(values.shape), "INT32")
    tensor.set_data_from_numpy(values)
    with protocol.InferenceServerClient(address) as client:
        return client.infer("echo", [tensor])


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 0), (2, 19), (8, 257)])
def test_tensors_pass_unchanged(echo: EmbeddedServer, protocol: str, shape: tuple[int, int]) -> None:
    values = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    module = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
    result = ask(module, getattr(echo, protocol), values)
    np.testing.assert_array_equal(result.as_numpy("y"), values + 1)
    np.testing.assert_array_equal(result.as_numpy("half"), values * np.float32(0.5))


def test_tensors_leave_the_log_clean(echo: EmbeddedServer) -> None:
    ask(tritonclient.http, echo.http, np.ones((1, 3), np.int32))
    assert "PyCapsule" not in echo.log


def test_metrics_are_served(echo: EmbeddedServer) -> None:
    with urllib.request.urlopen(f"http://{echo.metrics}/metrics", timeout=5) as answer:
        assert b"nv_inference_request_success" in answer.read()


def test_cpu_takes_the_cpu_configuration(facts: dict) -> None:
    assert facts["kind"] == "CPU"


def test_model_runs_in_this_environment(facts: dict) -> None:
    assert facts["python"] == list(sys.version_info[:3])
    assert facts["prefix"] == sys.prefix


@pytest.mark.parametrize("variable", ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "HOME"])
def test_environment_is_passed_on(facts: dict, variable: str) -> None:
    assert facts["environment"].get(variable) == os.environ.get(variable)


def test_environment_setting_wins(facts: dict) -> None:
    assert facts["environment"]["OMP_NUM_THREADS"] == "1"


def test_server_is_ready_when_all_its_ports_are_open(monkeypatch: pytest.MonkeyPatch, echo: EmbeddedServer) -> None:
    """Triton opens that of its metrics last, a moment after it says over HTTP that it is ready."""
    listens, asked = embedded._listens, []

    def refused_at_first(address: str) -> bool:
        asked.append(address)
        return asked.count(address) > 1 and listens(address)

    monkeypatch.setattr(embedded, "_listens", refused_at_first)
    echo._wait_until_ready()
    assert (asked.count(echo.grpc), asked.count(echo.metrics)) == (3, 2)
    assert not listens("127.0.0.1:1")


def test_no_more_models_load_at_once_than_there_are_cores(echo: EmbeddedServer) -> None:
    """On fewer they starve each other, and Triton takes one that is silent for a second for dead."""
    arguments = Path(f"/proc/{echo.pid}/cmdline").read_text().split("\0")
    (given,) = [one for one in arguments if one.startswith("--model-load-thread-count=")]
    assert 1 <= int(given.partition("=")[2]) <= min(4, len(os.sched_getaffinity(0)))


def test_admin_apis_are_locked_without_a_key(echo: EmbeddedServer) -> None:
    with tritonclient.http.InferenceServerClient(echo.http) as client:
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index()
    with tritonclient.grpc.InferenceServerClient(echo.grpc) as client:
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index()


def test_admin_key_opens_the_admin_apis(serve: Callable[..., EmbeddedServer], echo_repository: Path) -> None:
    running = serve(echo_repository, admin_key="sesame", models=["echo"])
    with tritonclient.http.InferenceServerClient(running.http) as client:
        (model,) = client.get_model_repository_index(headers={"admin-key": "sesame"})
        assert model["name"] == "echo"
    with tritonclient.grpc.InferenceServerClient(running.grpc) as client:
        index = client.get_model_repository_index(headers={"triton-grpc-protocol-admin-key": "sesame"}, as_json=True)
        assert index["models"][0]["name"] == "echo"


def test_gpu_configuration_fails_without_a_gpu(echo_repository: Path) -> None:
    if choose_device("auto")[0] == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(ServerFailed, match="KIND_GPU but no GPUs are available"):
        EmbeddedServer(echo_repository, device="gpu").start()


def test_failing_model_fails_the_start_with_its_reason(tmp_path: Path) -> None:
    repository = echo_model.write(tmp_path, before_ready="raise ValueError('no weights here')")
    with pytest.raises(ServerFailed, match="no weights here"):
        EmbeddedServer(repository, device="cpu").start()


def test_slow_start_is_given_up_and_ended(tmp_path: Path) -> None:
    repository = echo_model.write(tmp_path, before_ready="import time; time.sleep(60)")
    with pytest.raises(ServerFailed, match="not ready after 3 s"):
        EmbeddedServer(repository, device="cpu", start_timeout=3, stop_timeout=0.5).start()


def test_stop_leaves_nothing_behind(tmp_path: Path) -> None:
    core = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})"
    last = f"{core}; os.nice(19); self.held = np.ones(1 << 27, np.uint8)"
    server = EmbeddedServer(echo_model.write(tmp_path, before_ready=last), device="cpu", stop_timeout=0.5).start()
    pid, directory = server.pid, Path(server._directory.name)
    assert len(group_of(pid)) >= 2  # the server and its stub
    busy = f"{core}; print(flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
    try:  # beside which the stub takes long to give its memory back
        other.stdout.readline()
        os.kill(pid, signal.SIGSTOP)  # a server that hangs
        server.stop()
        left = group_of(pid)
    finally:
        other.kill()
        other.communicate()
    assert not left
    assert not directory.exists()
    assert not list(Path("/dev/shm").glob(directory.name + "*"))


def test_server_ends_with_the_process_that_started_it(echo_repository: Path) -> None:
    program = (
        "import time\n"
        "from lightseq_backend.serving.embedded import EmbeddedServer\n"
        f"server = EmbeddedServer({str(echo_repository)!r}, device='cpu').start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    pid = int(starter.stdout.readline())
    assert group_of(pid)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 20
    while group_of(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_of(pid)


def group_of(leader: int) -> list[int]:
    """Ids of the processes, zombies aside, in that process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(") ")[2].split()[:3]
        except OSError:  # ended while we looked
            continue
        if int(group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def install(root: Path, libraries: str = "lib") -> Path:
    """A Triton as in its container: {bin,backends/python,lib}, nothing from PyPI."""
    found = embedded.find_triton()
    (root / "bin").mkdir(parents=True)
    (root / "backends" / "python").mkdir(parents=True)
    (root / libraries).symlink_to(found.libraries[0])
    shutil.copy(found.server, root / "bin" / "tritonserver")
    for path in found.backend_files:
        shutil.copy(path, root / "backends" / "python" / path.name)
    return root


def test_server_on_the_path_is_used_without_the_wheel(
    tmp_path: Path, echo_repository: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., EmbeddedServer]
) -> None:
    root = install(tmp_path)
    monkeypatch.delenv(embedded.TRITON_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(root / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    assert embedded.find_triton().server == root / "bin" / "tritonserver"
    result = ask(tritonclient.grpc, serve(echo_repository).grpc, np.ones((1, 3), np.int32))
    assert result.as_numpy("y").tolist() == [[2, 2, 2]]


def test_server_in_a_named_directory_is_used_whatever_else_there_is(
    tmp_path: Path, echo_repository: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., EmbeddedServer]
) -> None:
    one, other = install(tmp_path / "one", "libs"), install(tmp_path / "other")
    running = serve(echo_repository, triton=one)
    assert os.readlink(f"/proc/{running.pid}/exe") == str(one / "bin" / "tritonserver")
    result = ask(tritonclient.grpc, running.grpc, np.ones((1, 3), np.int32))
    assert result.as_numpy("y").tolist() == [[2, 2, 2]]
    monkeypatch.setenv(embedded.TRITON_VARIABLE, str(other))
    assert embedded.find_triton().server == other / "bin" / "tritonserver"
    assert embedded.find_triton(one).server == one / "bin" / "tritonserver"


def test_server_for_another_python_is_refused(tmp_path: Path) -> None:
    stub = install(tmp_path) / "backends" / "python" / "triton_python_backend_stub"
    stub.write_bytes(b"\x7fELF...libpython3.9.so.1.0...")
    with pytest.raises(ConfigError, match=rf"stub is for Python 3.9; this is Python 3.{sys.version_info.minor}"):
        embedded.find_triton(tmp_path)


def test_named_directory_without_a_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere holds no Triton: bin/tritonserver is missing"):
        embedded.find_triton(tmp_path / "nowhere")


def test_no_server_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    monkeypatch.delenv(embedded.TRITON_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="install the extra `server`"):
        embedded.find_triton()


def test_missing_repository_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a directory"):
        EmbeddedServer(tmp_path / "nowhere")


def test_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tpu'; devices are auto, cpu, gpu"):
        EmbeddedServer(tmp_path, device="tpu")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_taken_port_fails_the_start(echo_repository: Path, taken_port: int) -> None:
    with pytest.raises(ServerFailed, match=f"{taken_port}' already in use"):
        EmbeddedServer(echo_repository, device="cpu", grpc_port=taken_port, models=[]).start()


def test_crash_of_tritons_own_start_is_tried_again(echo_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was seen: boost's exception ends the process before it is ready. Other failures are told at once."""
    server, starts = EmbeddedServer(echo_repository, device="cpu", models=[]), []

    def fail(log: str) -> None:
        starts.append(log)
        server._last_log = log
        raise ServerFailed(log)

    logs = iter(["what():  boost::interprocess::lock_exception"] * 3)
    monkeypatch.setattr(server, "_launch", lambda triton: None)
    monkeypatch.setattr(server, "_wait_until_ready", lambda: fail(next(logs)))
    with pytest.raises(ServerFailed, match="lock_exception"):
        server.start()
    assert len(starts) == 3
    logs = iter(["no such model"])
    with pytest.raises(ServerFailed, match="no such model"):
        server.start()
    assert len(starts) == 4


def test_port_taken_at_the_last_moment_is_replaced(
    echo_repository: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., EmbeddedServer]
) -> None:
    free = embedded._choose_ports((0, 0, 0))
    choices = iter([(taken_port, *free[1:]), free])
    monkeypatch.setattr(embedded, "_choose_ports", lambda wanted: next(choices))
    assert serve(echo_repository, models=[]).http == f"127.0.0.1:{free[0]}"


def test_free_ports_differ() -> None:
    assert len(set(embedded._choose_ports((0, 0, 0)))) == 3


def test_wanted_port_is_kept() -> None:
    assert embedded._choose_ports((18123, 0, 0))[0] == 18123
