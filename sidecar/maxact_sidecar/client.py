"""Asks a running sidecar, for ``maxact card``. Straight to the address, whatever proxy the environment names."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 30.0


class ClientError(RuntimeError):
    """No answer, or none that helps. The message starts with the URL."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("sidecar", timeout=_TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(url: str, path: str, body: bytes | None = None) -> Any:
    """The JSON that a sidecar at ``url`` (http, https or ``unix:/path``) answers; a body is posted as JSON."""
    connection, prefix = _connection(url)
    headers = {"Content-Type": "application/json"} if body else {}
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


def _connection(url: str) -> tuple[http.client.HTTPConnection, str]:
    if url.startswith("unix:/"):
        return _UnixConnection(url.removeprefix("unix:")), ""
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        parts = urlsplit(url)
        kind, host, port = kinds[parts.scheme], parts.hostname or "", parts.port
    except (KeyError, ValueError):
        raise ClientError(f"{url}: is not a URL; write http://127.0.0.1:9471 or unix:/path") from None
    return kind(host, port, timeout=_TIMEOUT_SECONDS), parts.path.rstrip("/")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
