"""Hop 7/9: the engines a sidecar knows.

An engine is the workers of one vLLM under one (model, engine) name. Each has one lock, held for a few numpy calls:
merging a window judges it at once, and a `Snapshot` copies under the lock while everything derived from it is computed
outside. What must not fall back when vLLM restarts (token and non-finite counters, high-water marks) lives here; what
belongs to a worker lives in its `RankState`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from maxact_proto import stats, wire
from maxact_proto.formats import FORMATS, FP16_LIMIT
from maxact_sidecar import headroom, merge, resolution
from maxact_sidecar.config import Settings
from maxact_sidecar.headroom import Evidence, Flags, Instant
from maxact_sidecar.history import Current
from maxact_sidecar.snapshot import RankDetail, RankSnapshot, SiteKey, Snapshot, peak
from maxact_sidecar.store import Memory, empty_memory, recall

_HISTOGRAM_SECONDS = 300.0
"""Horizon of histograms: a sample needs time, and shapes change slowly."""
_MOST_RANKS = 1024
_REMEMBER_SECONDS = 60.0
"""Numbers of windows of calm flags are written this often."""
_FEWEST_TOKENS = 256
"""Before so many are counted a median is not judged by."""

_log = logging.getLogger(__name__)


class Engine:
    """State of one (model, engine); thread-safe."""

    def __init__(
        self,
        layout: wire.Layout,
        label: str,
        settings: Settings,
        limits: Mapping[SiteKey, float],
        memory: Memory | None = None,
    ) -> None:
        """An engine nobody knows yet; ``memory``: what is known of one that had its name before this process."""
        self.model = layout.model
        self.label = label
        self.instance = layout.instance
        self.layout = layout
        self.disconnected_at: float | None = None
        """Steady seconds since the last rank left; None while one is connected."""
        self._half_horizon = settings.hold / 2
        self._range_limits = limits
        self._remembered = memory or empty_memory((), ())
        self._lock = threading.Lock()
        self._ranks: dict[str, merge.RankState] = {}
        self._positions: dict[SiteKey, int] = {}
        self._sites: tuple[wire.Site, ...] = ()
        self._keys: tuple[SiteKey, ...] = ()
        self._flags = Flags(settings.thresholds, settings.flag_hold)
        self._high_water = np.zeros((len(stats.PHASES), 0), np.float32)
        self._nonfinite = np.zeros((len(stats.PHASES), 0))
        self._nonfinite_before: dict[SiteKey, npt.NDArray[np.float64]] = {}
        """``[P]`` of sites that this engine had before vLLM restarted."""
        self._tokens = np.zeros(len(stats.PHASES), np.int64)
        self._windows = self._coalesced = 0
        self._histograms = [_no_histogram(0), _no_histogram(0)]
        """Two halves of their horizon, the older first; never written to, so that snapshots need no copies."""
        self._histogram_period = 0
        self._is_changed = True
        self._remembered_at = -math.inf
        """Steady seconds of the last `memory`."""

    @property
    def is_alias(self) -> bool:
        """True where the engine's own name was taken when it came."""
        return self.label != self.layout.engine

    @property
    def connected(self) -> bool:
        """True while a rank has a stream."""
        return self.disconnected_at is None

    @property
    def site_tables(self) -> list[tuple[wire.Site, ...]]:
        """Of its ranks."""
        return [rank.layout.sites for rank in self._ranks.values()]

    def attach(self, layout: wire.Layout) -> merge.RankState:
        """The state of a worker of this instance, known before or new. Raises `WireError` where its sites changed."""
        keys = [(site.layer, site.name) for site in layout.sites]
        with self._lock:
            rank = self._ranks.get(layout.rank)
            if rank is None:
                if len(self._ranks) >= _MOST_RANKS:
                    raise wire.WireError("layout.tensor_parallel_rank", f"{_MOST_RANKS} ranks of this engine are known")
                rank = self._ranks[layout.rank] = merge.RankState(layout, self._place(keys))
                self._name_sites()
                self._set_limits()
            elif rank.layout.sites != layout.sites:
                raise wire.WireError("layout.sites", f"differ from what {layout.rank} of this instance sent before")
            rank.streams += 1
            rank.generation += 1
            self.disconnected_at = None
        return rank

    def restarted(self, layout: wire.Layout, settings: Settings) -> Engine:
        """The engine when vLLM restarted: counters and marks go on, the site table holds what it observes now."""
        with self._lock:
            successor = Engine(layout, self.label, settings, self._range_limits, self._everything_remembered())
            nonfinite = self._nonfinite + self._merge(hold=False).sums[merge.NONFINITE]
            successor._nonfinite_before = self._nonfinite_before | dict(zip(self._keys, nonfinite.T, strict=True))
            successor._tokens = self._tokens + self._worker_tokens()
            successor._windows, successor._coalesced = self._windows, self._coalesced
        return successor

    def _everything_remembered(self) -> Memory:
        """`memory`, and what came from before but was not observed since."""
        own = self._memory()
        others = tuple(key for key in self._remembered.keys if key not in self._positions)
        rest = recall(self._remembered, others, own.criteria)
        return Memory(
            criteria=own.criteria,
            keys=(*own.keys, *others),
            high_water=np.concatenate([own.high_water, rest.high_water], axis=1),
            flags=np.concatenate([own.flags, rest.flags], axis=1),
        )

    def _place(self, keys: list[SiteKey]) -> headroom.Index:
        """Positions of sites in the engine's table, which grows by those it does not hold yet."""
        fresh = tuple(key for key in keys if key not in self._positions)
        for key in fresh:
            self._positions[key] = len(self._positions)
        index = np.array([self._positions[key] for key in keys])
        known = recall(self._remembered, fresh, self._flags.criteria)
        self._high_water = np.concatenate([self._high_water, known.high_water], axis=1)
        self._flags.add_sites(known.flags)
        none = np.zeros(len(stats.PHASES))
        before = [self._nonfinite_before.get(key, none) for key in fresh]
        self._nonfinite = np.column_stack([self._nonfinite, *before])
        self._histograms = [
            np.pad(half, ((0, len(fresh)), (0, 0))) if half.any() else _no_histogram(len(self._positions))
            for half in self._histograms
        ]
        # A slice is a view; an index array copies. One rank, and ranks in pipeline order, have contiguous sites.
        contiguous = (np.diff(index) == 1).all()
        return slice(int(index[0]), int(index[-1]) + 1) if contiguous else index

    def _name_sites(self) -> None:
        """Rebuild the site table: the widths of a site's shards add up."""
        table: dict[SiteKey, wire.Site] = {}
        for rank in sorted(self._ranks.values(), key=lambda rank: rank.layout.tp_rank):
            for site in rank.layout.sites:
                known = table.get((site.layer, site.name))
                if known is None:
                    table[site.layer, site.name] = site
                elif site.sharded:
                    table[site.layer, site.name] = replace(known, width=known.width + site.width)
        self._keys = tuple(self._positions)
        self._sites = tuple(table[key] for key in self._keys)

    def _set_limits(self) -> None:
        """All limits, where sites came or what they are judged against changed."""
        self._fixed_limits = np.full((len(self._flags.criteria), len(self._keys)), np.nan)
        for row, criterion in enumerate(self._flags.criteria):
            match criterion.meaning:
                case "range":
                    self._fixed_limits[row] = [self._range_limits.get(key, np.nan) for key in self._keys]
                case "fp16":
                    self._fixed_limits[row] = FP16_LIMIT
                case "saturation":
                    self._fixed_limits[row] = [np.nan if site.limit is None else site.limit for site in self._sites]
        self._quantized = np.array([name in resolution.INPUTS_OF_LINEAR_LAYERS for _, name in self._keys])
        self._enough = np.array([_FEWEST_TOKENS * site.width for site in self._sites])
        self._set_resolution_limits()

    def _set_resolution_limits(self) -> None:
        """Those that follow from histograms."""
        limits, typical = self._fixed_limits.copy(), np.full(self._fixed_limits.shape, np.nan)
        histogram = np.add(*self._histograms)
        known = self._quantized & (histogram.sum(axis=-1) >= self._enough)
        median = resolution.median(histogram)
        for row, criterion in enumerate(self._flags.criteria):
            if criterion.meaning == "resolution":
                number = FORMATS[criterion.format]
                # After a restart there is no histogram at first: a raised flag goes on as it was raised.
                worst, limit = self._flags.raised_at(row)
                limits[row] = np.where(known, resolution.limit(median, number), limit)
                if number.block:
                    typical[row] = np.where(known, resolution.typical_block_maximum(histogram, number), worst)
        self._flags.set_limits(limits, typical)

    def set_range_limits(self, limits: Mapping[SiteKey, float], now: Instant) -> None:
        """Judge ``range`` against these from now on, what is in the hold horizon included."""
        with self._lock:
            self._range_limits = limits
            raised = self._judge_again(now)
        self._announce("raised", raised)

    def set_thresholds(self, settings: Settings, now: Instant) -> None:
        """Judge by other thresholds from now on, what is in the hold horizon included."""
        with self._lock:
            self._flags.set_thresholds(settings.thresholds, settings.flag_hold)
            raised = self._judge_again(now)
        self._announce("raised", raised)

    def _judge_again(self, now: Instant) -> list[Evidence]:
        self._set_limits()
        self._is_changed = True
        return self._flags.observe(self._hold_extrema(now), slice(None), now, count=False)

    def is_unsaved(self, now: Instant) -> bool:
        """True where a mark rose or a flag changed since `memory` was asked for, or that was long ago."""
        return self._is_changed or now.steady - self._remembered_at >= _REMEMBER_SECONDS

    def memory(self, now: Instant) -> Memory:
        """What is to outlive the engine's workers and this process."""
        with self._lock:
            self._is_changed, self._remembered_at = False, now.steady
            return self._memory()

    def _memory(self) -> Memory:
        high_water = self._high_water.copy()
        for rank in self._ranks.values():
            high_water[:, rank.index] = np.maximum(high_water[:, rank.index], rank.lifetime.max(axis=0))
        return Memory(criteria=self._flags.criteria, keys=self._keys, high_water=high_water, flags=self._flags.table)

    def detach(self, rank: merge.RankState, now: Instant) -> None:
        """A stream of this worker ended."""
        with self._lock:
            rank.streams -= 1
            if not any(rank.streams for rank in self._ranks.values()):
                self.disconnected_at = now.steady

    def merge_window(self, rank: merge.RankState, window: wire.Window, now: Instant) -> bool:
        """Merge and judge a window; False where it was merged before."""
        with self._lock:
            if window.sequence <= rank.last_sequence:
                return False
            marks = rank.marks
            extrema = rank.merge(window, self._period(now), now.wall)
            self._windows += 1
            self._coalesced += window.coalesced
            if window.histogram is not None:
                self._add_histogram(window.histogram, rank.index, now)
            exceedings = self._flags.exceedings
            raised = self._flags.observe(extrema, rank.index, now, count=True)
            self._is_changed |= rank.marks != marks or self._flags.exceedings != exceedings
        self._announce("raised", raised)
        return True

    def _add_histogram(self, histogram: wire.Histogram, index: headroom.Index, now: Instant) -> None:
        """Shards add up; what several ranks counted of a whole tensor changes no share."""
        period = int(now.steady // (_HISTOGRAM_SECONDS / 2))
        if period != self._histogram_period:
            fresh = _no_histogram(len(self._positions))
            adjacent = period == self._histogram_period + 1
            self._histograms = [self._histograms[-1] if adjacent else fresh, fresh]
            self._histogram_period = period
        grown = self._histograms[-1].copy()
        grown[index] += histogram
        self._histograms = [self._histograms[0], grown]
        self._set_resolution_limits()

    def settle(self, now: Instant) -> None:
        """Clear flags whose time has come."""
        with self._lock:
            if not self._flags.due(now):
                return
            cleared = self._flags.settle(peak(self._hold_extrema(now)), now)
            self._is_changed |= bool(cleared)
        self._announce("cleared", cleared)

    def current(self, now: Instant) -> Current:
        """The site table, and absmax of all phases over the hold horizon."""
        with self._lock:
            return self._keys, peak(self._hold_extrema(now))

    def snapshot(self, now: Instant, *, ranks_apart: bool = False) -> Snapshot:
        """The engine at this moment; ``ranks_apart``: with the statistics of every worker on its own."""
        self.settle(now)
        with self._lock:
            ranks = self._rotated(now)
            holds = [rank.part(hold=True) for rank in ranks]
            totals = [rank.part(hold=False) for rank in ranks]
            flags = self._flags
            parts = Snapshot(
                model=self.model,
                engine=self.label,
                instance=self.instance,
                model_type=self.layout.model_type,
                dtype=self.layout.dtype,
                vllm_version=self.layout.vllm_version,
                sites=self._sites,
                keys=self._keys,
                hold=_NOTHING,
                total=_NOTHING,
                high_water=self._high_water,
                nonfinite=self._nonfinite,
                tokens=tuple((self._tokens + self._worker_tokens()).tolist()),
                worker_tokens=tuple(self._worker_tokens().tolist()),
                cached_tokens=max((rank.cached for rank in ranks), default=0),
                windows=self._windows,
                coalesced=self._coalesced,
                ranks=tuple(_rank_snapshot(rank) for rank in ranks),
                histograms=tuple(self._histograms),
                criteria=flags.criteria,
                limit=flags.limit,
                typical=flags.typical,
                flags=flags.table,
            )
        if ranks_apart:
            details = [_detail(*each) for each in zip(ranks, holds, totals, strict=True)]
            apart = [replace(rank, detail=own) for rank, own in zip(parts.ranks, details, strict=True)]
            parts = replace(parts, ranks=tuple(apart))
        return _merged(parts, holds, totals)

    def _worker_tokens(self) -> npt.NDArray[np.int64]:
        """Every rank sees every token, the slowest last."""
        counts = [rank.tokens for rank in self._ranks.values()]
        return np.max(counts, axis=0) if counts else np.zeros_like(self._tokens)

    def _period(self, now: Instant) -> int:
        return int(now.steady // self._half_horizon)

    def _rotated(self, now: Instant) -> list[merge.RankState]:
        ranks = sorted(self._ranks.values(), key=lambda rank: (rank.layout.pp_rank, rank.layout.tp_rank))
        for rank in ranks:
            rank.rotate(self._period(now))
        return ranks

    def _merge(self, *, hold: bool) -> merge.Statistics:
        return merge.merge_ranks([rank.part(hold=hold) for rank in self._ranks.values()], len(self._positions))

    def _hold_extrema(self, now: Instant) -> merge.Extrema:
        extrema = merge.empty_extrema(len(self._positions))
        for rank in self._rotated(now):
            extrema[..., rank.index] = np.maximum(extrema[..., rank.index], rank.hold_extrema())
        return extrema

    def _announce(self, event: str, flags: list[Evidence]) -> None:
        for flag in flags:
            layer, name = self._keys[flag.site]
            _log.warning(
                f"flag {event} meaning=%(meaning)s format=%(format)s model=%(model)s engine=%(engine)s "
                "layer=%(layer)s site=%(site)s phase=%(phase)s absmax=%(absmax).3g limit=%(limit).3g "
                "headroom_ratio=%(headroom_ratio).3g threshold=%(threshold)g first_exceeded=%(first_exceeded)s "
                "windows_exceeded=%(windows_exceeded)d windows=%(windows)d phases_exceeded=%(phases_exceeded)s",
                {
                    "meaning": flag.criterion.meaning,
                    "format": flag.criterion.format or "-",
                    "model": self.model,
                    "engine": self.label,
                    "layer": "-" if layer is None else layer,
                    "site": name,
                    "phase": flag.phase or "-",
                    "absmax": flag.absmax,
                    "limit": flag.limit,
                    "headroom_ratio": flag.headroom_ratio,
                    "threshold": flag.threshold,
                    "first_exceeded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(flag.first_exceeded)),
                    "windows_exceeded": flag.windows_exceeded,
                    "windows": flag.windows,
                    "phases_exceeded": ",".join(f"{each}:{n}" for each, n in flag.phases_exceeded.items()) or "-",
                },
            )


def _no_histogram(num_sites: int) -> wire.Histogram:
    return np.broadcast_to(np.float32(0), (num_sites, stats.NUM_BINS))


_NOTHING = merge.merge_ranks([], 0)


def _merged(parts: Snapshot, holds: list[merge.Part], totals: list[merge.Part]) -> Snapshot:
    """The snapshot with its ranks merged; runs outside the lock."""
    num_sites = len(parts.keys)
    total = merge.merge_ranks(totals, num_sites)
    return replace(
        parts,
        hold=merge.merge_ranks(holds, num_sites),
        total=total,
        high_water=np.maximum(parts.high_water, total.extrema.max(axis=0)),
        nonfinite=parts.nonfinite + total.sums[merge.NONFINITE],
    )


def _detail(rank: merge.RankState, hold: merge.Part, total: merge.Part) -> RankDetail:
    num_sites = len(rank.layout.sites)
    own, ever = (merge.merge_ranks([replace(part, index=slice(None))], num_sites) for part in (hold, total))
    nonfinite = ever.sums[merge.NONFINITE]
    seen = np.isfinite(ever.absmax) | (nonfinite > 0)
    return RankDetail(sites=rank.layout.sites, absmax=own.absmax, nonfinite=np.where(seen, nonfinite, np.nan))


def _rank_snapshot(rank: merge.RankState) -> RankSnapshot:
    return RankSnapshot(
        rank=rank.layout.rank,
        connected=rank.streams > 0,
        last_window_seconds=rank.last_window_seconds,
        windows=rank.windows,
        coalesced=rank.coalesced,
    )
