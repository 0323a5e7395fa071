"""Hop 8/9: extrema in, headroom ratios and flags out.

A headroom ratio is ``limit / absmax``: how often the largest magnitude fits under a limit. There is no single headroom;
every meaning has its own limit:

- ``range``: the absmax of a calibration card, all phases. Below 1 the traffic left what was calibrated.
- ``fp16``: 65504, the largest finite half. Below 1 an fp16 run of this model would have overflowed.
- ``resolution``, once for each format that is asked for: the absmax at whose scale half of the elements of a linear
  layer's input round to zero. Below 1 more than half do, at the scale that the absmax of this very window would need.
  In a block format the largest of a block sets the scale: there, that of a typical block stands in for the absmax.
- ``saturation``: scale x qmax of the static scale that the served checkpoint uses. Below 1 values are clipped now.

A meaning, with its format where it has one, is a criterion. A flag is raised when a window's ratio falls below the
raise threshold, so that one spike shows at once, and cleared when the ratio over the hold horizon is back at the clear
threshold *and* the flag has been up for its minimum time. Judging costs a few numpy calls per window; Python runs only
for flags that change.

A flag says what is wrong now. What tells a spike from drift is kept beside it, for ever: when a window first exceeded
the threshold, and of how many windows with tokens since then how many did, in which phases.

Shapes: P phases, S sites, M criteria.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from maxact_proto import stats
from maxact_proto.formats import FORMATS

Floats = npt.NDArray[np.floating]
Index = slice | npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """When a flag of one criterion goes up and down, as headroom ratios."""

    raise_below: float
    clear_at: float

    def scaled_to(self, raise_below: float) -> Threshold:
        """The same hysteresis around another raise threshold."""
        return Threshold(raise_below=raise_below, clear_at=raise_below * self.clear_at / self.raise_below)


MEANINGS: Final = {
    # Samples of the same domain exceed a calibrated maximum by a few percent; 11 % beyond it is different traffic.
    "range": Threshold(raise_below=0.9, clear_at=1.0),
    # A quarter of an octave below overflow: the next few percent of growth are not waited for.
    "fp16": Threshold(raise_below=1.25, clear_at=1.5),
    # The ratio is the median element in halves of the smallest step. That is the same loss in every format, and at 1
    # the median element is at the edge of rounding to zero: what is left of the tensor is its outliers.
    "resolution": Threshold(raise_below=1.0, clear_at=1.25),
    # Nothing is clipped at 1, and a scale made from an absmax sits at 1 by design: no earlier warning.
    "saturation": Threshold(raise_below=1.0, clear_at=1.05),
}


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a site is judged by: a row of every ``[M, ...]`` array."""

    meaning: str
    format: str = ""
    """Of ``resolution``; empty otherwise."""

    @property
    def is_per_block(self) -> bool:
        """True where not the absmax is judged but the largest of a typical block."""
        return bool(self.format) and FORMATS[self.format].block > 0


def criteria(formats: Iterable[str]) -> tuple[Criterion, ...]:
    """All meanings, ``resolution`` once per format."""
    names = tuple(formats)
    return tuple(
        Criterion(meaning, name) for meaning in MEANINGS for name in (names if meaning == "resolution" else ("",))
    )


ALL_CRITERIA: Final = criteria(FORMATS)

FLAG: Final = np.dtype(
    [
        ("active", np.bool_),
        ("since", np.float64),  # seconds since the epoch of the last raise
        ("raised", np.float64),  # the same moment in steady seconds
        ("last_exceeded", np.float64),  # seconds since the epoch
        ("absmax", np.float64),  # the worst of the episode, and what it was judged against
        ("limit", np.float64),
        ("threshold", np.float64),
        ("phase", np.int8),  # of the worst; -1: of a block, which no phase is known of
        ("first_exceeded", np.float64),  # seconds since the epoch, 0: never
        ("windows", np.int32),  # with tokens, since then
        ("windows_exceeded", np.int32),  # of these
        ("phases_exceeded", np.int32, (len(stats.PHASES),)),  # of these, in each phase
    ]
)
"""One flag of a ``[M, S]`` table."""
FlagTable = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Instant:
    """One moment on two clocks, in seconds: ``wall`` since the epoch, ``steady`` for durations."""

    wall: float
    steady: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """One flag: the worst value of its current (or last) episode, what that was judged against, and its history."""

    criterion: Criterion
    site: int
    """Position in the engine's site table."""
    phase: str | None
    """Phase of the worst value; None in a block format."""
    absmax: float
    """In a block format the largest of a typical block."""
    limit: float
    headroom_ratio: float
    threshold: float
    since: float
    """Seconds since the epoch."""
    last_exceeded: float
    """Seconds since the epoch."""
    first_exceeded: float
    """Seconds since the epoch, over all episodes and restarts."""
    windows: int
    """With tokens of this site, since it was first exceeded. A window is one worker's."""
    windows_exceeded: int
    """Of these, beyond the threshold."""
    phases_exceeded: dict[str, int]
    """Of these, in each phase; empty in a block format."""
    active: bool

    @property
    def exceeded_ratio(self) -> float | None:
        """Share of windows that exceeded; None before a window was counted."""
        return self.windows_exceeded / self.windows if self.windows else None


