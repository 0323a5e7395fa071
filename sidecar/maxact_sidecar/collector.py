"""Hop 8/9: snapshots in, ``/metrics`` out.

The bulk of the series (one per site, phase and statistic) is rendered straight from numpy with label sets cached per
site table and filled into templates: 50,000 series through `prometheus_client` gauges cost 390 ms, this way 12. A value
that is not known is an absent series, never a sentinel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
from prometheus_client import exposition as text_format
from prometheus_client.openmetrics import exposition as openmetrics

from maxact_proto import stats
from maxact_sidecar import merge, resolution
from maxact_sidecar.card import LoadedCard
from maxact_sidecar.config import Settings
from maxact_sidecar.families import (
    CRITERION,
    DETAIL,
    ENGINE,
    FAMILIES,
    FORMATTED,
    OCTAVES,
    RANK,
    RANK_PHASED,
    SITE,
    Detail,
    Family,
    SelfMetrics,
)
from maxact_sidecar.headroom import Criterion, Floats
from maxact_sidecar.snapshot import RankDetail, SiteKey, Snapshot

TEXT: Final = text_format.CONTENT_TYPE_LATEST
OPENMETRICS: Final = openmetrics.CONTENT_TYPE_LATEST

_OCTAVE_LABELS: Final = [f'octave="{start:.9g}"' for start in resolution.OCTAVES]


@dataclass(frozen=True, slots=True)
class _Template:
    """The lines of one engine's series of one family, a placeholder for each value."""

    keys: object
    """Of the site table that it was made for."""
    mask: bytes
    """Which of its label sets have a series."""
    text: bytes
    """Filled in as bytes: a third faster than as text that is encoded afterwards."""


