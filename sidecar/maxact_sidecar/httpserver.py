"""Uvicorn as the sidecar runs it: our signal handlers, renewed certificates, and no patience without end.

Connections are accepted here, not by uvicorn: so that every one is made with the certificate of that moment, that a
TLS handshake has an end, and that those who connect and say nothing cannot take all file descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from maxact_sidecar.tls import Identity, Renewal

MAX_CONNECTIONS: Final = 256
PATIENCE_SECONDS: Final = 15.0
"""A connection may keep us waiting so long: for a request, for the rest of one, or for taking the answer."""
HANDSHAKE_SECONDS: Final = 10.0
MAX_HEAD_BYTES: Final = 16 * 1024
_ABORT_SECONDS: Final = 1.0
_REST_SECONDS: Final = 0.5
"""Before we accept again after it failed, most likely for want of file descriptors."""

_log = logging.getLogger(__name__)


class _Connection(H11Protocol):
    """Of uvicorn's parsers the one that is always there, and that bounds the size of a request's head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gone = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone.set()


class HttpServer(uvicorn.Server):
    """Serves an ASGI application."""

    def __init__(self, app: Any, identity: Identity | None) -> None:
        """Raises `ConfigError` where the certificate cannot be used."""
        config = uvicorn.Config(
            app,
            http=_Connection,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ws="none",
            log_config=None,
            # Below are warnings that anybody can provoke with a request that is none.
            log_level="error",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        super().__init__(config)
        self._renewal = Renewal(identity) if identity else None
        self._guests: set[asyncio.Task[None]] = set()
        """One for each connection, from its handshake to its end."""
        self._busy_at: dict[Any, float] = {}
        """Connection -> steady seconds when it last was us who had something to do."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """In place of uvicorn's: accept on these sockets."""
        await self.lifespan.startup()
        self.servers = []
        self._acceptors = [asyncio.create_task(self._accept(each)) for each in sockets or []]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End what we started, then what uvicorn did."""
        for task in self._acceptors:
            task.cancel()
        await asyncio.gather(*self._acceptors, return_exceptions=True)
        await super().shutdown(sockets)
        for task in self._guests:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        listener.listen(self.config.backlog)
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                _log.error("http: cannot accept reason=%(reason)s", {"reason": str(error.strerror)})
                await asyncio.sleep(_REST_SECONDS)
                continue
            if len(self._guests) < MAX_CONNECTIONS:
                task = asyncio.create_task(self._receive(connection))
                self._guests.add(task)
                task.add_done_callback(self._guests.discard)
            else:
                connection.close()
            # While connections pour in, accepting never waits; windows must be merged meanwhile.
            await asyncio.sleep(0)

    async def _receive(self, connection: socket.socket) -> None:
        """Hand over to uvicorn, which knows the connection once its handshake is done."""
        context = self._renewal.context if self._renewal else None
        patience = {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": _ABORT_SECONDS}
        try:
            _, protocol = await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol, connection, ssl=context, **(patience if context else {})
            )
            await protocol.gone.wait()
        except OSError:
            connection.close()

    def _protocol(self) -> Any:
        return _Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            self._look_after()
        return await super().on_tick(counter)

    def _look_after(self) -> None:
        """Take over a renewed certificate, and cut off who keeps us waiting."""
        if self._renewal:
            self._renewal.look()
        now = time.monotonic()
        connections = list(self.server_state.connections)
        self._busy_at = {each: now if _is_our_turn(each) else self._busy_at.get(each, now) for each in connections}
        for connection, busy_at in self._busy_at.items():
            if now - busy_at > PATIENCE_SECONDS:
                connection.transport.abort()


def _is_our_turn(connection: Any) -> bool:
    """True while the application works on a request that has come in as a whole."""
    cycle = connection.cycle
    return cycle is not None and not cycle.response_complete and not cycle.more_body
