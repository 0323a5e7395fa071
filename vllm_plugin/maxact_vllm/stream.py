"""Hop 5/9: `Window` -> merged with its successors until acknowledged -> gRPC, one bidirectional stream per worker.

A few windows may be under way; the sidecar is asked to acknowledge every fourth, which spares it up to a third of what
gRPC costs it. While no more may be sent the next ones merge into one that waits, so a sidecar that is away for an hour
costs a few windows of memory and loses no extremum. A window that was sent but not acknowledged is sent again unchanged
after a reconnect: its sequence number lets the sidecar drop what it already merged, so sums are never counted twice.
The channel is made lazily, in the worker, never inherited over a fork.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import numpy as np

from maxact_proto import stats, wire
from maxact_vllm import logger
from maxact_vllm.config import Settings
from maxact_vllm.credentials import call_metadata, open_channel

_FIRST_BACKOFF_SECONDS = 0.2
_LONGEST_BACKOFF_SECONDS = 10.0
_REPEAT_LOG_SECONDS = 300.0
_DRAIN_SECONDS = 1.5
ACKNOWLEDGE_EVERY: Final = 4
MOST_UNDER_WAY: Final = 2 * ACKNOWLEDGE_EVERY
"""Windows that were sent and are not acknowledged."""
_LONGEST_REASON = 500
_WHAT_TO_DO = {
    "UNAUTHENTICATED": "Give --maxact-token-file a file with one of its tokens",
    "SettingsError": "The file is read again at every try",
}
"""By kind of problem, where starting a sidecar would not help."""


class Outbox:
    """The windows under way and the one that waits behind them. Thread-safe; the model's thread never comes here."""

    def __init__(self, num_sites: int) -> None:
        self._changed = threading.Condition()
        self._under_way: deque[wire.Window] = deque()
        self._waiting: wire.Window | None = None
        # A float32 sum that grows for an hour would lose the small windows: wait in float64.
        self._sums = np.zeros((len(stats.PHASES), num_sites, len(stats.STATS)))
        self._sequence = 0
        self._is_draining = False

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

    def under_way(self) -> list[wire.Window]:
        """The windows that were sent and are not acknowledged, in order."""
        with self._changed:
            return list(self._under_way)

    def take(self, timeout_seconds: float) -> wire.Window | None:
        """The next window to send, now under way; None when there is none within the time."""
        with self._changed:
            if not self._changed.wait_for(self._may_send, timeout_seconds):
                return None
            assert self._waiting is not None
            self._sequence += 1
            window = replace(
                self._waiting,
                sequence=self._sequence,
                values=self._sums.astype(np.float32),
                acknowledge_later=not self._is_draining and self._sequence % ACKNOWLEDGE_EVERY != 0,
            )
            self._under_way.append(window)
            self._waiting = None
            return window

    def _may_send(self) -> bool:
        return self._waiting is not None and len(self._under_way) < MOST_UNDER_WAY

    def acknowledge(self, sequence: int) -> None:
        """The sidecar merged all windows up to this sequence number."""
        with self._changed:
            while self._under_way and self._under_way[0].sequence <= sequence:
                self._under_way.popleft()
            self._changed.notify_all()

    def wait_until_sent(self, timeout_seconds: float) -> bool:
        """Whether all is acknowledged within the time. Meanwhile every window asks to be, and where none is left to
        ask, one without tokens does.
        """
        with self._changed:
            self._is_draining = True
            if self._waiting is None and self._under_way and self._under_way[-1].acknowledge_later:
                self._waiting = _without_tokens(self._under_way[-1])
                self._sums[:] = self._waiting.values
                self._changed.notify_all()
            is_sent = self._changed.wait_for(lambda: self._waiting is None and not self._under_way, timeout_seconds)
            self._is_draining = not is_sent
            return is_sent


def _without_tokens(window: wire.Window) -> wire.Window:
    """A window of no time behind this one."""
    return wire.Window(
        layout_id=0,
        sequence=0,
        start_seconds=window.end_seconds,
        end_seconds=window.end_seconds,
        tokens=(0,) * len(stats.PHASES),
        values=stats.empty(window.values.shape[1]),
        lifetime=window.lifetime,
    )


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
        again = deque(self._outbox.under_way())
        is_first = True
        while not (over.is_set() or self._halt.is_set()):
            window = again.popleft() if again else self._outbox.take(timeout_seconds=0.5)
            if window is not None:
                lifetime = window.lifetime if is_first else None
                yield wire.encode_window(replace(window, layout_id=self._layout_id, lifetime=lifetime))
                is_first = False


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
