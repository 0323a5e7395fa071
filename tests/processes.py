"""Programs that tests start: a sidecar with workers connected to it, and small helpers around processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from watchers import free_port
from workers import Worker


class Sidecar:
    """A running ``maxact sidecar`` on free ports, and the workers that tests connect to it."""

    def __init__(self, log: Path, *options: str) -> None:
        self.grpc, self.http = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.url = f"{'https' if '--tls-cert' in options else 'http'}://{self.http}"
        self.log = log
        self._workers: list[Worker] = []
        self._command = [program("maxact"), "sidecar", "--grpc", self.grpc, "--http", self.http, *options]
        self.start()

    def start(self) -> None:
        """Start it, the first time or again after its end."""
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(self._command, stdout=file, stderr=file)
        wait_for(self._is_ready, 30)

    @property
    def pid(self) -> int:
        """Of the running process."""
        return self._process.pid

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/-/ready", verify=False).is_success
        except httpx.TransportError:
            return False

    def connect(self, own: Any = None) -> Worker:
        """A worker with an open stream."""
        self._workers.append(Worker(self.grpc, own))
        return self._workers[-1]

    def get(self, path: str, **params: str) -> Any:
        """JSON of an API path."""
        return httpx.get(f"{self.url}/api/v1/{path}", params=params).raise_for_status().json()

    def scrape(self, accept: str = "", **params: str | list[str]) -> str:
        """The text of ``/metrics``."""
        return httpx.get(f"{self.url}/metrics", params=params, headers={"accept": accept}).raise_for_status().text

    def use_live_state_as_card(self) -> None:
        """Make what was seen so far the calibration card."""
        httpx.post(f"{self.url}/api/v1/cards", json=self.get("card")).raise_for_status()

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Let the process die at once, as a crash would."""
        self._process.kill()
        self._process.wait(10)

    def stop(self) -> int:
        """Close workers, end the process; its exit status."""
        for worker in self._workers:
            worker.close()
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(10)


def program(name: str) -> Path:
    """A program of the environment that runs the tests."""
    return Path(sys.executable).with_name(name)


def wait_for(condition: Any, seconds: float) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never became true: {condition}"
        time.sleep(0.05)
