"""Hop 8/9: extrema in, headroom ratios and flags out.

A headroom ratio is ``limit / absmax``: how often the largest magnitude fits under a limit. There is no single headroom;
every meaning has its own limit:

- ``range``: the absmax of a calibration card, all phases. Below 1 the traffic left what was calibrated.
- ``fp16``: 65504, the largest finite half. Below 1 an fp16 run of this model would have overflowed.
- ``resolution``: the absmax at whose INT-8 scale half of the elements of a linear layer's input round to zero. Below 1
  more than half do, at the scale that the absmax of this very window would need.
- ``saturation``: scale x qmax of the static scale that the served checkpoint uses. Below 1 values are clipped now.

A flag is raised when a window's ratio falls below the raise threshold, so that one spike shows at once, and cleared
when the ratio over the hold horizon is back at the clear threshold *and* the flag has been up for its minimum time.
Judging costs a few numpy calls per window; Python runs only for flags that change.

Shapes: P phases, S sites, M meanings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from maxact_proto import stats

Floats = npt.NDArray[np.floating]
Index = slice | npt.NDArray[np.intp]

FP16_LIMIT: Final = 65504.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """When a flag of one meaning goes up and down, as headroom ratios."""

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
    # At 1 the median element is at the edge of rounding to zero: what is left of the tensor is its outliers.
    "resolution": Threshold(raise_below=1.0, clear_at=1.25),
    # Nothing is clipped at 1, and a scale made from an absmax sits at 1 by design: no earlier warning.
    "saturation": Threshold(raise_below=1.0, clear_at=1.05),
}
"""In the order of every ``[M, ...]`` array."""

FLAG: Final = np.dtype(
    [
        ("active", np.bool_),
        ("since", np.float64),  # seconds since the epoch of the last raise, 0: never
        ("raised", np.float64),  # the same moment in steady seconds
        ("last_exceeded", np.float64),  # seconds since the epoch
        ("absmax", np.float64),  # the worst of the episode, and what it was judged against
        ("limit", np.float64),
        ("threshold", np.float64),
        ("phase", np.int64),
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
    """One flag: the worst value of its current (or last) episode and what that was judged against."""

    meaning: str
    site: int
    """Position in the engine's site table."""
    phase: str
    """Phase of the worst value."""
    absmax: float
    limit: float
    headroom_ratio: float
    threshold: float
    since: float
    """Seconds since the epoch."""
    last_exceeded: float
    """Seconds since the epoch."""
    active: bool


def ratio(limit: npt.NDArray[np.float64], absmax: Floats) -> npt.NDArray[np.float64]:
    """``limit [M, S] / absmax [S]``; NaN where either is unknown or the absmax is not positive."""
    known = np.isfinite(absmax) & (absmax > 0)
    headroom: npt.NDArray[np.float64] = limit / np.where(known, absmax, np.nan)
    return headroom


def list_flags(table: FlagTable) -> list[Evidence]:
    """All flags of a table ``[M, S]`` that were ever raised."""
    return [_evidence(table, *position) for position in np.argwhere(table["since"] > 0)]


def _evidence(table: FlagTable, meaning: int, site: int) -> Evidence:
    flag = table[meaning, site]
    return Evidence(
        meaning=tuple(MEANINGS)[meaning],
        site=int(site),
        phase=stats.PHASES[flag["phase"]],
        absmax=float(flag["absmax"]),
        limit=float(flag["limit"]),
        headroom_ratio=float(flag["limit"] / flag["absmax"]),
        threshold=float(flag["threshold"]),
        since=float(flag["since"]),
        last_exceeded=float(flag["last_exceeded"]),
        active=bool(flag["active"]),
    )


class Flags:
    """The flags of one engine. Not thread-safe: the engine's lock guards it."""

    def __init__(self, thresholds: Mapping[str, Threshold], hold_seconds: float) -> None:
        self.set_thresholds(thresholds, hold_seconds)
        self.limit = np.zeros((len(MEANINGS), 0))
        self.table: FlagTable = np.zeros((len(MEANINGS), 0), FLAG)
        self._ceiling = self.limit

    def set_thresholds(self, thresholds: Mapping[str, Threshold], hold_seconds: float) -> None:
        """Judge by these from the next `set_limits` on."""
        self._raise_below = np.array([[thresholds[name].raise_below] for name in MEANINGS])
        self._clear_at = np.array([[thresholds[name].clear_at] for name in MEANINGS])
        self._hold_seconds = hold_seconds

    def add_sites(self, flags: FlagTable) -> None:
        """Append sites with the flags they had, ``[M, S']``; positions of the others stay."""
        self.table = np.concatenate([self.table, flags], axis=1)

    def set_limits(self, limit: npt.NDArray[np.float64]) -> None:
        """Judge against ``limit [M, S]`` from now on (NaN: not judged)."""
        self.limit = np.where(limit > 0, limit, np.nan)
        judged = np.isfinite(self.limit)
        self._ceiling = np.where(judged, self.limit / self._raise_below, np.inf)
        self.table["active"] &= judged

    def observe(self, extrema: npt.NDArray[np.float32], index: Index, now: Instant) -> list[Evidence]:
        """Judge new values; what was raised. ``extrema`` is ``[2, P, S']``, its site k stands at ``index[k]``."""
        peak = np.maximum(*extrema)
        exceeded = peak.max(axis=0) > self._ceiling[:, index]
        if not exceeded.any():
            return []
        meaning, local = np.nonzero(exceeded)
        return self._record(meaning, np.arange(self.table.shape[1])[index][local], peak[:, local], now)

    def _record(
        self, meaning: npt.NDArray[np.intp], site: npt.NDArray[np.intp], peak: npt.NDArray[np.float32], now: Instant
    ) -> list[Evidence]:
        table = self.table
        fresh = ~table["active"][meaning, site]
        begun = (meaning[fresh], site[fresh])
        table["active"][begun] = True
        table["since"][begun] = now.wall
        table["raised"][begun] = now.steady
        table["absmax"][begun] = 0.0
        table["last_exceeded"][meaning, site] = now.wall
        worse = peak.max(axis=0) > table["absmax"][meaning, site]
        grown = (meaning[worse], site[worse])
        table["absmax"][grown] = peak.max(axis=0)[worse]
        table["limit"][grown] = self.limit[grown]
        table["threshold"][grown] = self._raise_below[grown[0], 0]
        table["phase"][grown] = peak.argmax(axis=0)[worse]
        return [_evidence(table, *position) for position in zip(*begun, strict=True)]

    def _may_clear(self, now: Instant) -> npt.NDArray[np.bool_]:
        old_enough: npt.NDArray[np.bool_] = now.steady - self.table["raised"] >= self._hold_seconds
        return self.table["active"] & old_enough

    def due(self, now: Instant) -> bool:
        """True where a flag has been up for its minimum time, so that `settle` could clear it."""
        return bool(self._may_clear(now).any())

    def settle(self, absmax: Floats, now: Instant) -> list[Evidence]:
        """Clear what may be cleared given ``absmax [S]`` over the hold horizon (``-inf``: no tokens); what was."""
        cleared = self._may_clear(now) & ~(absmax > self.limit / self._clear_at)
        self.table["active"][cleared] = False
        return [_evidence(self.table, *position) for position in np.argwhere(cleared)]
