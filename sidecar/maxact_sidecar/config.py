"""Settings of the sidecar: one frozen model, and errors that name the field.

Everything that can be set is here; file, variables and command line only fill it. Times are seconds.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from maxact_proto.formats import FORMATS
from maxact_sidecar.headroom import MEANINGS, Criterion, Threshold, criteria

DEFAULT_GRPC: Final = "127.0.0.1:4471"
DEFAULT_HTTP: Final = "127.0.0.1:9471"
_MAX_LINES: Final = 10


class ConfigError(ValueError):
    """Settings that cannot work. The message has one line per problem, each starting with the field."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a unix socket (``path``), or ``host`` and ``port`` (0: the system chooses)."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True where no other machine can connect: a unix socket or a loopback address."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: object) -> Address:
    """The `Address` written as ``unix:/path``, ``host:port`` or ``[ipv6]:port``. Raises `ValueError`."""
    if isinstance(text, Address):
        return text
    if isinstance(text, str):
        if text.startswith("unix:/"):
            return Address(path=text.removeprefix("unix:"))
        host, _, port = text.rpartition(":")
        if host and port.isascii() and port.isdigit() and int(port) < 65536 and not host.startswith("unix"):
            return Address(host=host.removeprefix("[").removesuffix("]"), port=int(port))
    raise ValueError(f"{text!r} is not an address; write host:port (127.0.0.1:4471) or unix:/path")


@dataclass(frozen=True, slots=True)
class CardSource:
    """A card to load at start, and the served model it is for where that is not the name inside the card."""

    path: Path
    model: str | None = None


def parse_card_source(text: object) -> CardSource:
    """The `CardSource` written as ``FILE`` or ``MODEL=FILE``. Raises `ValueError`."""
    if isinstance(text, CardSource):
        return text
    if isinstance(text, Path):
        return CardSource(text)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{text!r} is not a card; write FILE or MODEL=FILE")
    if "=" not in text or Path(text).exists():
        return CardSource(Path(text))
    model, _, path = text.partition("=")
    if not model or not path:
        raise ValueError(f"{text!r} is not a card; write FILE or MODEL=FILE")
    return CardSource(Path(path), model)


