"""The deployment files: everything that can be checked without a Docker engine or a cluster."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OPERATOR_GROUP = "monitoring.coreos.com"
"""Resources of the Prometheus operator; no schema for them comes with a package."""


def run_tool(name: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """Output of a program, from this environment or the system; skips the test where it is not installed."""
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("docker/*.Dockerfile")), ids=lambda path: path.name)
def test_hadolint_accepts_the_dockerfiles(path: Path) -> None:
    run_tool("hadolint", path)


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("docker/*.Dockerfile")), ids=lambda path: path.name)
def test_dockerfiles_copy_what_exists_and_what_the_build_context_holds(path: Path) -> None:
    ignored = path.with_name(f"{path.name}.dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}\n" in ignored, f"{source} is kept out of the context"


def test_the_sidecar_image_holds_no_torch_and_little_python() -> None:
    sizes: dict[str, int] = {}
    pending = ["maxact"]
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in sizes:
            continue
        distribution = importlib.metadata.distribution(name)
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
        sizes[name] = sum(file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc")
        requirements = [Requirement(text) for text in distribution.requires or ()]
        pending += [
            needed.name for needed in requirements if needed.marker is None or needed.marker.evaluate({"extra": ""})
        ]
    assert not {"torch", "vllm", "triton"} & set(sizes)
    assert sum(sizes.values()) < 120e6, sizes


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose/compose.yaml").read_bytes())
    return loaded


def test_the_compose_file_keeps_the_specification() -> None:
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose/compose.yaml")


def test_compose_mounts_and_builds_what_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        if "build" in service:
            context = (DEPLOY / "compose" / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DEPLOY / "compose" / source).exists(), source


def test_compose_publishes_on_the_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_in_compose_differs_by_its_addresses_only(compose: dict[str, Any]) -> None:
    own = yaml.safe_load((DEPLOY / "compose/prometheus.yml").read_bytes())
    reference = yaml.safe_load((ROOT / "grafana/prometheus.yml").read_bytes())
    (alertmanager,) = own["alerting"]["alertmanagers"][0]["static_configs"]
    (target,) = own["scrape_configs"][0]["static_configs"]
    for (address,) in (alertmanager["targets"], target["targets"]):
        assert address.partition(":")[0] in compose["services"]
    alertmanager["targets"], target["targets"] = ["127.0.0.1:9093"], ["127.0.0.1:9471"]
    assert own == reference


def test_the_sidecar_takes_the_options_of_the_deployments(compose: dict[str, Any]) -> None:
    pod = yaml.safe_load((DEPLOY / "kubernetes/base/deployment.yaml").read_bytes())["spec"]["template"]["spec"]
    known = set(re.findall(r"--[a-z0-9-]+", run_tool("maxact", "sidecar", "--help")))
    for command in (compose["services"]["sidecar"]["command"], pod["initContainers"][0]["args"]):
        assert command[0] == "sidecar"
        assert {option.partition("=")[0] for option in command[1:]} <= known


@pytest.fixture(scope="module", params=["base", "monitoring", "overlays/monitored"])
def rendered(request: pytest.FixtureRequest) -> str:
    return run_tool("kubectl", "kustomize", DEPLOY / "kubernetes" / request.param)


def test_every_kustomization_renders_to_valid_resources(rendered: str, tmp_path: Path) -> None:
    documents = [document for document in yaml.safe_load_all(rendered) if OPERATOR_GROUP not in document["apiVersion"]]
    path = tmp_path / "rendered.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    assert run_tool("kubernetes-validate", "--strict", path).count("passed") == len(documents)


def test_strict_validation_would_see_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text((DEPLOY / "kubernetes/base/service.yaml").read_text().replace("selector:", "selectors:"))
    with pytest.raises(AssertionError, match="selectors"):
        run_tool("kubernetes-validate", "--strict", path)


@pytest.fixture(scope="module")
def monitored() -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> resource of the example overlay."""
    text = run_tool("kubectl", "kustomize", DEPLOY / "kubernetes/overlays/monitored")
    return {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(text)}


def test_every_container_is_restricted(monitored: dict[tuple[str, str], dict[str, Any]]) -> None:
    pod = monitored["Deployment", "vllm"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"startupProbe", "livenessProbe", "readinessProbe", "resources"} <= set(container)


def test_worker_and_sidecar_share_the_socket(monitored: dict[tuple[str, str], dict[str, Any]]) -> None:
    pod = monitored["Deployment", "vllm"]["spec"]["template"]["spec"]
    (sidecar,), (vllm,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    endpoint = next(option for option in vllm["args"] if option.startswith("--maxact-endpoint="))
    assert f"--grpc={endpoint.partition('=')[2]}" in sidecar["args"]
    folder = str(Path(endpoint.partition("unix:")[2]).parent)
    for container in (sidecar, vllm):
        assert {"name": "maxact", "mountPath": folder} in container["volumeMounts"]


def test_monitors_select_the_pods_and_their_port(monitored: dict[tuple[str, str], dict[str, Any]]) -> None:
    deployment = monitored["Deployment", "vllm"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    (port,) = deployment["spec"]["template"]["spec"]["initContainers"][0]["ports"]
    pods = monitored["PodMonitor", "maxact"]["spec"]
    services = yaml.safe_load((DEPLOY / "kubernetes/monitoring/servicemonitor.yaml").read_bytes())["spec"]
    for monitor, endpoints in ((pods, "podMetricsEndpoints"), (services, "endpoints")):
        assert monitor["selector"]["matchLabels"].items() <= labels
        assert [endpoint["port"] for endpoint in monitor[endpoints]] == [port["name"]]
    assert port["name"] in {entry["name"] for entry in monitored["Service", "vllm"]["spec"]["ports"]}


def test_rules_and_dashboards_are_the_committed_ones(monitored: dict[tuple[str, str], dict[str, Any]]) -> None:
    rules = yaml.safe_load((ROOT / "grafana/rules/maxact.rules.yaml").read_bytes())
    assert monitored["PrometheusRule", "maxact"]["spec"] == rules
    for path in (ROOT / "grafana/dashboards").glob("*.json"):
        config = monitored["ConfigMap", path.stem]
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert config["data"] == {path.name: path.read_text()}


def test_the_systemd_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    unit = (DEPLOY / "systemd/maxact-sidecar.service").read_text()
    installed = Path(sys.executable).with_name("maxact")
    path = tmp_path / "maxact-sidecar.service"
    path.write_text(unit.replace("/opt/maxact/bin/maxact", str(installed)))
    run_tool("systemd-analyze", "verify", path)
    score = run_tool("systemd-analyze", "security", "--offline=true", path)
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", score)[1]) <= 1.5  # type: ignore[index]
