"""Hop 8/9: what the absmax of every site was since this process started, for the page, in constant memory.

One grid of time for all engines: when it is full, neighbouring rows merge by maximum and the step doubles, so that a
spike never fades. Sampled often enough that none is missed: an absmax is held for half of the hold horizon at least.
Long history belongs to Prometheus. Times run on the steady clock from the start, a wall clock that jumps bends nothing.
Shapes: T rows of time, S sites.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from maxact_sidecar.headroom import Instant
from maxact_sidecar.snapshot import SiteKey
from maxact_sidecar.store import EngineKey

_ROWS: Final = 120
"""Even. 64 engines of 1,000 sites take 31 MB."""
_MOST_SITES: Final = 100_000
"""Of all engines: 48 MB."""
_STEP_SECONDS: Final = 5.0

Current = tuple[tuple[SiteKey, ...], npt.NDArray[np.float32]]
"""The site table of an engine, and ``[S]``: absmax of now, not finite where nothing was seen."""


@dataclass(frozen=True, slots=True)
class Course:
    """The history of one engine."""

    keys: tuple[SiteKey, ...]
    absmax: npt.NDArray[np.float32]
    """``[T, S]``: NaN where nothing was seen."""


class History:
    """absmax over time; thread-safe."""

    def __init__(self, hold_seconds: float) -> None:
        """Begins with the first `add`."""
        self._sample_seconds = min(_STEP_SECONDS, hold_seconds / 2)
        self._start = Instant(0.0, 0.0)
        self._next = -math.inf
        self._lock = threading.Lock()
        self._step_seconds = self._sample_seconds
        self._num_rows = 0
        self._courses: dict[EngineKey, Course] = {}

    def is_due(self, now: Instant) -> bool:
        """True where it is time to `add`."""
        return now.steady >= self._next

    def add(self, engines: Mapping[EngineKey, Current], now: Instant) -> None:
        """Take in what engines show now. One that is missing is forgotten; one that is too many is left out."""
        if self._next == -math.inf:
            self._start = now
        self._next = now.steady + self._sample_seconds
        with self._lock:
            row = self._row(now)
            former, self._courses = self._courses, {}
            room = _MOST_SITES
            for name, (keys, absmax) in engines.items():
                if len(keys) <= room:
                    room -= len(keys)
                    course = self._courses[name] = _place(former.get(name), keys)
                    known = np.where(np.isfinite(absmax), absmax, np.float32(np.nan))
                    course.absmax[row] = np.fmax(course.absmax[row], known)
            self._num_rows = row + 1

    def _row(self, now: Instant) -> int:
        while (row := int((now.steady - self._start.steady) / self._step_seconds)) >= _ROWS:
            self._courses = {name: _halved(course) for name, course in self._courses.items()}
            self._step_seconds *= 2
        return row

    def show(self) -> tuple[list[float], dict[EngineKey, Course]]:
        """Begin of every row until now, seconds since the epoch, and what engines were in those."""
        with self._lock:
            rows = self._num_rows
            times = [self._start.wall + row * self._step_seconds for row in range(rows)]
            courses = {name: Course(each.keys, each.absmax[:rows]) for name, each in self._courses.items()}
        return times, courses


def _place(course: Course | None, keys: tuple[SiteKey, ...]) -> Course:
    """The course with these sites, as it is where they did not change."""
    if course is not None and course.keys == keys:
        return course
    absmax = np.full((_ROWS, len(keys)), np.nan, np.float32)
    if course is not None:
        position = {key: index for index, key in enumerate(course.keys)}
        for index, key in enumerate(keys):
            if key in position:
                absmax[:, index] = course.absmax[:, position[key]]
    return Course(keys, absmax)


def _halved(course: Course) -> Course:
    absmax = np.full_like(course.absmax, np.nan)
    absmax[: _ROWS // 2] = np.fmax(course.absmax[::2], course.absmax[1::2])
    return Course(course.keys, absmax)
