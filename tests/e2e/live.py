"""Real servers for end-to-end tests, on free ports of the loopback: sidecar, Prometheus, Alertmanager, a webhook.

Prometheus and Alertmanager run the committed configurations of ``grafana/``, with 1 s scrapes and evaluations and with
the addresses of this run.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import numpy as np
import pytest
import yaml

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_proto.v1 import telemetry_pb2_grpc as rpc

GRAFANA: Final = Path(__file__).parents[2] / "grafana"
PROGRAMS: Final = ("prometheus", "prometheus-alertmanager")


def need_programs() -> None:
    """Skip the test where a server is not installed."""
    for program in PROGRAMS:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], Any], *, seconds: float, what: str) -> Any:
    """The first truthy result; fails with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return result


@contextlib.contextmanager
def process(command: list[str | Path], *, ready: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that runs while the context is open; entered once ``GET ready`` succeeds, left by SIGTERM."""

    def serves() -> bool:
        assert running.poll() is None, log.read_text()
        try:
            return httpx.get(ready).is_success
        except httpx.TransportError:
            return False

    with log.open("wb") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(serves, seconds=30, what=f"{ready} answers")
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(20)


class Worker:
    """A vLLM worker as the sidecar sees it: a layout, then windows of planted statistics, each acknowledged."""

    def __init__(self, address: str, *, model: str, sites: tuple[tuple[int | None, str], ...]) -> None:
        self.model = model
        self._sites = sites
        self._sequence = 0
        self._lifetime = stats.empty(len(sites))[..., : stats.NUM_EXTREMA].copy()
        self._requests: queue.Queue[pb.StreamRequest | None] = queue.Queue()
        self._channel = grpc.insecure_channel(address)
        table = tuple(wire.Site(layer=layer, name=name, width=64, sharded=False) for layer, name in sites)
        layout = wire.Layout(model=model, engine="0", instance="first", sites=table)
        self._requests.put(wire.encode_layout(layout))
        stub = rpc.TelemetryServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._replies = stub.Stream(iter(self._requests.get, None), wait_for_ready=True)
        self._layout_id = next(self._replies).layout_accepted.layout_id

    def send(self, planted: dict[tuple[int | None, str], float] | None = None) -> None:
        """One window: absmax 10 everywhere but where something else is planted."""
        tokens = (1, 30, 20)
        values = stats.empty(len(self._sites))
        for index, site in enumerate(self._sites):
            peak = (planted or {}).get(site, 10.0)
            for phase, count in enumerate(tokens):
                elements = 64 * count
                values[phase, index] = (peak, -peak / 2, elements * 4.0, elements * 1.0, 0)
        extrema = values[..., : stats.NUM_EXTREMA]
        self._lifetime = np.stack(
            [np.maximum(self._lifetime[..., 0], extrema[..., 0]), np.minimum(self._lifetime[..., 1], extrema[..., 1])],
            -1,
        )
        self._sequence += 1
        now = time.time()
        window = wire.Window(
            layout_id=self._layout_id,
            sequence=self._sequence,
            start_seconds=now - 0.2,
            end_seconds=now,
            tokens=tokens,
            values=values,
            lifetime=self._lifetime,
        )
        self._requests.put(wire.encode_window(window))
        assert next(self._replies).window_ack.sequence == self._sequence

    def close(self) -> None:
        """End the stream."""
        self._requests.put(None)
        self._channel.close()


def send_foreign_layout(address: str) -> None:
    """Connect as a worker of another version: the sidecar refuses the stream."""
    layout = wire.Layout(
        model="m", engine="0", instance="i", sites=(wire.Site(layer=0, name="hidden", width=64, sharded=False),)
    )
    message = wire.encode_layout(layout)
    message.layout.stats.append("a statistic of tomorrow")
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        list(rpc.TelemetryServiceStub(channel).Stream(iter([message])))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """A running ``maxact sidecar``."""

    grpc: str
    http: str
    process: subprocess.Popen[bytes]

    def use_live_state_as_card(self) -> None:
        """Make what was seen so far the calibration card."""
        card = httpx.get(f"http://{self.http}/api/v1/card").raise_for_status().json()
        httpx.post(f"http://{self.http}/api/v1/cards", json=card).raise_for_status()


@contextlib.contextmanager
def run_sidecar(folder: Path, *options: str) -> Iterator[Sidecar]:
    """``maxact sidecar`` with these options."""
    receiver, page = (f"127.0.0.1:{free_port()}" for _ in range(2))
    maxact = Path(sys.executable).with_name("maxact")
    command: list[str | Path] = [maxact, "sidecar", "--grpc", receiver, "--http", page, *options]
    with process(command, ready=f"http://{page}/-/healthy", log=folder / "sidecar.log") as running:
        yield Sidecar(grpc=receiver, http=page, process=running)


class Webhook:
    """Receives the notifications of an Alertmanager."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        """Alerts as delivered, each with ``received``: seconds of the steady clock."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.received += [{**alert, "received": time.monotonic()} for alert in body["alerts"]]
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def find(self, alertname: str, status: str) -> list[dict[str, Any]]:
        """Delivered alerts of that name and status, firing or resolved."""
        return [
            alert for alert in self.received if (alert["labels"]["alertname"], alert["status"]) == (alertname, status)
        ]

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextlib.contextmanager
def run_webhook() -> Iterator[Webhook]:
    """A `Webhook` that listens while the context is open."""
    webhook = Webhook()
    try:
        yield webhook
    finally:
        webhook.close()


@contextlib.contextmanager
def run_alertmanager(folder: Path, webhook: Webhook) -> Iterator[str]:
    """An Alertmanager with the committed routing; its address. Only the pause between notifications is shortened."""
    config = yaml.safe_load((GRAFANA / "alertmanager.yml").read_bytes())
    config["route"]["group_interval"] = "5s"
    for receiver in config["receivers"]:
        for hook in receiver["webhook_configs"]:
            hook["url"] = f"http://{webhook.address}/{receiver['name']}"
    path = folder / "alertmanager.yml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command: list[str | Path] = [
        "prometheus-alertmanager",
        f"--config.file={path}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    ]
    with process(command, ready=f"http://{address}/-/ready", log=folder / "alertmanager.log"):
        yield address


class Prometheus:
    """The HTTP interface of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.started = time.time()

    def _get(self, path: str, **params: str | float) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30).json()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Samples of now."""
        result: list[dict[str, Any]] = self._get("query", query=expr)["result"]
        return result

    def query_range(self, expr: str) -> list[dict[str, Any]]:
        """Series since this Prometheus started, one sample per second."""
        data = self._get("query_range", query=expr, start=self.started, end=time.time(), step=1)
        result: list[dict[str, Any]] = data["result"]
        return result

    def firing(self) -> list[dict[str, Any]]:
        """Alerts that fire now."""
        return [alert for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"]

    def rules(self) -> list[dict[str, Any]]:
        """All rules with their health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]


@contextlib.contextmanager
def run_prometheus(folder: Path, *, target: str, alertmanager: str) -> Iterator[Prometheus]:
    """A Prometheus with the committed configuration and rules, at one second everywhere."""
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_bytes())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    rules = yaml.safe_load((GRAFANA / config["rule_files"][0]).read_bytes())
    for group in rules["groups"]:
        group.pop("interval", None)
    (folder / "rules").mkdir()
    (folder / config["rule_files"][0]).write_text(yaml.safe_dump(rules, width=10_000))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command: list[str | Path] = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address={address}",
    ]
    with process(command, ready=f"http://{address}/-/ready", log=folder / "prometheus.log"):
        yield Prometheus(f"http://{address}")
