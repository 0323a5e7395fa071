"""Hop 4/9: at each interval the running window is taken off the device and closed: accumulators -> `Window`.

A thread of ours swaps the two sets of accumulators, so that the model's thread goes on folding into the other one
without a lock, then copies the full set and empties it. On a GPU both happen on a side stream that waits for the
model's stream; the model's stream waits for nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from maxact_proto import stats, wire
from maxact_vllm import logger
from maxact_vllm.fold import Accumulators

_HISTOGRAM_SECONDS = 30.0
"""A histogram is four times as large as the rest of a window, and its shape changes slowly."""
_FIRST_HISTOGRAMS = 20
"""So many come as soon as there is anything to tell: of 64 rows one is counted, and nothing is judged by a few."""


class Flusher(threading.Thread):
    """Closes a window every ``layout.interval_seconds``, busy or idle, and hands it to ``deliver``."""

    def __init__(
        self,
        accumulators: Accumulators,
        histograms: torch.Tensor,
        layout: wire.Layout,
        deliver: Callable[[wire.Window], None],
    ) -> None:
        super().__init__(name="maxact-flush", daemon=True)
        self._state = accumulators
        self._histograms = histograms
        self._counted = np.zeros(tuple(histograms.shape), np.int64)
        self._next_histogram = 0.0
        self._num_histograms = 0
        self._layout = layout
        self._deliver = deliver
        self._lifetime = stats.empty(len(layout.sites))[..., : stats.NUM_EXTREMA].copy()
        on_gpu = accumulators.empty.is_cuda
        self._take = _take_from_gpu(accumulators) if on_gpu else _take_from_cpu(accumulators)
        self._read = _reader_of_gpu(histograms) if on_gpu else histograms.numpy().copy
        self._since = time.time()
        self._silent: set[int] | None = None
        self._halt = threading.Event()

    def run(self) -> None:
        """Until `stop`. An error is logged and ends the thread: the model does not notice."""
        try:
            deadline = time.monotonic()
            while True:
                # Deadlines are multiples, not sleeps added up: a late window does not delay all later ones.
                deadline = max(deadline + self._layout.interval_seconds, time.monotonic())
                stopped = self._halt.wait(deadline - time.monotonic())
                self._deliver(self.close_window())
                if stopped:
                    return
        except Exception:
            logger.exception("maxact stopped measuring; serving goes on")

    def stop(self) -> None:
        """Close and deliver a last window; returns when that is done, within a second."""
        self._halt.set()
        if self.is_alive():
            self.join(timeout=1)

    def close_window(self) -> wire.Window:
        """The statistics since the last call. Layout id and sequence number are the stream's business."""
        state = self._state
        taken = state.active
        state.active = 1 - taken
        folds = state.folds
        while folds % 2 and state.folds == folds:  # a fold is being launched, into which set we cannot know
            time.sleep(0.0002)
        tokens = tuple(state.tokens[taken])
        values, counts = self._take(taken) if any(tokens) else (stats.empty(len(self._layout.sites)), None)
        cached, state.cached[taken] = state.cached[taken], 0
        state.tokens[taken][:] = [0] * len(tokens)
        np.maximum(self._lifetime[..., stats.MAX], values[..., stats.MAX], out=self._lifetime[..., stats.MAX])
        np.minimum(self._lifetime[..., stats.MIN], values[..., stats.MIN], out=self._lifetime[..., stats.MIN])
        if any(tokens):
            self._watch_silent_sites(values)
        start, self._since = self._since, time.time()
        return wire.Window(
            layout_id=0,
            sequence=0,
            start_seconds=start,
            end_seconds=self._since,
            tokens=tokens,
            values=values,
            lifetime=self._lifetime.copy(),
            histogram=self._close_histogram(),
            counts=counts,
            cached=cached,
        )

    def _close_histogram(self) -> wire.Histogram | None:
        """What was counted since the last one; None before its time has come, or without any."""
        if time.monotonic() < self._next_histogram and not self._halt.is_set():
            return None
        counted = self._read()
        grown, self._counted = counted - self._counted, counted
        if not grown.any():
            return None
        self._num_histograms += 1
        if self._num_histograms >= _FIRST_HISTOGRAMS:
            self._next_histogram = time.monotonic() + _HISTOGRAM_SECONDS
        return grown.astype(np.float32)

    def _watch_silent_sites(self, values: stats.Values) -> None:
        """Say so when tokens flow and a site stays empty: a hook that vLLM optimized away must not pass unnoticed."""
        empty = np.isneginf(values[..., stats.MAX]) & (values[..., stats.NONFINITE] == 0)
        silent = set(np.flatnonzero(empty.all(axis=0)).tolist())
        new = silent - (self._silent or set())
        self._silent = silent | (self._silent or set())
        if new:
            sites = [self._layout.sites[index] for index in sorted(new)]
            names = ", ".join(site.name if site.layer is None else f"layers.{site.layer}.{site.name}" for site in sites)
            logger.warning("maxact: tokens flow, yet %d of %d sites saw none: %s", len(new), values.shape[1], names)


Taken = tuple[stats.Values, stats.Counts | None]
"""What one set held; no counts where no site has a static scale."""


def _take_from_cpu(state: Accumulators) -> Callable[[int], Taken]:
    def take(index: int) -> Taken:
        values, counts = state.values[index].numpy().copy(), state.counts[index].numpy().copy()
        state.values[index].copy_(state.empty)
        state.counts[index].zero_()
        return values, counts if counts.size else None

    return take


def _take_from_gpu(state: Accumulators) -> Callable[[int], Taken]:
    """Copy on a side stream into pinned memory, empty the set behind it, and wait on this thread only."""
    side_stream = torch.cuda.Stream(state.empty.device)
    pinned = torch.empty(state.empty.shape, dtype=torch.float32, pin_memory=True)
    pinned_counts = torch.empty(state.counts[0].shape, dtype=torch.int64, pin_memory=True)
    # A blocking event lets this thread sleep in the driver instead of spinning on a core.
    done = torch.cuda.Event(blocking=True)

    def take(index: int) -> Taken:
        side_stream.wait_stream(state.stream)
        with torch.cuda.stream(side_stream):
            pinned.copy_(state.values[index], non_blocking=True)
            pinned_counts.copy_(state.counts[index], non_blocking=True)
            state.values[index].copy_(state.empty)
            state.counts[index].zero_()
            done.record()
        done.synchronize()
        counts = pinned_counts.numpy().copy()
        return pinned.numpy().copy(), counts if counts.size else None

    return take


def _reader_of_gpu(histograms: torch.Tensor) -> Callable[[], npt.NDArray[np.int64]]:
    """Copy on a side stream while the model counts on: every bin is right before or after a step."""
    side_stream = torch.cuda.Stream(histograms.device)
    pinned = torch.empty(histograms.shape, dtype=torch.int64, pin_memory=True)
    done = torch.cuda.Event(blocking=True)

    def read() -> npt.NDArray[np.int64]:
        with torch.cuda.stream(side_stream):
            pinned.copy_(histograms, non_blocking=True)
            done.record()
        done.synchronize()
        counted: npt.NDArray[np.int64] = pinned.numpy().copy()
        return counted

    return read
