"""What can be known of the image and of compose.yaml without a Docker engine."""

from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import compose_spec
import echo_model
import numpy as np
import pytest
import tritonclient.http
import yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
ENVIRONMENT_FILE = dict(
    line.split("=", 1) for line in (ROOT / ".env").read_text().splitlines() if line and not line.startswith("#")
)
SERVICES = ["triton", "triton-cpu"]


def instruction(name: str) -> list[str]:
    """The words of the Dockerfile's exec-form instruction, for example ENTRYPOINT."""
    (words,) = re.findall(rf"{name} (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)
    return json.loads(words)


def test_dockerfile_passes_its_linter() -> None:
    done = subprocess.run([BIN / "hadolint", ROOT / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_file_follows_the_specification() -> None:
    assert compose_spec.PyCompose.from_json(json.dumps(COMPOSE)).service_names() == SERVICES


@pytest.mark.parametrize("fault", [{"portz": []}, {"ports": ["127.0.0.1:8000:x"]}, {"shm_size": "1zb"}])
def test_specification_check_finds_faults(fault: dict) -> None:
    compose = copy.deepcopy(COMPOSE)
    compose["services"]["triton"].update(fault)
    with pytest.raises(ValueError):
        compose_spec.PyCompose.from_json(json.dumps(compose))


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_published_to_this_machine_alone(service: str) -> None:
    ports = COMPOSE["services"][service]["ports"]
    assert ports == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]


@pytest.mark.parametrize("service", SERVICES)
def test_container_runs_without_privileges(service: str) -> None:
    settings = COMPOSE["services"][service]
    assert settings["user"] == "1000:1000"
    assert settings["cap_drop"] == ["ALL"]
    assert settings["read_only"]


@pytest.mark.parametrize("service", SERVICES)
def test_container_has_shared_memory_for_its_models(service: str) -> None:
    assert COMPOSE["services"][service]["shm_size"] == "1gb"


def test_plain_up_starts_the_gpu_service_alone() -> None:
    chosen = ENVIRONMENT_FILE["COMPOSE_PROFILES"].split(",")
    started = [name for name in SERVICES if set(COMPOSE["services"][name]["profiles"]) & set(chosen)]
    assert started == ["triton"]


def test_cpu_profile_starts_a_service_that_needs_no_gpu() -> None:
    started = [name for name in SERVICES if "cpu" in COMPOSE["services"][name]["profiles"]]
    assert started == ["triton-cpu"]
    assert "deploy" not in COMPOSE["services"]["triton-cpu"]


def test_gpu_service_reserves_a_gpu() -> None:
    (device,) = COMPOSE["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_health_checks_agree() -> None:
    for service in SERVICES:
        assert COMPOSE["services"][service]["healthcheck"]["test"] == ["CMD", *instruction("^    CMD")]


def test_copied_paths_exist_and_reach_the_build() -> None:
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, flags=re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    for path in copied:
        assert list(ROOT.glob(path)), path
        assert f"!{path}" in allowed


def test_every_dependency_is_pinned() -> None:
    lines = [
        line
        for device in ("cpu", "gpu")
        for line in (ROOT / "docker" / f"requirements-{device}.txt").read_text().splitlines()
        if not line.startswith(("#", "--requirement"))
    ]
    assert [line for line in lines if not re.fullmatch(r"[\w.\-\[\]]+==[\d.]+", line)] == []


def test_image_installs_what_the_project_needs() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    dependencies = [*project["dependencies"], *extras["text"], *extras["hdf5"]]
    needed = {re.split(r"[<>=!\[]", dependency)[0] for dependency in dependencies}
    pinned = (ROOT / "docker" / "requirements-cpu.txt").read_text()
    assert needed == set(re.findall(r"^([\w.\-]+)==", pinned, flags=re.MULTILINE))
    assert re.search(r"^numpy==1\.", pinned, flags=re.MULTILINE), "Triton 24.10's stub loses strings under NumPy 2"


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The image's entry command with the arguments of compose's CPU service, here instead of in the image.

    Only what the container would supply is replaced: where the models lie, the address, the ports.
    """
    repository = echo_model.write(tmp_path_factory.mktemp("models"))
    here = {"/models": str(repository), "0.0.0.0": "127.0.0.1", "${LIGHTSEQ_ADMIN_KEY:-}": "sesame"}
    words = [here.get(word, word) for word in instruction("^ENTRYPOINT") + COMPOSE["services"]["triton-cpu"]["command"]]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    process = subprocess.Popen([str(BIN / words[0]), *words[1:], *ports], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:  # ends when the process does
            if line.startswith("ready: "):
                yield process, dict(re.findall(r"(http|grpc|metrics) (\S+?)(?:/metrics)?(?:\s|$)", line))
                break
        else:
            pytest.fail("the entry command ended before the server was ready")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_entry_command_serves(container: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    tensor = tritonclient.http.InferInput("x", [1, 2], "INT32")
    tensor.set_data_from_numpy(np.array([[1, 41]], np.int32))
    with tritonclient.http.InferenceServerClient(container[1]["http"]) as client:
        assert client.infer("echo", [tensor]).as_numpy("y").tolist() == [[2, 42]]


def test_entry_command_passes_the_health_check(container: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    check = COMPOSE["services"]["triton-cpu"]["healthcheck"]["test"][1:]
    check = [word.replace("127.0.0.1:8000", container[1]["http"]) for word in check]
    assert subprocess.run(check, timeout=10).returncode == 0


def test_entry_command_restricts_the_admin_apis(container: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    with tritonclient.http.InferenceServerClient(container[1]["http"]) as client:
        with pytest.raises(tritonclient.http.InferenceServerException, match="restricted"):
            client.get_model_repository_index()
        assert client.get_model_repository_index(headers={"admin-key": "sesame"})


def test_entry_command_ends_on_sigterm(container: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    process, _ = container  # the last test: it ends what the others use
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=25) == 0
