"""``maxact sidecar`` and ``maxact card``: gathers `config.Settings`, talks to a running sidecar, explains failures."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import urlencode

import typer
from pythonjsonlogger.json import JsonFormatter

from maxact_sidecar.auth import read_tokens
from maxact_sidecar.card import CardError, read_card
from maxact_sidecar.client import ClientError, Login, ask
from maxact_sidecar.config import DEFAULT_HTTP, ConfigError, Settings
from maxact_sidecar.configfile import read_settings

_CARD = "card"


def sidecar(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="MAXACT_SIDECAR_CONFIG", help="YAML file; keys are the options below."),
    ] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Say whether all settings and files are right, and end.")
    ] = False,
    **options: Any,
) -> None:
    """Receive statistics from vLLM workers; judge headroom; serve metrics and the page.

    Addresses are host:port or unix:/path. The page is at the HTTP address, Prometheus scrapes /metrics there.
    An option goes before its variable, a variable before the file. SIGHUP reads file and cards again.

    Example: maxact sidecar --card smollm2.json, then: vllm serve MODEL --plugin maxact
    """
    _set_up_logging()
    from maxact_sidecar import run

    given = {_field(name): value for name, value in options.items() if value}

    def read() -> Settings:
        return read_settings(config, given)

    try:
        if check_config:
            run.check(read())
            typer.echo("the configuration is right")
        else:
            asyncio.run(run.serve(read))
    except (ConfigError, CardError) as error:
        fail(str(error))


def _field(option: str) -> str:
    """The setting behind an option: the one that may be repeated has a singular name."""
    return "cards" if option == _CARD else option


def _options() -> list[inspect.Parameter]:
    """An option of the command line for every setting."""
    parameters = []
    for field, info in Settings.model_fields.items():
        name = _CARD if field == "cards" else field
        extra: Any = info.json_schema_extra
        is_switch = info.annotation is bool
        kind: Any = bool if is_switch else list[str] | None if name == _CARD else str | None
        shown = None if is_switch or not info.default else str(info.default)
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            metavar=extra["metavar"] or None,
            help=info.description,
            envvar=f"MAXACT_SIDECAR_{field.upper()}",
            show_envvar=False,
            show_default=shown or False,
        )
        default = False if is_switch else None
        annotation = Annotated[kind, option]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))
    return parameters


_signature = inspect.signature(sidecar, eval_str=True)
_own = [each for each in _signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
sidecar.__signature__ = _signature.replace(parameters=[*_own, *_options()])  # type: ignore[attr-defined]


def card(
    url: Annotated[str, typer.Argument(metavar="URL", help="HTTP address of a sidecar.")] = f"http://{DEFAULT_HTTP}",
    output: Annotated[Path | None, typer.Option(metavar="F", help="Save the live state as a card here.")] = None,
    load: Annotated[Path | None, typer.Option(metavar="F", help="Judge range against this card from now on.")] = None,
    add: Annotated[bool, typer.Option("--add", help="With --load: keep the other cards of the model.")] = False,
    model: Annotated[str | None, typer.Option(metavar="M", help="Served model, where there are several.")] = None,
    engine: Annotated[str | None, typer.Option(metavar="E", help="Engine; all engines merged if omitted.")] = None,
    token_file: Annotated[Path | None, typer.Option(metavar="F", help="Bearer token for the sidecar.")] = None,
    ca: Annotated[Path | None, typer.Option(metavar="PEM", help="Authority of the sidecar's certificate.")] = None,
    cert: Annotated[Path | None, typer.Option(metavar="PEM", help="Certificate to show the sidecar.")] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its key, where it is in another file.")] = None,
) -> None:
    """Save the live state of a sidecar as a calibration card, or load a card into it.

    Example: maxact card http://127.0.0.1:9471 --output card.json, another day: maxact card --load card.json
    """
    if (output is None) == (load is None):
        fail("give either --output F (save the live state) or --load F (judge against a card)")
    try:
        token = read_tokens(token_file)[0] if token_file else None
    except ConfigError as error:
        fail(f"--token-file: {error}")
    call = partial(_ask, url, Login(token, ca, cert, key))
    if output is not None:
        _save(call, output, model, engine)
    elif load is not None:
        _load(call, load, add)


def _save(call: Callable[..., Any], output: Path, model: str | None, engine: str | None) -> None:
    query = urlencode({name: value for name, value in (("model", model), ("engine", engine)) if value is not None})
    document = call(f"/api/v1/card?{query}")
    try:
        output.write_text(json.dumps(document, indent=1) + "\n")
    except OSError as error:
        fail(f"{output}: {error.strerror}")
    tokens = sum(document["tokens"].values())
    sites = len({(site["layer"], site["site"]) for site in document["sites"]})
    typer.echo(f"{output}: {document['model']}, {sites} sites, {tokens} tokens")


def _load(call: Callable[..., Any], path: Path, add: bool) -> None:
    try:
        body = read_card(path).model_dump_json().encode()
    except CardError as error:
        fail(str(error))
    query = urlencode({"name": path.stem, "add": "true" if add else "false"})
    loaded = call(f"/api/v1/cards?{query}", body)
    typer.echo(f"{path}: {loaded['model']}, {loaded['sites']} sites are judged against it")


def _ask(url: str, login: Login, path: str, body: bytes | None = None) -> Any:
    try:
        return ask(url, path, body, login)
    except ClientError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End with one line per problem on stderr and status 2."""
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(2)


class _Json(JsonFormatter):
    """One object per line, with a field for everything that is named in the message."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        if isinstance(record.args, dict):
            log_data.update(record.args)


class _Line(logging.Formatter):
    """Names come from workers and cards: no line break and no terminal sequence of theirs is obeyed."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


def _set_up_logging() -> None:
    """Readable lines on a terminal, JSON where a machine reads them."""
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(_Line("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(_Json("{asctime}{levelname}{name}{message}", style="{"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
