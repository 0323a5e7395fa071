"""TLS of both servers, from PEM files that are read again when they change: certificates are renewed while we run.

A change takes effect as a whole: certificate, key and authority of new connections come from one reading, and while
the files do not fit each other (they are replaced one after the other) what was read before stays in use.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from maxact_sidecar.config import ConfigError, Settings

_log = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """Certificate and key of a server and, where clients must show a certificate, who may have signed it."""

    cert: Path
    key: Path
    client_ca: Path | None

    def context(self) -> ssl.SSLContext:
        """For the HTTP server. Raises `ConfigError` naming the file."""
        self.read()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            reason = (getattr(error, "reason", None) or str(error)).lower().replace("_", " ")
            raise ConfigError(
                f"tls_cert: {self.cert} and {self.key} are not a certificate and its key: {reason}"
            ) from None
        if self.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError):
                raise ConfigError(f"client_ca: {self.client_ca}: holds no certificate") from None
        return context

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """Key, certificate and authority. Raises `ConfigError` naming the file."""
        authority = _read("client_ca", self.client_ca) if self.client_ca else None
        cert, key = _read("tls_cert", self.cert), _read("tls_key", self.key)
        return key, cert, authority

    def stamp(self) -> Stamp:
        """Differs when a file changed."""
        try:
            found = [path.stat() for path in (self.cert, self.key, self.client_ca) if path]
        except OSError:
            return ()
        return tuple((status.st_ino, status.st_mtime_ns, status.st_size) for status in found)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}") from None


def _no_password() -> str:
    """In place of OpenSSL's question on the terminal."""
    raise ConfigError("tls_key: is encrypted; a server starts without anybody to type a password")


def make_identities(settings: Settings) -> tuple[Identity | None, Identity | None]:
    """Of the gRPC and of the HTTP server; None without TLS, as on a unix socket, which no other machine reaches."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None, None
    cert, key = settings.tls_cert, settings.tls_key
    return (
        None if settings.grpc.path else Identity(cert, key, settings.grpc_client_ca),
        None if settings.http.path else Identity(cert, key, settings.http_client_ca),
    )


class Renewal:
    """What the files of an identity held when they last worked. Any thread may ask."""

    def __init__(self, identity: Identity) -> None:
        """Raises `ConfigError` where the files do not work."""
        self._identity = identity
        self._lock = threading.Lock()
        # Before reading: a change in between is then noticed as one.
        self._stamp = identity.stamp()
        self.context = identity.context()
        self.pems = identity.read()

    def look(self) -> bool:
        """True once after every change. A change that cannot be used is logged, and what was there stays in use."""
        with self._lock:
            stamp = self._identity.stamp()
            if stamp == self._stamp:
                return False
            try:
                context, pems = self._identity.context(), self._identity.read()
            except ConfigError as error:
                self._stamp = stamp
                _log.error("certificate not renewed reason=%(reason)s", {"reason": str(error)})
                return False
            if self._identity.stamp() != stamp:
                return False  # being replaced this moment
            self._stamp, self.context, self.pems = stamp, context, pems
            _log.info("certificate renewed file=%(file)s", {"file": str(self._identity.cert)})
            return True


def grpc_credentials(identity: Identity) -> Any:
    """Server credentials that look for renewed files at every handshake. Raises `ConfigError`."""
    renewal = Renewal(identity)

    def configure() -> Any:
        key, cert, authority = renewal.pems
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=authority)

    def configure_anew() -> Any:
        return configure() if renewal.look() else None

    client_is_asked = identity.client_ca is not None
    credentials: Any = grpc.dynamic_ssl_server_credentials(configure(), configure_anew, client_is_asked)
    return credentials
