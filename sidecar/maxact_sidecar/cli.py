"""``maxact sidecar`` and ``maxact card``: fills `config.Settings`, talks to a running sidecar, explains failures."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import urlencode

import typer
from pythonjsonlogger.json import JsonFormatter

from maxact_sidecar.card import CardError, read_card
from maxact_sidecar.client import ClientError, ask
from maxact_sidecar.config import DEFAULT_GRPC, DEFAULT_HTTP, ConfigError, make_settings
from maxact_sidecar.headroom import MEANINGS

_RANGE, _FP16, _RESOLUTION, _SATURATION = (meaning.raise_below for meaning in MEANINGS.values())


def sidecar(
    grpc: Annotated[str, typer.Option(metavar="ADDR", help="Where vLLM workers connect.")] = DEFAULT_GRPC,
    http: Annotated[str, typer.Option(metavar="ADDR", help="Where metrics, API and page are served.")] = DEFAULT_HTTP,
    card: Annotated[
        list[str] | None,
        typer.Option(metavar="[MODEL=]FILE", help="Calibration card to judge range against. May be repeated."),
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="DIR", help="Keep high-water marks, flags and loaded cards here.")
    ] = None,
    hold: Annotated[float, typer.Option(metavar="S", help="Horizon of the gauges, seconds.")] = 30.0,
    stale: Annotated[
        float, typer.Option(metavar="S", help="A gone engine's series disappear after so many seconds.")
    ] = 60.0,
    flag_hold: Annotated[float, typer.Option(metavar="S", help="A flag stays up at least so many seconds.")] = 60.0,
    range_threshold: Annotated[
        float, typer.Option(metavar="R", help="Raise a range flag below this headroom ratio.")
    ] = _RANGE,
    fp16_threshold: Annotated[
        float, typer.Option(metavar="R", help="Raise an fp16 flag below this headroom ratio.")
    ] = _FP16,
    resolution_threshold: Annotated[
        float, typer.Option(metavar="R", help="Raise a resolution flag below this headroom ratio.")
    ] = _RESOLUTION,
    saturation_threshold: Annotated[
        float, typer.Option(metavar="R", help="Raise a saturation flag below this headroom ratio.")
    ] = _SATURATION,
    max_series: Annotated[
        int, typer.Option(metavar="N", help="Series per scrape; more are dropped and counted.")
    ] = 200_000,
    max_streams: Annotated[int, typer.Option(metavar="N", help="Workers served at once; more are refused.")] = 1024,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow addresses other machines can reach, unencrypted.")
    ] = False,
) -> None:
    """Receive statistics from vLLM workers; judge headroom; serve metrics and the page.

    Addresses are host:port or unix:/path. The page is at the HTTP address, Prometheus scrapes /metrics there.

    Example: maxact sidecar --card smollm2.json, then: vllm serve MODEL --plugin maxact
    """
    _set_up_logging()
    from maxact_sidecar.run import serve

    try:
        settings = make_settings(
            grpc=grpc,
            http=http,
            cards=tuple(card or ()),
            state=state,
            hold=hold,
            stale=stale,
            flag_hold=flag_hold,
            range_threshold=range_threshold,
            fp16_threshold=fp16_threshold,
            resolution_threshold=resolution_threshold,
            saturation_threshold=saturation_threshold,
            max_series=max_series,
            max_streams=max_streams,
            insecure=insecure,
        )
        asyncio.run(serve(settings))
    except (ConfigError, CardError) as error:
        fail(str(error))


def card(
    url: Annotated[str, typer.Argument(metavar="URL", help="HTTP address of a sidecar.")] = f"http://{DEFAULT_HTTP}",
    output: Annotated[Path | None, typer.Option(metavar="F", help="Save the live state as a card here.")] = None,
    load: Annotated[Path | None, typer.Option(metavar="F", help="Judge range against this card from now on.")] = None,
    add: Annotated[bool, typer.Option("--add", help="With --load: keep the other cards of the model.")] = False,
    model: Annotated[str | None, typer.Option(metavar="M", help="Served model, where there are several.")] = None,
    engine: Annotated[str | None, typer.Option(metavar="E", help="Engine; all engines merged if omitted.")] = None,
) -> None:
    """Save the live state of a sidecar as a calibration card, or load a card into it.

    Example: maxact card http://127.0.0.1:9471 --output card.json, another day: maxact card --load card.json
    """
    if (output is None) == (load is None):
        fail("give either --output F (save the live state) or --load F (judge against a card)")
    if output is not None:
        _save(url, output, model, engine)
    elif load is not None:
        _load(url, load, add)


def _save(url: str, output: Path, model: str | None, engine: str | None) -> None:
    query = urlencode({name: value for name, value in (("model", model), ("engine", engine)) if value is not None})
    document = _ask(url, f"/api/v1/card?{query}")
    try:
        output.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        fail(f"{output}: {error.strerror}")
    tokens = sum(document["tokens"].values())
    sites = len({(site["layer"], site["site"]) for site in document["sites"]})
    typer.echo(f"{output}: {document['model']}, {sites} sites, {tokens} tokens")


def _load(url: str, path: Path, add: bool) -> None:
    try:
        body = read_card(path).model_dump_json().encode()
    except CardError as error:
        fail(str(error))
    query = urlencode({"name": path.stem, "add": "true" if add else "false"})
    loaded = _ask(url, f"/api/v1/cards?{query}", body)
    typer.echo(f"{path}: {loaded['model']}, {loaded['sites']} sites are judged against it")


def _ask(url: str, path: str, body: bytes | None = None) -> Any:
    try:
        return ask(url, path, body)
    except ClientError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End with one line per problem on stderr and status 2."""
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(2)


def _set_up_logging() -> None:
    """Readable lines on a terminal, JSON where a machine reads them."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(JsonFormatter("{asctime}{levelname}{name}{message}", style="{"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
