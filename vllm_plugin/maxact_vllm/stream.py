"""Hop 5/9: `Window` -> merged with its successors until acknowledged -> gRPC, one bidirectional stream per worker.

At most one window is under way. While it is unacknowledged the next ones merge into one that waits, so a sidecar that
is away for an hour costs two windows of memory and loses no extremum. A window that was sent but not acknowledged is
sent again unchanged after a reconnect: its sequence number lets the sidecar drop what it already merged, so sums are
never counted twice. The channel is made lazily, in the worker, never inherited over a fork.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from maxact_proto import stats, wire
from maxact_vllm import logger
from maxact_vllm.config import Settings
from maxact_vllm.credentials import call_metadata, open_channel

_FIRST_BACKOFF_SECONDS = 0.2
_LONGEST_BACKOFF_SECONDS = 10.0
_REPEAT_LOG_SECONDS = 300.0
_DRAIN_SECONDS = 1.5
_LONGEST_REASON = 500
_WHAT_TO_DO = {
    "UNAUTHENTICATED": "Give --maxact-token-file a file with one of its tokens",
    "SettingsError": "The file is read again at every try",
}
"""By kind of problem, where starting a sidecar would not help."""


class Outbox:
    """The window under way and the one that waits behind it. Thread-safe; the model's thread never comes here."""

    def __init__(self, num_sites: int) -> None:
        self._changed = threading.Condition()
        self._under_way: wire.Window | None = None
        self._waiting: wire.Window | None = None
        # A float32 sum that grows for an hour would lose the small windows: wait in float64.
        self._sums = np.zeros((len(stats.PHASES), num_sites, len(stats.STATS)))
        self._sequence = 0

    def put(self, window: wire.Window) -> None:
        """Queue a closed window, or merge it into the one that waits."""
        with self._changed:
            waiting = self._waiting
            if waiting is None:
                self._sums[:] = window.values
                self._waiting = window
            else:
                stats.merge_into(self._sums, window.values)
                self._waiting = replace(
                    window,
                    start_seconds=waiting.start_seconds,
                    tokens=tuple(a + b for a, b in zip(waiting.tokens, window.tokens, strict=True)),
                    coalesced=waiting.coalesced + 1,
                    histogram=_add(waiting.histogram, window.histogram),
                    counts=_add(waiting.counts, window.counts),
                    cached=waiting.cached + window.cached,
                )
            self._changed.notify_all()

    def under_way(self) -> wire.Window | None:
        """The window that was sent last and is not acknowledged."""
        with self._changed:
            return self._under_way

    def take(self, timeout_seconds: float) -> wire.Window | None:
        """The next window to send, now under way; None when there is none within the time."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None and self._under_way is None, timeout_seconds)
            if self._waiting is None or self._under_way is not None:
                return None
            self._sequence += 1
            values = self._sums.astype(np.float32)
            self._under_way = replace(self._waiting, sequence=self._sequence, values=values)
            self._waiting = None
            return self._under_way

    def acknowledge(self, sequence: int) -> None:
        """The sidecar merged this sequence number."""
        with self._changed:
            if self._under_way is not None and self._under_way.sequence <= sequence:
                self._under_way = None
            self._changed.notify_all()

    def wait_until_sent(self, timeout_seconds: float) -> bool:
        """Whether all is acknowledged within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and self._under_way is None, timeout_seconds)


def _add(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    return one + other


class Streamer(threading.Thread):
    """Keeps a stream to the sidecar up and drains the outbox into it."""

    def __init__(self, settings: Settings, layout: wire.Layout, outbox: Outbox) -> None:
        super().__init__(name="maxact-stream", daemon=True)
        self._settings = settings
        self._layout = layout
        self._outbox = outbox
        self._halt = threading.Event()
        self._accepted = threading.Event()
        self._layout_id = 0
        self._log = _Transitions(settings.endpoint)

    def run(self) -> None:
        """Until `stop`: connect, stream, wait, again. No error leaves this thread."""
        backoff = _FIRST_BACKOFF_SECONDS
        while not self._halt.is_set():
            try:
                self._converse()
                problem = "the sidecar ended the stream"
            except Exception as error:
                problem = _describe(error)
            if self._halt.is_set():
                return
            if self._accepted.is_set():
                backoff = _FIRST_BACKOFF_SECONDS
            self._log.lost(problem)
            self._halt.wait(backoff * random.uniform(0.5, 1.0))
            backoff = min(2 * backoff, _LONGEST_BACKOFF_SECONDS)

    def stop(self) -> None:
        """Give the last windows a moment to be acknowledged, then hang up."""
        if self.is_alive() and self._accepted.is_set():
            self._outbox.wait_until_sent(_DRAIN_SECONDS)
        self._halt.set()

    def _converse(self) -> None:
        """One stream from connect to its end. Raises what gRPC raises."""
        from maxact_proto.v1 import telemetry_pb2_grpc

        self._accepted.clear()
        over = threading.Event()
        options = [("grpc.max_receive_message_length", 65536), ("grpc.enable_http_proxy", 0)]
        with open_channel(self._settings, options) as channel:
            stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                for response in stub.Stream(self._requests(over), metadata=call_metadata(self._settings)):
                    self._receive(response)
            finally:
                over.set()

    def _receive(self, response: Any) -> None:
        if response.HasField("layout_accepted"):
            self._layout_id = response.layout_accepted.layout_id
            self._outbox.acknowledge(response.layout_accepted.last_sequence)
            self._accepted.set()
            self._log.connected()
        elif response.HasField("window_ack"):
            self._outbox.acknowledge(response.window_ack.sequence)

    def _requests(self, over: threading.Event) -> Iterator[Any]:
        """What we say on one stream; runs on a thread of gRPC. ``over`` is set when the stream has ended."""
        yield wire.encode_layout(self._layout)
        while not self._accepted.wait(0.5):
            if over.is_set() or self._halt.is_set():
                return
        window = self._outbox.under_way()
        while not (over.is_set() or self._halt.is_set()):
            if window is not None:
                yield wire.encode_window(replace(window, layout_id=self._layout_id))
            window = self._outbox.take(timeout_seconds=0.5)


class _Transitions:
    """Logs connects, losses and other reasons for them, not every retry."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._is_connected = False
        self._logged_at: dict[str, float] = {}

    def connected(self) -> None:
        if not self._is_connected:
            logger.info("maxact streams to the sidecar at %s (pid %d)", self._endpoint, os.getpid())
        self._is_connected = True

    def lost(self, problem: str) -> None:
        now, kind = time.monotonic(), problem.partition(":")[0]
        if self._is_connected or now - self._logged_at.get(kind, -_REPEAT_LOG_SECONDS) >= _REPEAT_LOG_SECONDS:
            self._logged_at[kind] = now
            what_to_do = _WHAT_TO_DO.get(kind, f"Start one with: maxact sidecar --grpc {self._endpoint}")
            logger.warning(
                "maxact has no sidecar at %s (%s); statistics are kept and sent when it is there. %s",
                *(self._endpoint, problem, what_to_do),
            )
        self._is_connected = False


def _describe(error: Exception) -> str:
    code = getattr(error, "code", None)
    details = getattr(error, "details", None)
    if callable(code) and callable(details):
        # Written by whoever answers at that address.
        text = "".join(each if each.isprintable() else " " for each in str(details())[:_LONGEST_REASON])
        return f"{code().name}: {text}"
    return f"{type(error).__name__}: {error}"
