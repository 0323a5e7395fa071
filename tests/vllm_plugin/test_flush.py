"""Closing windows: nothing lost between two sets of accumulators, nothing twice."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest
import torch
from workers import layout

from maxact_proto import stats, wire
from maxact_vllm.flush import Flusher
from maxact_vllm.fold import Accumulators

NUM_SITES = 3


def accumulate(state: Accumulators, peak: float, tokens: int = 1) -> None:
    """What a fold leaves behind for a decode step."""
    state.folds += 1
    values = state.values[state.active][stats.DECODE]
    values[:, stats.MAX] = torch.maximum(values[:, stats.MAX], torch.tensor(peak))
    values[:, stats.MIN] = torch.minimum(values[:, stats.MIN], torch.tensor(-1.0))
    values[:, stats.SUM_ABS] += 1
    state.tokens[state.active][stats.DECODE] += tokens
    state.folds += 1


def make(interval: float = 3600.0) -> tuple[Accumulators, Flusher, list[wire.Window]]:
    state = Accumulators(NUM_SITES, torch.device("cpu"))
    delivered: list[wire.Window] = []
    histograms = torch.zeros(NUM_SITES, stats.NUM_BINS, dtype=torch.int64)
    return state, Flusher(state, histograms, layout(interval_seconds=interval), delivered.append), delivered


def test_a_window_holds_what_was_folded_since_the_last_one() -> None:
    state, flusher, _ = make()
    accumulate(state, 5.0)
    accumulate(state, 3.0)
    first, second = flusher.close_window(), flusher.close_window()
    assert first.tokens == (0, 0, 2)
    assert (first.values[stats.DECODE, :, stats.MAX] == 5.0).all()
    assert (first.values[stats.DECODE, :, stats.SUM_ABS] == 2.0).all()
    assert second.tokens == (0, 0, 0)
    np.testing.assert_array_equal(second.values, stats.empty(NUM_SITES))
    assert first.end_seconds == second.start_seconds


def test_lifetime_extrema_outlive_their_window() -> None:
    state, flusher, _ = make()
    accumulate(state, 5.0)
    flusher.close_window()
    accumulate(state, 2.0)
    window = flusher.close_window()
    assert (window.values[stats.DECODE, :, stats.MAX] == 2.0).all()
    assert (window.lifetime[stats.DECODE, :, stats.MAX] == 5.0).all()


def test_histograms_come_at_once_at_first_then_rarely_and_with_the_last_window(monkeypatch: pytest.MonkeyPatch) -> None:
    state, histograms = Accumulators(NUM_SITES, torch.device("cpu")), torch.zeros(NUM_SITES, stats.NUM_BINS)
    flusher = Flusher(state, histograms.long(), layout(), [].append)
    assert flusher.close_window().histogram is None, "nothing was counted"
    now, came = 0.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for second in range(80):
        now = 1000.0 + second
        flusher._histograms[1, 5] += 7
        histogram = flusher.close_window().histogram
        if histogram is not None:
            came.append((second, int(histogram[1, 5])))
            assert histogram.sum() == histogram[1, 5]
    assert came == [*((second, 7) for second in range(20)), (49, 210), (79, 210)]
    flusher._histograms[2, 0] += 3
    assert flusher.close_window().histogram is None
    flusher.stop()
    last = flusher.close_window().histogram
    assert last is not None
    assert (last[2, 0], last.sum()) == (3, 3)


def test_no_fold_is_lost_or_counted_twice_while_windows_are_closed() -> None:
    state, flusher, delivered = make(interval=0.05)
    flusher.start()
    steps = 20_000
    for _ in range(steps):
        accumulate(state, 1.0)
    flusher.stop()
    assert len(delivered) > 2
    assert sum(window.tokens[stats.DECODE] for window in delivered) == steps
    assert sum(window.values[stats.DECODE, 0, stats.SUM_ABS] for window in delivered) == steps


def test_the_last_window_is_delivered_when_it_stops() -> None:
    state, flusher, delivered = make()
    flusher.start()
    accumulate(state, 7.0)
    flusher.stop()
    assert delivered[-1].tokens == (0, 0, 1)
    assert not [thread for thread in threading.enumerate() if thread.name == "maxact-flush"]


def test_a_site_that_stays_empty_while_tokens_flow_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    state, flusher, _ = make()
    for _ in range(2):
        accumulate(state, 1.0)
        state.values[state.active][:, 1] = torch.from_numpy(stats.empty(1))[:, 0]
        with caplog.at_level(logging.WARNING, "vllm.maxact"):
            flusher.close_window()
    assert [record.getMessage() for record in caplog.records] == [
        "maxact: tokens flow, yet 1 of 3 sites saw none: layers.0.hidden"
    ]
