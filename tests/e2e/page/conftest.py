"""A real headless Chromium, and a real sidecar fed over real gRPC, for the tests of the page."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_proto.v1 import telemetry_pb2_grpc as rpc

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_LAYERS = 12
LAYER_SITES = ("hidden", "attn_input", "o_proj_input", "mlp_input", "down_proj_input")
TYPICAL_ABSMAX = {
    "embedding": 1.4,
    "hidden": 60.0,
    "attn_input": 12.0,
    "o_proj_input": 1.6,
    "mlp_input": 9.0,
    "down_proj_input": 18.0,
    "final_norm": 41.0,
}

CHROMIUM_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()


class Browser:
    """One tab of a Chromium, driven over its DevTools pipe; keeps what went wrong in it."""

    def __init__(self, profile: Path) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._replies: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._id = 0
        self._start(profile)
        target = self._send("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        attached = self._send("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self._session: str = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _start(self, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        # Chromium reads commands on descriptor 3 and writes events on 4, each message ended by a NUL.
        line = f'exec chromium "$@" 3</dev/fd/{commands} 4>/dev/fd/{events}'
        self._process = subprocess.Popen(
            ["sh", "-c", line, "sh", *CHROMIUM_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(commands, events),
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(events)
        self._pipe = os.fdopen(self._commands, "wb", buffering=0)
        self._reader = threading.Thread(target=self._read, args=(os.fdopen(self._events, "rb"),), daemon=True)
        self._reader.start()

    def _read(self, pipe: Any) -> None:
        with pipe:
            pending = b""
            while chunk := pipe.read1(1 << 16):
                *messages, pending = (pending + chunk).split(b"\0")
                for message in messages:
                    self._receive(json.loads(message))

    def _receive(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._replies[message["id"]].put(message)
            return
        method, params = message["method"], message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.responseReceived" and params["response"]["status"] >= 400:
            self.problems.append(f"{params['response']['status']} {params['response']['url']}")
        elif method == "Network.loadingFailed":
            self.problems.append(f"request failed: {params['errorText']}")
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])

    def _send(self, method: str, params: dict[str, Any], session: str | None) -> dict[str, Any]:
        self._id += 1
        reply = self._replies[self._id] = queue.Queue()
        message = {"id": self._id, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self._pipe.write(json.dumps(message).encode() + b"\0")
        answer = reply.get(timeout=30)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Result of a DevTools method on the tab."""
        return self._send(method, params, self._session)

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """The first truthy value of a JavaScript expression."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}\n{self.evaluate('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        """One key of the keyboard, down and up."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        params = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key], "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **params)
        self.call("Input.dispatchKeyEvent", type="keyUp", **params)

    def show(self, *, width: int, dark: bool = False) -> None:
        """Viewport width in CSS pixels (below 700 a phone) and colour scheme."""
        phone = width < 700
        scale = 2 if phone else 1
        height = 780 if phone else 900
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        path.parent.mkdir(exist_ok=True)
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @contextlib.contextmanager
    def covered(self) -> Iterator[None]:
        """Another tab covers this one: its page is hidden."""
        cover = self._send("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        self._send("Target.activateTarget", {"targetId": cover}, None)
        yield
        self._send("Target.closeTarget", {"targetId": cover}, None)
        self.call("Page.bringToFront")

    def close(self) -> None:
        """End the browser and wait for it."""
        self._send("Browser.close", {}, None)
        self._process.wait(20)
        self._pipe.close()
        self._reader.join(10)


HALF_NORMAL = np.abs(np.random.default_rng(0).normal(size=2000))
BINS = np.concatenate([[0.0], stats.BIN_EDGES[1:], [np.inf]])


class Worker:
    """A vLLM worker as the sidecar sees it: a layout, then windows with planted values, each acknowledged."""

    def __init__(self, address: str, *, engine: str = "0", model: str = MODEL) -> None:
        sites = [(layer, name) for layer in range(NUM_LAYERS) for name in LAYER_SITES]
        self.sites = [(None, "embedding"), *sites, (None, "final_norm")]
        layout = wire.Layout(
            model=model,
            model_type="llama",
            dtype="bfloat16",
            engine=engine,
            instance=f"instance-{engine}",
            vllm_version="0.32.0+cpu",
            sites=tuple(
                wire.Site(layer=layer, name=name, width=576, sharded=False, module=f"model.layers.{layer}.{name}")
                for layer, name in self.sites
            ),
        )
        self._sequence = 0
        self._requests: queue.Queue[pb.StreamRequest | None] = queue.Queue()
        self._channel = grpc.insecure_channel(address)
        self._requests.put(wire.encode_layout(layout))
        stub = rpc.TelemetryServiceStub(self._channel)
        self._replies = stub.Stream(iter(self._requests.get, None), wait_for_ready=True, timeout=110)
        self._layout_id = next(self._replies).layout_accepted.layout_id
        self._lifetime = stats.empty(len(self.sites))[..., : stats.NUM_EXTREMA].copy()

    def send(self, **planted: float) -> None:
        """One window of ordinary traffic; ``layer_4_hidden=2e3`` plants an absmax there, in phase first."""
        values = stats.empty(len(self.sites))
        histogram = np.zeros((len(self.sites), stats.NUM_BINS), np.float32)
        tokens = (1, 30, 20)
        for index, (layer, name) in enumerate(self.sites):
            rms = TYPICAL_ABSMAX[name] * (1 + (layer or 0) / 8) / 20
            histogram[index] = 300 * 576 * np.histogram(HALF_NORMAL * rms, BINS)[0] / len(HALF_NORMAL)
            for phase, factor in enumerate((1.0, 0.8, 0.9)):
                peak = TYPICAL_ABSMAX[name] * factor * (1 + (layer or 0) / 8)
                if phase == stats.FIRST:
                    peak = planted.get(name if layer is None else f"layer_{layer}_{name}", peak)
                elements = tokens[phase] * 576
                values[phase, index] = (peak * 0.7, -peak, elements * (peak / 20) ** 2, elements * peak / 40, 0)
        self._lifetime = np.stack(
            [np.maximum(self._lifetime[..., 0], values[..., 0]), np.minimum(self._lifetime[..., 1], values[..., 1])], -1
        )
        self._sequence += 1
        now = time.time()
        window = wire.Window(
            layout_id=self._layout_id,
            sequence=self._sequence,
            start_seconds=now - 1,
            end_seconds=now,
            tokens=tokens,
            values=values,
            lifetime=self._lifetime,
            histogram=histogram,
        )
        self._requests.put(wire.encode_window(window))
        assert next(self._replies).window_ack.sequence == self._sequence

    def close(self) -> None:
        """End the stream."""
        self._requests.put(None)
        self._channel.close()


class Sidecar:
    """A `maxact sidecar` process on two free ports, and the workers connected to it."""

    def __init__(self, log: Path, *options: str) -> None:
        self.grpc, self.http = (f"127.0.0.1:{_free_port()}" for _ in range(2))
        self.url = f"http://{self.http}"
        self._log = log
        self._options = options
        self._workers: list[Worker] = []
        self.start()

    def start(self) -> None:
        """Start the process and wait until it serves."""
        command = [Path(sys.executable).with_name("maxact"), "sidecar", "--grpc", self.grpc, "--http", self.http]
        command += self._options
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._serves():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)

    def _serves(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/healthy").is_success
        except httpx.TransportError:
            return False

    def worker(self, **options: str) -> Worker:
        """A new worker connected to this sidecar."""
        self._workers.append(Worker(self.grpc, **options))
        return self._workers[-1]

    def load_card(self) -> None:
        """Make what was seen so far the calibration card."""
        card = httpx.get(f"{self.url}/api/v1/card", params={"model": MODEL}).raise_for_status().json()
        httpx.post(f"{self.url}/api/v1/cards", json=card).raise_for_status()

    def stop(self) -> None:
        """End workers and process."""
        while self._workers:
            self._workers.pop().close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.call("Page.navigate", url="about:blank")
    chromium.show(width=1280)
    chromium.problems.clear()
    chromium.requests.clear()
    return chromium


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[Sidecar]:
    running = Sidecar(tmp_path / "sidecar.log")
    yield running
    running.stop()


@pytest.fixture
def two_formats(tmp_path: Path) -> Iterator[Sidecar]:
    """One that judges two formats, NVFP4 far too strictly."""
    running = Sidecar(tmp_path / "sidecar.log", "--formats", "int8,nvfp4", "--resolution-threshold", "nvfp4=1000")
    yield running
    running.stop()
