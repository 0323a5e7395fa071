"""What a worker shows the sidecar, and how it knows that it is the right one: TLS and a bearer token, from files.

Only the names of files are settings. They are read at every connect, so that a renewed certificate or another token
counts from the next connect on: a sidecar that no longer takes a token ends the stream, and the worker comes back with
what the file holds by then. What a file holds is in no message: a setting and a name are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from maxact_vllm.config import PATHS, Settings, SettingsError


def open_channel(settings: Settings, options: Sequence[tuple[str, Any]]) -> Any:
    """A gRPC channel to the sidecar. Raises `SettingsError` where a file cannot be read."""
    import grpc

    if not settings.tls_ca:
        return grpc.insecure_channel(settings.endpoint, options)
    ca, cert, key = (_read(name, getattr(settings, name)) for name in ("tls_ca", "tls_cert", "tls_key"))
    return grpc.secure_channel(settings.endpoint, grpc.ssl_channel_credentials(ca, key, cert), options)


def call_metadata(settings: Settings) -> tuple[tuple[str, str], ...]:
    """What goes with a stream. Raises `SettingsError` where the token cannot be read."""
    if not settings.token_file:
        return ()
    return (("authorization", f"Bearer {_read_token('token_file', settings.token_file)}"),)


def check_file(name: str, path: str) -> None:
    """Whether the file can be what the setting says. Raises `SettingsError`."""
    _CHECKS[name](name, path)


def check_files(settings: Settings) -> None:
    """Whether all files can be read and fit each other. Raises `SettingsError`."""
    for name in PATHS:
        if getattr(settings, name):
            check_file(name, getattr(settings, name))
    if settings.tls_cert:
        _check_pair(settings.tls_cert, settings.tls_key)


def _read(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"maxact {name}: {path}: {error.strerror}") from None


def _read_token(name: str, path: str) -> str:
    lines = [line.strip() for line in (_read(name, path) or b"").splitlines()]
    tokens = [line for line in lines if line and not line.startswith(b"#")]
    if not tokens:
        raise SettingsError(f"maxact {name}: {path}: holds no token")
    # gRPC refuses other characters, with the token in its message.
    if not re.fullmatch(b"[!-~]+", tokens[0]):
        raise SettingsError(f"maxact {name}: {path}: its first token is not ASCII without spaces")
    return tokens[0].decode()


def _check_certificates(name: str, path: str) -> None:
    import ssl

    _read(name, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (ssl.SSLError, OSError):
        raise SettingsError(f"maxact {name}: {path}: holds no certificate") from None


def _check_key(name: str, path: str) -> None:
    if b"PRIVATE KEY-----" not in (_read(name, path) or b""):
        raise SettingsError(f"maxact {name}: {path}: holds no private key")


def _check_pair(cert: str, key: str) -> None:
    import ssl

    def ask() -> str:
        raise SettingsError(f"maxact tls_key: {key}: is encrypted; nobody is there to type a password")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(cert, key, password=ask)
    except (ssl.SSLError, OSError):
        raise SettingsError(f"maxact tls_key: {key}: is not the key of {cert}") from None


_CHECKS: Final[dict[str, Callable[[str, str], object]]] = {
    "tls_ca": _check_certificates,
    "tls_cert": _check_certificates,
    "tls_key": _check_key,
    "token_file": _read_token,
}
assert set(_CHECKS) == set(PATHS)
