"""Who may connect: bearer tokens and users from files that are read again when they change.

A token file has one token per line, so that an old and a new one can both be valid for a while. A user file is that of
``htpasswd -B``: ``name:bcrypt-hash`` per line. Lines that start with ``#`` are comments. What a file holds is never in
a message or a log: only its name and a line number are.

bcrypt is slow on purpose, and anybody may ask for it: there is one thread for it and a short queue, so that guessing
takes one core at most and neither the event loop nor the threads that others need. A login that was right is
remembered, and costs a digest from then on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Generic, TypeVar

from maxact_sidecar.config import ConfigError, Settings

FEWEST_CHARACTERS: Final = 16
LOOK_SECONDS: Final = 1.0
"""A file that changed is noticed after so long."""
MOST_COST: Final = 14
"""Of bcrypt, as a power of two: about a second for one login."""
MOST_LOGINS: Final = 16
"""Logins that wait for bcrypt at once; more are turned away."""
_MOST_REMEMBERED: Final = 100
_HASH: Final = re.compile(r"\$2[aby]\$(\d\d)\$[./A-Za-z0-9]{53}")

_log = logging.getLogger(__name__)
Content = TypeVar("Content")


class TooManyLoginsError(Exception):
    """So many logins wait already that this one is not looked at."""


class _Watched(Generic[Content]):
    """What a file holds, read again when it changed; while it cannot be read, what it held before."""

    def __init__(self, path: Path, read: Callable[[Path], Content]) -> None:
        self._path = path
        self._read = read
        # Before reading: a change in between is then noticed as one.
        self._stamp = _stamp(path)
        self._content = read(path)
        self._looked_at = time.monotonic()

    def get(self) -> Content:
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            self._look()
        return self._content

    def _look(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._content = self._read(self._path)
            _log.info("read again file=%(file)s", {"file": str(self._path)})
        except ConfigError as error:
            _log.error("not read again, former content holds reason=%(reason)s", {"reason": str(error)})


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_mtime_ns, status.st_size)


class Gate:
    """Decides about ``Authorization`` headers. Without any file everybody may pass. For one event loop."""

    def __init__(self, token_file: Path | None, users_file: Path | None = None) -> None:
        """Read the files. Raises `ConfigError` naming file and line."""
        self._tokens = _Watched(token_file, _read_digests) if token_file else None
        self._users = _Watched(users_file, _read_users) if users_file else None
        self._verified: dict[bytes, str] = {}
        """Digest of a login that was right -> the hash it was right for."""
        self._num_logins = 0
        self._bcrypt = ThreadPoolExecutor(1, "maxact-login") if users_file else None

    @property
    def is_open(self) -> bool:
        """True where nothing is asked."""
        return self._tokens is None and self._users is None

    @property
    def challenge(self) -> str:
        """What a refused client is told, for ``WWW-Authenticate``."""
        return 'Basic realm="maxact"' if self._users else 'Bearer realm="maxact"'

    def admits_token(self, header: str) -> bool:
        """Whether this header may pass without a password; takes microseconds."""
        if self.is_open:
            return True
        kind, _, value = header.partition(" ")
        if self._tokens is None or kind.lower() != "bearer":
            return False
        presented = _digest(value.strip())
        # Every token is compared, in constant time: how long it takes tells nothing.
        return sum(hmac.compare_digest(presented, token) for token in self._tokens.get()) > 0

    async def admits(self, header: str) -> bool:
        """Whether this header may pass, with a token or a password. Raises `TooManyLoginsError`."""
        if self.admits_token(header):
            return True
        kind, _, value = header.partition(" ")
        if self._users is None or kind.lower() != "basic":
            return False
        try:
            name, _, password = base64.b64decode(value.strip(), validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        return await self._admits_user(name, password, self._users.get())

    async def _admits_user(self, name: str, password: str, users: dict[str, str]) -> bool:
        known = users.get(name)
        login = _digest(f"{name}:{password}")
        if known is not None and self._verified.get(login) == known:
            return True
        if self._num_logins >= MOST_LOGINS:
            raise TooManyLoginsError
        self._num_logins += 1
        try:
            # An unknown name costs what a wrong password of the first user does, or its absence could be timed.
            hashed = known or next(iter(users.values()))
            right = await asyncio.get_running_loop().run_in_executor(self._bcrypt, _fits, password, hashed)
        finally:
            self._num_logins -= 1
        if not right or known is None:
            return False
        self._verified = {login: known, **dict(list(self._verified.items())[: _MOST_REMEMBERED - 1])}
        return True


def _fits(password: str, hashed: str) -> bool:
    import bcrypt

    try:
        # bcrypt sees 72 bytes and, since its version 5, refuses more; htpasswd cuts there as well.
        return bcrypt.checkpw(password.encode()[:72], hashed.encode())
    except ValueError:
        return False


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


def read_tokens(path: Path) -> list[str]:
    """The tokens of a file, at least one. Raises `ConfigError` naming file and line, never the token."""
    lines = _lines(path)
    if not lines:
        raise ConfigError(f"{path}: holds no token")
    for number, token in lines:
        # What a header can carry: a library that refuses to send one would say so with the token in its message.
        if len(token) < FEWEST_CHARACTERS or not re.fullmatch("[!-~]+", token):
            raise ConfigError(
                f"{path}:{number}: is not a token of at least {FEWEST_CHARACTERS} characters, ASCII without spaces"
            )
    return [token for _, token in lines]


def _read_digests(path: Path) -> list[bytes]:
    """Of the tokens, so that all have one length. Raises `ConfigError`."""
    return [_digest(token) for token in read_tokens(path)]


def _read_users(path: Path) -> dict[str, str]:
    """Hashes by name. Raises `ConfigError`."""
    try:
        import bcrypt  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("http_users_file: needs bcrypt: pip install 'maxact[auth]'") from None
    users: dict[str, str] = {}
    for number, line in _lines(path):
        name, _, hashed = line.partition(":")
        match = _HASH.fullmatch(hashed)
        if not name or not match:
            raise ConfigError(f"{path}:{number}: is not name:bcrypt-hash, as htpasswd -B writes it")
        if not 4 <= int(match[1]) <= MOST_COST:
            raise ConfigError(f"{path}:{number}: costs 2^{match[1]}; allowed are 4 to {MOST_COST}")
        users[name] = hashed
    if not users:
        raise ConfigError(f"{path}: holds no user")
    return users
