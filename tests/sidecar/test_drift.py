"""How often, since when and in which phases a threshold was exceeded, and which formats are judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleets import Rank, at, card_of, make, only, use_card
from workers import SITES, WIDTH, window

from maxact_proto import stats
from maxact_sidecar.collector import Collector
from maxact_sidecar.config import make_settings
from maxact_sidecar.families import SelfMetrics
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.headroom import Criterion, Evidence

HIDDEN = 1
EDGES = np.concatenate([[0.0], stats.BIN_EDGES[1:], [np.inf]])


def calibrated(**settings: Any) -> tuple[Fleet, Rank]:
    """A fleet whose only engine is judged against a card of absmax 10 everywhere."""
    fleet = make(hold=4.0, flag_hold=0.0, **settings)
    rank = Rank(fleet)
    rank.send(0, 10.0)
    use_card(fleet, card_of(fleet, 0), at(0), name="calm")
    return fleet, rank


def range_of(fleet: Fleet, seconds: float, site: int = HIDDEN) -> Evidence:
    [flag] = [
        each for each in only(fleet, seconds).evidence if each.criterion == Criterion("range") and each.site == site
    ]
    return flag


def test_the_rate_counts_windows_from_the_first_that_exceeded_on() -> None:
    fleet, rank = calibrated()
    for seconds, peak in enumerate([10.0, 10.0, 40.0, 10.0, 20.0, 10.0, 10.0], start=1):
        rank.send(seconds, [1.0, peak, 1.0])
    flag = range_of(fleet, 7)
    assert (flag.windows_exceeded, flag.windows, flag.exceeded_ratio) == (2, 5, 0.4)
    assert (flag.first_exceeded, flag.last_exceeded) == (1e9 + 3, 1e9 + 5)


def test_the_first_time_stays_when_a_flag_is_raised_again() -> None:
    fleet, rank = calibrated()
    rank.send(1, [1.0, 40.0, 1.0])
    assert not only(fleet, 20).active.any()
    rank.send(30, [1.0, 20.0, 1.0])
    flag = range_of(fleet, 30)
    assert (flag.active, flag.since, flag.first_exceeded, flag.absmax) == (True, 1e9 + 30, 1e9 + 1, 20.0)


def test_windows_without_tokens_of_a_site_are_not_counted() -> None:
    fleet, rank = calibrated()
    rank.send(1, [1.0, 40.0, 1.0])
    idle = window(rank.state.last_sequence + 1, 1.0, tokens=(0, 0, 0), values=stats.empty(len(SITES)))
    rank.engine.merge_window(rank.state, replace(idle, lifetime=idle.values[..., :2].copy()), at(2))
    assert range_of(fleet, 2).windows == 1


def test_phases_are_counted_apart() -> None:
    fleet, rank = calibrated()
    for sequence, (first, decode) in enumerate([(40.0, 5.0), (40.0, 20.0), (5.0, 20.0), (5.0, 5.0)], start=2):
        own = window(sequence, 5.0)
        for phase, peak in ((stats.FIRST, first), (stats.DECODE, decode)):
            own.values[phase] = own.values[stats.PREFILL]
            own.values[phase, :, stats.MIN] = -peak
        rank.engine.merge_window(rank.state, own, at(sequence))
    flag = range_of(fleet, 5)
    assert flag.phases_exceeded == {"first": 2, "prefill": 0, "decode": 2}
    assert (flag.windows_exceeded, flag.windows, flag.phase) == (3, 4, "first")


def test_traffic_that_a_new_card_finds_out_of_range_is_raised_without_counting_as_a_window() -> None:
    fleet = make(hold=4.0, flag_hold=0.0)
    rank = Rank(fleet)
    rank.send(0, 10.0)
    calm = card_of(fleet, 0)
    rank.send(1, [1.0, 40.0, 1.0])
    use_card(fleet, calm, at(1), name="calm")
    flag = range_of(fleet, 1)
    assert (flag.active, flag.windows, flag.exceeded_ratio, flag.first_exceeded) == (True, 0, None, 1e9 + 1)
    rank.send(2, [1.0, 40.0, 1.0])
    assert (range_of(fleet, 2).windows, range_of(fleet, 2).windows_exceeded) == (1, 1)


def test_the_rate_goes_on_over_a_restart_of_vllm() -> None:
    fleet, rank = calibrated()
    rank.send(1, [1.0, 40.0, 1.0])
    rank.send(2, [1.0, 10.0, 1.0])
    rank.leave(3)
    again = Rank(fleet, instance="second")
    again.send(4, [1.0, 40.0, 1.0])
    flag = range_of(fleet, 4)
    assert (flag.windows_exceeded, flag.windows, flag.first_exceeded) == (2, 3, 1e9 + 1)


def scrape(fleet: Fleet, seconds: float, **settings: Any) -> list[str]:
    parts = Collector(make_settings(**settings), SelfMetrics()).render(
        fleet.snapshots(at(seconds)), fleet.cards, as_openmetrics=False
    )
    return b"".join(parts).decode().splitlines()


def test_what_the_evidence_says_is_scraped_for_sites_that_exceeded() -> None:
    fleet, rank = calibrated()
    rank.send(1, [1.0, 40.0, 1.0])
    rank.send(2, [1.0, 10.0, 1.0])
    site = 'model_name="tiny/llama",engine="0",layer="0",site="hidden",meaning="range"'
    shown = [
        line
        for line in scrape(fleet, 2)
        if line.startswith(("maxact_headroom_w", "maxact_headroom_p", "maxact_headroom_first"))
    ]
    assert shown == [
        f"maxact_headroom_first_exceeded_timestamp_seconds{{{site}}} 1000000001.0",
        f"maxact_headroom_windows_total{{{site}}} 2.0",
        f"maxact_headroom_windows_exceeded_total{{{site}}} 1.0",
        f'maxact_headroom_phase_windows_exceeded_total{{{site},phase="first"}} 0.0',
        f'maxact_headroom_phase_windows_exceeded_total{{{site},phase="prefill"}} 1.0',
        f'maxact_headroom_phase_windows_exceeded_total{{{site},phase="decode"}} 0.0',
    ]


def bulk_and_spikes(median: float, spike: float, share: float) -> Any:
    """Histograms of 300 tokens: a normal bulk, and a share of the elements at ``spike``."""
    counts = np.histogram(np.abs(np.random.default_rng(0).normal(size=20_000)) * median / 0.6745, EDGES)[0] / 20_000
    counts = counts * (1 - share)
    counts[np.searchsorted(EDGES, spike, side="right") - 1] += share
    return np.tile(counts * 300 * WIDTH, (len(SITES), 1)).astype(np.float32)


def resolutions(fleet: Fleet, seconds: float) -> dict[str, float]:
    """Headroom ratio of each format at the input of the linear layer."""
    snapshot = only(fleet, seconds)
    ratios = snapshot.headroom_ratio[:, 2]
    return {each.format: float(ratio) for each, ratio in zip(snapshot.criteria, ratios, strict=True) if each.format}


ALL_FORMATS = "int8,int4,fp8_e4m3,fp8_e5m2,nvfp4"


def test_every_format_is_judged_by_where_half_of_the_elements_round_to_zero() -> None:
    fleet = make(formats=ALL_FORMATS)
    Rank(fleet).send(0, 8.0, histogram=bulk_and_spikes(1.0, 8.0, 0.0))
    ratios = resolutions(fleet, 0)
    tensors = {"int8": 254 / 8, "int4": 14 / 8, "fp8_e4m3": 448 * 2**10 / 8, "fp8_e5m2": 57344 * 2**17 / 8}
    assert {name: ratios[name] for name in tensors} == pytest.approx(tensors, rel=0.03)
    # Of 16 normal values the largest has its median at 2.03 standard deviations, that is 3.0 medians.
    assert ratios["nvfp4"] == pytest.approx(24 / 3.0, rel=0.05)


def test_a_lone_spike_takes_the_resolution_of_a_tensor_and_not_that_of_blocks() -> None:
    fleet = make(formats=ALL_FORMATS)
    Rank(fleet).send(0, 600.0, histogram=bulk_and_spikes(1.0, 600.0, 1e-4))
    raised = {flag.criterion.format for flag in only(fleet, 0).evidence if flag.active and flag.site == 2}
    assert raised == {"int8", "int4"}


def test_spikes_in_every_block_take_the_resolution_of_blocks_in_no_phase() -> None:
    fleet = make(formats="nvfp4", flag_hold=0.0, hold=4.0)
    rank = Rank(fleet)
    rank.send(0, 40.0, histogram=bulk_and_spikes(1.0, 36.0, 0.2))
    [flag] = only(fleet, 0).evidence
    assert (flag.criterion, flag.site, flag.phase) == (Criterion("resolution", "nvfp4"), 2, None)
    assert 32 <= flag.absmax <= 48, "the largest of a typical block, within the bin of 36"
    assert flag.limit == pytest.approx(24 * 1.4, rel=0.1), "a fifth of larger elements moves the median up"
    assert (flag.windows, flag.windows_exceeded, flag.phases_exceeded) == (1, 1, {})
    assert not any("phase_windows" in line for line in scrape(fleet, 0) if not line.startswith("#"))
    rank.send(400, 40.0, histogram=bulk_and_spikes(1.0, 36.0, 0.0))
    assert not only(fleet, 401).active.any(), "the histogram of before is forgotten"


def test_formats_that_are_not_asked_for_cost_no_series() -> None:
    fleet = make()
    Rank(fleet).send(0, 8.0, histogram=bulk_and_spikes(1.0, 8.0, 0.0))
    formats = {part for line in scrape(fleet, 0) for part in line.split(",") if part.startswith("format=")}
    assert {each.split('"')[1] for each in formats} == {"int8"}
    thresholds = [line for line in scrape(fleet, 0, formats="int4,nvfp4") if "threshold_ratio{" in line]
    assert 'maxact_headroom_threshold_ratio{meaning="resolution",format="nvfp4"} 1' in thresholds
    assert len(thresholds) == 5
