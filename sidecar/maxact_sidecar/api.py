"""What ``/api/v1`` answers: typed JSON, made from snapshots. A quantity that is not known is null."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel

from maxact_proto import stats
from maxact_sidecar import merge
from maxact_sidecar.card import CardTokens, LoadedCard
from maxact_sidecar.headroom import Floats
from maxact_sidecar.history import History
from maxact_sidecar.snapshot import SiteKey, Snapshot


class RankView(BaseModel):
    """One worker. Times are seconds since the epoch."""

    rank: str
    connected: bool
    last_window_seconds: float | None
    windows: int
    coalesced: int


class EngineView(BaseModel):
    """One engine of a model."""

    engine: str
    instance: str
    vllm_version: str
    sites: int
    ranks: list[RankView]
    tokens: CardTokens


class ModelView(BaseModel):
    """One served model."""

    model: str
    model_type: str
    dtype: str
    engines: list[EngineView]
    cards: list[str]


class PhaseView(BaseModel):
    """Statistics of one site in one phase over the hold horizon; ``absmax_high_water`` ever."""

    tokens: int
    absmax: float | None
    max: float | None
    min: float | None
    rms: float | None
    mean_abs: float | None
    crest_ratio: float | None
    nonfinite: int
    absmax_high_water: float | None


class FormatView(BaseModel):
    """What a number format costs a site at the scale of its absmax, estimated from a sample."""

    headroom_ratio: float | None
    """Of the meaning ``resolution``."""
    sqnr_decibels: float | None
    zeroed_ratio: float | None


class SiteView(BaseModel):
    """One site of one engine."""

    model: str
    engine: str
    layer: int | None
    site: str
    module: str
    width: int
    phases: dict[str, PhaseView]
    absmax: float | None
    absmax_high_water: float | None
    headroom: dict[str, float | None]
    """By meaning, of those that are not of a format."""
    formats: dict[str, FormatView]


class FlagView(BaseModel):
    """One headroom flag, raised now or before, and how often its threshold was exceeded.

    Times are seconds since the epoch. A window is one worker's; windows count from the first that exceeded on.
    """

    model: str
    engine: str
    layer: int | None
    site: str
    meaning: str
    format: str | None
    """Of ``resolution``."""
    phase: str | None
    """Of the worst value; null in a block format."""
    absmax: float
    limit: float
    headroom_ratio: float
    threshold: float
    since: float
    last_exceeded: float
    first_exceeded: float
    windows: int
    windows_exceeded: int
    exceeded_ratio: float | None
    """Share of windows that exceeded."""
    phases_exceeded: dict[str, int]
    """Windows that exceeded in each phase; empty in a block format."""
    active: bool


class SiteHistoryView(BaseModel):
    """absmax of one site over time; null where nothing was seen."""

    model: str
    layer: int | None
    site: str
    absmax: list[float | None]


class HistoryView(BaseModel):
    """absmax of sites over time, four digits. Times are seconds since the epoch: where each step begins."""

    times: list[float]
    sites: list[SiteHistoryView]


class CardView(BaseModel):
    """One calibration card in use."""

    name: str
    model: str
    tokens: CardTokens
    sites: int


def view_models(snapshots: Iterable[Snapshot], cards: Sequence[LoadedCard]) -> list[ModelView]:
    """Models with their engines."""
    views: dict[str, ModelView] = {}
    for snapshot in snapshots:
        view = views.get(snapshot.model)
        if view is None:
            named = [card.name for card in cards if card.served_model == snapshot.model]
            view = views[snapshot.model] = ModelView(
                model=snapshot.model, model_type=snapshot.model_type, dtype=snapshot.dtype, engines=[], cards=named
            )
        view.engines.append(_view_engine(snapshot))
    return list(views.values())


def _view_engine(snapshot: Snapshot) -> EngineView:
    return EngineView(
        engine=snapshot.engine,
        instance=snapshot.instance,
        vllm_version=snapshot.vllm_version,
        sites=len(snapshot.keys),
        ranks=[
            RankView(
                rank=rank.rank,
                connected=rank.connected,
                last_window_seconds=rank.last_window_seconds,
                windows=rank.windows,
                coalesced=rank.coalesced,
            )
            for rank in snapshot.ranks
        ],
        tokens=CardTokens(**dict(zip(stats.PHASES, snapshot.tokens, strict=True))),
    )


def view_sites(snapshots: Iterable[Snapshot]) -> list[SiteView]:
    """All sites of the engines."""
    return [view for snapshot in snapshots for view in _view_engine_sites(snapshot)]


def _view_engine_sites(snapshot: Snapshot) -> list[SiteView]:
    hold = snapshot.hold
    columns: dict[str, Floats] = {
        "absmax": hold.absmax,
        "max": hold.maximum,
        "min": hold.minimum,
        "rms": hold.rms,
        "mean_abs": hold.mean_abs,
        "crest_ratio": hold.crest_ratio,
        "absmax_high_water": snapshot.high_water,
    }
    tokens, nonfinite = hold.sums[merge.TOKENS], snapshot.nonfinite
    zeroed, sqnr = snapshot.zeroed_ratio, snapshot.sqnr_decibels
    names = [number.name for number in snapshot.formats]
    plain = [(row, each.meaning) for row, each in enumerate(snapshot.criteria) if not each.format]
    resolution = [row for row, each in enumerate(snapshot.criteria) if each.format]
    peak, high_water, headroom = snapshot.absmax, snapshot.high_water.max(axis=0), snapshot.headroom_ratio
    return [
        SiteView(
            model=snapshot.model,
            engine=snapshot.engine,
            layer=layer,
            site=name,
            module=snapshot.sites[index].module,
            width=snapshot.sites[index].width,
            phases={
                phase: PhaseView(
                    tokens=int(tokens[row, index]),
                    nonfinite=int(nonfinite[row, index]),
                    **{column: _known(values[row, index]) for column, values in columns.items()},
                )
                for row, phase in enumerate(stats.PHASES)
            },
            absmax=_known(peak[index]),
            absmax_high_water=_known(high_water[index]),
            headroom={meaning: _known(headroom[row, index]) for row, meaning in plain},
            formats={
                name: FormatView(
                    headroom_ratio=_known(headroom[row, index]),
                    sqnr_decibels=_known(sqnr[number, index]),
                    zeroed_ratio=_known(zeroed[number, index]),
                )
                for number, (name, row) in enumerate(zip(names, resolution, strict=True))
            },
        )
        for index, (layer, name) in enumerate(snapshot.keys)
    ]


def _known(value: np.floating) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def view_flags(snapshots: Iterable[Snapshot]) -> list[FlagView]:
    """Flags, raised ones first, the latest first."""
    views = [
        FlagView(
            model=snapshot.model,
            engine=snapshot.engine,
            layer=snapshot.keys[flag.site][0],
            site=snapshot.keys[flag.site][1],
            meaning=flag.criterion.meaning,
            format=flag.criterion.format or None,
            phase=flag.phase,
            absmax=flag.absmax,
            limit=flag.limit,
            headroom_ratio=flag.headroom_ratio,
            threshold=flag.threshold,
            since=flag.since,
            last_exceeded=flag.last_exceeded,
            first_exceeded=flag.first_exceeded,
            windows=flag.windows,
            windows_exceeded=flag.windows_exceeded,
            exceeded_ratio=flag.exceeded_ratio,
            phases_exceeded=flag.phases_exceeded,
            active=flag.active,
        )
        for snapshot in snapshots
        for flag in snapshot.evidence
    ]
    return sorted(views, key=lambda view: (not view.active, -view.since, view.headroom_ratio))


def view_history(history: History, model: str | None, engine: str | None) -> HistoryView:
    """History of sites; engines of one model merged by maximum."""
    times, courses = history.show()
    merged: dict[tuple[str, SiteKey], Floats] = {}
    for (name, label), course in courses.items():
        if model in (None, name) and engine in (None, label):
            for key, absmax in zip(course.keys, _four_digits(course.absmax).T, strict=True):
                merged[name, key] = np.fmax(absmax, merged.get((name, key), absmax))
    sites = [
        SiteHistoryView.model_construct(model=name, layer=layer, site=site, absmax=_nulls(absmax))
        for (name, (layer, site)), absmax in merged.items()
    ]
    return HistoryView.model_construct(times=times, sites=sites)


def _nulls(values: Floats) -> list[float | None]:
    return [value if value == value else None for value in values.tolist()]


def _four_digits(values: Floats) -> Floats:
    """Rounded, so that JSON is a third as long."""
    known = np.where(values > 0, values, np.nan).astype(np.float64)
    places = 3 - np.floor(np.log10(known))
    # Scaled by a power of ten that is exact, one way or the other, so that the nearest float is that of four digits.
    up, down = 10.0 ** np.maximum(places, 0), 10.0 ** np.maximum(-places, 0)
    rounded: Floats = np.where(values == 0, 0.0, np.rint(known * up / down) / up * down)
    return rounded


def view_card(loaded: LoadedCard) -> CardView:
    """One card."""
    return CardView(
        name=loaded.name, model=loaded.served_model, tokens=loaded.card.tokens, sites=len(loaded.card.limits())
    )
