"""TLS of both servers, from PEM files that are read again when they change: certificates are renewed while we run."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from maxact_sidecar.config import ConfigError, Settings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """Certificate and key of a server and, where clients must show a certificate, who may have signed it."""

    cert: Path
    key: Path
    client_ca: Path | None

    def context(self) -> ssl.SSLContext:
        """For the HTTP server. Raises `ConfigError` naming the file."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_into(context)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Let new connections of ``context`` use what the files hold now. Raises `ConfigError`."""
        for name, path in (("tls_cert", self.cert), ("tls_key", self.key), ("client_ca", self.client_ca)):
            if path:
                try:
                    path.read_bytes()
                except OSError as error:
                    raise ConfigError(f"{name}: {path}: {error.strerror}") from None
        try:
            context.load_cert_chain(self.cert, self.key)
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).lower().replace("_", " ")
            raise ConfigError(
                f"tls_cert: {self.cert} and {self.key} are not a certificate and its key: {reason}"
            ) from None
        if self.client_ca:
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError:
                raise ConfigError(f"client_ca: {self.client_ca}: holds no certificate") from None
            context.verify_mode = ssl.CERT_REQUIRED

    def stamp(self) -> tuple[int, ...]:
        """Differs when a file changed."""
        try:
            return tuple(path.stat().st_mtime_ns for path in (self.cert, self.key, self.client_ca) if path)
        except OSError:
            return ()


def make_identities(settings: Settings) -> tuple[Identity | None, Identity | None]:
    """Of the gRPC and of the HTTP server; None without TLS."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None, None
    authorities = (settings.grpc_client_ca, settings.http_client_ca)
    grpc_identity, http_identity = (Identity(settings.tls_cert, settings.tls_key, each) for each in authorities)
    return grpc_identity, http_identity


class Renewal:
    """Notices when the files of an identity have changed to something that works."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._stamp = identity.stamp()

    def is_due(self) -> bool:
        """True once after every change. A change that cannot be used is logged, and what was there stays in use."""
        stamp = self.identity.stamp()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self.identity.context()
        except ConfigError as error:
            _log.error("certificate not renewed reason=%(reason)s", {"reason": str(error)})
            return False
        _log.info("certificate renewed file=%(file)s", {"file": str(self.identity.cert)})
        return True


def grpc_credentials(identity: Identity) -> Any:
    """Server credentials that look for renewed files at every handshake. Raises `ConfigError`."""
    identity.context()
    renewal = Renewal(identity)

    def read() -> Any:
        authority = identity.client_ca.read_bytes() if identity.client_ca else None
        pair = (identity.key.read_bytes(), identity.cert.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

    def read_if_changed() -> Any:
        return read() if renewal.is_due() else None

    return grpc.dynamic_ssl_server_credentials(
        read(), read_if_changed, require_client_authentication=identity.client_ca is not None
    )
