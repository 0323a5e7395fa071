"""Prometheus, Alertmanager and a webhook, on free ports of the loopback, to watch a sidecar end to end.

Prometheus and Alertmanager run the committed configurations of ``grafana/``, with 1 s scrapes and evaluations and with
the addresses of this run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import os
import queue
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import servers
import yaml

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2_grpc

GRAFANA: Final = Path(__file__).parents[1] / "grafana"
PROGRAMS: Final = ("prometheus", "prometheus-alertmanager")


class ServerError(RuntimeError):
    """A server that did not come up. The message ends with the last lines of its log."""


def missing_programs() -> list[str]:
    """The servers that are not installed here."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return missing + (["the templates of prometheus-alertmanager"] if servers.lacks_templates() else [])


def free_port() -> int:
    """A port nobody listens on just now, below those that Linux hands out: one of those is soon somebody's own."""
    while True:
        port = _DRAWS.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


_DRAWS = random.SystemRandom()
"""Not seeded: programs side by side must not draw the same."""


def send_foreign_layout(address: str) -> None:
    """Connect to a sidecar as a worker of another version; the sidecar refuses the stream and counts it."""
    site = wire.Site(layer=0, name="hidden", width=64, sharded=False)
    message = wire.encode_layout(wire.Layout(model="m", engine="0", instance="i", sites=(site,)))
    message.layout.stats.append("a statistic of tomorrow")
    with grpc.insecure_channel(address) as channel, contextlib.suppress(grpc.RpcError):
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)  # type: ignore[no-untyped-call]
        list(stub.Stream(iter([message])))


def send_scaled_window(address: str, sequence: int, *, absmax: float = 10, nonfinite: int = 0) -> None:
    """A window of a tiny engine whose checkpoint carries a static scale, for the panels that show such scales.

    The scale represents magnitudes up to 100; ``nonfinite`` tokens are not finite.
    """
    site = wire.Site(layer=0, name="mlp_input", width=64, sharded=False, limit=100.0)
    values = stats.empty(1)
    values[stats.PREFILL, 0] = (absmax, -absmax, 64 * absmax**2, 64 * absmax, nonfinite)
    window = wire.Window(
        layout_id=0,
        sequence=sequence,
        start_seconds=time.time() - 1,
        end_seconds=time.time(),
        tokens=(0, 1, 0),
        values=values,
        lifetime=values[..., : stats.NUM_EXTREMA].copy(),
    )
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    requests.put(wire.encode_layout(wire.Layout(model="scaled", engine="0", instance="i", sites=(site,))))
    with grpc.insecure_channel(address) as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)  # type: ignore[no-untyped-call]
        replies = stub.Stream(iter(requests.get, None), timeout=10)
        accepted = next(replies).layout_accepted
        requests.put(wire.encode_window(dataclasses.replace(window, layout_id=accepted.layout_id)))
        assert next(replies).window_ack.sequence == sequence
        requests.put(None)


@contextlib.contextmanager
def process(
    command: list[str | Path], *, ready: str, log: Path, seconds: float = 30, environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that runs while the context is open; entered once ``GET ready`` succeeds, left by SIGTERM.

    Raises `ServerError` where it ends before, or takes longer than ``seconds``.
    """

    with log.open("wb") as output:
        running = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **(environ or {})})
    try:
        deadline = time.monotonic() + seconds
        while not _answers(ready):
            if running.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                raise ServerError(f"{command[0]} does not answer at {ready}; {log} ends with:\n{tail}")
            time.sleep(0.1)
        yield running
    finally:
        running.terminate()
        running.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


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
        if answer["status"] != "success":
            raise ServerError(f"{params}: {answer.get('error')}")
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
    (folder / "rules").mkdir()
    for name in config["rule_files"]:
        rules = yaml.safe_load((GRAFANA / name).read_bytes())
        for group in rules["groups"]:
            group.pop("interval", None)
        (folder / name).write_text(yaml.safe_dump(rules, width=10_000))
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
