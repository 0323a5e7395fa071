"""From windows to an acknowledged stream, with a real gRPC server that goes away and comes back."""

from __future__ import annotations

import time

import numpy as np
import pytest
from processes import wait_for
from receiver import Listening
from workers import layout, window

from maxact_proto import stats
from maxact_vllm.stream import Outbox, Streamer

NUM_SITES = 3


def test_windows_merge_while_one_is_under_way() -> None:
    outbox = Outbox(NUM_SITES)
    outbox.put(window(0, 1.0))
    under_way = outbox.take(0)
    for peak in (4.0, 2.0, 3.0):
        outbox.put(window(0, peak))
    assert outbox.take(0) is None
    outbox.acknowledge(under_way.sequence)
    merged = outbox.take(0)
    assert (under_way.sequence, merged.sequence) == (1, 2)
    assert merged.coalesced == 2
    assert merged.tokens == (0, 12, 0)
    assert (merged.values[stats.PREFILL, :, stats.MIN] == -4.0).all()
    assert merged.values[stats.PREFILL, 0, stats.SUM_ABS] == pytest.approx(4 * 64 * (4 + 2 + 3) / 8)


def test_an_hour_without_a_sidecar_keeps_the_extremum_and_every_small_window() -> None:
    outbox = Outbox(NUM_SITES)
    outbox.put(window(0, 1e4))
    for _ in range(3600):
        outbox.put(window(0, 1e-2))
    merged = outbox.take(0)
    assert merged.tokens == (0, 4 * 3601, 0)
    assert (merged.values[stats.PREFILL, :, stats.MIN] == -1e4).all()
    assert merged.values[stats.PREFILL, 0, stats.SUM_ABS] == pytest.approx(32 * (1e4 + 3600 * 1e-2), rel=1e-6)


def test_windows_reach_the_sidecar_in_order_and_are_acknowledged() -> None:
    outbox = Outbox(NUM_SITES)
    with Listening() as listening:
        streamer = Streamer(listening.endpoint, layout(), outbox)
        streamer.start()
        for peak in (1.0, 2.0, 3.0):
            outbox.put(window(0, peak))
            assert outbox.wait_until_sent(10)
        streamer.stop()
        received = listening.receiver.windows["pp0tp0"]
    assert [each.sequence for each in received] == [1, 2, 3]
    assert [-each.values[stats.PREFILL, 0, stats.MIN] for each in received] == [1.0, 2.0, 3.0]


def test_nothing_is_lost_or_counted_twice_when_the_sidecar_is_away() -> None:
    outbox = Outbox(NUM_SITES)
    first = Listening()
    with first:
        streamer = Streamer(first.endpoint, layout(), outbox)
        streamer.start()
        outbox.put(window(0, 1.0))
        assert outbox.wait_until_sent(10)
    for peak in (9.0, 2.0):
        outbox.put(window(0, peak))
    time.sleep(0.5)
    with Listening(first.port) as second:
        assert outbox.wait_until_sent(20)
        streamer.stop()
        received = second.receiver.windows["pp0tp0"]
    assert sum(each.tokens[stats.PREFILL] for each in received) == 8
    assert min(each.values[stats.PREFILL, 0, stats.MIN] for each in received) == -9.0


def test_a_window_that_was_merged_but_not_acknowledged_keeps_its_sequence_number() -> None:
    outbox = Outbox(NUM_SITES)
    outbox.put(window(0, 1.0))
    sent = outbox.take(0)
    assert outbox.under_way() is sent
    outbox.acknowledge(sent.sequence)
    assert outbox.under_way() is None
    outbox.put(window(0, 2.0))
    np.testing.assert_array_equal(outbox.take(0).sequence, sent.sequence + 1)


def test_stopping_without_a_sidecar_is_quick() -> None:
    streamer = Streamer("127.0.0.1:1", layout(), Outbox(NUM_SITES))
    streamer.start()
    started = time.monotonic()
    streamer.stop()
    wait_for(lambda: not streamer.is_alive(), 5)
    assert time.monotonic() - started < 5
