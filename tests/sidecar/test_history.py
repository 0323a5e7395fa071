"""History of absmax: in constant memory, nothing fades, engines come and go."""

from __future__ import annotations

import numpy as np
import pytest
from workers import MODEL, SITES, layout, window

from maxact_sidecar import api
from maxact_sidecar.config import make_settings
from maxact_sidecar.fleet import Fleet
from maxact_sidecar.headroom import Instant
from maxact_sidecar.history import History

KEYS = ((None, "embedding"), (0, "hidden"))
ENGINE = ("m", "0")


def at(seconds: float) -> Instant:
    return Instant(1e9 + seconds, 50.0 + seconds)


def fill(history: History, values: list[float], step: float = 5.0) -> None:
    for number, value in enumerate(values):
        history.add({ENGINE: (KEYS, np.array([value, -np.inf], np.float32))}, at(step * number))


def test_every_sample_is_a_row_until_the_memory_is_full() -> None:
    history = History(hold_seconds=30.0)
    fill(history, [1.0, 3.0, 2.0])
    times, courses = history.show()
    assert times == [1e9, 1e9 + 5, 1e9 + 10]
    assert courses[ENGINE].absmax[:, 0].tolist() == [1.0, 3.0, 2.0]
    assert np.isnan(courses[ENGINE].absmax[:, 1]).all()


def test_a_spike_of_long_ago_is_still_there_and_memory_is_constant() -> None:
    history = History(hold_seconds=30.0)
    values = [1.0] * 5000
    values[777] = 9.0
    fill(history, values)
    times, courses = history.show()
    assert len(times) <= 120
    step = times[1] - times[0]
    assert step == 320.0, "5 s doubled six times: 120 rows of it cover 5,000 samples"
    row = int(np.nanargmax(courses[ENGINE].absmax[:, 0]))
    assert times[row] <= 1e9 + 5 * 777 < times[row] + step
    assert np.sort(courses[ENGINE].absmax[:, 0])[-2:].tolist() == [1.0, 9.0]


def test_a_process_that_slept_has_a_gap() -> None:
    history = History(hold_seconds=30.0)
    fill(history, [1.0, 2.0], step=15.0)
    _, courses = history.show()
    np.testing.assert_array_equal(courses[ENGINE].absmax[:, 0], [1.0, np.nan, np.nan, 2.0])


def test_a_wall_clock_that_jumps_bends_no_time() -> None:
    history = History(hold_seconds=30.0)
    fill(history, [1.0])
    history.add({ENGINE: (KEYS, np.array([2.0, 3.0], np.float32))}, Instant(5.0, at(5).steady))
    assert history.show()[0] == [1e9, 1e9 + 5]


def test_sites_that_come_later_join_and_an_engine_that_is_gone_is_forgotten() -> None:
    history = History(hold_seconds=30.0)
    fill(history, [1.0])
    more = (*KEYS, (1, "hidden"))
    history.add({ENGINE: (more, np.array([2.0, 3.0, 4.0], np.float32))}, at(5))
    np.testing.assert_array_equal(history.show()[1][ENGINE].absmax, [[1.0, np.nan, np.nan], [2.0, 3.0, 4.0]])
    history.add({}, at(10))
    assert history.show()[1] == {}


def test_more_sites_than_there_is_room_for_are_left_out_by_engine() -> None:
    history = History(hold_seconds=30.0)
    keys = tuple((layer, "hidden") for layer in range(60_000))
    now = np.ones(60_000, np.float32)
    history.add({("m", "0"): (keys, now), ("m", "1"): (keys, now), ("m", "2"): (KEYS, now[:2])}, at(0))
    assert set(history.show()[1]) == {("m", "0"), ("m", "2")}


@pytest.mark.parametrize("hold", [4.0, 30.0])
def test_no_spike_falls_between_two_samples(hold: float) -> None:
    fleet = Fleet(make_settings(hold=hold))
    engine, rank = fleet.attach(layout())
    for second in range(60):
        peak = 9.0 if second == 31 else 1.0
        engine.merge_window(rank, window(second + 1, peak), at(second + 0.5))
        fleet.settle(at(second + 1))
    _, courses = fleet.history.show()
    assert courses[MODEL, "0"].absmax.max() == 9.0
    assert courses[MODEL, "0"].absmax[-1].tolist() == [1.0] * len(SITES)


def test_engines_of_a_model_are_merged_by_maximum_and_numbers_have_four_digits() -> None:
    history = History(hold_seconds=30.0)
    for number, (one, other) in enumerate([(1.23456, 2.0), (3.0, np.nan), (np.nan, np.nan)]):
        engines = {("m", "0"): (KEYS[:1], np.float32([one])), ("m", "1"): (KEYS[:1], np.float32([other]))}
        history.add(engines | {("n", "0"): (KEYS[1:], np.float32([65504.7]))}, at(5 * number))
    both = api.view_history(history, "m", None)
    assert [(site.model, site.layer, site.site, site.absmax) for site in both.sites] == [
        ("m", None, "embedding", [2.0, 3.0, None])
    ]
    [one] = api.view_history(history, "m", "0").sites
    assert one.absmax == [1.235, 3.0, None]
    assert [site.absmax[0] for site in api.view_history(history, None, None).sites] == [2.0, 65500.0]
