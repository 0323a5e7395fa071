"""The table of statistics: what merges how."""

from __future__ import annotations

import numpy as np

from maxact_proto import stats


def random_values(seed: int, sites: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(stats.PHASES), sites, len(stats.STATS))).astype(np.float32)
    values[..., stats.SUM_SQUARES :] = np.abs(values[..., stats.SUM_SQUARES :])
    return values


def test_merging_with_nothing_changes_nothing() -> None:
    values = random_values(0)
    merged = values.copy()
    stats.merge_into(merged, stats.empty(4))
    np.testing.assert_array_equal(merged, values)
    nothing = stats.empty(4)
    stats.merge_into(nothing, values)
    np.testing.assert_array_equal(nothing, values)


def test_extremes_merge_as_extremes_and_sums_as_sums() -> None:
    one, other = random_values(1), random_values(2)
    merged = one.copy()
    stats.merge_into(merged, other)
    for column, stat in enumerate(stats.STATS):
        rule = {"max": np.maximum, "min": np.minimum, "sum": np.add}[stat.merge]
        np.testing.assert_array_equal(merged[..., column], rule(one[..., column], other[..., column]))


def test_absmax_is_the_larger_magnitude_and_minus_infinity_for_nothing() -> None:
    values = stats.empty(2)
    values[0, 0, :2] = (3.0, -7.0)
    assert stats.absmax(values)[0].tolist() == [7.0, -np.inf]


def test_columns_are_where_their_names_say() -> None:
    named = {stat.name: index for index, stat in enumerate(stats.STATS)}
    assert named == {
        "max": stats.MAX,
        "min": stats.MIN,
        "sum_squares": stats.SUM_SQUARES,
        "sum_abs": stats.SUM_ABS,
        "nonfinite": stats.NONFINITE,
    }
    assert [stat.merge for stat in stats.STATS[: stats.NUM_EXTREMA]] == ["max", "min"]
