"""Who may connect: bearer tokens and users from files that are read again when they change.

A token file has one token per line, so that an old and a new one can both be valid for a while. A user file is that of
``htpasswd -B``: ``name:bcrypt-hash`` per line. Lines that start with ``#`` are comments.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from maxact_sidecar.config import ConfigError, Settings

_FEWEST_CHARACTERS: Final = 16
_NOBODY: Final = b"$2b$10$abcdefghijklmnopqrstuu5Lo0g67CiD3M4RpN1BmBb4Crp5w7dbK"
"""A hash no password is known for: an unknown name takes as long as a wrong password."""

_log = logging.getLogger(__name__)
Content = TypeVar("Content")


class _Watched(Generic[Content]):
    """What a file holds, read again when it changed; while it cannot be read, what it held before."""

    def __init__(self, path: Path, read: Callable[[Path], Content]) -> None:
        self._path = path
        self._read = read
        self._stamp = _stamp(path)
        self._content = read(path)

    def get(self) -> Content:
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._content = self._read(self._path)
                _log.info("read again file=%(file)s", {"file": str(self._path)})
            except ConfigError as error:
                _log.error("not read again, former content holds reason=%(reason)s", {"reason": str(error)})
        return self._content


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_mtime_ns, status.st_size)


class Gate:
    """Decides about ``Authorization`` headers. Without any file everybody may pass."""

    def __init__(self, token_file: Path | None, users_file: Path | None = None) -> None:
        """Read the files. Raises `ConfigError` naming file and line."""
        self._tokens = _Watched(token_file, _read_tokens) if token_file else None
        self._users = _Watched(users_file, _read_users) if users_file else None
        self._verified: dict[bytes, bytes] = {}
        """Digest of a header that was right -> the hash it was right for: bcrypt takes a tenth of a second."""

    @property
    def is_open(self) -> bool:
        """True where nothing is asked."""
        return self._tokens is None and self._users is None

    @property
    def challenge(self) -> str:
        """What a refused client is told, for ``WWW-Authenticate``."""
        return 'Basic realm="maxact"' if self._users else 'Bearer realm="maxact"'

    def admits(self, header: str) -> bool:
        """Whether this header may pass; may take as long as bcrypt does."""
        kind, _, value = header.partition(" ")
        if self._tokens and kind.lower() == "bearer":
            presented = _digest(value.strip())
            # Every token is compared, in constant time: how long it takes tells nothing.
            return sum(hmac.compare_digest(presented, token) for token in self._tokens.get()) > 0
        if self._users and kind.lower() == "basic":
            return self._admits_user(value.strip(), self._users.get())
        return self.is_open

    def _admits_user(self, value: str, users: dict[str, bytes]) -> bool:
        try:
            name, colon, password = base64.b64decode(value, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        known = users.get(name)
        header = _digest(value)
        if known is not None and self._verified.get(header) == known:
            return True
        import bcrypt

        # bcrypt sees 72 bytes and refuses more.
        right = bcrypt.checkpw(password.encode()[:72], known or _NOBODY) and known is not None and bool(colon)
        if right and known is not None:
            self._verified = {header: known, **dict(list(self._verified.items())[:99])}
        return right


def make_gates(settings: Settings) -> tuple[Gate, Gate]:
    """Of the gRPC and of the HTTP server. Raises `ConfigError`."""
    return Gate(settings.grpc_token_file), Gate(settings.http_token_file, settings.http_users_file)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _read_tokens(path: Path) -> list[bytes]:
    """Digests of the tokens, so that all have one length. Raises `ConfigError`."""
    lines = _lines(path)
    if not lines:
        raise ConfigError(f"{path}: holds no token")
    for number, token in lines:
        if len(token) < _FEWEST_CHARACTERS or any(character.isspace() for character in token):
            raise ConfigError(f"{path}:{number}: is not a token of at least {_FEWEST_CHARACTERS} characters, no spaces")
    return [_digest(token) for _, token in lines]


def _read_users(path: Path) -> dict[str, bytes]:
    """Hashes by name. Raises `ConfigError`."""
    try:
        import bcrypt
    except ModuleNotFoundError:
        raise ConfigError("http_users_file: needs bcrypt: pip install 'maxact[auth]'") from None
    users: dict[str, bytes] = {}
    for number, line in _lines(path):
        name, _, hashed = line.partition(":")
        try:
            bcrypt.checkpw(b"", hashed.encode())
        except ValueError:
            raise ConfigError(f"{path}:{number}: is not name:bcrypt-hash, as htpasswd -B writes it") from None
        users[name] = hashed.encode()
    if not users:
        raise ConfigError(f"{path}: holds no user")
    return users
