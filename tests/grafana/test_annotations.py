"""Annotations are evaluated once a minute: what happens between two steps must still be marked."""

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

SCRAPE_SECONDS = 15
STEP_SECONDS = 60
EXPRESSIONS = {query.where.rpartition(" ")[2]: query.runnable for query in queries(DASHBOARDS["maxact-overview"])}
WORKER = '{job="maxact", instance="s", model_name="m", engine="0", rank="pp0tp0"}'


def marked(expr: str, series: str, samples: list[str], folder: Path) -> list[int]:
    """Steps (in minutes) at which an annotation marks a series that had these values, a scrape each."""
    given = {series: " ".join(samples)}
    counted = f"count({expr}) or vector(0)"
    return [
        step
        for step in range(1, 10)
        if gives(counted, 1, series=given, at_seconds=step * STEP_SECONDS, scrape=SCRAPE_SECONDS, folder=folder)
    ]


@pytest.mark.parametrize("before", range(16, 20), ids=lambda scrapes: f"after-{scrapes}-scrapes")
def test_an_engine_that_was_away_for_a_single_scrape_is_marked(before: int, tmp_path: Path) -> None:
    up = ["1"] * before + ["0"] + ["1"] * 24
    steps = marked(EXPRESSIONS["starts"], f"maxact_rank_up{WORKER}", up, tmp_path)
    assert steps in ([5], [5, 6])


def test_a_first_start_is_marked_once_and_a_stop_not_at_all(tmp_path: Path) -> None:
    up = ["_"] * 10 + ["1"] * 20 + ["0"] * 4 + ["stale"]
    assert marked(EXPRESSIONS["starts"], f"maxact_rank_up{WORKER}", up, tmp_path) == [3]


def test_a_new_card_is_marked_once(tmp_path: Path) -> None:
    card = 'maxact_card_info{job="maxact", instance="s", model_name="m", card="june", bos="true"}'
    assert marked(EXPRESSIONS["changes"], card, ["_"] * 18 + ["1"] * 20, tmp_path) == [5]
