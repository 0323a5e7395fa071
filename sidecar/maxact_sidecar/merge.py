"""Hop 7/9: windows of all ranks in, one set of statistics per engine out.

Each rank accumulates on its own (`RankState`, a handful of numpy calls per window); ranks meet when somebody looks
(`merge_ranks`), so that which rank counts is decided with all of them at hand:

- extrema merge by max and min over all ranks;
- sums of sharded sites add up over tensor-parallel ranks, as do their elements and what a static scale saturates and
  zeroes of them; those of replicated sites are counted once, from the lowest tensor-parallel rank that has data;
- tokens and non-finite token rows are the largest of any rank: every rank of an engine computes the same tokens, and a
  row that is non-finite in several slices is still one row.

The hold horizon is kept as two half-horizon buckets, float32: a gauge needs no more, and a window touches little
memory. What leaves it is added to a float64 total, so the sums since a worker started are those of the past and of both
buckets. Shapes: P phases, S sites.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from maxact_proto import stats, wire
from maxact_sidecar.headroom import Index

Extrema = npt.NDArray[np.float32]
"""``[2, P, S]``: (max, -min), so that both merge by maximum and the larger is absmax; -inf where nothing was seen."""
Sums = npt.NDArray[np.float64]
"""``[4, P, S]``: the rows below."""
SQUARES, MAGNITUDES, NONFINITE, TOKENS = range(4)
Counts = stats.Counts
assert (SQUARES, MAGNITUDES, NONFINITE) == tuple(
    column - stats.NUM_EXTREMA for column in (stats.SUM_SQUARES, stats.SUM_ABS, stats.NONFINITE)
), "the first rows are the wire's sum columns, in their order"

# A float32 sum of squares overflows above |x| = 1.8e19; an infinity in a running total would never leave it. So many
# windows fit into a half-horizon before its float32 overflows.
_LARGEST: Final = np.finfo(np.float32).max / np.float32(2**16)


def empty_extrema(num_sites: int) -> Extrema:
    """Extrema of sites that saw nothing, ``[2, P, S]``."""
    return np.full((2, len(stats.PHASES), num_sites), -np.inf, np.float32)


def _extrema(values: stats.Values) -> Extrema:
    """`Extrema` from (max, min, ...) ``[P, S, ..]``; a new array."""
    extrema = values[..., : stats.NUM_EXTREMA].transpose(2, 0, 1).copy()
    np.negative(extrema[1], out=extrema[1])
    return extrema


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Statistics of all sites over some time. Derived quantities are NaN where there were no tokens."""

    extrema: Extrema
    sums: Sums
    elements: npt.NDArray[np.float64]
    """``[P, S]``: finite elements behind the sums."""
    counts: Counts
    """``[P, S, counts]``: saturated and zeroed elements, of `stats.COUNTS`; 0 where there is no static scale."""

    @property
    def absmax(self) -> npt.NDArray[np.float32]:
        """``[P, S]``."""
        return self._known(self.extrema.max(axis=0))

    @property
    def maximum(self) -> npt.NDArray[np.float32]:
        """``[P, S]``: largest signed value."""
        return self._known(self.extrema[0])

    @property
    def minimum(self) -> npt.NDArray[np.float32]:
        """``[P, S]``: smallest signed value."""
        return self._known(-self.extrema[1])

    @staticmethod
    def _known(extremum: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.where(np.isfinite(extremum), extremum, np.float32(np.nan))

    @property
    def rms(self) -> npt.NDArray[np.float64]:
        """``[P, S]``."""
        return np.sqrt(self._per_element(SQUARES))

    @property
    def mean_abs(self) -> npt.NDArray[np.float64]:
        """``[P, S]``."""
        return self._per_element(MAGNITUDES)

    @property
    def crest_ratio(self) -> npt.NDArray[np.float64]:
        """``[P, S]``: absmax / rms."""
        rms = self.rms
        crest: npt.NDArray[np.float64] = self.absmax / np.where(rms > 0, rms, np.nan)
        return crest

    @property
    def saturation_ratio(self) -> npt.NDArray[np.float64]:
        """``[P, S]``: share of elements beyond the limit of the served static scale."""
        share: npt.NDArray[np.float64] = self.counts[..., stats.SATURATED] / np.where(
            self.elements > 0, self.elements, np.nan
        )
        return share

    def _per_element(self, row: int) -> npt.NDArray[np.float64]:
        mean: npt.NDArray[np.float64] = self.sums[row] / np.where(self.elements > 0, self.elements, np.nan)
        return mean


class _Running:
    """Sums over some time. What is the same for all sites, or nearly always zero, is not stored for each."""

    def __init__(self, num_sites: int, dtype: type[np.floating]) -> None:
        self.energies = np.zeros((2, len(stats.PHASES), num_sites), dtype)
        """``[2, P, S]``: squares and magnitudes."""
        self.tokens = np.zeros(len(stats.PHASES), np.int64)
        """Of the windows."""
        self.rare: npt.NDArray[np.float64] | None = None
        """``[2, P, S]``: non-finite token rows, and tokens of windows in which the site saw none."""

    def add(self, values: stats.Values, tokens: npt.NDArray[np.int64], phases: slice) -> None:
        """Add what a window holds; its tokens, ``[P]``, are all within ``phases``."""
        columns = values.transpose(2, 0, 1)[:, phases]
        energies = columns[stats.SUM_SQUARES : stats.NONFINITE]
        if columns[stats.SUM_SQUARES].max(initial=0.0) >= _LARGEST:
            energies = np.minimum(energies, _LARGEST)
        self.energies[:, phases] += energies
        self.tokens += tokens
        seen, nonfinite = columns[stats.MAX] > -np.inf, columns[stats.NONFINITE]
        if not seen.all() or nonfinite.any():
            missed = ~(seen | (nonfinite > 0)) * tokens[phases, None]
            self._add_rare(phases, np.stack([nonfinite, missed]))

    def clear(self) -> None:
        """Hold nothing again."""
        self.energies.fill(0)
        self.tokens.fill(0)
        self.rare = None

    def absorb(self, other: _Running) -> None:
        """Add what another one holds."""
        self.energies += other.energies
        self.tokens += other.tokens
        if other.rare is not None:
            self._add_rare(slice(None), other.rare)

    def _add_rare(self, phases: slice, rare: npt.NDArray[np.floating]) -> None:
        if rare.any():
            if self.rare is None:
                self.rare = np.zeros(self.energies.shape)
            self.rare[:, phases] += rare

    def full(self) -> npt.NDArray[np.float64]:
        """All rows, ``[4, P, S]``."""
        sums = np.zeros((4, *self.energies.shape[1:]))
        sums[:NONFINITE] = self.energies
        sums[TOKENS] = self.tokens[:, None]
        if self.rare is not None:
            sums[NONFINITE] = self.rare[0]
            sums[TOKENS] -= self.rare[1]
        return sums


class RankState:
    """What one worker sent since it started. Not thread-safe: the engine's lock guards it."""

    def __init__(self, layout: wire.Layout, index: Index) -> None:
        self.layout = layout
        self.index = index
        """Where this rank's sites stand in the engine's site table."""
        self.widths = np.array([site.width for site in layout.sites], np.float64)
        self.sharded = np.array([site.sharded for site in layout.sites])
        self.streams = 0
        """How many are open."""
        self.generation = 0
        """How many were opened: only the newest may merge."""
        self.last_sequence = 0
        self.last_window_seconds: float | None = None
        self.windows = 0
        self.coalesced = 0
        self.tokens = np.zeros(len(stats.PHASES), np.int64)
        self.cached = 0
        """Tokens that were taken from the prefix cache."""
        num_sites = len(layout.sites)
        self.lifetime = empty_extrema(num_sites)
        self.marks = 0
        """How often an extremum of the lifetime rose."""
        self._period = 0
        self._buckets = [empty_extrema(num_sites) for _ in range(2)]
        self._sums = [_Running(num_sites, np.float32) for _ in range(2)]
        self._past = _Running(num_sites, np.float64)
        """Sums before those of the hold horizon."""
        # Nothing without static scales: a fleet need not hold zeros.
        self._num_counts = len(stats.COUNTS) if any(site.limit is not None for site in layout.sites) else 0
        self._total_counts = self._no_counts()
        self._counts = [self._no_counts() for _ in range(2)]

    def _no_counts(self) -> Counts:
        return np.zeros((*self.lifetime.shape[1:], self._num_counts), np.int64)

    def merge(self, window: wire.Window, period: int, seconds: float) -> Extrema:
        """Merge a window that arrived in half-horizon number ``period``, at epoch ``seconds``; its extrema."""
        extrema = _extrema(window.values)
        self.rotate(period)
        np.maximum(self._buckets[-1], extrema, out=self._buckets[-1])
        self._raise(extrema)
        if window.lifetime is not None:
            self._raise(_extrema(window.lifetime))
        tokens = np.array(window.tokens, np.int64)
        self._sums[-1].add(window.values, tokens, window.phases)
        self.tokens += tokens
        if self._num_counts and window.counts is not None:
            self._total_counts += window.counts
            self._counts[-1] += window.counts
        self.cached += window.cached
        self.last_sequence = window.sequence
        self.last_window_seconds = seconds
        self.windows += 1
        self.coalesced += window.coalesced
        return extrema

    def _raise(self, extrema: Extrema) -> None:
        if (extrema > self.lifetime).any():
            self.marks += 1
            np.maximum(self.lifetime, extrema, out=self.lifetime)

    def rotate(self, period: int) -> None:
        """Forget what is older than the hold horizon, but for the sums of all time."""
        if period == self._period:
            return
        # Emptied, not made anew: a fleet does this every few seconds, and its heap would end in pieces.
        for _ in range(1 if period == self._period + 1 else 2):
            self._past.absorb(self._sums[0])
            self._sums[0].clear()
            self._buckets[0].fill(-np.inf)
            self._counts[0].fill(0)
            for buckets in (self._sums, self._buckets, self._counts):
                buckets.reverse()
        self._period = period

    def hold_extrema(self) -> Extrema:
        """Extrema over the hold horizon, a new array."""
        return np.maximum(*self._buckets)

    def part(self, *, hold: bool) -> Part:
        """A copy of the statistics over the hold horizon, or since the worker started."""
        sums = self._sums[0].full() + self._sums[1].full()
        return Part(
            order=(self.layout.tp_rank, self.layout.pp_rank),
            index=self.index,
            widths=self.widths,
            sharded=self.sharded,
            extrema=self.hold_extrema() if hold else self.lifetime.copy(),
            sums=sums if hold else sums + self._past.full(),
            counts=np.add(*self._counts) if hold else self._total_counts.copy(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Statistics of one rank, to be merged: ``S'`` sites that stand at ``index`` in the engine's table."""

    order: tuple[int, int]
    index: Index
    widths: npt.NDArray[np.float64]
    sharded: npt.NDArray[np.bool_]
    extrema: Extrema
    sums: Sums
    counts: Counts
    """``[P, S', counts]``, or none of them."""


def no_counts(num_sites: int) -> Counts:
    """Counts of sites without static scales, ``[P, S, counts]``; read-only zeros that take no memory."""
    return np.broadcast_to(np.int64(0), (len(stats.PHASES), num_sites, len(stats.COUNTS)))


def merge_ranks(parts: Iterable[Part], num_sites: int) -> Statistics:
    """Statistics of an engine from its ranks, by the rules of this module."""
    extrema = empty_extrema(num_sites)
    sums = np.zeros((4, len(stats.PHASES), num_sites))
    elements = np.zeros(sums.shape[1:])
    counts = no_counts(num_sites)
    for part in sorted(parts, key=lambda part: part.order):
        at = part.index
        first = part.sharded | (sums[TOKENS][:, at] == 0)
        extrema[:, :, at] = np.maximum(extrema[:, :, at], part.extrema)
        sums[:NONFINITE, :, at] += part.sums[:NONFINITE] * first
        elements[:, at] += (part.sums[TOKENS] - part.sums[NONFINITE]) * part.widths * first
        sums[NONFINITE:, :, at] = np.maximum(sums[NONFINITE:, :, at], part.sums[NONFINITE:])
        if part.counts.shape[-1]:
            counts = counts if counts.flags.writeable else counts.copy()
            counts[:, at] += part.counts * first[..., None]
    return Statistics(extrema=extrema, sums=sums, elements=elements, counts=counts)
