"""The Alertmanager example, in a real Alertmanager: who is told, and what is not said twice."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import watchers
from grafana.assets import ALERTS, GRAFANA

pytestmark = pytest.mark.server

RECEIVERS = {"info": "maxact-info", "warning": "maxact", "critical": "maxact-critical"}
PLACE = {"job": "maxact", "instance": "s1"}
SITE = {**PLACE, "model_name": "m", "engine": "0", "layer": "3", "site": "hidden"}


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running Alertmanager with the committed configuration."""
    if missing := watchers.missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("alertmanager")
    with watchers.run_webhook() as webhook, watchers.run_alertmanager(folder, webhook) as address:
        yield address


@pytest.mark.parametrize("name", sorted(ALERTS))
@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed")
def test_every_alert_goes_to_the_receiver_of_its_severity(name: str) -> None:
    severity = ALERTS[name]["labels"]["severity"]
    labels = [f"{label}={value}" for label, value in {**SITE, "alertname": name, "severity": severity}.items()]
    command = ["amtool", "config", "routes", "test", f"--config.file={GRAFANA / 'alertmanager.yml'}", *labels]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == RECEIVERS[severity]


def inhibited(address: str, *alerts: dict[str, str]) -> set[str]:
    """Names of those of the given alerts that are inhibited while all of them fire."""
    instance = f"s{time.monotonic_ns()}"
    sent = [{"labels": {**alert, "severity": "x", "instance": alert["instance"] + instance}} for alert in alerts]
    url = f"http://{address}/api/v2/alerts"
    httpx.post(url, json=sent).raise_for_status()
    seen: list[dict[str, Any]] = httpx.get(url).raise_for_status().json()
    ours = [alert for alert in seen if alert["labels"]["instance"].endswith(instance)]
    assert len(ours) == len(alerts)
    return {alert["labels"]["alertname"] for alert in ours if alert["status"]["inhibitedBy"]}


def firing(name: str, **labels: str) -> dict[str, str]:
    return {"alertname": name, **SITE, **labels}


def test_a_dead_sidecar_silences_what_it_explains_and_nothing_that_still_holds(alertmanager: str) -> None:
    silenced = inhibited(alertmanager, *(firing(name) for name in ALERTS))
    assert silenced == {"MaxactStreamDown", "MaxactDriftRising", "MaxactSeriesDropped"}


def test_a_dead_sidecar_silences_nothing_of_another(alertmanager: str) -> None:
    assert inhibited(alertmanager, firing("MaxactSidecarDown"), firing("MaxactStreamDown", instance="s2")) == set()


def test_a_site_beyond_the_range_silences_its_own_drift_only(alertmanager: str) -> None:
    beyond, elsewhere = firing("MaxactRangeExceeded"), firing("MaxactDriftRising", layer="4")
    assert inhibited(alertmanager, beyond, firing("MaxactDriftRising")) == {"MaxactDriftRising"}
    assert inhibited(alertmanager, beyond, elsewhere) == set()
