"""Asks a running sidecar, for ``maxact card``. Straight to the address, whatever proxy the environment names."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from pathlib import Path
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


def ask(url: str, path: str, body: bytes | None = None, *, token: str | None = None, ca: Path | None = None) -> Any:
    """The JSON that a sidecar at ``url`` (http, https or ``unix:/path``) answers; a body is posted as JSON.

    ``token`` is sent as bearer token; ``ca`` signs the sidecar's certificate where the system's authorities do not.
    """
    connection, prefix = _connection(url, ca)
    headers = {"Content-Type": "application/json"} if body else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
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


def _connection(url: str, ca: Path | None) -> tuple[http.client.HTTPConnection, str]:
    if url.startswith("unix:/"):
        return _UnixConnection(url.removeprefix("unix:")), ""
    try:
        parts = urlsplit(url)
        host, port, prefix = parts.hostname or "", parts.port, parts.path.rstrip("/")
    except ValueError:
        parts = urlsplit("")
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS), prefix
    if parts.scheme == "https":
        try:
            context = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError):
            raise ClientError(f"{ca}: holds no certificate") from None
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=context), prefix
    raise ClientError(f"{url}: is not a URL; write http://127.0.0.1:9471 or unix:/path")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
