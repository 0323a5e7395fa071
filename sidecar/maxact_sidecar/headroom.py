"""Hop 8/9: extrema in, headroom ratios and flags out.

A headroom ratio is ``limit / absmax``: how often the largest magnitude fits under a limit. There is no single headroom;
every meaning has its own limit:

- ``range``: the absmax of a calibration card, all phases. Below 1 the traffic left what was calibrated.
- ``fp16``: 65504, the largest finite half. Below 1 an fp16 run of this model would have overflowed.

A flag is raised when a window's ratio falls below the raise threshold, so that one spike shows at once, and cleared
when the ratio over the hold horizon is back at the clear threshold *and* the flag has been up for its minimum time.
Judging costs a few numpy calls per window; Python runs only for flags that change.

Shapes: P phases, S sites, M meanings.
"""

from __future__ import annotations

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
}


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


class Flags:
    """The flags of one engine. Not thread-safe: the engine's lock guards it. Arrays are ``[M, S]``."""

    def __init__(self, thresholds: dict[str, Threshold], hold_seconds: float) -> None:
        self._meanings = tuple(thresholds)
        self._raise_below = np.array([[thresholds[name].raise_below] for name in self._meanings])
        self._clear_at = np.array([[thresholds[name].clear_at] for name in self._meanings])
        self._hold_seconds = hold_seconds
        self.limit = self._filled(0, np.nan)
        self.active = np.zeros((len(self._meanings), 0), np.bool_)
        self.since = self._filled(0, 0.0)
        self._raised = self._filled(0, 0.0)
        self._last_exceeded = self._filled(0, 0.0)
        self._worst = self._filled(0, 0.0)
        self._worst_limit = self._filled(0, 0.0)
        self._phase = np.zeros((len(self._meanings), 0), np.intp)
        self._ceiling = self._filled(0, np.inf)

    def _filled(self, num_sites: int, value: float) -> npt.NDArray[np.float64]:
        return np.full((len(self._meanings), num_sites), value)

    def set_limits(self, limit: npt.NDArray[np.float64]) -> None:
        """Judge against ``limit [M, S]`` from now on (NaN: not judged). S may grow; positions keep their meaning."""
        self._grow(limit.shape[1])
        self.limit = np.where(limit > 0, limit, np.nan)
        judged = np.isfinite(self.limit)
        self._ceiling = np.where(judged, self.limit / self._raise_below, np.inf)
        self.active &= judged

    def _grow(self, num_sites: int) -> None:
        pad = ((0, 0), (0, num_sites - self.active.shape[1]))
        for name in ("active", "since", "_raised", "_last_exceeded", "_worst", "_worst_limit", "_phase"):
            setattr(self, name, np.pad(getattr(self, name), pad))

    def observe(self, extrema: npt.NDArray[np.float32], index: Index, now: Instant) -> list[Evidence]:
        """Judge new values; what was raised. ``extrema`` is ``[2, P, S']``, its site k stands at ``index[k]``."""
        peak = np.maximum(extrema[stats.MAX], -extrema[stats.MIN])
        exceeded = peak.max(axis=0) > self._ceiling[:, index]
        if not exceeded.any():
            return []
        meaning, local = np.nonzero(exceeded)
        return self._record(meaning, np.arange(self.active.shape[1])[index][local], peak[:, local], now)

    def _record(
        self, meaning: npt.NDArray[np.intp], site: npt.NDArray[np.intp], peak: npt.NDArray[np.float32], now: Instant
    ) -> list[Evidence]:
        fresh = ~self.active[meaning, site]
        begun = (meaning[fresh], site[fresh])
        self.active[begun] = True
        self.since[begun] = now.wall
        self._raised[begun] = now.steady
        self._worst[begun] = 0.0
        self._last_exceeded[meaning, site] = now.wall
        worse = peak.max(axis=0) > self._worst[meaning, site]
        grown = (meaning[worse], site[worse])
        self._worst[grown] = peak.max(axis=0)[worse]
        self._worst_limit[grown] = self.limit[grown]
        self._phase[grown] = peak.argmax(axis=0)[worse]
        return [self._evidence(*position) for position in zip(*begun, strict=True)]

    def due(self, now: Instant) -> bool:
        """True where a flag has been up for its minimum time, so that `settle` could clear it."""
        return bool((self.active & (now.steady - self._raised >= self._hold_seconds)).any())

    def settle(self, absmax: Floats, now: Instant) -> list[Evidence]:
        """Clear what may be cleared given ``absmax [S]`` over the hold horizon (``-inf``: no tokens); what was."""
        old_enough = self.active & (now.steady - self._raised >= self._hold_seconds)
        cleared = old_enough & ~(absmax > self.limit / self._clear_at)
        self.active &= ~cleared
        return [self._evidence(*position) for position in np.argwhere(cleared)]

    def evidence(self) -> list[Evidence]:
        """All flags that were ever raised."""
        return [self._evidence(*position) for position in np.argwhere(self.since > 0)]

    def _evidence(self, meaning: int, site: int) -> Evidence:
        at = (meaning, site)
        return Evidence(
            meaning=self._meanings[meaning],
            site=int(site),
            phase=stats.PHASES[self._phase[at]],
            absmax=float(self._worst[at]),
            limit=float(self._worst_limit[at]),
            headroom_ratio=float(self._worst_limit[at] / self._worst[at]),
            threshold=float(self._raise_below[meaning, 0]),
            since=float(self.since[at]),
            last_exceeded=float(self._last_exceeded[at]),
            active=bool(self.active[at]),
        )
