"""A worker as the sidecar sees it: layouts, windows with chosen values, and a real gRPC client that sends them."""

from __future__ import annotations

import queue
import time
from typing import Any

import grpc
import numpy as np

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2_grpc

MODEL = "tiny/llama"
WIDTH = 64
SITES = (
    wire.Site(layer=None, name="embedding", width=WIDTH, sharded=False, module="model.embed_tokens"),
    wire.Site(layer=0, name="hidden", width=WIDTH, sharded=False, module="model.layers.1.input_layernorm"),
    wire.Site(layer=0, name="down_proj_input", width=WIDTH, sharded=True, module="model.layers.0.mlp.down_proj"),
)


def layout(**changes: Any) -> wire.Layout:
    """A layout of three sites; keyword arguments replace fields."""
    fields: dict[str, Any] = {"model": MODEL, "engine": "0", "instance": "first", "sites": SITES, "dtype": "bfloat16"}
    return wire.Layout(**(fields | {"model_type": "llama", "vllm_version": "0.32.0"} | changes))


def window(sequence: int, peaks: Any, *, sites: int = len(SITES), layout_id: int = 0, **changes: Any) -> wire.Window:
    """A window of one prefill step of 4 tokens where site k saw values in ``[-peaks[k], peaks[k] / 2]``."""
    values = stats.empty(sites)
    peak = np.broadcast_to(np.asarray(peaks, np.float32), (sites,))
    values[stats.PREFILL, :, stats.MAX] = peak / 2
    values[stats.PREFILL, :, stats.MIN] = -peak
    values[stats.PREFILL, :, stats.SUM_SQUARES] = 4 * WIDTH * (peak / 4) ** 2
    values[stats.PREFILL, :, stats.SUM_ABS] = 4 * WIDTH * peak / 8
    values[stats.PREFILL, :, stats.NONFINITE] = 0
    fields: dict[str, Any] = {"tokens": (0, 4, 0), "values": values, "lifetime": values[..., :2].copy()}
    now = time.time()
    return wire.Window(
        **(
            {"layout_id": layout_id, "sequence": sequence, "start_seconds": now - 1, "end_seconds": now}
            | fields
            | changes
        )
    )


class Worker:
    """A real stream to a sidecar."""

    def __init__(self, address: str, own: wire.Layout | None = None) -> None:
        self.layout = own or layout()
        self._requests: queue.Queue[Any] = queue.Queue()
        self._channel = grpc.insecure_channel(address)
        self._requests.put(wire.encode_layout(self.layout))
        stub = telemetry_pb2_grpc.TelemetryServiceStub(self._channel)
        self._replies = stub.Stream(iter(self._requests.get, None), wait_for_ready=True, timeout=150)
        accepted = next(self._replies).layout_accepted
        self.layout_id, self.sequence = accepted.layout_id, accepted.last_sequence

    def send(self, peaks: Any, **changes: Any) -> None:
        """Send the next window and wait until it is merged."""
        self.sequence += 1
        own = window(self.sequence, peaks, sites=len(self.layout.sites), layout_id=self.layout_id, **changes)
        self.send_raw(own)

    def send_raw(self, own: wire.Window) -> None:
        """Send a window as it is and wait for its acknowledgement."""
        self.post(own)
        assert next(self._replies).window_ack.sequence == own.sequence

    def post(self, own: wire.Window) -> None:
        """Send a window as it is."""
        self._requests.put(wire.encode_window(own))

    def close(self) -> None:
        """End the stream."""
        self._requests.put(None)
        self._channel.close()
