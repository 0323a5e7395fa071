"""A real Prometheus and Alertmanager watch a real sidecar that is fed over real gRPC: one story, asserted in parts.

Calm traffic becomes the card; the same traffic is silent; one window leaves the range; the notification arrives; calm
traffic resolves it; a second spike is followed by the death of the sidecar.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import watchers
from grafana.assets import ALERTS, RECORDED, all_queries
from processes import Sidecar, wait_for
from workers import WIDTH, Worker, layout

from maxact_proto import stats, wire
from maxact_sidecar.snapshot import SiteKey

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

MODEL: Final = 'say "hi"\\now'
"""A model name may hold what must be escaped in labels and templates."""
SITES: Final = ((None, "embedding"), (0, "hidden"), (1, "hidden"), (1, "mlp_input"), (None, "final_norm"))
SCALES: Final = {"mlp_input": 20.0}
"""Largest magnitude that the checkpoint's scale of a site represents."""
SPIKE: Final[dict[SiteKey, float]] = {(1, "hidden"): 80.0}
INTERVAL: Final = 0.2


@dataclass(slots=True)
class Story:
    """What was seen."""

    silent: list[dict[str, Any]] = field(default_factory=list)
    """Alerts that fired during calm traffic with a card."""
    fired: list[dict[str, Any]] = field(default_factory=list)
    notified: list[dict[str, Any]] = field(default_factory=list)
    metric_seconds: float = 0.0
    """From the window with the spike to the flag in Prometheus."""
    notification_seconds: float = 0.0
    empty: list[str] = field(default_factory=list)
    """Queries and rules that returned nothing while a flag was raised."""
    num_queries: int = 0
    unhealthy: list[str] = field(default_factory=list)
    resolved: list[dict[str, Any]] = field(default_factory=list)
    """Alerts that still fired after the flag was cleared."""
    resolution: list[dict[str, Any]] = field(default_factory=list)
    after_death: list[dict[str, Any]] = field(default_factory=list)
    """Alerts that fired five seconds after the sidecar had died."""
    sidecar_up: list[dict[str, Any]] = field(default_factory=list)


def send(worker: Worker, planted: dict[SiteKey, float]) -> None:
    """One window of every phase: absmax 10 everywhere but where something else is planted, the bulk around 4."""
    values = stats.empty(len(SITES))
    tokens = (1, 30, 20)
    histogram = np.zeros((len(SITES), stats.NUM_BINS), np.float32)
    histogram[:, np.searchsorted(stats.BIN_EDGES, 4.0)] = WIDTH * sum(tokens)
    for index, site in enumerate(SITES):
        peak = planted.get(site, 10.0)
        for phase, count in enumerate(tokens):
            values[phase, index] = (peak, -peak / 2, WIDTH * count * 4.0, WIDTH * count * 1.0, 0)
    lifetime = values[..., : stats.NUM_EXTREMA].copy()
    worker.send(0, values=values, lifetime=lifetime, tokens=tokens, histogram=histogram)


