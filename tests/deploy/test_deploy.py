"""The deployment files: everything that can be checked without a Docker engine or a cluster."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from cloudcoil.models.prometheus_operator import v1 as operator_types
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OPERATOR_GROUP = "monitoring.coreos.com"
"""Resources of the Prometheus operator: Kubernetes' own schemas do not know them."""
KUSTOMIZATIONS = sorted(path.parent for path in (DEPLOY / "kubernetes").rglob("kustomization.yaml"))


def run_tool(name: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """Output of a program, from this environment or the system; skips the test where it is not installed.

    CI skips nothing but what needs systemd, which containers rarely have.
    """
    program = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if program is None:
        assert name == "systemd-analyze" or not os.environ.get("CI"), f"{name} is not installed"
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
    for source in copied(path):
        assert (ROOT / source).exists(), source
        assert f"!{source}\n" in ignored, f"{source} is kept out of the context"


def copied(dockerfile: Path) -> list[str]:
    """What a Dockerfile copies out of the build context."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile.read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()]


def test_what_the_dockerfiles_copy_is_enough_to_build_maxact(tmp_path: Path) -> None:
    one, other = sorted(DEPLOY.glob("docker/*.Dockerfile"))
    assert copied(one) == copied(other)
    context = tmp_path / "context"
    context.mkdir()
    for source in copied(one):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("node_modules"))
        else:
            shutil.copy(ROOT / source, context)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([*build, context], check=True, capture_output=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    (wheel,) = tmp_path.glob("maxact-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"maxact_vllm/plugin.py", "maxact_sidecar/page/index.html", "maxact_proto/wire.py"} <= names
    assert not [name for name in names if "node_modules" in name or "/src/" in name]


def extra(name: str) -> list[Requirement]:
    """What an extra of maxact adds."""
    every = [Requirement(text) for text in importlib.metadata.distribution("maxact").requires or ()]
    return [each for each in every if each.marker and each.marker.evaluate({"extra": name})]


def test_the_sidecar_image_holds_no_torch_and_little_python() -> None:
    dockerfile = (DEPLOY / "docker/sidecar.Dockerfile").read_text()
    assert "--without-pip" in dockerfile
    assert "--no-compile" in dockerfile, "compiled copies would have to be counted"
    sizes: dict[str, int] = {}
    pending = ["maxact", *(needed.name for needed in extra("auth"))]
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


VLLM_ARGUMENTS = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
for line in sys.stdin:
    parsed = parser.parse_args(["serve", *json.loads(line)])
    print(json.dumps([parsed.model_tag, parsed.plugin, parsed.maxact_endpoint]))
"""


@pytest.mark.engine
def test_vllm_takes_the_arguments_of_the_deployments(
    compose: dict[str, Any], monitored: dict[tuple[str, str], dict[str, Any]]
) -> None:
    pod = monitored["Deployment", "vllm"]["spec"]["template"]["spec"]
    commands = [compose["services"]["vllm"]["command"], pod["containers"][0]["args"]]
    asked = "\n".join(json.dumps(command) for command in commands)
    command = [sys.executable, "-c", VLLM_ARGUMENTS]
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "will be removed" not in done.stderr
    parsed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    socket = "unix:/run/maxact/grpc.sock"
    assert parsed == [["${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}", "maxact", socket], ["$(MODEL)", "maxact", socket]]


@pytest.fixture(scope="module", params=KUSTOMIZATIONS, ids=lambda path: str(path.relative_to(DEPLOY / "kubernetes")))
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(run_tool("kubectl", "kustomize", request.param)))


def is_of_the_operator(document: dict[str, Any]) -> bool:
    return OPERATOR_GROUP in document["apiVersion"]


def test_every_kustomization_renders_to_valid_resources(rendered: list[dict[str, Any]], tmp_path: Path) -> None:
    documents = [document for document in rendered if not is_of_the_operator(document)]
    if documents:
        path = tmp_path / "rendered.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        assert run_tool("kubernetes-validate", "--strict", path).count("passed") == len(documents)
    for document in filter(is_of_the_operator, rendered):
        assert as_the_operator_reads(document) == document


def as_the_operator_reads(document: dict[str, Any]) -> dict[str, Any]:
    """The resource through the operator's own types: raises on a wrong value, loses what it does not know."""
    model = getattr(operator_types, document["kind"]).model_validate(document)
    read: dict[str, Any] = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return read


def test_the_operators_types_would_see_a_mistake() -> None:
    monitor = yaml.safe_load((DEPLOY / "kubernetes/monitoring/podmonitor/podmonitor.yaml").read_bytes())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    endpoint["intervall"] = endpoint.pop("interval")
    assert as_the_operator_reads(monitor) != monitor
    endpoint["scheme"] = "gopher"
    with pytest.raises(ValueError, match="gopher"):
        as_the_operator_reads(monitor)


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


