"""Hop 8/9: snapshots in, ``/metrics`` out.

`FAMILIES` is the catalogue: metric names are an interface. The bulk of the series (one per site, phase and statistic)
is rendered straight from numpy with label sets cached per site table: 50,000 series through `prometheus_client` gauges
cost 390 ms, this way 10-25 ms. Metrics about the sidecar itself go through `prometheus_client` (`SelfMetrics`).
A value that is not known is an absent series, never a sentinel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client import exposition as text_format
from prometheus_client.openmetrics import exposition as openmetrics

from maxact_proto import stats
from maxact_sidecar import __version__, merge
from maxact_sidecar.card import LoadedCard
from maxact_sidecar.config import Settings
from maxact_sidecar.headroom import MEANINGS, Floats
from maxact_sidecar.state import SiteKey, Snapshot

SITE: Final = ("model_name", "engine", "layer", "site")
PHASED: Final = (*SITE, "phase")
JUDGED: Final = (*SITE, "meaning")
RANK: Final = ("model_name", "engine", "rank")
ENGINE: Final = ("model_name", "engine")

TEXT: Final = text_format.CONTENT_TYPE_LATEST
OPENMETRICS: Final = openmetrics.CONTENT_TYPE_LATEST


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: what its series mean."""

    name: str
    type: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    unit: str
    help: str


FAMILIES: Final = (
    Family("maxact_absmax", "gauge", PHASED, "activation", "Largest magnitude over the hold horizon"),
    Family("maxact_absmax_high_water", "gauge", PHASED, "activation", "Largest magnitude ever seen"),
    Family("maxact_max", "gauge", PHASED, "activation", "Largest signed value over the hold horizon"),
    Family("maxact_min", "gauge", PHASED, "activation", "Smallest signed value over the hold horizon"),
    Family("maxact_rms", "gauge", PHASED, "activation", "Root mean square over the hold horizon"),
    Family("maxact_mean_abs", "gauge", PHASED, "activation", "Mean magnitude over the hold horizon"),
    Family("maxact_crest_ratio", "gauge", PHASED, "ratio", "Crest factor absmax / rms over the hold horizon"),
    Family("maxact_nonfinite_tokens_total", "counter", PHASED, "tokens", "Token rows holding a NaN or an infinity"),
    Family("maxact_headroom_ratio", "gauge", JUDGED, "ratio", "Limit / absmax over the hold horizon; < 1: beyond it"),
    Family("maxact_headroom_limit", "gauge", JUDGED, "activation", "Limit that the site is judged against"),
    Family("maxact_headroom_flag", "gauge", JUDGED, "", "1 while the headroom flag is raised, else 0"),
    Family(
        "maxact_headroom_flag_since_timestamp_seconds",
        *("gauge", JUDGED, "seconds", "When the flag was raised; only while it is"),
    ),
    Family(
        "maxact_headroom_threshold_ratio",
        *("gauge", ("meaning",), "ratio", "A flag is raised when the headroom ratio falls below this"),
    ),
    Family("maxact_card_info", "gauge", ("model_name", "card", "bos"), "", "1 for each calibration card in use"),
    Family("maxact_tokens_total", "counter", (*ENGINE, "phase"), "tokens", "Token rows that went through the model"),
    Family("maxact_rank_up", "gauge", RANK, "", "1 while the worker's stream is connected, else 0"),
    Family(
        "maxact_rank_last_window_timestamp_seconds",
        *("gauge", RANK, "seconds", "When the worker's last window arrived"),
    ),
    Family("maxact_windows_total", "counter", ENGINE, "windows", "Windows merged"),
    Family("maxact_windows_coalesced_total", "counter", ENGINE, "windows", "Windows merged by workers while unsent"),
    Family("maxact_engines", "gauge", (), "", "Engines whose series are shown"),
)
"""What is rendered here, in this order. `SelfMetrics` adds the rest."""


