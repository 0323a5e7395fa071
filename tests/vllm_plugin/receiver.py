"""A real gRPC server that stands where the sidecar stands and keeps what workers send: tests of the plugin alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np

from maxact_proto import stats, wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_proto.v1 import telemetry_pb2_grpc


class Receiver(telemetry_pb2_grpc.TelemetryServiceServicer):
    """Acknowledges every window. ``layouts`` and ``windows`` are per rank, in order of arrival."""

    def __init__(self) -> None:
        self.layouts: dict[str, wire.Layout] = {}
        self.windows: dict[str, list[wire.Window]] = {}
        self.changed = threading.Condition()

    def Stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """The service's only method."""
        layout = wire.decode_layout(next(requests).layout)
        self.layouts[layout.rank] = layout
        windows = self.windows.setdefault(layout.rank, [])
        last = windows[-1].sequence if windows else 0
        yield pb.StreamResponse(layout_accepted=pb.LayoutAccepted(layout_id=7, last_sequence=last))
        for request in requests:
            window = wire.decode_window(request.window, len(layout.sites))
            with self.changed:
                windows.append(window)
                self.changed.notify_all()
            yield pb.StreamResponse(window_ack=pb.WindowAck(sequence=window.sequence))

    def total(self, rank: str = "pp0tp0", since: int = 0) -> stats.Values:
        """Windows of a rank merged, from window ``since`` on, ``[phases, sites, stats]``."""
        values = stats.empty(len(self.layouts[rank].sites)).astype(np.float64)
        for window in self.windows[rank][since:]:
            stats.merge_into(values, window.values)
        return values.astype(np.float32)

    def tokens(self, rank: str = "pp0tp0", since: int = 0) -> list[int]:
        """Token rows per phase over the windows of a rank, from window ``since`` on."""
        counts: list[int] = np.sum([window.tokens for window in self.windows[rank][since:]], axis=0).tolist()
        return counts

    def histogram(self, rank: str = "pp0tp0") -> Any:
        """Histograms of a rank added up, float64 ``[sites, bins]``."""
        return np.sum([w.histogram for w in self.windows[rank] if w.histogram is not None], axis=0, dtype=np.float64)

    def widths(self, rank: str = "pp0tp0") -> Any:
        """Elements per token of each site of a rank."""
        return np.array([site.width for site in self.layouts[rank].sites])

    def sites(self, rank: str = "pp0tp0") -> list[str]:
        """``<layer>.<site>`` of each site of a rank, ``-`` for no layer."""
        return [f"{'-' if site.layer is None else site.layer}.{site.name}" for site in self.layouts[rank].sites]


class Listening:
    """A `Receiver` served on a local port (0: a free one); a context manager."""

    def __init__(self, port: int = 0) -> None:
        self.port = port

    def __enter__(self) -> Listening:
        self.receiver = Receiver()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(self.receiver, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()
        return self

    @property
    def endpoint(self) -> str:
        """``host:port`` of the server."""
        return f"127.0.0.1:{self.port}"

    def __exit__(self, *exc: object) -> None:
        self._server.stop(grace=None).wait()