class Collector:
    """Renders scrapes; safe to call from several threads.

    A scrape fills values into templates. They are made anew where a site table changed, or which of its sites have a
    value; both are rare.
    """

    def __init__(self, settings: Settings, metrics: SelfMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._templates: dict[tuple[str, int], _Template] = {}

    def use_settings(self, settings: Settings) -> None:
        """Show these thresholds and keep this series cap from the next scrape on."""
        self._settings = settings

    def render(
        self,
        snapshots: Sequence[Snapshot],
        cards: Sequence[LoadedCard],
        *,
        as_openmetrics: bool,
        details: Collection[Detail] = (),
    ) -> Iterator[bytes]:
        """One scrape, in the Prometheus text format or in OpenMetrics; ``details``: with these of `DETAIL`.

        In parts: a large fleet's is 20 MB, which need not be there at once.
        """
        started = time.perf_counter()
        room = self._settings.max_series
        dropped = 0
        templates: dict[tuple[str, int], _Template] = {}
        for family in _families(details):
            head = _head(family, as_openmetrics)
            for part, (keys, sets, values) in enumerate(self._series(family, snapshots, cards)):
                known, left_out = _known(values, room)
                room -= (shown := int(known.sum()))
                dropped += left_out
                if shown:
                    key = (family.name, part)
                    templates[key] = template = _template(family, keys, sets, known, self._templates.get(key))
                    yield head + template.text % tuple(values[known].tolist()) + b"\n"
                    head = b""
        self._templates = templates
        self._metrics.series.set(self._settings.max_series - room)
        self._metrics.series_dropped.inc(dropped)
        # What this scrape cost is shown by the next one.
        yield (openmetrics if as_openmetrics else text_format).generate_latest(self._metrics.registry)
        self._metrics.render_seconds.observe(time.perf_counter() - started)

    def _series(
        self, family: Family, snapshots: Sequence[Snapshot], cards: Sequence[LoadedCard]
    ) -> Iterable[tuple[object, Callable[[], Sequence[str]], Floats]]:
        """Per template: what it depends on, its label sets, and the values; NaN where there is no series."""
        if family.labels[: len(SITE)] == SITE:
            for snapshot in snapshots:
                values = _SITE_VALUES[family.name](snapshot).ravel()
                yield snapshot.keys, partial(_site_sets, snapshot, family.labels), values
        elif family.labels == RANK_PHASED:
            for snapshot in snapshots:
                yield from _detail_series(family.name, snapshot)
        elif family.labels in (RANK, ENGINE, (*ENGINE, "phase")):
            for snapshot in snapshots:
                yield None, *_engine_series(family.name, snapshot)
        elif family.labels == CRITERION:
            thresholds = self._settings.thresholds
            names = [_criterion_labels(criterion) for criterion in thresholds]
            yield None, lambda: names, np.array([threshold.raise_below for threshold in thresholds.values()])
        elif family.name == "maxact_card_info":
            yield None, lambda: [_card_labels(card) for card in cards], np.ones(len(cards))
        else:
            yield None, lambda: [""], np.array([float(len(snapshots))])


def _families(details: Collection[Detail]) -> Iterable[Family]:
    yield from FAMILIES
    for name, families in DETAIL.items():
        if name in details:
            yield from families


def _site_sets(snapshot: Snapshot, labels: tuple[str, ...]) -> list[str]:
    """Label sets in the order of `_SITE_VALUES`. Made anew when needed."""
    sites = [_site_labels(snapshot, key) for key in snapshot.keys]
    criteria = [_criterion_labels(criterion) for criterion in snapshot.criteria]
    formats = [f'format="{number.name}"' for number in snapshot.formats]
    phases = [f'phase="{phase}"' for phase in stats.PHASES]
    own = (
        (criteria, "meaning" in labels),
        (formats, labels == FORMATTED),
        (phases, "phase" in labels),
        (_OCTAVE_LABELS, labels == OCTAVES),
    )
    for values, there in own:
        if there:
            sites = [f"{each},{value}" for value in values for each in sites]
    return sites


def _criterion_labels(criterion: Criterion) -> str:
    own = f',format="{criterion.format}"' if criterion.format else ""
    return f'meaning="{criterion.meaning}"{own}'


def _site_labels(snapshot: Snapshot, key: SiteKey) -> str:
    return _engine_labels(snapshot) + _place_labels(*key)


def _place_labels(layer: int | None, name: str) -> str:
    place = "" if layer is None else f',layer="{layer}"'
    return f'{place},site="{name}"'


def _detail_series(name: str, snapshot: Snapshot) -> Iterable[tuple[None, Callable[[], Sequence[str]], Floats]]:
    for rank in snapshot.ranks:
        if rank.detail:
            labels = f'{_engine_labels(snapshot)},rank="{rank.rank}"'
            yield None, partial(_detail_sets, labels, rank.detail), _DETAIL_VALUES[name](rank.detail).ravel()


def _detail_sets(rank: str, detail: RankDetail) -> list[str]:
    """Label sets in the order of ``[phases, sites]``."""
    places = [rank + _place_labels(site.layer, site.name) for site in detail.sites]
    return [f'{place},phase="{phase}"' for phase in stats.PHASES for place in places]


def _engine_labels(snapshot: Snapshot) -> str:
    return f'model_name="{_escape(snapshot.model)}",engine="{_escape(snapshot.engine)}"'


def _card_labels(loaded: LoadedCard) -> str:
    bos = {None: "unknown", True: "true", False: "false"}[loaded.card.bos]
    return f'model_name="{_escape(loaded.served_model)}",card="{_escape(loaded.name)}",bos="{bos}"'


def _escape(text: str) -> str:
    """A label value as the text formats want it, inside a template."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"").replace("%", "%%")


def _nonfinite(snapshot: Snapshot) -> Floats:
    seen = (snapshot.total.sums[merge.TOKENS] > 0) | (snapshot.nonfinite > 0)
    return np.where(seen, snapshot.nonfinite, np.nan)


def _counts(snapshot: Snapshot, counts: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> Floats:
    return np.where(snapshot.counted, counts, np.nan)


_SITE_VALUES: Final[Mapping[str, Callable[[Snapshot], Floats]]] = {
    "maxact_absmax": lambda snapshot: snapshot.hold.absmax,
    "maxact_absmax_high_water": lambda snapshot: snapshot.high_water,
    "maxact_max": lambda snapshot: snapshot.hold.maximum,
    "maxact_min": lambda snapshot: snapshot.hold.minimum,
    "maxact_rms": lambda snapshot: snapshot.hold.rms,
    "maxact_mean_abs": lambda snapshot: snapshot.hold.mean_abs,
    "maxact_crest_ratio": lambda snapshot: snapshot.hold.crest_ratio,
    "maxact_zeroed_ratio": lambda snapshot: snapshot.zeroed_ratio,
    "maxact_sqnr_decibels": lambda snapshot: snapshot.sqnr_decibels,
    "maxact_magnitude_octave_ratio": lambda snapshot: snapshot.octave_ratio,
    "maxact_saturation_ratio": lambda snapshot: np.where(snapshot.counted, snapshot.hold.saturation_ratio, np.nan),
    "maxact_saturated_total": lambda snapshot: _counts(snapshot, snapshot.total.counts[..., stats.SATURATED]),
    "maxact_zeroed_total": lambda snapshot: _counts(snapshot, snapshot.total.counts[..., stats.ZEROED]),
    "maxact_scaled_elements_total": lambda snapshot: _counts(snapshot, snapshot.total.elements),
    "maxact_nonfinite_tokens_total": _nonfinite,
    "maxact_headroom_ratio": lambda snapshot: snapshot.headroom_ratio,
    "maxact_headroom_limit": lambda snapshot: np.where(snapshot.judged, snapshot.limit, np.nan),
    "maxact_headroom_flag": lambda snapshot: np.where(snapshot.judged, snapshot.active, np.nan),
    "maxact_headroom_flag_since_timestamp_seconds": lambda snapshot: np.where(
        snapshot.active, snapshot.flags["since"], np.nan
    ),
    "maxact_headroom_first_exceeded_timestamp_seconds": lambda snapshot: _of_exceeded(snapshot, "first_exceeded"),
    "maxact_headroom_windows_total": lambda snapshot: _of_exceeded(snapshot, "windows"),
    "maxact_headroom_windows_exceeded_total": lambda snapshot: _of_exceeded(snapshot, "windows_exceeded"),
    "maxact_headroom_phase_windows_exceeded_total": lambda snapshot: _of_phases(snapshot),
}
"""``[sites]``, or ``[..., sites]`` with phases, criteria, phases and criteria, formats or octaves before.

What is not finite has no series.
"""


def _of_exceeded(snapshot: Snapshot, column: str) -> Floats:
    """``[criteria, sites]``: a column of flags that were ever raised."""
    return np.where(snapshot.flags["first_exceeded"] > 0, snapshot.flags[column], np.nan)


def _of_phases(snapshot: Snapshot) -> Floats:
    """``[phases, criteria, sites]``: windows that exceeded in a phase, of flags that know phases."""
    of_phases = np.moveaxis(snapshot.flags["phases_exceeded"], -1, 0).astype(np.float64)
    known = (snapshot.flags["first_exceeded"] > 0) & (snapshot.flags["phase"] >= 0)
    return np.where(known, of_phases, np.nan)


_DETAIL_VALUES: Final[Mapping[str, Callable[[RankDetail], Floats]]] = {
    "maxact_rank_absmax": lambda detail: detail.absmax,
    "maxact_rank_nonfinite_tokens_total": lambda detail: detail.nonfinite,
}
"""``[phases, sites]``."""


def _engine_series(name: str, snapshot: Snapshot) -> tuple[Callable[[], list[str]], Floats]:
    sets, values = _engine_values(name, snapshot)
    return lambda: sets, values


def _engine_values(name: str, snapshot: Snapshot) -> tuple[list[str], Floats]:
    engine = _engine_labels(snapshot)
    ranks = [f'{engine},rank="{rank.rank}"' for rank in snapshot.ranks]
    match name:
        case "maxact_tokens_total":
            return [f'{engine},phase="{phase}"' for phase in stats.PHASES], np.array(snapshot.tokens, np.float64)
        case "maxact_rank_up":
            return ranks, np.array([float(rank.connected) for rank in snapshot.ranks])
        case "maxact_rank_last_window_timestamp_seconds":
            return ranks, np.array([rank.last_window_seconds or np.nan for rank in snapshot.ranks])
        case "maxact_cached_tokens_total":
            return [engine], np.array([float(snapshot.cached_tokens)])
        case "maxact_windows_total":
            return [engine], np.array([float(snapshot.windows)])
        case "maxact_windows_coalesced_total":
            return [engine], np.array([float(snapshot.coalesced)])
    raise AssertionError(f"{name} has no values")


def _known(values: Floats, room: int) -> tuple[npt.NDArray[np.bool_], int]:
    """Which series exist and are shown, and how many do not find room."""
    known: npt.NDArray[np.bool_] = np.isfinite(values)
    left_out = np.flatnonzero(known)[room:]
    known[left_out] = False
    return known, len(left_out)


def _template(
    family: Family,
    keys: object,
    sets: Callable[[], Sequence[str]],
    known: npt.NDArray[np.bool_],
    former: _Template | None,
) -> _Template:
    mask = known.tobytes()
    if keys is not None and former is not None and former.keys is keys and former.mask == mask:
        return former
    shown = sets()
    names = [f"{{{shown[index]}}}" if family.labels else "" for index in np.flatnonzero(known)]
    text = "\n".join(f"{family.name}{labels} {family.format}" for labels in names)
    return _Template(keys, mask, text.encode())


def _head(family: Family, as_openmetrics: bool) -> bytes:
    name = family.name.removesuffix("_total") if as_openmetrics and family.type == "counter" else family.name
    unit = f" ({family.unit})" if family.unit else ""
    return f"# HELP {name} {family.help}{unit}\n# TYPE {name} {family.type}\n".encode()
