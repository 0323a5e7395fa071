"""The HTTP side: metrics, health, JSON and the page.

What takes long (rendering 50,000 series, listing all sites) is a plain function, which FastAPI runs on a thread, so
that windows go on being merged meanwhile: it works on snapshots. What changes state runs on the event loop.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maxact_sidecar import __version__, api
from maxact_sidecar.auth import Gate, TooManyLoginsError
from maxact_sidecar.card import Card, CardError, LoadedCard, build_card
from maxact_sidecar.collector import OPENMETRICS, TEXT, Collector
from maxact_sidecar.config import parse_address
from maxact_sidecar.families import Detail
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.ingest import clock
from maxact_sidecar.snapshot import Snapshot

MAX_BODY_BYTES = 64 * 1024 * 1024
"""20,000 sites x 3 phases of a card are about 15 MB."""
MOST_CARDS = 256
"""A card for a new model costs whoever may post nothing to invent."""

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_PROBES = ("/-/healthy", "/-/ready")

Model = Annotated[str | None, Query(description="Served model name; needed where several models are served")]
Engine = Annotated[str | None, Query(description="Engine name; all engines of the model where omitted")]

Details = Annotated[
    Sequence[Detail],
    Query(description="histogram: with shares of elements by magnitude; rank: with series of every worker; or both"),
]
Name = Annotated[str | None, Query(description="Name of the card in metrics; its model where omitted", max_length=512)]
Add = Annotated[bool, Query(description="Keep other cards of the model: the widest range of all counts")]


def make_app(fleet: Fleet, collector: Collector, gate: Gate, *, by_own_names: bool) -> FastAPI:
    """The application. ``by_own_names``: without a login only for who calls it by a name of the loopback."""
    app = FastAPI(title="maxact sidecar", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(_BodyLimit)
    if not gate.is_open:
        app.add_middleware(_Guard, gate=gate)
    elif by_own_names:
        app.add_middleware(_OwnNames)
    app.add_exception_handler(RequestValidationError, _explain)
    app.add_exception_handler(405, _name_methods)
    page = resources.files("maxact_sidecar").joinpath("page/index.html").read_text()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request, detail: Details = ()) -> Response:
        """Prometheus text format, or OpenMetrics where the client accepts it."""
        as_openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")
        snapshots = fleet.snapshots(clock(), ranks_apart="rank" in detail)
        parts = collector.render(snapshots, fleet.cards, as_openmetrics=as_openmetrics, details=detail)
        headers = {"Content-Type": OPENMETRICS if as_openmetrics else TEXT, "Vary": "Accept, Accept-Encoding"}
        if re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", request.headers.get("accept-encoding", "")):
            headers["Content-Encoding"] = "gzip"
            return Response(_gzipped(parts), headers=headers)
        return Response(b"".join(parts), headers=headers)

    @app.get("/-/healthy", response_class=PlainTextResponse)
    async def healthy() -> str:
        """The process answers."""
        return "healthy\n"

    @app.get("/-/ready", response_class=PlainTextResponse)
    async def ready() -> str:
        """Workers can connect: this listener comes up after the gRPC one."""
        return "ready\n"

    _add_api(app, fleet)
    return app


def _gzipped(parts: Iterable[bytes]) -> bytes:
    compressor = zlib.compressobj(1, wbits=16 + zlib.MAX_WBITS)
    return b"".join((*(compressor.compress(part) for part in parts), compressor.flush()))


def _add_api(app: FastAPI, fleet: Fleet) -> None:
    @app.get("/api/v1/models")
    def models() -> list[api.ModelView]:
        """Served models, their engines and ranks."""
        return api.view_models(fleet.snapshots(clock()), fleet.cards)

    @app.get("/api/v1/sites")
    def sites(model: Model = None, engine: Engine = None) -> list[api.SiteView]:
        """Statistics and headroom of every site."""
        return api.view_sites(_select(fleet, model, engine))

    @app.get("/api/v1/history")
    def history(model: Model = None, engine: Engine = None) -> api.HistoryView:
        """absmax of every site since the sidecar started; engines are merged where none is chosen."""
        return api.view_history(fleet.history, model, engine)

    @app.get("/api/v1/flags")
    def flags() -> list[api.FlagView]:
        """Headroom flags, raised ones first."""
        return api.view_flags(fleet.snapshots(clock()))

    @app.get("/api/v1/cards")
    async def cards() -> list[api.CardView]:
        """Calibration cards in use."""
        return [api.view_card(card) for card in fleet.cards]

    @app.post(
        "/api/v1/cards",
        status_code=201,
        responses={
            400: {"description": "Not UTF-8"},
            409: {"description": "Too many cards"},
            413: {"description": "Card too large"},
        },
    )
    async def load_card(card: Card, name: Name = None, add: Add = False) -> api.CardView:
        """Judge ``range`` against this card, in place of those of the same model or, with ``add``, as well."""
        loaded = LoadedCard(name=name or card.model, served_model=card.model, card=card)
        is_known = any((each.served_model, each.name) == (loaded.served_model, loaded.name) for each in fleet.cards)
        if len(fleet.cards) >= MOST_CARDS and not is_known:
            raise HTTPException(409, f"{MOST_CARDS} cards are in use already")
        fleet.load_card(loaded, clock(), add=add)
        return api.view_card(loaded)

    @app.get(
        "/api/v1/card",
        responses={404: {"description": "No such model or engine"}, 409: {"description": "No tokens, or ambiguous"}},
    )
    def card(model: Model = None, engine: Engine = None) -> Card:
        """Everything seen since the workers started, as a calibration card."""
        return _live_card(fleet, model, engine)


def _live_card(fleet: Fleet, model: str | None, engine: str | None) -> Card:
    served = sorted({snapshot.model for snapshot in fleet.snapshots(clock())})
    if not served:
        raise HTTPException(404, "no engine has connected yet")
    if model is None and len(served) > 1:
        raise HTTPException(409, f"several models are served, choose one with model=: {', '.join(served)}")
    chosen = _select(fleet, model or served[0], engine)
    if not chosen:
        raise HTTPException(404, f"model {model or served[0]!r} engine {engine!r} is not served; served: {served}")
    try:
        return build_card(chosen, now=clock().wall, maxact_version=__version__)
    except CardError as error:
        raise HTTPException(409, str(error)) from None


def _select(fleet: Fleet, model: str | None, engine: str | None) -> list[Snapshot]:
    return [
        snapshot
        for snapshot in fleet.snapshots(clock())
        if model in (None, snapshot.model) and engine in (None, snapshot.engine)
    ]


class _Guard:
    """Asks everybody for a token or a password, but for the probes, which tell nothing."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            passes = scope["path"] in _PROBES or await self._gate.admits(Headers(scope=scope).get("authorization", ""))
        except TooManyLoginsError:
            await JSONResponse({"detail": "too many logins at once"}, 429, {"Retry-After": "1"})(scope, receive, send)
            return
        if passes:
            await self._app(scope, receive, send)
        else:
            headers = {"WWW-Authenticate": self._gate.challenge}
            await JSONResponse({"detail": "log in first"}, 401, headers)(scope, receive, send)


