"""The example proxy before a real Triton: who gets through, with what, and what never does."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import echo_model
import grpc
import numpy as np
import pytest
import tritonclient.grpc
from repositories import tensor
from tritonclient.utils import InferenceServerException

from lightseq_backend.serving.embedded import EmbeddedServer

CONFIGURATION = Path(__file__).resolve().parents[1] / "docker" / "nginx" / "nginx.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
OPENSSL = shutil.which("openssl")
KEY = {"authorization": "Bearer sesame"}

pytestmark = pytest.mark.skipif(not (NGINX and OPENSSL), reason="needs nginx (apt-get install nginx-light) and openssl")


class Proxy:
    def __init__(self, port: int, certificate: Path, triton: EmbeddedServer):
        self.address, self.certificate, self.triton = f"localhost:{port}", certificate, triton

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Status, and the answer's headers."""
        request = urllib.request.Request(f"https://{self.address}{path}", body, headers)
        context = ssl.create_default_context(cafile=str(self.certificate))
        try:
            with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                return answer.status, answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.headers

    def grpc(self) -> tritonclient.grpc.InferenceServerClient:
        return tritonclient.grpc.InferenceServerClient(self.address, ssl=True, root_certificates=str(self.certificate))


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    directory = tmp_path_factory.mktemp("nginx")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        [
            *(str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    (directory / "callers.map").write_text('"Bearer sesame" ali;\n')
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    with EmbeddedServer(echo_model.write(directory / "models"), device="cpu", stop_timeout=5) as triton:
        text = CONFIGURATION.read_text()
        here = {
            "listen 8443": f"listen 127.0.0.1:{port}",
            "127.0.0.1:8000": triton.http,
            "127.0.0.1:8001": triton.grpc,
            "/etc/nginx": str(directory),
            "/tmp/nginx": str(directory / "nginx"),
        }
        for there, place in here.items():
            assert there in text
            text = text.replace(there, place)
        (directory / "nginx.conf").write_text(text)
        command = [str(NGINX), "-p", str(directory), "-c", str(directory / "nginx.conf"), "-e", "stderr"]
        process = subprocess.Popen([*command, "-g", "daemon off; master_process off; error_log stderr;"])
        try:
            wait_for(port, process)
            yield Proxy(port, certificate, triton)
        finally:
            process.terminate()
            process.wait(10)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert process.poll() is None, "nginx ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail("nginx does not listen")


BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "INT32", "data": [1, 41]}]}).encode()
INFER = "/v2/models/echo/infer"


def test_caller_with_a_key_is_served_over_http(proxy: Proxy) -> None:
    assert proxy.ask(INFER, BODY, **KEY)[0] == 200


def test_caller_with_a_key_is_served_over_grpc(proxy: Proxy) -> None:
    with proxy.grpc() as client:
        answer = client.infer("echo", [tensor(tritonclient.grpc, "x", [[1, 41]])], headers=KEY)
    assert answer.as_numpy("y").tolist() == [[2, 42]]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer other"}, {"authorization": "sesame"}])
def test_caller_without_a_key_is_not(proxy: Proxy, headers: dict[str, str]) -> None:
    assert proxy.ask(INFER, BODY, **headers)[0] == 401
    with proxy.grpc() as client, pytest.raises(InferenceServerException) as refused:
        client.infer("echo", [tensor(tritonclient.grpc, "x", [[1, 41]])], headers=headers)
    assert refused.value.status() == "StatusCode.UNAUTHENTICATED"


def test_load_balancer_needs_no_key(proxy: Proxy) -> None:
    assert proxy.ask("/v2/health/ready")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/index",
        "/v2/repository/models/echo/unload",
        "/v2/systemsharedmemory/status",
        "/v2/logging",
        "/v2/trace/setting",
        "/v2/models/stats",
        "/v2/models/echo/stats",
        "/metrics",
        "/v2/models/echo/../../repository/index",
    ],
)
def test_administration_does_not_get_through(proxy: Proxy, path: str) -> None:
    assert proxy.ask(path, b"{}" if "index" in path or "unload" in path else None, **KEY)[0] in (404, 400)


def test_administration_does_not_get_through_over_grpc(proxy: Proxy) -> None:
    with proxy.grpc() as client, pytest.raises(InferenceServerException) as refused:
        client.get_model_repository_index(headers=KEY)
    assert refused.value.status() == f"StatusCode.{grpc.StatusCode.UNIMPLEMENTED.name}"


def test_large_request_is_refused_before_triton_reads_it(proxy: Proxy) -> None:
    assert proxy.ask(INFER, bytes((1 << 20) + 1), **KEY)[0] == 413
    assert proxy.ask(INFER, BODY, **KEY)[0] == 200


@pytest.mark.parametrize("ids", [250_000, 280_000])  # 1 MiB holds 262,144
def test_large_request_is_refused_over_grpc(proxy: Proxy, ids: int) -> None:
    refused = 4 * ids > 1 << 20
    with proxy.grpc() as client, pytest.raises(InferenceServerException) if refused else nullcontext():
        client.infer("echo", [tensor(tritonclient.grpc, "x", np.zeros((1, ids)))], headers=KEY)


def test_plain_http_is_refused(proxy: Proxy) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{proxy.address}{INFER}", timeout=10)
    assert refused.value.code == 400