class Traffic:
    """Sends a window every `INTERVAL` seconds until stopped; what is planted goes into the next one."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._planted: dict[SiteKey, float] | None = None
        self._sent = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            planted, self._planted = self._planted, None
            send(self._worker, planted or {})
            if planted:
                self._sent.set()

    def plant(self, planted: dict[SiteKey, float]) -> float:
        """Put these into one window; the steady second at which it was acknowledged."""
        self._sent.clear()
        self._planted = planted
        assert self._sent.wait(10)
        return time.monotonic()

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()
        self._thread.join(10)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    if missing := watchers.missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)}")
    with ExitStack() as stack:
        yield tell(tmp_path_factory.mktemp("live"), stack)


def tell(folder: Path, stack: ExitStack) -> Story:
    seen = Story()
    webhook = stack.enter_context(watchers.run_webhook())
    alertmanager = stack.enter_context(watchers.run_alertmanager(folder, webhook))
    sidecar = Sidecar(folder / "sidecar.log", "--hold", "4", "--flag-hold", "6")
    stack.callback(sidecar.stop)
    prometheus = stack.enter_context(watchers.run_prometheus(folder, target=sidecar.http, alertmanager=alertmanager))
    sites = tuple(
        wire.Site(layer=layer, name=name, width=WIDTH, sharded=False, limit=SCALES.get(name)) for layer, name in SITES
    )
    traffic = Traffic(sidecar.connect(layout(model=MODEL, sites=sites)))
    stack.callback(traffic.stop)
    stay_calm(seen, sidecar, prometheus)
    leave_the_range(seen, traffic, prometheus, webhook)
    ask_everything(seen, prometheus)
    calm_down(seen, prometheus, webhook)
    die(seen, traffic, sidecar, prometheus)
    return seen


def flags(prometheus: watchers.Prometheus) -> list[dict[str, Any]]:
    return prometheus.query('maxact_headroom_flag{meaning="range"} == 1')


def stay_calm(seen: Story, sidecar: Sidecar, prometheus: watchers.Prometheus) -> None:
    wait_for(lambda: prometheus.query("maxact_absmax"), 20)
    watchers.send_foreign_layout(sidecar.grpc)
    sidecar.use_live_state_as_card()
    judged = 'maxact_headroom_flag{meaning="range"}'
    wait_for(lambda: prometheus.query(judged), 20)
    time.sleep(4)
    seen.silent = prometheus.firing()


def leave_the_range(seen: Story, traffic: Traffic, prometheus: watchers.Prometheus, webhook: watchers.Webhook) -> None:
    spike = traffic.plant(SPIKE)
    wait_for(lambda: flags(prometheus), 10)
    seen.metric_seconds = time.monotonic() - spike
    wait_for(prometheus.firing, 10)
    seen.fired = prometheus.firing()
    wait_for(lambda: webhook.find("MaxactRangeExceeded", "firing"), 30)
    seen.notified = webhook.find("MaxactRangeExceeded", "firing")
    seen.notification_seconds = seen.notified[0]["received"] - spike


def ask_everything(seen: Story, prometheus: watchers.Prometheus) -> None:
    for query in all_queries():
        seen.num_queries += 1
        if not prometheus.query_range(query.runnable):
            seen.empty.append(query.where)
    for name in RECORDED:
        seen.num_queries += 1
        if not prometheus.query_range(name):
            seen.empty.append(name)
    for alert in ALERTS.values():
        prometheus.query(alert["expr"])
    seen.unhealthy = [
        f"{rule['name']}: {rule.get('lastError')}" for rule in prometheus.rules() if rule["health"] != "ok"
    ]


def calm_down(seen: Story, prometheus: watchers.Prometheus, webhook: watchers.Webhook) -> None:
    wait_for(lambda: not flags(prometheus), 30)
    wait_for(lambda: not prometheus.firing(), 10)
    seen.resolved = prometheus.firing()
    wait_for(lambda: webhook.find("MaxactRangeExceeded", "resolved"), 30)
    seen.resolution = webhook.find("MaxactRangeExceeded", "resolved")


def die(seen: Story, traffic: Traffic, sidecar: Sidecar, prometheus: watchers.Prometheus) -> None:
    traffic.plant(SPIKE)
    wait_for(prometheus.firing, 10)
    traffic.stop()
    sidecar.kill()
    wait_for(lambda: prometheus.query('up{job="maxact"} == 0'), 10)
    time.sleep(5)
    assert prometheus.query("maxact_headroom_flag") == []
    seen.after_death = prometheus.firing()
    seen.sidecar_up = prometheus.query("instance:maxact_sidecar:up")


def test_traffic_within_the_card_is_silent(story: Story) -> None:
    assert story.silent == []


def test_one_window_beyond_the_card_fires_for_its_site_alone(story: Story) -> None:
    (alert,) = story.fired
    labels = {name: alert["labels"][name] for name in ("alertname", "model_name", "layer", "site", "severity")}
    assert labels == {
        "alertname": "MaxactRangeExceeded",
        "model_name": MODEL,
        "layer": "1",
        "site": "hidden",
        "severity": "warning",
    }


def test_the_alert_tells_the_values(story: Story) -> None:
    (alert,) = story.fired
    description = alert["annotations"]["description"]
    assert description.startswith("absmax 80 in the last hour, calibrated absmax 10, lowest headroom ratio 0.125")


def test_the_notification_arrives_in_time(story: Story, record_property: Any) -> None:
    record_property("spike_to_metric_s", round(story.metric_seconds, 2))
    record_property("spike_to_notification_s", round(story.notification_seconds, 2))
    assert story.metric_seconds < 4
    assert story.notification_seconds < 15
    (alert,) = story.notified
    assert alert["annotations"]["runbook_url"] == "docs/runbooks/MaxactRangeExceeded.md"


def test_every_query_and_recording_rule_returns_data(story: Story) -> None:
    assert story.num_queries > 50
    assert story.empty == []


def test_every_rule_is_evaluated_without_error(story: Story) -> None:
    assert story.unhealthy == []


def test_the_alert_resolves_when_the_sidecar_clears_the_flag(story: Story) -> None:
    assert story.resolved == []
    assert story.resolution[0]["labels"]["site"] == "hidden"


def test_the_alert_outlives_the_sidecar(story: Story) -> None:
    assert [alert["labels"]["alertname"] for alert in story.after_death] == ["MaxactRangeExceeded"]
    assert [sample["value"][1] for sample in story.sidecar_up] == ["0"]