def test_what_is_for_the_native_sidecar_names_its_port_by_number(
    monitored: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """The names of an init container's ports are found by services from Kubernetes 1.33 on only."""
    (port,) = monitored["Deployment", "vllm"]["spec"]["template"]["spec"]["initContainers"][0]["ports"]
    (service,) = [each for each in monitored["Service", "vllm"]["spec"]["ports"] if each["name"] == port["name"]]
    assert service["targetPort"] == port["containerPort"]
    allowed = [each["port"] for rule in monitored["NetworkPolicy", "vllm"]["spec"]["ingress"] for each in rule["ports"]]
    assert allowed == ["http", port["containerPort"]]


def test_every_deployment_keeps_the_state(
    compose: dict[str, Any], monitored: dict[tuple[str, str], dict[str, Any]]
) -> None:
    folder = "/var/lib/maxact"
    (sidecar,) = monitored["Deployment", "vllm"]["spec"]["template"]["spec"]["initContainers"]
    assert f"--state={folder}" in sidecar["args"]
    assert {"name": "state", "mountPath": folder} in sidecar["volumeMounts"]
    service = compose["services"]["sidecar"]
    assert f"--state={folder}" in service["command"]
    assert f"state:{folder}" in service["volumes"]
    for path in (DEPLOY / "systemd").iterdir():
        assert "maxact sidecar --state %S/maxact" in path.read_text()
    assert "StateDirectory=maxact\n" in (DEPLOY / "systemd/maxact-sidecar.service").read_text()


def test_monitors_select_the_pods_and_their_port(monitored: dict[tuple[str, str], dict[str, Any]]) -> None:
    deployment = monitored["Deployment", "vllm"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    (port,) = deployment["spec"]["template"]["spec"]["initContainers"][0]["ports"]
    pods = monitored["PodMonitor", "maxact"]["spec"]
    (asked,) = yaml.safe_load((ROOT / "grafana/prometheus.yml").read_bytes())["scrape_configs"]
    services = yaml.safe_load((DEPLOY / "kubernetes/monitoring/servicemonitor/servicemonitor.yaml").read_bytes())[
        "spec"
    ]
    for monitor, endpoints in ((pods, "podMetricsEndpoints"), (services, "endpoints")):
        assert monitor["selector"]["matchLabels"].items() <= labels
        assert [endpoint["port"] for endpoint in monitor[endpoints]] == [port["name"]]
        assert [endpoint["params"] for endpoint in monitor[endpoints]] == [asked["params"]]
    assert port["name"] in {entry["name"] for entry in monitored["Service", "vllm"]["spec"]["ports"]}


def test_the_annotated_overlay_names_the_port_of_the_sidecar() -> None:
    text = run_tool("kubectl", "kustomize", DEPLOY / "kubernetes/overlays/annotated")
    template = next(item for item in yaml.safe_load_all(text) if item["kind"] == "Deployment")["spec"]["template"]
    (port,) = template["spec"]["initContainers"][0]["ports"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


def test_the_secured_overlay_is_a_configuration_that_works(tmp_path: Path) -> None:
    text = run_tool("kubectl", "kustomize", DEPLOY / "kubernetes/overlays/secured")
    resources = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(text)}
    policy = resources["NetworkPolicy", "vllm"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [[each["port"] for each in rule["ports"]] for rule in policy["egress"]] == [[53, 53], [443]]
    pod = resources["Deployment", "vllm"]["spec"]["template"]["spec"]
    (sidecar,) = pod["initContainers"]
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    (endpoint,) = resources["PodMonitor", "maxact"]["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"]["ca"]["secret"]["name"] == secrets["tls"]
    assert endpoint["authorization"]["credentials"] == {"name": secrets["token"], "key": "token"}
    assert {sidecar[f"{kind}Probe"]["httpGet"]["scheme"] for kind in ("startup", "liveness", "readiness")} == {"HTTPS"}
    mounts = {mount["name"]: mount["mountPath"] for mount in sidecar["volumeMounts"]}
    arguments = [
        re.sub(f"{mounts['tls']}|{mounts['token']}|{mounts['state']}", str(tmp_path), argument)
        for argument in sidecar["args"]
    ]
    issued = trustme.CA().issue_cert(endpoint["tlsConfig"]["serverName"])
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    (tmp_path / "token").write_text("a-token-of-sufficient-length")
    assert run_tool("maxact", *arguments, "--check-config") == "the configuration is right\n"


def test_rules_and_dashboards_are_the_committed_ones(monitored: dict[tuple[str, str], dict[str, Any]]) -> None:
    for name in ("maxact", "maxact-reference"):
        rules = yaml.safe_load((ROOT / f"grafana/rules/{name}.rules.yaml").read_bytes())
        assert monitored["PrometheusRule", name]["spec"] == rules
    for path in (ROOT / "grafana/dashboards").glob("*.json"):
        config = monitored["ConfigMap", path.stem]
        assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert config["data"] == {path.name: path.read_text()}


@pytest.mark.parametrize("drop_in", [None, "tls.conf"])
def test_the_systemd_unit_is_valid_and_hardened(tmp_path: Path, drop_in: str | None) -> None:
    installed = str(Path(sys.executable).with_name("maxact"))
    path = tmp_path / "maxact-sidecar.service"
    unit = (DEPLOY / "systemd/maxact-sidecar.service").read_text()
    if drop_in:
        # As a second part of the unit: systemctl reads it so, and systemd-analyze looks for drop-ins elsewhere.
        unit += (DEPLOY / "systemd" / drop_in).read_text()
    path.write_text(unit.replace("/opt/maxact/bin/maxact", installed))
    run_tool("systemd-analyze", "verify", path)
    score = run_tool("systemd-analyze", "security", "--offline=true", path)
    assert float(re.search(r"exposure level for \S+: ([\d.]+)", score)[1]) <= 1.5  # type: ignore[index]


def test_the_sidecar_takes_the_options_of_the_systemd_units() -> None:
    known = set(re.findall(r"--[a-z0-9-]+", run_tool("maxact", "sidecar", "--help")))
    for path in (DEPLOY / "systemd").iterdir():
        (command,) = re.findall(r"^ExecStart=/opt/maxact/bin/maxact sidecar(.*)", path.read_text(), re.MULTILINE)
        assert set(re.findall(r"--[a-z0-9-]+", command)) <= known
