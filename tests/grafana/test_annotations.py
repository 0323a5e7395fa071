"""Annotations are evaluated once per step, which grows with the time range: what happens between two must be marked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from grafana.assets import DASHBOARDS, queries, substitute
from promql import gives

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed"),
]

SCRAPE_SECONDS = 15
STEPS = pytest.mark.parametrize("step", [60, 300], ids=["step-of-1-minute", "step-of-5-minutes"])
"""An hour, and a range of eight hours."""
EXPRESSIONS = {query.where.rpartition(" ")[2]: query.expr for query in queries(DASHBOARDS["maxact-overview"])}
WORKER = '{job="maxact", instance="s", model_name="m", engine="0", rank="pp0tp0"}'
UP = f"maxact_rank_up{WORKER}"
START = 'process_start_time_seconds{job="maxact", instance="s"}'


def marked(name: str, series: dict[str, list[str]], step: int, folder: Path) -> list[int]:
    """Steps at which an annotation marks something, of series with these values, a scrape each."""
    given = {metric: " ".join(samples) for metric, samples in series.items()}
    counted = f"count({substitute(EXPRESSIONS[name], step=f'{step}s')}) or vector(0)"
    return [
        number
        for number in range(1, 10)
        if gives(counted, 1, series=given, at_seconds=number * step, scrape=SCRAPE_SECONDS, folder=folder)
    ]


def scrapes(steps: float, step: int) -> int:
    """Number of scrapes in that many steps."""
    return round(steps * step / SCRAPE_SECONDS)


@STEPS
@pytest.mark.parametrize("after", [4, 4.25, 4.5, 4.75])
def test_an_engine_that_was_away_for_a_single_scrape_is_marked_once(after: float, step: int, tmp_path: Path) -> None:
    away = scrapes(after, step)
    up = ["1"] * away + ["0"] + ["1"] * scrapes(6, step)
    assert marked("starts", {UP: up}, step, tmp_path) == [5]


@STEPS
@pytest.mark.parametrize("after", [4.25, 4.5, 4.75])
def test_an_engine_that_went_away_with_its_sidecar_is_marked_once(after: float, step: int, tmp_path: Path) -> None:
    away = scrapes(after, step)
    up = ["1"] * away + ["stale"] + ["1"] * scrapes(6, step)
    start = ["1000"] * away + ["stale"] + ["2000"] * scrapes(6, step)
    assert marked("starts", {UP: up, START: start}, step, tmp_path) == [5]


@STEPS
def test_a_first_start_is_marked_once_and_a_stop_not_at_all(step: int, tmp_path: Path) -> None:
    up = ["_"] * scrapes(2.5, step) + ["1"] * scrapes(5, step) + ["0"] * 4 + ["stale"]
    assert marked("starts", {UP: up}, step, tmp_path) == [3]


@STEPS
def test_a_new_card_is_marked_once(step: int, tmp_path: Path) -> None:
    card = 'maxact_card_info{job="maxact", instance="s", model_name="m", card="june", bos="true"}'
    samples = ["_"] * scrapes(4.5, step) + ["1"] * scrapes(5, step)
    assert marked("changes", {card: samples}, step, tmp_path) == [5]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        ("", True),
        (', job="maxact", instance="s"', True),
        (', job="other", instance="s"', False),
        (', job="maxact", instance="t"', False),
    ],
    ids=["no-sidecar-at-all", "selected", "another-job", "another-instance"],
)
def test_alerts_of_the_selected_targets_and_of_none_are_marked(labels: str, shown: bool, tmp_path: Path) -> None:
    alert = f'ALERTS{{alertname="MaxactSidecarDown", alertstate="firing", severity="warning"{labels}}}'
    selected = EXPRESSIONS["Alerts"].replace("$job", "maxact").replace("$instance", "s")
    counted = f"count({selected}) or vector(0)"
    assert gives(counted, int(shown), series={alert: "1x9"}, at_seconds=60, scrape=15, folder=tmp_path)