class _OwnNames:
    """Where nobody logs in: refuses who does not call us by a name of the loopback.

    A browser on this machine may be made to ask us by the page of somebody whose host name leads here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        host = Headers(scope=scope).get("host", "localhost").lower()
        if _is_loopback(host):
            await self._app(scope, receive, send)
        else:
            detail = "here I am localhost; who comes by another name needs a token, see --http-token-file"
            await JSONResponse({"detail": detail}, 403)(scope, receive, send)


def _is_loopback(host: str) -> bool:
    try:
        return parse_address(host if re.search(r":\d+$", host) else f"{host}:0").is_local
    except ValueError:
        return False


class _BodyLimit:
    """Refuses a body that is, or turns out to be, larger than any card, before all of it is in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        num_bytes = 0

        async def receive_some() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"a card has at most {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, receive_some, send)


async def _explain(_: Request, error: Exception) -> JSONResponse:
    """422 with what is wrong where; the input is not sent back, it may be megabytes or not even JSON (a NaN)."""
    assert isinstance(error, RequestValidationError)
    problems = [{name: problem[name] for name in ("type", "loc", "msg")} for problem in error.errors()]
    return JSONResponse({"detail": problems}, 422)


async def _name_methods(request: Request, _: Exception) -> JSONResponse:
    """405 with every method of the path; by itself Starlette names those of one route."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = sorted({method for route in routes for method in route.methods})
    return JSONResponse({"detail": "Method Not Allowed"}, 405, {"Allow": ", ".join(methods)})