class SelfMetrics:
    """Metrics about the sidecar itself, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        Info("maxact_build", "Version of this sidecar", registry=registry).info({"version": __version__})
        self.windows_rejected = Counter(
            "maxact_windows_rejected", "Messages that broke the wire's limits", ["reason"], registry=registry
        )
        self.ingest_seconds = Histogram(
            "maxact_ingest_seconds",
            "Time to decode, merge and judge one window",
            buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2, 0.1),
            registry=registry,
        )
        self.render_seconds = Histogram(
            "maxact_render_seconds",
            "Time to render one scrape",
            buckets=(1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5),
            registry=registry,
        )
        self.series = Gauge("maxact_series", "Series of the last scrape, without these", registry=registry)
        self.series_dropped = Counter(
            "maxact_series_dropped", "Series left out of scrapes by the series cap", registry=registry
        )


class Collector:
    """Renders scrapes. Label sets are built once per site table."""

    def __init__(self, settings: Settings, metrics: SelfMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._labels: dict[tuple[str, str], _Labels] = {}

    def render(self, snapshots: Sequence[Snapshot], cards: Sequence[LoadedCard], *, as_openmetrics: bool) -> bytes:
        """One scrape, in the Prometheus text format or in OpenMetrics."""
        started = time.perf_counter()
        lines: list[str] = []
        room = self._settings.max_series
        dropped = 0
        labels = [self._labels_of(snapshot) for snapshot in snapshots]
        for family in FAMILIES:
            sets, values = _flatten(self._series(family, snapshots, labels, cards))
            dropped += max(0, len(sets) - room)
            sets, values = sets[:room], values[:room]
            room -= len(sets)
            if sets:
                lines += _head(family, as_openmetrics)
                lines += _lines(family, sets, values)
        self._metrics.series.set(self._settings.max_series - room)
        self._metrics.series_dropped.inc(dropped)
        # What this scrape cost is shown by the next one.
        own: bytes = (openmetrics if as_openmetrics else text_format).generate_latest(self._metrics.registry)
        body = ("\n".join(lines) + "\n").encode() + own
        self._metrics.render_seconds.observe(time.perf_counter() - started)
        return body

    def _labels_of(self, snapshot: Snapshot) -> _Labels:
        key = (snapshot.model, snapshot.engine)
        known = self._labels.get(key)
        if known is None or known.keys is not snapshot.keys:
            known = self._labels[key] = _Labels(snapshot)
        return known

    def _series(
        self, family: Family, snapshots: Sequence[Snapshot], labels: list[_Labels], cards: Sequence[LoadedCard]
    ) -> Iterable[tuple[Sequence[str], Floats]]:
        """Label sets and values; NaN where there is no series."""
        if family.labels in (PHASED, JUDGED):
            for snapshot, own in zip(snapshots, labels, strict=True):
                sets = own.phased if family.labels == PHASED else own.judged
                yield sets, _SITE_VALUES[family.name](snapshot).ravel()
        elif family.labels in (RANK, ENGINE, (*ENGINE, "phase")):
            for snapshot in snapshots:
                yield _engine_series(family.name, snapshot)
        elif family.labels == ("meaning",):
            thresholds = self._settings.thresholds
            names = [f'meaning="{meaning}"' for meaning in thresholds]
            yield names, np.array([threshold.raise_below for threshold in thresholds.values()])
        elif family.name == "maxact_card_info":
            yield [_card_labels(card) for card in cards], np.ones(len(cards))
        else:
            yield [""], np.array([float(len(snapshots))])


class _Labels:
    """The label sets of one engine's sites, in the order of ``[phases, sites]`` and ``[meanings, sites]``."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.keys = snapshot.keys
        sites = [_site_labels(snapshot, key) for key in snapshot.keys]
        self.phased = [f'{site},phase="{phase}"' for phase in stats.PHASES for site in sites]
        self.judged = [f'{site},meaning="{meaning}"' for meaning in MEANINGS for site in sites]


def _site_labels(snapshot: Snapshot, key: SiteKey) -> str:
    layer, name = key
    place = "" if layer is None else f',layer="{layer}"'
    return f'{_engine_labels(snapshot)}{place},site="{name}"'


