"""One sidecar process: both servers on one event loop, from start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from maxact_sidecar.auth import Gate, make_gates
from maxact_sidecar.card import CardError, read_cards
from maxact_sidecar.collector import Collector
from maxact_sidecar.config import Address, ConfigError, Settings
from maxact_sidecar.families import SelfMetrics
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.headroom import MEANINGS
from maxact_sidecar.http import make_app
from maxact_sidecar.httpserver import MAX_CONNECTIONS, HttpServer
from maxact_sidecar.ingest import Telemetry, clock, most_connections, start_server
from maxact_sidecar.store import Store
from maxact_sidecar.tls import make_identities

_SETTLE_SECONDS = 1.0
_GRACE_SECONDS = 0.5
"""For the window being merged: streams of workers never end by themselves, and what is not acknowledged comes again."""
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # malloc.h
_LARGE_BYTES = 1 << 17
_OTHER_FILES = 128
"""Beside connections: state, cards, what gRPC and Python hold open."""

_RELOADED: Final = {"cards", "stale", "flag_hold", "max_series", *(f"{meaning}_threshold" for meaning in MEANINGS)}
_FIXED: Final = [name for name in Settings.model_fields if name not in _RELOADED]
"""Settings that a running sidecar keeps."""

_log = logging.getLogger(__name__)


def check(settings: Settings) -> None:
    """Read all files that settings name. Raises `ConfigError` and `CardError`."""
    read_cards(settings.cards)
    make_gates(settings)
    for identity in make_identities(settings):
        if identity:
            identity.context()


async def serve(read: Callable[[], Settings]) -> None:
    """Serve until SIGINT or SIGTERM; ``read`` gives the settings, again at every SIGHUP.

    Raises `ConfigError` and `CardError` before anything listens.
    """
    settings = read()
    metrics = SelfMetrics()
    _return_memory()
    os.umask(0o077)  # sockets and state are ours alone
    _allow_files(most_connections(settings) + MAX_CONNECTIONS)
    with contextlib.ExitStack() as stack:
        store = Store(settings.state, metrics) if settings.state else None
        if store:
            stack.callback(store.close)
        await _serve(settings, read, metrics, store)


async def _serve(settings: Settings, read: Callable[[], Settings], metrics: SelfMetrics, store: Store | None) -> None:
    memories, cards = (store.load_engines(clock()), store.load_cards()) if store else ({}, [])
    fleet, collector = Fleet(settings, memories, cards), Collector(settings, metrics)
    fleet.configure_cards(read_cards(settings.cards), clock())
    grpc_gate, http_gate = make_gates(settings)
    grpc_identity, http_identity = make_identities(settings)
    _warn_of_openings(settings, grpc_gate, http_gate)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: _reload(settings, read, fleet, collector))
    with _listening(settings.http) as (listener, http), _private_socket(settings.grpc):
        # Nobody but us has a certificate that a browser takes for ours.
        by_own_names = settings.http.is_local and not settings.http.path and http_identity is None
        http_server = HttpServer(make_app(fleet, collector, http_gate, by_own_names=by_own_names), http_identity)
        grpc_server, grpc = await start_server(Telemetry(fleet, settings, metrics, grpc_gate), settings, grpc_identity)
        http_task = asyncio.create_task(http_server.serve(sockets=[listener]))
        settle_task = asyncio.create_task(_settle(fleet, store, stop))
        page = str(http) if http.path else f"{'https' if http_identity else 'http'}://{http}"
        where = {"grpc": str(grpc), "page": f"{page}/", "metrics": f"{page}/metrics"}
        _log.info("sidecar ready grpc=%(grpc)s page=%(page)s metrics=%(metrics)s", where)
        await stop.wait()
        _log.info("sidecar stopping")
        http_server.should_exit = True
        await grpc_server.stop(grace=_GRACE_SECONDS)
        await http_task
        await settle_task
        await _remember(fleet, store, all_windows=True)


def _return_memory() -> None:
    """Have glibc give back what a scrape took: one heap, not one for each thread or two, and large arrays beside it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _allow_files(num_connections: int) -> None:
    """Let as many connections be open as are allowed in, where the system's first offer is smaller."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    granted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    except (OSError, ValueError):  # a sandbox forbids it
        granted = soft
    if granted < needed:
        wanted = {"granted": granted, "needed": needed}
        _log.warning("too few open files for max_streams granted=%(granted)d needed=%(needed)d", wanted)


def _warn_of_openings(settings: Settings, grpc_gate: Gate, http_gate: Gate) -> None:
    for name, address, gate, client_ca in (
        ("grpc", settings.grpc, grpc_gate, settings.grpc_client_ca),
        ("http", settings.http, http_gate, settings.http_client_ca),
    ):
        if gate.is_open and not address.is_local and not client_ca:
            _log.warning("anybody who reaches it may use it server=%(server)s", {"server": name})
        if not gate.is_open and not address.is_local and settings.tls_cert is None:
            _log.warning("tokens and passwords cross the network unencrypted server=%(server)s", {"server": name})
    for name, path in settings.secrets.items():
        if path.exists() and path.stat().st_mode & stat.S_IROTH:
            loose = {"setting": name, "file": str(path)}
            _log.warning("every user of this machine can read it setting=%(setting)s file=%(file)s", loose)


def _reload(started: Settings, read: Callable[[], Settings], fleet: Fleet, collector: Collector) -> None:
    """Take over changed thresholds and cards. Where anything is wrong, all stays as it is."""
    try:
        settings = read()
        cards = read_cards(settings.cards)
    except (ConfigError, CardError) as error:
        for line in str(error).splitlines():
            _log.error("not reloaded reason=%(reason)s", {"reason": line})
        return
    fixed = [name for name in _FIXED if getattr(settings, name) != getattr(started, name)]
    if fixed:
        _log.warning("needs a restart to change settings=%(settings)s", {"settings": ",".join(fixed)})
        settings = settings.model_copy(update={name: getattr(started, name) for name in fixed})
    fleet.use_settings(settings, clock())
    fleet.configure_cards(cards, clock())
    collector.use_settings(settings)
    _log.info("reloaded")


async def _settle(fleet: Fleet, store: Store | None, stop: asyncio.Event) -> None:
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _SETTLE_SECONDS)
        fleet.settle(clock())
        await _remember(fleet, store)


async def _remember(fleet: Fleet, store: Store | None, *, all_windows: bool = False) -> None:
    """Write what changed, on a thread: the disk may be slow."""
    if store:
        now, loaded = clock(), [card for card in fleet.cards if not card.configured]
        everything = all_windows or store.is_behind
        engines = {key: each for key, each in fleet.engines.items() if everything or each.is_unsaved(now)}

        def write() -> None:
            store.save(((key, each.memory(now)) for key, each in engines.items()), loaded, all_windows=all_windows)

        await asyncio.to_thread(write)


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[tuple[socket.socket, Address]]:
    """A listening socket for the HTTP server, and where it is. Raises `ConfigError` where it cannot be had."""
    with _private_socket(address):
        try:
            listener = _listen(address)
        except OSError as error:
            reason = str(error.strerror).partition(" (")[0]
            raise ConfigError(f"http: cannot listen on {address}: {reason}") from None
        with listener:
            yield listener, address if address.path else replace(address, port=listener.getsockname()[1])


def _listen(address: Address) -> socket.socket:
    if address.path:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address.path)
        listener.listen()
        return listener
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server((address.host, address.port), family=family)


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
