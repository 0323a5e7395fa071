"""Merging, marks and flags of engines, under a clock of the test's own."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fleets import Rank, at, card_of, make, only, use_card
from workers import MODEL, SITES, WIDTH, window

from maxact_proto import stats, wire
from maxact_sidecar import merge
from maxact_sidecar.card import LoadedCard
from maxact_sidecar.headroom import Instant

RANGE, FP16, _, SATURATION = range(4)


def test_extrema_of_the_hold_horizon_fade_and_the_high_water_mark_stays() -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(0, [1.0, 500.0, 2.0])
    rank.send(1, [1.0, 5.0, 2.0])
    assert only(fleet, 2).absmax.tolist() == [1.0, 500.0, 2.0]
    rank.send(20, [1.0, 5.0, 2.0])
    later = only(fleet, 21)
    assert later.absmax.tolist() == [1.0, 5.0, 2.0]
    assert later.high_water[stats.PREFILL].tolist() == [1.0, 500.0, 2.0]


def test_a_spike_is_shown_for_at_least_half_of_the_hold_horizon() -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(4.9, 50.0)
    rank.send(5.1, 1.0)
    assert only(fleet, 9.8).absmax[0] == 50.0


def test_an_idle_engine_has_no_current_values() -> None:
    fleet = make()
    Rank(fleet).send(0, 3.0)
    assert np.isnan(only(fleet, 30).absmax).all()


def test_only_what_a_state_does_not_know_yet_is_told_it() -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(0, [1.0, 5.0, 2.0])
    [engine] = fleet.engines.values()
    told = []
    for seconds, peaks in ((1, [1.0, 5.0, 2.0]), (2, [1.0, 6.0, 2.0]), (3, 1.0), (4, [1.0, 70_000.0, 1.0]), (5, 1.0)):
        engine.memory(at(seconds))
        rank.send(seconds, peaks)
        told.append(engine.is_unsaved(at(seconds)))
    assert told == [False, True, False, True, False]
    assert engine.is_unsaved(at(65)), "how many windows a calm flag saw is told once a minute"


def test_sums_since_the_start_go_on_when_the_hold_horizon_moves() -> None:
    fleet = make()
    rank = Rank(fleet)
    for seconds in (0, 4, 9, 14, 60, 61):
        rank.send(seconds, 8.0)
    seen = only(fleet, 62)
    elements = [seen.total.elements[stats.PREFILL, 0], seen.hold.elements[stats.PREFILL, 0]]
    assert elements == [6 * 4 * WIDTH, 2 * 4 * WIDTH]
    np.testing.assert_allclose(seen.total.rms[stats.PREFILL], 2.0)
    assert seen.total.sums[merge.TOKENS, stats.FIRST].tolist() == [0.0] * len(SITES)


def test_a_site_that_did_not_run_in_a_window_counts_no_tokens_of_it() -> None:
    fleet = make()
    rank = Rank(fleet)
    values = window(0, 3.0).values
    values[:, 1] = stats.empty(1)[:, 0]
    rank.send(0, 3.0)
    rank.send(1, 3.0, values=values)
    assert only(fleet, 2).total.sums[merge.TOKENS, stats.PREFILL].tolist() == [8.0, 4.0, 8.0]


def test_rms_and_mean_magnitude_are_over_elements() -> None:
    fleet = make()
    Rank(fleet).send(0, 8.0)
    hold = only(fleet, 1).hold
    np.testing.assert_allclose(hold.rms[stats.PREFILL], 2.0)
    np.testing.assert_allclose(hold.mean_abs[stats.PREFILL], 1.0)
    np.testing.assert_allclose(hold.crest_ratio[stats.PREFILL], 4.0)


def test_tensor_parallel_ranks_count_replicated_sites_once_and_add_shards() -> None:
    fleet = make()
    for tp_rank, peaks in enumerate(([1.0, 4.0, 8.0], [1.0, 4.0, 16.0])):
        Rank(fleet, tp_rank=tp_rank, tp_size=2).send(0, peaks)
    snapshot = only(fleet, 1)
    assert snapshot.absmax.tolist() == [1.0, 4.0, 16.0]
    assert snapshot.tokens == (0, 4, 0)
    assert snapshot.hold.elements[stats.PREFILL].tolist() == [4 * WIDTH, 4 * WIDTH, 2 * 4 * WIDTH]
    assert [site.width for site in snapshot.sites] == [WIDTH, WIDTH, 2 * WIDTH]
    np.testing.assert_allclose(snapshot.hold.rms[stats.PREFILL], [0.25, 1.0, np.sqrt((4 + 16) / 2)])


def test_pipeline_stages_hold_different_sites_of_one_engine() -> None:
    fleet = make()
    other = (wire.Site(layer=1, name="hidden", width=WIDTH, sharded=False),)
    Rank(fleet, pp_rank=0, pp_size=2).send(0, 1.0)
    Rank(fleet, pp_rank=1, pp_size=2, sites=other).send(0, 2.0)
    snapshot = only(fleet, 1)
    assert snapshot.keys == ((None, "embedding"), (0, "hidden"), (0, "down_proj_input"), (1, "hidden"))
    assert snapshot.absmax.tolist() == [1.0, 1.0, 1.0, 2.0]
    assert snapshot.tokens == (0, 4, 0)


def test_a_window_that_comes_twice_is_merged_once() -> None:
    fleet = make()
    rank = Rank(fleet)
    own = window(1, 2.0)
    assert rank.engine.merge_window(rank.state, own, at(0))
    assert not rank.engine.merge_window(rank.state, own, at(1))
    assert only(fleet, 1).tokens == (0, 4, 0)


def test_a_reconnecting_worker_goes_on_where_it_was() -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(0, 2.0)
    rank.leave(1)
    again = Rank(fleet)
    assert again.state.last_sequence == 1
    again.send(2, 3.0)
    assert only(fleet, 3).tokens == (0, 8, 0)


def test_a_restarted_engine_keeps_counters_and_marks() -> None:
    fleet = make()
    first = Rank(fleet)
    first.send(0, 500.0)
    first.leave(1)
    Rank(fleet, instance="second").send(2, 3.0)
    snapshot = only(fleet, 3)
    assert snapshot.engine == "0"
    assert snapshot.tokens == (0, 8, 0)
    assert snapshot.worker_tokens == (0, 4, 0)
    assert snapshot.high_water[stats.PREFILL, 0] == 500.0
    assert snapshot.absmax[0] == 3.0


def test_a_restart_that_observes_fewer_sites_shows_no_others_and_forgets_none() -> None:
    fleet = make()
    first = Rank(fleet)
    own = window(1, [1.0, 500.0, 3.0])
    own.values[stats.PREFILL, 1, stats.NONFINITE] = 3
    first.engine.merge_window(first.state, own, at(0))
    first.leave(1)
    second = Rank(fleet, instance="second", sites=SITES[::2])
    second.send(2, 2.0)
    assert only(fleet, 3).keys == ((None, "embedding"), (0, "down_proj_input"))
    second.leave(4)
    Rank(fleet, instance="third").send(5, 1.0)
    snapshot = only(fleet, 6)
    assert snapshot.keys == tuple((site.layer, site.name) for site in SITES)
    assert snapshot.high_water[stats.PREFILL].tolist() == [2.0, 500.0, 3.0]
    assert snapshot.nonfinite[stats.PREFILL].tolist() == [0, 3, 0]
    assert (snapshot.tokens, snapshot.windows) == ((0, 12, 0), 3)


def test_a_raised_flag_outlives_a_restart() -> None:
    fleet = make()
    first = Rank(fleet)
    first.send(0, [1.0, 6e4, 2.0])
    first.leave(1)
    Rank(fleet, instance="second").send(2, 1.0)
    [flag] = only(fleet, 3).evidence
    assert (flag.active, flag.absmax, flag.since) == (True, 6e4, 1e9)


def test_another_model_is_another_engine_and_the_former_one_goes_stale() -> None:
    fleet = make(stale=60.0)
    first = Rank(fleet)
    first.send(0, 500.0)
    first.leave(1)
    Rank(fleet, instance="second", model="another/model").send(2, 3.0)
    assert [(each.model, each.high_water.max()) for each in fleet.snapshots(at(3))] == [
        ("another/model", 3.0),
        (MODEL, 500.0),
    ]
    assert [each.model for each in fleet.snapshots(at(62))] == ["another/model"]


@pytest.mark.parametrize(
    "change",
    [{"model_type": "qwen3"}, {"sites": tuple(replace(site, width=2 * WIDTH) for site in SITES)}],
    ids=["type", "width"],
)
def test_another_model_under_the_same_name_goes_on_with_its_marks_and_is_warned_of(
    change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fleet = make()
    first = Rank(fleet)
    first.send(0, 500.0)
    first.leave(1)
    Rank(fleet, instance="second", **change).send(2, 3.0)
    snapshot = only(fleet, 3)
    assert (snapshot.absmax[0], snapshot.high_water[stats.PREFILL, 0]) == (3.0, 500.0)
    assert f"another model under the same name model={MODEL} engine=0 was=llama" in caplog.text


def test_a_restart_of_the_same_model_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    fleet = make()
    Rank(fleet, tp_rank=0, tp_size=2).leave(1)
    single = tuple(replace(site, width=2 * WIDTH) if site.sharded else site for site in SITES)
    Rank(fleet, instance="second", sites=single)
    assert caplog.text == ""


def test_a_lost_rank_is_down_fades_and_the_others_go_on() -> None:
    fleet = make(hold=10.0)
    first, second = (Rank(fleet, tp_rank=rank, tp_size=2) for rank in range(2))
    first.send(0, [1.0, 4.0, 8.0])
    second.send(0, [1.0, 4.0, 16.0])
    second.leave(1)
    first.send(20, [1.0, 4.0, 7.0])
    snapshot = only(fleet, 21)
    assert [(rank.rank, rank.connected) for rank in snapshot.ranks] == [("pp0tp0", True), ("pp0tp1", False)]
    assert snapshot.absmax.tolist() == [1.0, 4.0, 7.0]
    assert snapshot.high_water[stats.PREFILL].tolist() == [1.0, 4.0, 16.0]
    assert snapshot.tokens == (0, 8, 0)
    assert len(fleet.snapshots(at(1000))) == 1, "one worker is left: the engine is not stale"
    again = Rank(fleet, tp_rank=1, tp_size=2)
    again.send(22, [1.0, 4.0, 9.0])
    back = only(fleet, 23)
    assert (back.absmax[2], [rank.connected for rank in back.ranks]) == (9.0, [True, True])


def test_replicated_sites_of_a_lost_first_rank_are_counted_from_the_next() -> None:
    fleet = make(hold=10.0)
    first, second = (Rank(fleet, tp_rank=rank, tp_size=2) for rank in range(2))
    for rank in (first, second):
        rank.send(0, 4.0)
    first.leave(1)
    second.send(20, 4.0)
    elements = only(fleet, 21).hold.elements[stats.PREFILL]
    assert elements.tolist() == [4 * WIDTH, 4 * WIDTH, 4 * WIDTH]


def test_two_live_engines_of_one_name_do_not_mix(caplog: pytest.LogCaptureFixture) -> None:
    fleet = make()
    Rank(fleet).send(0, 1.0)
    Rank(fleet, instance="second").send(0, 2.0)
    assert [snapshot.engine for snapshot in fleet.snapshots(at(1))] == ["0", "0@second"]
    assert "--maxact-engine" in caplog.text


def test_an_engine_shown_under_an_alias_keeps_it_while_it_lives_and_is_forgotten_afterwards() -> None:
    fleet = make(stale=60.0)
    first = Rank(fleet)
    second = Rank(fleet, instance="second")
    second.send(0, 2.0)
    first.leave(1)
    second.leave(2)
    again = Rank(fleet, instance="second")
    assert (again.engine.label, again.state.last_sequence) == ("0@second", 1)
    again.leave(3)
    fleet.settle(at(64))
    assert Rank(fleet, instance="second").engine.label == "0"


def test_a_window_overtaken_by_its_successor_is_dropped() -> None:
    fleet = make()
    rank = Rank(fleet)
    assert rank.engine.merge_window(rank.state, window(2, 2.0), at(0))
    assert not rank.engine.merge_window(rank.state, window(1, 9.0), at(0))
    assert only(fleet, 1).absmax[0] == 2.0


def test_windows_that_never_came_cost_no_high_water_mark() -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.engine.merge_window(rank.state, window(1, 2.0), at(0))
    lost, own = window(4, 9.0), window(5, 3.0)
    own.lifetime = lost.lifetime
    assert rank.engine.merge_window(rank.state, own, at(1))
    snapshot = only(fleet, 1)
    assert (snapshot.absmax[0], snapshot.high_water[stats.PREFILL, 0]) == (3.0, 9.0)
    assert snapshot.tokens == (0, 8, 0)


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_wall_clock_that_jumps_neither_hides_values_nor_clears_flags_nor_makes_an_engine_stale(jump: float) -> None:
    fleet = make(hold=10.0, flag_hold=5.0, stale=60.0)
    rank = Rank(fleet)
    rank.send(0, 6e4)
    gone = Rank(fleet, engine="1", instance="other")
    gone.leave(0)

    def jumped(seconds: float) -> Instant:
        return Instant(at(seconds).wall + jump, at(seconds).steady)

    rank.engine.merge_window(rank.state, window(2, 1.0), jumped(1))
    snapshot, _ = fleet.snapshots(jumped(1))
    assert snapshot.absmax[0] == 6e4
    assert snapshot.active[FP16].all()
    assert snapshot.ranks[0].last_window_seconds == jumped(1).wall
    rank.engine.merge_window(rank.state, window(3, 1.0), jumped(20))
    snapshot, _ = fleet.snapshots(jumped(20))
    assert (snapshot.absmax[0], snapshot.active.any()) == (1.0, False)


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_worker_whose_clock_is_off_is_judged_by_arrival(jump: float) -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(0, 6e4, start_seconds=1e9 + jump, end_seconds=1e9 + jump + 1)
    snapshot = only(fleet, 1)
    assert (snapshot.absmax[0], snapshot.ranks[0].last_window_seconds) == (6e4, 1e9)


def test_a_gone_engine_disappears_after_the_stale_time_and_returns_with_its_marks() -> None:
    fleet = make(stale=60.0)
    rank = Rank(fleet)
    rank.send(0, 500.0)
    rank.leave(1)
    assert len(fleet.snapshots(at(60))) == 1
    assert fleet.snapshots(at(62)) == []
    Rank(fleet, instance="second").send(100, 1.0)
    assert only(fleet, 101).high_water[stats.PREFILL, 0] == 500.0


def test_a_worker_whose_sites_changed_is_refused() -> None:
    fleet = make()
    Rank(fleet)
    with pytest.raises(wire.WireError, match=r"layout\.sites: differ"):
        Rank(fleet, sites=SITES[:2])


def test_nonfinite_rows_are_counted_over_restarts() -> None:
    fleet = make()
    own = window(1, 2.0)
    own.values[stats.PREFILL, 1, stats.NONFINITE] = 3
    rank = Rank(fleet)
    rank.engine.merge_window(rank.state, own, at(0))
    rank.leave(1)
    Rank(fleet, instance="second")
    assert only(fleet, 2).nonfinite[stats.PREFILL].tolist() == [0, 3, 0]


def test_range_is_judged_against_the_card_and_raised_with_evidence(caplog: pytest.LogCaptureFixture) -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(0, [1.0, 10.0, 2.0])
    use_card(fleet, card_of(fleet, 1), at(1), name="calm")
    caplog.set_level(logging.WARNING)
    rank.send(2, [1.0, 11.0, 2.0])  # 9 % beyond: within the threshold
    assert not only(fleet, 2).active.any()
    rank.send(3, [1.0, 40.0, 2.0])
    snapshot = only(fleet, 3)
    assert np.argwhere(snapshot.active).tolist() == [[RANGE, 1]]
    [flag] = snapshot.evidence
    assert (flag.absmax, flag.limit, flag.headroom_ratio, flag.threshold) == (40.0, 10.0, 0.25, 0.9)
    assert (flag.phase, flag.since) == ("prefill", 1e9 + 3)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        f"flag raised meaning=range format=- model={MODEL} engine=0 layer=0 site=hidden phase=prefill absmax=40 "
        "limit=10 headroom_ratio=0.25 threshold=0.9 first_exceeded=2001-09-09T01:46:43Z windows_exceeded=1 windows=1 "
        "phases_exceeded=first:0,prefill:1,decode:0"
    )


def test_a_flag_goes_down_only_after_its_minimum_time_and_back_in_range() -> None:
    fleet = make(hold=4.0, flag_hold=10.0)
    rank = Rank(fleet)
    rank.send(0, 10.0)
    use_card(fleet, card_of(fleet, 0), at(0), name="calm")
    rank.send(1, 40.0)
    for seconds in range(2, 10):
        rank.send(seconds, 10.0)
        assert only(fleet, seconds).active[RANGE].all(), seconds
    rank.send(12, 10.5)  # out of the flag's minimum time, but 5 % beyond the card: not yet clear
    assert only(fleet, 12).active[RANGE].all()
    rank.send(20, 10.0)
    assert not only(fleet, 20).active.any()
    assert [flag.active for flag in only(fleet, 20).evidence] == [False] * 3


def test_fp16_is_judged_without_a_card() -> None:
    fleet = make()
    Rank(fleet).send(0, [1.0, 6e4, 2.0])
    snapshot = only(fleet, 1)
    assert np.argwhere(snapshot.active).tolist() == [[FP16, 1]]
    assert np.isnan(snapshot.headroom_ratio[RANGE]).all()


def test_a_deployed_scale_is_a_limit_from_the_first_window_on() -> None:
    fleet = make()
    deployed = tuple(replace(site, limit=127 * 0.5) if site.name == "down_proj_input" else site for site in SITES)
    rank = Rank(fleet, sites=deployed)
    rank.send(0, [100.0, 100.0, 63.0])
    assert not only(fleet, 0).active[SATURATION].any()
    rank.send(1, [100.0, 100.0, 64.0])
    snapshot = only(fleet, 1)
    assert np.argwhere(snapshot.active).tolist() == [[SATURATION, 2]]
    assert snapshot.headroom_ratio[SATURATION, 2] == 63.5 / 64
    assert np.isnan(snapshot.headroom_ratio[SATURATION, :2]).all()


def test_a_card_for_another_model_changes_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(0, 10.0)
    card = card_of(fleet, 0).model_copy(update={"model": "another/model"})
    use_card(fleet, card, at(1), name="wrong")
    rank.send(2, 1000.0)
    assert not only(fleet, 2).active.any()
    assert "which nobody serves here" in caplog.text


def test_an_engine_no_loaded_card_is_for_is_named(caplog: pytest.LogCaptureFixture) -> None:
    fleet = make()
    rank = Rank(fleet)
    rank.send(0, 10.0)
    use_card(fleet, card_of(fleet, 0), at(1), name="calm")
    Rank(fleet, model="another/model")
    assert "no card for model=another/model: its range is not judged" in caplog.text
    assert "--card MODEL=FILE" in caplog.text


def test_a_card_under_another_name_is_used_where_it_is_said_to_fit() -> None:
    fleet = make()
    rank = Rank(fleet, model="served-as")
    rank.send(0, 10.0)
    card = card_of(fleet, 0).model_copy(update={"model": "hub/name"})
    use_card(fleet, card, at(1), name="calm", served_model="served-as")
    rank.send(2, 40.0)
    assert only(fleet, 2).active[RANGE].all()


def test_a_flag_of_a_replaced_card_goes_with_the_card() -> None:
    fleet = make(flag_hold=0.0, hold=4.0)
    rank = Rank(fleet)
    rank.send(0, 10.0)
    use_card(fleet, card_of(fleet, 0), at(0), name="calm")
    rank.send(1, 40.0)
    assert only(fleet, 1).active[RANGE].all()
    use_card(fleet, card_of(fleet, 1), at(1), name="wide")
    assert not only(fleet, 2).active.any()


def test_a_card_holds_extrema_and_sums_of_all_engines() -> None:
    fleet = make()
    Rank(fleet, engine="0").send(0, [1.0, 4.0, 2.0])
    Rank(fleet, engine="1", instance="second").send(0, [3.0, 2.0, 2.0])
    card = card_of(fleet, 1)
    assert card.engine is None
    assert card.limits() == {(None, "embedding"): 3.0, (0, "hidden"): 4.0, (0, "down_proj_input"): 2.0}
    assert card.num_tokens == 8
    hidden = next(site for site in card.sites if site.site == "hidden")
    assert (hidden.elements, hidden.tokens, hidden.phase) == (2 * 4 * WIDTH, 8, "prefill")
    assert hidden.rms == pytest.approx(np.sqrt((1.0 + 0.25) / 2))


def test_sums_that_overflowed_do_not_poison_later_windows() -> None:
    fleet = make()
    rank = Rank(fleet)
    huge = window(1, 1.0)
    huge.values[stats.PREFILL, :, stats.SUM_SQUARES] = np.inf
    rank.engine.merge_window(rank.state, huge, at(0))
    assert np.isfinite(only(fleet, 1).total.sums[merge.SQUARES]).all()


def test_traffic_is_out_of_range_only_where_no_card_of_the_model_covers_it() -> None:
    fleet = make(flag_hold=0.0, hold=4.0)
    rank = Rank(fleet)
    rank.send(0, [10.0, 1.0, 10.0])
    use_card(fleet, card_of(fleet, 0), at(0), name="english")
    rank.send(1, [1.0, 10.0, 10.0])
    assert np.argwhere(only(fleet, 1).active).tolist() == [[RANGE, 1]]
    use_card(fleet, card_of(fleet, 1), at(1), name="code", add=True)
    assert not only(fleet, 2).active.any()
    assert [card.name for card in fleet.cards] == ["code", "english"]
    rank.send(2, [1.0, 20.0, 1.0])
    assert np.argwhere(only(fleet, 2).active).tolist() == [[RANGE, 1]]


def test_a_configuration_replaces_what_it_configured_and_leaves_loaded_cards_of_other_models() -> None:
    fleet = make()
    Rank(fleet).send(0, 10.0)
    card = card_of(fleet, 0)

    def named(name: str, model: str) -> LoadedCard:
        return LoadedCard(name=name, served_model=model, card=card)

    fleet.configure_cards([named("a", "one"), named("b", "two")], at(0))
    fleet.load_card(named("c", "three"), at(0))
    fleet.configure_cards([named("d", "two")], at(1))
    assert [(card.name, card.served_model) for card in fleet.cards] == [("c", "three"), ("d", "two")]
