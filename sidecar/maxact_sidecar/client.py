"""Asks a running sidecar, for ``maxact card``. Straight to the address, whatever proxy the environment names."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from maxact_sidecar.config import Address

_TIMEOUT_SECONDS = 30.0


class ClientError(RuntimeError):
    """No answer, or none that helps. The message starts with the URL."""


@dataclass(frozen=True, slots=True)
class Login:
    """What a sidecar asks for, and how to know that it is the right one."""

    token: str | None = None
    ca: Path | None = None
    """Who signed the sidecar's certificate, where the system's authorities did not."""
    cert: Path | None = None
    """Our own certificate, with its key unless that is in ``key``."""
    key: Path | None = None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("sidecar", timeout=_TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(url: str, path: str, body: bytes | None = None, login: Login | None = None) -> Any:
    """The JSON that a sidecar at ``url`` (http, https or ``unix:/path``) answers; a body is posted as JSON."""
    login = login or Login()
    connection, prefix = _connection(url, login)
    headers = {"Content-Type": "application/json"} if body else {}
    if login.token:
        headers["Authorization"] = f"Bearer {login.token}"
    try:
        connection.request("POST" if body else "GET", prefix + path, body, headers)
        response = connection.getresponse()
        text = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ClientError(f"{url}: no sidecar answers there ({_reason(error)})") from None
    finally:
        connection.close()
    try:
        document = json.loads(text)
        problem = None if response.status < 300 else document["detail"]
    except (ValueError, KeyError, TypeError):
        raise ClientError(f"{url}: HTTP {response.status}, is this a maxact sidecar?") from None
    if problem is not None:
        raise ClientError(f"{url}: {problem}")
    return document


def _connection(url: str, login: Login) -> tuple[http.client.HTTPConnection, str]:
    if url.startswith("unix:/"):
        return _UnixConnection(url.removeprefix("unix:")), ""
    try:
        parts = urlsplit(url)
        host, port, prefix = parts.hostname or "", parts.port, parts.path.rstrip("/")
    except ValueError:
        parts = urlsplit("")
    if parts.scheme == "http":
        if login.token and not Address(host=host).is_local:
            raise ClientError(f"{url}: a token would cross the network unencrypted; use https")
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS), prefix
    if parts.scheme == "https":
        context = _context(login)
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=context), prefix
    raise ClientError(f"{url}: is not a URL; write http://127.0.0.1:9471 or unix:/path")


def _context(login: Login) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=login.ca)
    except (OSError, ssl.SSLError):
        raise ClientError(f"{login.ca}: holds no certificate") from None
    if login.cert:
        try:
            context.load_cert_chain(login.cert, login.key, password="")
        except (OSError, ssl.SSLError):
            files = " and ".join(str(path) for path in (login.cert, login.key) if path)
            raise ClientError(f"{files}: not a certificate and its unencrypted key") from None
    return context


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
