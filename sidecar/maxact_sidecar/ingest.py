"""Hop 7/9: the gRPC service: a layout opens a stream, windows come in, each is merged and judged, then acknowledged.

A window is acknowledged after it was merged, never before: what a worker has not seen acknowledged it keeps. Workers
ask for that with every few windows, and an acknowledgement stands for all windows before: writing one costs a gRPC
server nearly as much as reading a window. What does not go as planned has one result each:

- a message that breaks a limit of the wire ends its stream with INVALID_ARGUMENT and is counted by field;
- a second stream of the same worker: the first is dead, nothing that still comes out of it is merged, or the window
  that is sent again would count twice;
- a sequence number that was merged before, or is below one that was: acknowledged, counted as repeated, not merged; a
  gap: merged; the first window of a stream brings the lifetime extrema of its worker, so none of them is ever missed;
- vLLM restarts (another instance, the former one gone): counters and marks go on, statistics and site table begin anew;
- another model: another engine, and the former one goes stale; under the same name a restart, and a warning;
- a worker is lost: its rank is down, its values fade with the hold horizon, the others go on; when it comes back with
  the same instance, it goes on where it was;
- a clock jumps: nothing is judged by it. Horizons and minimum times run on the steady clock of this process, from the
  arrival of a window; wall clocks only label (when a flag was raised, when a window ended).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

import grpc

from maxact_proto import wire
from maxact_proto.v1 import telemetry_pb2 as pb
from maxact_proto.v1 import telemetry_pb2_grpc
from maxact_sidecar.auth import Gate
from maxact_sidecar.config import Address, ConfigError, Settings
from maxact_sidecar.families import SelfMetrics
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.headroom import Instant
from maxact_sidecar.merge import RankState
from maxact_sidecar.state import Engine
from maxact_sidecar.tls import Identity, grpc_credentials

_log = logging.getLogger(__name__)


def clock() -> Instant:
    """Now."""
    return Instant(time.time(), time.monotonic())


class Telemetry(telemetry_pb2_grpc.TelemetryServiceServicer):
    """The service of `telemetry.proto`; one coroutine per worker."""

    def __init__(self, fleet: Fleet, settings: Settings, metrics: SelfMetrics, gate: Gate) -> None:
        self._fleet = fleet
        self._gate = gate
        self._max_streams = settings.max_streams
        self._metrics = metrics
        self._num_streams = 0
        self._next_layout_id = 1

    async def Stream(self, requests: AsyncIterator[Any], context: Any) -> None:
        """One worker, from its layout to its end."""
        if not self._admits(context):
            await self._refuse(context)
        if self._num_streams >= self._max_streams:
            self._metrics.windows_rejected.labels("max_streams").inc()
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_streams} streams are served already")
        self._num_streams += 1
        try:
            await self._serve(context)
        except wire.WireError as error:
            self._metrics.windows_rejected.labels(error.field.partition("[")[0]).inc()
            who = {"peer": context.peer(), "reason": str(error)}
            _log.warning("stream rejected peer=%(peer)s reason=%(reason)s", who)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            self._num_streams -= 1

    def _admits(self, context: Any) -> bool:
        if self._gate.is_open:
            return True
        return self._gate.admits_token(dict(context.invocation_metadata()).get("authorization", ""))

    async def _refuse(self, context: Any) -> None:
        self._metrics.windows_rejected.labels("authorization").inc()
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token of the sidecar's grpc_token_file is needed")

    async def _serve(self, context: Any) -> None:
        attached = await self._attach(context)
        if attached is None:
            return
        engine, rank = attached
        who = {"model": rank.layout.model, "engine": engine.label, "rank": rank.layout.rank}
        _log.info(
            "worker connected model=%(model)s engine=%(engine)s rank=%(rank)s sites=%(sites)d vllm=%(vllm)s",
            {**who, "sites": len(rank.layout.sites), "vllm": rank.layout.vllm_version},
        )
        try:
            await self._receive(context, engine, rank)
        finally:
            engine.detach(rank, clock())
            _log.info("worker gone model=%(model)s engine=%(engine)s rank=%(rank)s", who)

    async def _attach(self, context: Any) -> tuple[Engine, RankState] | None:
        """The engine and rank of the layout that comes first; None where the stream ends before.

        Neither the message nor its site table is held on to while the stream lasts: for 512 workers of 1,000 sites
        they take 200 MB, and most workers have the same table.
        """
        try:
            request = await asyncio.wait_for(context.read(), LAYOUT_SECONDS)
        except TimeoutError:
            raise wire.WireError("layout", f"did not come within {LAYOUT_SECONDS:g} s") from None
        if request is grpc.aio.EOF:
            return None
        if not request.HasField("layout"):
            raise wire.WireError("layout", "is missing: it must be the first message of a stream")
        return self._fleet.attach(wire.decode_layout(request.layout))

    async def _receive(self, context: Any, engine: Engine, rank: RankState) -> None:
        generation = rank.generation
        layout_id, self._next_layout_id = self._next_layout_id, self._next_layout_id + 1
        accepted = pb.LayoutAccepted(layout_id=layout_id, last_sequence=rank.last_sequence)
        await context.write(pb.StreamResponse(layout_accepted=accepted))
        while (request := await context.read()) is not grpc.aio.EOF and rank.generation == generation:
            # A stream lasts for weeks: one whose token was withdrawn ends with its next window.
            if not self._admits(context):
                await self._refuse(context)
            merged = self._merge(request, layout_id, engine, rank)
            del request  # a fleet that waits for its next windows need not hold the last ones
            if merged is not None:
                await context.write(pb.StreamResponse(window_ack=pb.WindowAck(sequence=merged)))

    def _merge(self, request: Any, layout_id: int, engine: Engine, rank: RankState) -> int | None:
        """The sequence number that is to be acknowledged now."""
        if not request.HasField("window"):
            raise wire.WireError("window", "is missing: every message after the layout is a window")
        with self._metrics.ingest_seconds.time():
            window = wire.decode_window(request.window, len(rank.layout.sites))
            if window.layout_id != layout_id:
                raise wire.WireError("window.layout_id", f"is {window.layout_id}, this stream's is {layout_id}")
            now = clock()
            is_new = engine.merge_window(rank, window, now)
        if is_new:
            # Two clocks: where one of them jumps or they differ, a window cannot have come before its end.
            self._metrics.window_lag_seconds.observe(max(0.0, now.wall - window.end_seconds))
        else:
            self._metrics.windows_repeated.inc()
        return None if window.acknowledge_later else window.sequence


HANDSHAKE_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 15.0
LAYOUT_SECONDS: Final = 10.0
SPARE_CONNECTIONS: Final = 64
"""Beyond the streams that are served, so that one too many is told so rather than cut off."""

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    # Pings that measure the bandwidth take a quarter of what gRPC costs here; a window a second needs little of it.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),  # without them a worker would be given 64 kB at a time
    # Otherwise every connection keeps what its largest burst needed, ready for the next: 512 workers 100 MB.
    ("grpc.experimental.tcp_max_read_buffer_size", 1 << 13),
    ("grpc.so_reuseport", 0),  # a second sidecar on the same port must fail, not share it in silence
    # A worker whose machine vanished closes nothing: ask, so that it counts as gone within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Who connects and says nothing holds a connection no longer than this, and neither who opens no stream.
    ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1000)),
    ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1000)),
)


def most_connections(settings: Settings) -> int:
    """Connections of workers that are let in."""
    return settings.max_streams + SPARE_CONNECTIONS


async def start_server(telemetry: Telemetry, settings: Settings, identity: Identity | None) -> tuple[Any, Address]:
    """The gRPC server and where it listens. Raises `ConfigError` where the address cannot be had."""
    address = settings.grpc
    most = most_connections(settings)
    options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", most), ("grpc.max_concurrent_streams", most))
    server = grpc.aio.server(options=options)
    telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(telemetry, server)  # type: ignore[no-untyped-call]
    try:
        if identity and not address.path:
            port = server.add_secure_port(str(address), grpc_credentials(identity))
        else:
            port = server.add_insecure_port(str(address))
    except RuntimeError:
        port = 0
    if not port:
        raise ConfigError(f"grpc: cannot listen on {address}: is another sidecar running there?")
    await server.start()
    return server, address if address.path else replace(address, port=port)