def _engine_labels(snapshot: Snapshot) -> str:
    return f'model_name="{_escape(snapshot.model)}",engine="{_escape(snapshot.engine)}"'


def _card_labels(loaded: LoadedCard) -> str:
    bos = {None: "unknown", True: "true", False: "false"}[loaded.card.bos]
    return f'model_name="{_escape(loaded.served_model)}",card="{_escape(loaded.name)}",bos="{bos}"'


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _nonfinite(snapshot: Snapshot) -> Floats:
    seen = (snapshot.total.sums[merge.TOKENS] > 0) | (snapshot.nonfinite > 0)
    return np.where(seen, snapshot.nonfinite, np.nan)


_SITE_VALUES: Final[Mapping[str, Callable[[Snapshot], Floats]]] = {
    "maxact_absmax": lambda snapshot: snapshot.hold.absmax,
    "maxact_absmax_high_water": lambda snapshot: snapshot.high_water,
    "maxact_max": lambda snapshot: snapshot.hold.extrema[stats.MAX],
    "maxact_min": lambda snapshot: snapshot.hold.extrema[stats.MIN],
    "maxact_rms": lambda snapshot: snapshot.hold.rms,
    "maxact_mean_abs": lambda snapshot: snapshot.hold.mean_abs,
    "maxact_crest_ratio": lambda snapshot: snapshot.hold.crest_ratio,
    "maxact_nonfinite_tokens_total": _nonfinite,
    "maxact_headroom_ratio": lambda snapshot: snapshot.headroom_ratio,
    "maxact_headroom_limit": lambda snapshot: np.where(snapshot.judged, snapshot.limit, np.nan),
    "maxact_headroom_flag": lambda snapshot: np.where(snapshot.judged, snapshot.active, np.nan),
    "maxact_headroom_flag_since_timestamp_seconds": lambda snapshot: np.where(snapshot.active, snapshot.since, np.nan),
}
"""``[phases, sites]`` or ``[meanings, sites]``; what is not finite has no series."""


def _engine_series(name: str, snapshot: Snapshot) -> tuple[list[str], Floats]:
    engine = _engine_labels(snapshot)
    ranks = [f'{engine},rank="{rank.rank}"' for rank in snapshot.ranks]
    match name:
        case "maxact_tokens_total":
            return [f'{engine},phase="{phase}"' for phase in stats.PHASES], np.array(snapshot.tokens, np.float64)
        case "maxact_rank_up":
            return ranks, np.array([float(rank.connected) for rank in snapshot.ranks])
        case "maxact_rank_last_window_timestamp_seconds":
            return ranks, np.array([rank.last_window_seconds or np.nan for rank in snapshot.ranks])
        case "maxact_windows_total":
            return [engine], np.array([float(snapshot.windows)])
        case "maxact_windows_coalesced_total":
            return [engine], np.array([float(snapshot.coalesced)])
    raise AssertionError(f"{name} has no values")


def _flatten(parts: Iterable[tuple[Sequence[str], Floats]]) -> tuple[list[str], list[float]]:
    """Label sets and values of the series that exist."""
    sets: list[str] = []
    values: list[float] = []
    for names, array in parts:
        known = np.isfinite(array)
        if known.all():
            sets += names
            values += array.tolist()
        else:
            sets += [names[index] for index in np.flatnonzero(known)]
            values += array[known].tolist()
    return sets, values


def _lines(family: Family, sets: list[str], values: list[float]) -> list[str]:
    if not family.labels:
        return [f"{family.name} {value!r}" for value in values]
    return [f"{family.name}{{{names}}} {value!r}" for names, value in zip(sets, values, strict=True)]


def _head(family: Family, as_openmetrics: bool) -> list[str]:
    name = family.name.removesuffix("_total") if as_openmetrics and family.type == "counter" else family.name
    unit = f" ({family.unit})" if family.unit else ""
    return [f"# HELP {name} {family.help}{unit}", f"# TYPE {name} {family.type}"]
