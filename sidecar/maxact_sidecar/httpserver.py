"""Uvicorn as the sidecar runs it: our signal handlers, renewed certificates, and no patience without end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Final

import uvicorn

from maxact_sidecar.tls import Identity, Renewal

_MAX_CONNECTIONS: Final = 256
_PATIENCE_SECONDS: Final = 15.0
"""A connection may keep us waiting so long: for a request, for the rest of one, or for taking the answer."""


class HttpServer(uvicorn.Server):
    """Serves an ASGI application; `look_after` is to be called about once a second."""

    def __init__(self, app: Any, identity: Identity | None) -> None:
        """Raises `ConfigError` where the certificate cannot be used."""
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        config.load()
        self._renewal = Renewal(identity) if identity else None
        config.ssl = identity.context() if identity else None
        super().__init__(config)
        self._busy_at: dict[Any, float] = {}
        """Connection -> steady seconds when it last was us who had something to do."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield

    def look_after(self) -> None:
        """Take over a renewed certificate, and cut off who keeps us waiting."""
        if self._renewal and self.config.ssl and self._renewal.is_due():
            self._renewal.identity.load_into(self.config.ssl)
        now = time.monotonic()
        connections = list(self.server_state.connections)
        self._busy_at = {each: now if _is_our_turn(each) else self._busy_at.get(each, now) for each in connections}
        for connection, busy_at in self._busy_at.items():
            if now - busy_at > _PATIENCE_SECONDS:
                connection.transport.abort()


def _is_our_turn(connection: Any) -> bool:
    """True while the application works on a request that has come in as a whole."""
    cycle = connection.cycle
    return cycle is not None and not cycle.response_complete and not cycle.more_body
