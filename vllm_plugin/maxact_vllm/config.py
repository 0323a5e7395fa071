"""Settings of the plugin: one dataclass, filled from flags, from ``additional_config`` or from the environment.

Settings travel to the workers inside vLLM's own ``additional_config["maxact"]``, which also enters vLLM's compile-cache
key: an artefact compiled with other sites, or without maxact, is never reused.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import maxact_proto

PRESETS: Final[Mapping[str, frozenset[str] | None]] = {
    "serving": frozenset(
        {"embedding", "hidden", "attn_input", "o_proj_input", "mlp_input", "down_proj_input", "final_norm"}
    ),
    "paper": frozenset({"embedding", "hidden", "attn_output", "mlp_output", "mlp_gate", "router_logits", "final_norm"}),
    "all": None,
}
"""Site names of each preset; None: every site. `serving` is what W8A8 quantizes plus the residual stream."""

KEY: Final = "maxact"
"""Key in vLLM's ``additional_config``."""

PATHS: Final = ("tls_ca", "tls_cert", "tls_key", "token_file")
"""Settings that name a file. What is in it never travels: not in ``additional_config``, not into a log."""

BESIDE_THE_GRAPH: Final = frozenset({"endpoint", "interval", "engine", *PATHS})
"""Settings that do not change what is compiled. Any other one does, as far as the compile-cache key can tell."""


class SettingsError(ValueError):
    """A setting the user gave that cannot work. The message names the setting and what would be right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the operator asked for."""

    endpoint: str = "127.0.0.1:4471"
    """gRPC address of the sidecar: ``host:port`` or ``unix:/path``."""
    sites: str = "serving"
    """A preset or a regular expression searched in names like ``layers.11.hidden`` and ``final_norm``."""
    interval: float = 1.0
    """Seconds between windows."""
    engine: str = ""
    """Name of this engine in metrics; empty: the data-parallel rank."""
    tls_ca: str = ""
    """PEM file: who signed the sidecar's certificate. Empty: no TLS."""
    tls_cert: str = ""
    """PEM file: certificate to show the sidecar."""
    tls_key: str = ""
    """PEM file: private key of ``tls_cert``."""
    token_file: str = ""
    """File whose first line that is no comment is the bearer token for the sidecar."""

    def __post_init__(self) -> None:
        _check_endpoint(self.endpoint)
        _check_sites(self.sites)
        if not (isinstance(self.interval, int | float) and 0.05 <= self.interval <= 3600):
            raise SettingsError(f"maxact interval: {self.interval!r} is not between 0.05 and 3600 seconds")
        _check_paths(self)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Settings:
        """Settings from ``additional_config["maxact"]``; environment variables fill what it leaves out.

        Raises `SettingsError` for an unknown key or a value that cannot work.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(mapping) - set(names))
        if unknown:
            raise SettingsError(f"maxact: unknown setting {unknown[0]!r}; known are {', '.join(names)}")
        given = {name: mapping[name] for name in names if mapping.get(name) is not None}
        try:
            if "interval" in given:
                given["interval"] = number(given["interval"])
            values = _from_environ() | given
            # A worker may have another working directory.
            absolute = {name: os.path.abspath(path) for name in PATHS if (path := values.get(name))}
            return cls(**(values | absolute))
        except TypeError as error:
            raise SettingsError(f"maxact: {error}") from error

    def to_mapping(self) -> dict[str, Any]:
        """What travels in ``additional_config["maxact"]``: JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def wants(self, layer: int | None, site: str) -> bool:
        """Whether the site is to be observed."""
        if self.sites in PRESETS:
            names = PRESETS[self.sites]
            return names is None or site in names
        return re.search(self.sites, site if layer is None else f"layers.{layer}.{site}") is not None


def graph_key(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``additional_config["maxact"]`` belongs into vLLM's compile-cache key: what decides the graph."""
    return {name: value for name, value in given.items() if name not in BESIDE_THE_GRAPH} | {"build": _build()}


@functools.cache
def _build() -> str:
    """Digest of the code that decides which operations enter a graph.

    vLLM compares the files that Dynamo went through, which those that choose the sites are not among.
    """
    digest = hashlib.sha256(maxact_proto.__version__.encode())
    for folder in (Path(__file__).parent, Path(maxact_proto.__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def disown(vllm_config: Any) -> None:
    """Nothing of ours is in the graph that is compiled next: it is vLLM's own, and so is its compile-cache key."""
    additional = vllm_config.additional_config or {}
    vllm_config.additional_config = {name: value for name, value in additional.items() if name != KEY}


def spoil(vllm_config: Any) -> None:
    """Part of what is ours may be in the graph that is compiled next: a compile-cache key that is never met again."""
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), KEY: {"spoilt": os.urandom(8).hex()}}


def _from_environ() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(Settings)):
        text = os.environ.get(f"MAXACT_{name.upper()}")
        if text:
            values[name] = number(text) if name == "interval" else text
    return values


def number(text: Any) -> float:
    """A float from a flag, a variable or a mapping. Raises `SettingsError` when it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        raise SettingsError(f"maxact interval: {text!r} is not a number of seconds") from None


def _check_endpoint(endpoint: str) -> None:
    if endpoint.startswith("unix:") and len(endpoint) > len("unix:"):
        return
    host, _, port = endpoint.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise SettingsError(f"maxact endpoint: {endpoint!r} is neither host:port nor unix:/path")


def _check_paths(settings: Settings) -> None:
    given = {name for name in PATHS if getattr(settings, name)}
    if ("tls_cert" in given) != ("tls_key" in given):
        raise SettingsError("maxact tls_cert: certificate and key are needed together, tls_cert and tls_key")
    if "tls_cert" in given and "tls_ca" not in given:
        raise SettingsError("maxact tls_cert: needs TLS, tls_ca")
    if "tls_ca" in given and settings.endpoint.startswith("unix:"):
        raise SettingsError(f"maxact tls_ca: there is no TLS on {settings.endpoint}, where no other machine connects")
    if "token_file" in given and "tls_ca" not in given and not _is_local(settings.endpoint):
        raise SettingsError(f"maxact token_file: the token would go to {settings.endpoint} unencrypted; give tls_ca")


def _is_local(endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0].strip("[]")
    if endpoint.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_sites(sites: str) -> None:
    if sites in PRESETS:
        return
    try:
        re.compile(sites)
    except re.error as error:
        raise SettingsError(
            f"maxact sites: {sites!r} is no preset ({', '.join(PRESETS)}) and no regular expression: {error}"
        ) from error
