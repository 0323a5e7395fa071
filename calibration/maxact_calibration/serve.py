"""``maxact serve``: a sidecar and ``vllm serve --plugin maxact`` as two child processes, one to stop.

The sidecar comes first and goes last. If it dies alone, serving goes on: the plugin keeps its statistics. Each child
leads a process group: its leader is asked to stop and does so in order, and whatever is left of the group then is
killed, so that vLLM's engine processes end with it whatever happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from maxact_sidecar.cli import fail, sidecar
from maxact_sidecar.config import DEFAULT_GRPC, DEFAULT_HTTP

_SIDECAR_START_SECONDS = 30.0
_STOP_SECONDS = 25.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub id, as for vllm serve.")],
    grpc: Annotated[str, typer.Option(metavar="ADDR", help="Address between vLLM and the sidecar.")] = DEFAULT_GRPC,
    http: Annotated[str, typer.Option(metavar="ADDR", help="Where metrics, API and page are served.")] = DEFAULT_HTTP,
    card: Annotated[
        list[str] | None, typer.Option(metavar="[MODEL=]FILE", help="Calibration card for the sidecar.")
    ] = None,
) -> None:
    """Serve MODEL with vLLM, observed, with a sidecar beside it.

    Every option of maxact sidecar can be given here; all other arguments go to vllm serve.

    Example: maxact serve Qwen/Qwen3-8B --card qwen3.json --max-model-len 8192 --maxact-sites all
    """
    if model.startswith("-"):
        fail(f"MODEL comes first, before {model}: maxact serve MODEL [options] [vllm arguments]")
    for_sidecar, for_vllm = split(context.args)
    taken = [argument for argument in for_vllm if argument.split("=")[0] in ("--plugin", "--maxact-endpoint")]
    if taken:
        fail(f"{taken[0]}: maxact serve sets this itself; the address between vLLM and the sidecar is --grpc ADDR")
    vllm = _program("vllm")
    if vllm is None:
        fail("vllm is not installed beside maxact: install maxact into the environment vLLM runs in")
    cards = [argument for file in card or () for argument in ("--card", file)]
    sidecar_command = [str(_program("maxact")), "sidecar", "--grpc", grpc, "--http", http, *cards, *for_sidecar]
    vllm_command = [str(vllm), "serve", model, "--plugin", "maxact", "--maxact-endpoint", grpc, *for_vllm]
    with _signals_raise(), _child(sidecar_command) as beside:
        _wait_until_ready(beside, http)
        with _child(vllm_command) as server:
            status = _watch(server, beside)
    raise typer.Exit(status)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are options of ``maxact sidecar``, with their values, and the others."""
    parameters = inspect.signature(sidecar).parameters.values()
    takes_value = {"--" + each.name.replace("_", "-"): not isinstance(each.default, bool) for each in parameters}
    ours: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in takes_value:
            others.append(argument)
            continue
        ours.append(argument)
        if takes_value[name] and not equals:
            ours += [value for value in [next(rest, None)] if value is not None]
    return ours, others


def _program(name: str) -> Path | None:
    """A program of the environment this Python runs in, else of the path."""
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return beside
    found = shutil.which(name)
    return Path(found) if found else None


class _Stop(BaseException):
    """The user wants us to stop."""


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """End with status 0 when the user stops us; children are stopped on the way out."""

    def stop(number: int, frame: Any) -> None:
        # Once is enough: a second signal must not interrupt stopping the children.
        for each in _STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Stop

    for each in _STOP_SIGNALS:
        signal.signal(each, stop)
    with contextlib.suppress(_Stop):
        yield
        return
    raise typer.Exit(0)


@contextlib.contextmanager
def _child(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own that is gone when the context ends, with all that it started."""
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], http: str) -> None:
    deadline = time.monotonic() + _SIDECAR_START_SECONDS
    while not _answers(http):
        if process.poll() is not None:
            raise typer.Exit(process.returncode or 1)  # it has said why
        if time.monotonic() > deadline:
            fail(f"the sidecar did not answer at {http} within {_SIDECAR_START_SECONDS:.0f} s")
        time.sleep(0.1)


def _answers(http: str) -> bool:
    if http.startswith("unix:"):
        return Path(http.removeprefix("unix:")).exists()
    try:
        with urllib.request.urlopen(f"http://{http}/-/ready", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _watch(server: subprocess.Popen[bytes], beside: subprocess.Popen[bytes]) -> int:
    """Wait for vLLM's end; its exit status."""
    warned = False
    while server.poll() is None:
        if beside.poll() is not None and not warned:
            warned = True
            typer.echo("maxact: the sidecar ended; vLLM goes on, restart one with: maxact sidecar", err=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.5)
    status = server.returncode
    return status if status >= 0 else 128 - status
