"""The Kubernetes manifests: Kubernetes' own schemas, and that names, ports and metrics fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

DIRECTORY = Path(__file__).resolve().parents[1] / "docker" / "kubernetes"
RESOURCES = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())["resources"]
VERSION = "1.32"


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((DIRECTORY / name).read_text())


def pod() -> dict[str, Any]:
    return manifest("deployment.yaml")["spec"]["template"]


def test_every_manifest_is_listed() -> None:
    assert sorted(RESOURCES) == sorted({path.name for path in DIRECTORY.glob("*.yaml")} - {"kustomization.yaml"})


@pytest.mark.parametrize("name", sorted(set(RESOURCES) - {"pod-monitor.yaml"}))  # which is no resource of Kubernetes'
def test_manifest_follows_the_schema(name: str) -> None:
    kubernetes_validate.validate(manifest(name), VERSION, strict=True)


@pytest.mark.parametrize("change", [{"replicaz": 2}, {"replicas": "two"}])
def test_schema_check_finds_faults(change: dict[str, Any]) -> None:
    deployment = manifest("deployment.yaml")
    deployment["spec"].update(change)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)


def test_service_and_monitor_find_the_pods_and_their_ports() -> None:
    labels, (container,) = pod()["metadata"]["labels"], pod()["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    service, monitor = manifest("service.yaml")["spec"], manifest("pod-monitor.yaml")["spec"]
    assert service["selector"].items() <= labels.items()
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert {port["targetPort"] for port in service["ports"]} <= set(ports)
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}


def test_autoscaler_scales_the_deployment_by_a_gauge_of_ours() -> None:
    scaler = manifest("autoscaler.yaml")["spec"]
    assert scaler["scaleTargetRef"]["name"] == manifest("deployment.yaml")["metadata"]["name"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "lightseq_queue_rows"


@pytest.mark.parametrize(
    ("page", "healthy"), [("", True), ('lightseq_ready{a="b"} 1', True), ('lightseq_ready{a="b"} 0', False)]
)
def test_liveness_probe_sees_a_model_that_has_failed(page: str, healthy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import urllib.request

    program = pod()["spec"]["containers"][0]["livenessProbe"]["exec"]["command"][2]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(page.encode()))
    with pytest.raises(SystemExit) as ended:
        exec(program, {})
    assert (not ended.value.code) == healthy
