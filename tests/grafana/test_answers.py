"""What the overview answers while a flag is raised and the traffic of now is calm again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from grafana.assets import DASHBOARDS, queries
from promql import gives

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed"),
]

UNKNOWN = -1
PLACE = 'job="maxact", instance="s", model_name="m", engine="0"'
FLAGGED = f'{{{PLACE}, layer="9", site="hidden", meaning="range"}}'
CALM = f'{{{PLACE}, layer="3", site="hidden", meaning="range"}}'
SERIES = {
    'maxact_headroom_threshold_ratio{job="maxact", instance="s", meaning="range"}': "0.9x20",
    f'maxact_rank_up{{{PLACE}, rank="pp0tp0"}}': "1x20",
    # One spike in the fifth minute; the flag stays up for its minimum time, then clears.
    f"maxact_headroom_ratio{FLAGGED}": "1.8x3 0.45 1.8x16",
    f"maxact_headroom_flag{FLAGGED}": "0x3 1x4 0x12",
    f"maxact_headroom_limit{FLAGGED}": "50x20",
    f"maxact_headroom_ratio{CALM}": "1.35x20",
    f"maxact_headroom_flag{CALM}": "0x20",
    f"maxact_headroom_limit{CALM}": "50x20",
}
QUERIES = {
    query.where.removeprefix("maxact-overview / "): query.runnable for query in queries(DASHBOARDS["maxact-overview"])
}


@pytest.mark.parametrize(
    ("question", "raised", "cleared"),
    [
        ("Is INT-8 safe now? / A", 1, 0),
        ("Smallest margin / A", 0.5, 1.5),
        ("Margin to the range flag: site by layer / A", 0.5, 1.5),
        ("Worst sites: clipping / A", 0.5, 1.5),
    ],
)
def test_a_raised_flag_shows_its_reason_until_it_clears(
    question: str, raised: float, cleared: float, tmp_path: Path
) -> None:
    expr = f"min({QUERIES[question]})"
    for minute, value in ((2, cleared), (4, raised), (6, raised), (10, cleared)):
        assert gives(expr, value, series=SERIES, at_seconds=60 * minute, scrape=60, folder=tmp_path), f"minute {minute}"


def test_the_worst_sites_show_the_value_that_raised_the_flag(tmp_path: Path) -> None:
    absmax = f"max({QUERIES['Worst sites: clipping / B']})"
    assert gives(absmax, 50 / 0.45, series=SERIES, at_seconds=360, scrape=60, folder=tmp_path)


def test_safe_is_not_said_of_a_model_without_a_card(tmp_path: Path) -> None:
    stranger = 'maxact_rank_up{job="maxact", instance="s", model_name="other", engine="0", rank="pp0tp0"}'
    clipping, resolution = (QUERIES[f"Is INT-8 safe now? / {letter}"] for letter in "AB")
    assert gives(clipping, 0, series=SERIES, at_seconds=720, scrape=60, folder=tmp_path)
    assert gives(clipping, UNKNOWN, series={**SERIES, stranger: "1x20"}, at_seconds=720, scrape=60, folder=tmp_path)
    assert gives(clipping, UNKNOWN, series={}, at_seconds=720, scrape=60, folder=tmp_path)
    assert gives(resolution, UNKNOWN, series=SERIES, at_seconds=720, scrape=60, folder=tmp_path)
