"""One sidecar process: both servers on one event loop, from start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from maxact_sidecar.card import read_card
from maxact_sidecar.collector import Collector, SelfMetrics
from maxact_sidecar.config import Address, ConfigError, Settings
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.http import make_app
from maxact_sidecar.ingest import Telemetry, clock, start_server

_SETTLE_SECONDS = 1.0
_GRACE_SECONDS = 2.0

_log = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises `ConfigError` and `CardError` before anything listens."""
    fleet, metrics = Fleet(settings), SelfMetrics()
    for source in settings.cards:
        fleet.use_card(read_card(source.path), clock(), name=source.path.stem, served_model=source.model)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with _listening(settings.http) as listener, _private_socket(settings.grpc):
        grpc_server = await start_server(Telemetry(fleet, settings, metrics), settings)
        http_server = _HttpServer(make_app(fleet, Collector(settings, metrics)))
        http_task = asyncio.create_task(http_server.serve(sockets=[listener]))
        settle_task = asyncio.create_task(_settle(fleet))
        _log.info("sidecar ready grpc=%s page=%s metrics=%s", settings.grpc, *_urls(settings.http))
        await stop.wait()
        _log.info("sidecar stopping")
        settle_task.cancel()
        http_server.should_exit = True
        await grpc_server.stop(grace=_GRACE_SECONDS)
        await http_task


async def _settle(fleet: Fleet) -> None:
    while True:
        await asyncio.sleep(_SETTLE_SECONDS)
        fleet.settle(clock())


class _HttpServer(uvicorn.Server):
    """Uvicorn under our signal handlers."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            limit_concurrency=256,
            timeout_graceful_shutdown=int(_GRACE_SECONDS),
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    """A bound socket for the HTTP server. Raises `ConfigError` where the address cannot be had."""
    with _private_socket(address):
        try:
            if address.path:
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(address.path)
            else:
                listener = _bind(address)
        except OSError as error:
            raise ConfigError(f"http: cannot listen on {address}: {error.strerror}") from None
        with listener:
            yield listener


def _bind(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address.host, address.port))
    return listener


@contextlib.contextmanager
def _private_socket(address: Address) -> Iterator[None]:
    """For a unix address: no left-over file before, none after, and only our user may connect in between."""
    if not address.path:
        yield
        return
    path = Path(address.path)
    if not path.parent.is_dir():
        raise ConfigError(f"{address}: the folder {path.parent} does not exist")
    _remove_dead_socket(path, address)
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
        path.unlink(missing_ok=True)


def _remove_dead_socket(path: Path, address: Address) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ConfigError(f"{address}: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise ConfigError(f"{address}: something listens there already")


def _urls(address: Address) -> tuple[str, str]:
    base = str(address) if address.path else f"http://{address}"
    return f"{base}/", f"{base}/metrics"