def magnitude(absmax: Floats, typical: Floats) -> Floats:
    """``[M, S]``: what is judged, the largest of a ``typical [M, S]`` block where there is one, else ``absmax [S]``.

    What saw no token (``-inf`` or NaN) stays that.
    """
    return np.where(np.isfinite(typical) & (absmax > -np.inf), typical, absmax)


def ratio(limit: npt.NDArray[np.float64], magnitude: Floats) -> npt.NDArray[np.float64]:
    """``limit [M, S] / magnitude [M, S] or [S]``; NaN where either is unknown or the magnitude is not positive."""
    known = np.isfinite(magnitude) & (magnitude > 0)
    headroom: npt.NDArray[np.float64] = limit / np.where(known, magnitude, np.nan)
    return headroom


def list_flags(table: FlagTable, of: Sequence[Criterion]) -> list[Evidence]:
    """All flags of a table ``[M, S]`` that were ever raised."""
    return [_evidence(table, of, *position) for position in np.argwhere(table["first_exceeded"] > 0)]


def _evidence(table: FlagTable, of: Sequence[Criterion], row: int, site: int) -> Evidence:
    flag = table[row, site]
    known = flag["phase"] >= 0
    return Evidence(
        criterion=of[row],
        site=int(site),
        phase=stats.PHASES[flag["phase"]] if known else None,
        absmax=float(flag["absmax"]),
        limit=float(flag["limit"]),
        headroom_ratio=float(flag["limit"] / flag["absmax"]),
        threshold=float(flag["threshold"]),
        since=float(flag["since"]),
        last_exceeded=float(flag["last_exceeded"]),
        first_exceeded=float(flag["first_exceeded"]),
        windows=int(flag["windows"]),
        windows_exceeded=int(flag["windows_exceeded"]),
        phases_exceeded=dict(zip(stats.PHASES, flag["phases_exceeded"].tolist(), strict=True)) if known else {},
        active=bool(flag["active"]),
    )


def _no_flags(num_criteria: int, num_sites: int) -> FlagTable:
    """``[M, S]``: read-only zeros that take no memory, as long as none was ever raised."""
    return np.broadcast_to(np.zeros((), FLAG), (num_criteria, num_sites))


