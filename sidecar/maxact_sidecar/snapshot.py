"""Hop 7/9: one engine at one moment, immutable; what is derived from statistics is computed when asked for.

P phases, S sites, M criteria, F formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from maxact_proto import wire
from maxact_proto.formats import FORMATS, Format
from maxact_sidecar import headroom, merge, resolution
from maxact_sidecar.headroom import Criterion, Evidence, Floats

SiteKey = tuple[int | None, str]
"""(layer, site name)."""


def peak(extrema: merge.Extrema) -> npt.NDArray[np.float32]:
    """``[S]`` from ``[2, P, S]``: absmax over all phases, ``-inf`` where nothing was seen."""
    peak: npt.NDArray[np.float32] = extrema.max(axis=(0, 1))
    return peak


@dataclass(frozen=True, kw_only=True, slots=True)
class RankDetail:
    """Statistics of one worker's own sites, not merged with those of the others."""

    sites: tuple[wire.Site, ...]
    absmax: npt.NDArray[np.float32]
    """``[P, S]``: over the hold horizon; NaN without tokens."""
    nonfinite: npt.NDArray[np.float64]
    """``[P, S]``: token rows since it started; NaN where it never saw any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSnapshot:
    """One worker of an engine."""

    rank: str
    connected: bool
    last_window_seconds: float | None
    """Arrival of its last window, seconds since the epoch."""
    windows: int
    coalesced: int
    detail: RankDetail | None = None
    """Only where it was asked for: it doubles what a snapshot of many workers costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One engine at one moment."""

    model: str
    engine: str
    instance: str
    model_type: str
    dtype: str
    vllm_version: str
    sites: tuple[wire.Site, ...]
    """Site table, widths over all shards. The same object until it changes."""
    keys: tuple[SiteKey, ...]
    hold: merge.Statistics
    """Over the hold horizon."""
    total: merge.Statistics
    """Since the workers started."""
    high_water: npt.NDArray[np.float32]
    """``[P, S]``: largest absmax ever, ``-inf`` where nothing was seen."""
    nonfinite: npt.NDArray[np.float64]
    """``[P, S]``: token rows, over restarts."""
    tokens: tuple[int, ...]
    """Per phase, over restarts."""
    worker_tokens: tuple[int, ...]
    """Per phase, since the workers started."""
    cached_tokens: int
    """Taken from the prefix cache since the workers started: never computed, so in no other number."""
    windows: int
    coalesced: int
    ranks: tuple[RankSnapshot, ...]
    histograms: tuple[npt.NDArray[np.float32], ...]
    """Parts of `histogram`."""
    criteria: tuple[Criterion, ...]
    """``[M]``."""
    limit: npt.NDArray[np.float64]
    """``[M, S]``: NaN where not judged."""
    typical: npt.NDArray[np.float64]
    """``[M, S]``: what is judged in place of the absmax in a block format, the largest of a typical block; else NaN."""
    flags: headroom.FlagTable
    """``[M, S]``."""

    @property
    def absmax(self) -> npt.NDArray[np.float32]:
        """``[S]``: over the hold horizon, all phases; NaN without tokens."""
        absmax = peak(self.hold.extrema)
        return np.where(np.isfinite(absmax), absmax, np.float32(np.nan))

    @property
    def histogram(self) -> npt.NDArray[np.float32]:
        """``[S, bins]``: elements by magnitude over the last minutes, all phases."""
        histogram: npt.NDArray[np.float32] = np.sum(self.histograms, axis=0)
        return histogram

    @property
    def formats(self) -> tuple[Format, ...]:
        """``[F]``: whose cost is estimated."""
        return tuple(FORMATS[criterion.format] for criterion in self.criteria if criterion.format)

    @property
    def zeroed_ratio(self) -> Floats:
        """``[F, S]``: share of elements that round to zero at the scale of absmax; NaN where nothing was counted."""
        histogram = self.histogram
        return self._per_format([resolution.zeroed_ratio(histogram, self.absmax, each) for each in self.formats])

    @property
    def sqnr_decibels(self) -> Floats:
        """``[F, S]``: signal to quantization noise at the scale of absmax; NaN where nothing was counted."""
        histogram, elements = self.histogram, self.hold.elements.sum(axis=0)
        power = self.hold.sums[merge.SQUARES].sum(axis=0) / np.where(elements > 0, elements, np.nan)
        return self._per_format(
            [resolution.sqnr_decibels(histogram, self.absmax, power, each) for each in self.formats]
        )

    @property
    def octave_ratio(self) -> Floats:
        """``[octaves, S]``: share of elements by magnitude; NaN where nothing was counted."""
        return resolution.octave_ratio(self.histogram)

    def _per_format(self, values: list[Floats]) -> Floats:
        return np.array(values).reshape(len(values), len(self.keys))

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """``[P, S]``: where elements that a static scale saturates and zeroes are counted."""
        scaled = np.array([site.limit is not None for site in self.sites])
        counted: npt.NDArray[np.bool_] = (self.total.elements > 0) & scaled
        return counted

    @property
    def headroom_ratio(self) -> npt.NDArray[np.float64]:
        """``[M, S]``: limit / absmax over the hold horizon; NaN where not judged or without tokens."""
        return headroom.ratio(self.limit, headroom.magnitude(self.absmax, self.typical))

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """``[M, S]``: raised flags."""
        raised: npt.NDArray[np.bool_] = self.flags["active"]
        return raised

    @property
    def evidence(self) -> list[Evidence]:
        """Flags that were ever raised."""
        return headroom.list_flags(self.flags, self.criteria)

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """``[M, S]``: sites that have a limit and were ever seen."""
        seen: npt.NDArray[np.bool_] = np.isfinite(self.limit) & (self.high_water.max(axis=0) >= 0)
        return seen