def parse_formats(value: object) -> tuple[str, ...]:
    """Names of formats, a list or separated by commas. Raises `ValueError`."""
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"{value!r} is not a list of formats; formats are {', '.join(FORMATS)}")
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    for name in names:
        if name not in FORMATS:
            raise ValueError(f"{name!r} is not a format; formats are {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(names))


def parse_thresholds(value: object) -> dict[str, float]:
    """A headroom ratio per format, of ``R`` for all, ``FORMAT=R,FORMAT=R``, or a mapping. Raises `ValueError`."""
    default = MEANINGS["resolution"].raise_below
    given: Mapping[Any, Any] = value if isinstance(value, Mapping) else dict.fromkeys(FORMATS, value)
    if isinstance(value, str) and "=" in value:
        given = {name: ratio for name, _, ratio in (part.partition("=") for part in value.split(","))}
    try:
        ratios = {str(name).strip(): float(ratio) for name, ratio in given.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no ratio; write R for all formats, or FORMAT=R,FORMAT=R") from None
    for name, ratio in ratios.items():
        if name not in FORMATS:
            raise ValueError(f"{name!r} is not a format; formats are {', '.join(FORMATS)}")
        if not 0 < ratio < math.inf:
            raise ValueError(f"{ratio:g} is not above 0")
    return dict.fromkeys(FORMATS, default) | ratios


def _option(default: Any, metavar: str, description: str, **limits: Any) -> Any:
    return Field(
        default=default,
        description=description,
        validate_default=True,
        json_schema_extra={"metavar": metavar},
        **limits,
    )


def _threshold(meaning: str) -> Any:
    default = MEANINGS[meaning].raise_below
    return _option(default, "R", f"Raise a {meaning} flag below this headroom ratio.", gt=0)


class Settings(BaseModel):
    """What ``maxact sidecar`` runs with; every field is an option, a variable and a key of the configuration file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    grpc: Annotated[Address, BeforeValidator(parse_address)] = _option(
        DEFAULT_GRPC, "ADDR", "Where vLLM workers connect."
    )
    http: Annotated[Address, BeforeValidator(parse_address)] = _option(
        DEFAULT_HTTP, "ADDR", "Where metrics, API and page are served."
    )
    cards: tuple[Annotated[CardSource, BeforeValidator(parse_card_source)], ...] = _option(
        (), "[MODEL=]FILE", "Calibration card to judge range against. May be repeated."
    )
    state: Path | None = _option(None, "DIR", "Keep high-water marks, flags and loaded cards here.")
    hold: float = _option(30.0, "S", "Horizon of the gauges, seconds.", gt=0)
    stale: float = _option(60.0, "S", "A gone engine's series disappear after so many seconds.", ge=0)
    flag_hold: float = _option(60.0, "S", "A flag stays up at least so many seconds.", ge=0)
    range_threshold: float = _threshold("range")
    fp16_threshold: float = _threshold("fp16")
    saturation_threshold: float = _threshold("saturation")
    formats: Annotated[tuple[str, ...], BeforeValidator(parse_formats)] = _option(
        "int8", "F,F", f"Formats whose resolution is judged, of {', '.join(FORMATS)}."
    )
    resolution_threshold: Annotated[dict[str, float], BeforeValidator(parse_thresholds)] = _option(
        "1", "[F=]R", "Raise a resolution flag below this headroom ratio; F=R,F=R for single formats."
    )
    max_series: int = _option(200_000, "N", "Series per scrape; more are dropped and counted.", ge=1)
    max_streams: int = _option(1024, "N", "Workers served at once; more are refused.", ge=1)
    tls_cert: Path | None = _option(None, "PEM", "Certificate of both servers, with what leads to its authority.")
    tls_key: Path | None = _option(None, "PEM", "Private key of the certificate.")
    grpc_client_ca: Path | None = _option(None, "PEM", "Workers must show a certificate signed by this authority.")
    http_client_ca: Path | None = _option(None, "PEM", "HTTP clients must show a certificate signed by this authority.")
    grpc_token_file: Path | None = _option(None, "FILE", "Workers must send one of these bearer tokens.")
    http_token_file: Path | None = _option(None, "FILE", "HTTP clients may log in with one of these bearer tokens.")
    http_users_file: Path | None = _option(None, "FILE", "HTTP clients may log in as one of these; from htpasswd -B.")
    insecure: bool = _option(False, "", "Allow addresses other machines can reach, unencrypted.")

    @model_validator(mode="after")
    def _refuse_half_of_tls(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert: certificate and key are needed together, tls_cert and tls_key")
        for name, address in (("grpc_client_ca", self.grpc), ("http_client_ca", self.http)):
            if getattr(self, name) and self.tls_cert is None:
                raise ValueError(f"{name}: needs TLS, tls_cert and tls_key")
            if getattr(self, name) and address.path:
                raise ValueError(f"{name}: there is no TLS on {address}, where only this user can connect")
        return self

    @property
    def secrets(self) -> dict[str, Path]:
        """Files that nobody else should be able to read."""
        names = ("tls_key", "grpc_token_file", "http_token_file", "http_users_file")
        return {name: path for name in names if (path := getattr(self, name))}

    @model_validator(mode="after")
    def _refuse_open_addresses(self) -> Settings:
        for name in ("grpc", "http"):
            address: Address = getattr(self, name)
            if not address.is_local and self.tls_cert is None and not self.insecure:
                raise ValueError(
                    f"{name}: {address} can be reached from other machines, without encryption; "
                    "use a loopback address or unix:/path, give --tls-cert and --tls-key, or say --insecure"
                )
        return self

    @property
    def thresholds(self) -> dict[Criterion, Threshold]:
        """Raise and clear thresholds per criterion; the distance between the two is that of the defaults."""
        return {criterion: self._threshold_of(criterion) for criterion in criteria(self.formats)}

    def _threshold_of(self, criterion: Criterion) -> Threshold:
        given = getattr(self, f"{criterion.meaning}_threshold")
        return MEANINGS[criterion.meaning].scaled_to(given[criterion.format] if criterion.format else given)


def make_settings(**values: Any) -> Settings:
    """`Settings` of keyword values as a user wrote them. Raises `ConfigError`."""
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(error))) from None


Place = tuple[int | str, ...]
"""Where a value stands in a document: keys and list indices."""


def describe(error: ValidationError, where: Callable[[Place], str] = lambda place: "") -> list[str]:
    """One line per problem of a pydantic error, ``field[3].name: what is wrong``; the first ten.

    ``where`` gives what comes before the field, such as file and line.
    """
    problems = error.errors()
    lines = [
        where(problem["loc"]) + _line(problem["loc"], problem["msg"].removeprefix("Value error, "))
        for problem in problems[:_MAX_LINES]
    ]
    return lines if len(problems) <= _MAX_LINES else [*lines, f"and {len(problems) - _MAX_LINES} more problems"]


def _line(place: Place, message: str) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return f"{path}: {message}" if path else message