class Flags:
    """The flags of one engine. Not thread-safe: the engine's lock guards it."""

    def __init__(self, thresholds: Mapping[Criterion, Threshold], hold_seconds: float) -> None:
        self.criteria = tuple(thresholds)
        self._per_block = np.array([[criterion.is_per_block] for criterion in self.criteria])
        self._any_per_block = bool(self._per_block.any())
        self.set_thresholds(thresholds, hold_seconds)
        self.limit = np.zeros((len(self.criteria), 0))
        self.typical = self.limit
        # Of a flag, the number of windows is kept less those of its site, so that a window adds to one number per site.
        self._table: FlagTable = _no_flags(len(self.criteria), 0)
        self._windows = np.zeros(0, np.int32)
        self._ceiling = self.limit
        self._lowest_ceiling = np.zeros(0)
        self.exceedings = 0
        """How often anything was beyond a threshold."""

    @property
    def table(self) -> FlagTable:
        """``[M, S]``, which does not change any more."""
        if not self._table.flags.writeable:
            return self._table
        table = self._table.copy()
        table["windows"] += self._windows * (table["first_exceeded"] > 0)
        return table

    def set_thresholds(self, thresholds: Mapping[Criterion, Threshold], hold_seconds: float) -> None:
        """Judge by these from the next `set_limits` on; the criteria stay."""
        self._raise_below = np.array([[thresholds[criterion].raise_below] for criterion in self.criteria])
        self._clear_at = np.array([[thresholds[criterion].clear_at] for criterion in self.criteria])
        self._hold_seconds = hold_seconds

    def add_sites(self, flags: FlagTable) -> None:
        """Append sites with the flags they had, ``[M, S']``; positions of the others stay."""
        some = self._table.flags.writeable or flags["first_exceeded"].any()
        num_sites = self._table.shape[1] + flags.shape[1]
        self._table = np.concatenate([self._table, flags], axis=1) if some else _no_flags(len(flags), num_sites)
        self._windows = np.append(self._windows, np.zeros(flags.shape[1], np.int32))

    def set_limits(self, limit: npt.NDArray[np.float64], typical: npt.NDArray[np.float64]) -> None:
        """Judge against ``limit [M, S]`` from now on (NaN: not judged), in block formats by ``typical [M, S]``."""
        self.limit = np.where(limit > 0, limit, np.nan)
        self.typical = typical
        judged = np.isfinite(self.limit)
        self._ceiling = np.where(judged, self.limit / self._raise_below, np.inf)
        self._lowest_ceiling = self._ceiling.min(axis=0, initial=np.inf)
        if self._table.flags.writeable:
            self._table["active"] &= judged

    @property
    def active(self) -> npt.NDArray[np.bool_]:
        """``[M, S]``: raised flags."""
        active: npt.NDArray[np.bool_] = self._table["active"]
        return active

    def raised_at(self, row: int) -> tuple[Floats, Floats]:
        """Of raised flags of a criterion the worst value and its limit, ``[S]``; NaN for others."""
        flags = self._table[row]
        return np.where(flags["active"], flags["absmax"], np.nan), np.where(flags["active"], flags["limit"], np.nan)

    def _magnitude(self, absmax: Floats, index: Index = slice(None)) -> Floats:
        return magnitude(absmax, self.typical[:, index]) if self._any_per_block else absmax

    def observe(self, extrema: npt.NDArray[np.float32], index: Index, now: Instant, *, count: bool) -> list[Evidence]:
        """Judge new values; what was raised. ``extrema`` is ``[2, P, S']``, its site k stands at ``index[k]``.

        ``count``: they are a window, not values that were judged before.
        """
        peak = np.maximum(*extrema)
        absmax = peak.max(axis=0)
        if count:
            self._windows[index] += absmax > -np.inf
        if not self._any_per_block and not (absmax > self._lowest_ceiling[index]).any():
            return []
        judged = self._magnitude(absmax, index)
        exceeded = judged > self._ceiling[:, index]
        if not exceeded.any():
            return []
        self.exceedings += 1
        row, local = np.nonzero(exceeded)
        site = np.arange(self._table.shape[1])[index][local]
        worst = np.broadcast_to(judged, exceeded.shape)[row, local]
        return self._record(row, site, worst, peak[:, local], now, count=count)

    def _record(
        self,
        row: npt.NDArray[np.intp],
        site: npt.NDArray[np.intp],
        worst: Floats,
        peak: npt.NDArray[np.float32],
        now: Instant,
        *,
        count: bool,
    ) -> list[Evidence]:
        if not self._table.flags.writeable:
            self._table = self._table.copy()
        table = self._table
        at = (row, site)
        fresh = ~table["active"][at]
        begun = (row[fresh], site[fresh])
        table["active"][begun] = True
        table["since"][begun] = now.wall
        table["raised"][begun] = now.steady
        table["absmax"][begun] = 0.0
        table["last_exceeded"][at] = now.wall
        self._count(at, peak, now, count=count)
        worse = worst > table["absmax"][at]
        grown = (row[worse], site[worse])
        table["absmax"][grown] = worst[worse]
        table["limit"][grown] = self.limit[grown]
        table["threshold"][grown] = self._raise_below[grown[0], 0]
        table["phase"][grown] = np.where(self._per_block[grown[0], 0], -1, peak.argmax(axis=0)[worse])
        table = self.table if begun[0].size else table
        return [_evidence(table, self.criteria, *position) for position in zip(*begun, strict=True)]

    def _count(
        self,
        at: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]],
        peak: npt.NDArray[np.float32],
        now: Instant,
        *,
        count: bool,
    ) -> None:
        table = self._table
        first = table["first_exceeded"][at] == 0
        never = (at[0][first], at[1][first])
        table["first_exceeded"][never] = now.wall
        table["windows"][never] = int(count) - self._windows[never[1]]
        if count:
            table["windows_exceeded"][at] += 1
            table["phases_exceeded"][at] += (peak > self._ceiling[at]).T

    def _may_clear(self, now: Instant) -> npt.NDArray[np.bool_]:
        old_enough: npt.NDArray[np.bool_] = now.steady - self._table["raised"] >= self._hold_seconds
        return self._table["active"] & old_enough

    def due(self, now: Instant) -> bool:
        """True where a flag has been up for its minimum time, so that `settle` could clear it."""
        return bool(self._may_clear(now).any())

    def settle(self, absmax: Floats, now: Instant) -> list[Evidence]:
        """Clear what may be cleared given ``absmax [S]`` over the hold horizon (``-inf``: no tokens); what was."""
        cleared = self._may_clear(now) & ~(self._magnitude(absmax) > self.limit / self._clear_at)
        if not cleared.any():
            return []
        self._table["active"][cleared] = False
        table = self.table
        return [_evidence(table, self.criteria, *position) for position in np.argwhere(cleared)]
