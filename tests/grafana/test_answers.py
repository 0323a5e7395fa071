"""What the boards answer while a flag is raised and the traffic is calm again, where nobody can know, and of sites."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from grafana.assets import DASHBOARDS, RULES, all_queries, queries
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
    'up{job="maxact", instance="s"}': "1x20",
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


def answers(expr: str, value: float, series: dict[str, str], minute: int, folder: Path) -> bool:
    """True where a query of a board gives this value in that minute, with the rules loaded."""
    at = 60 * minute
    return gives(expr, value, series=series, at_seconds=at, scrape=60, folder=folder, rules=[RULES])


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
        assert answers(expr, value, SERIES, minute, tmp_path), f"minute {minute}"


def test_the_worst_sites_show_the_value_that_raised_the_flag(tmp_path: Path) -> None:
    absmax = f"max({QUERIES['Worst sites: clipping / B']})"
    assert answers(absmax, 50 / 0.45, SERIES, 6, tmp_path)


def test_safe_is_not_said_of_a_model_without_a_card(tmp_path: Path) -> None:
    stranger = 'maxact_rank_up{job="maxact", instance="s", model_name="other", engine="0", rank="pp0tp0"}'
    clipping, resolution = (QUERIES[f"Is INT-8 safe now? / {letter}"] for letter in "AB")
    assert answers(clipping, 0, SERIES, 12, tmp_path)
    assert answers(clipping, UNKNOWN, {**SERIES, stranger: "1x20"}, 12, tmp_path)
    assert answers(clipping, UNKNOWN, {}, 12, tmp_path)
    assert answers(resolution, UNKNOWN, SERIES, 12, tmp_path)


def replica(instance: str, *, up: str, flag: str) -> dict[str, str]:
    """Another sidecar of the same model; its series end where it goes down. No flag: it is not judged."""
    place = f'job="maxact", instance="{instance}", model_name="m", engine="0"'
    series = {
        f'up{{job="maxact", instance="{instance}"}}': up,
        f'maxact_rank_up{{{place}, rank="pp0tp0"}}': up.replace("0x", "_x"),
        f'maxact_headroom_flag{{{place}, layer="9", site="hidden", meaning="range"}}': flag,
    }
    return {name: values for name, values in series.items() if values}


CLIPPING = QUERIES["Is INT-8 safe now? / A"]


def test_a_flag_of_a_dead_sidecar_is_still_a_no_beside_a_healthy_replica(tmp_path: Path) -> None:
    series = replica("s1", up="1x9 0x30", flag="0x4 1x4 stale") | replica("s2", up="1x40", flag="0x40")
    for minute, value in ((3, 0), (7, 1), (12, 1), (38, 1)):
        assert answers(CLIPPING, value, series, minute, tmp_path), f"minute {minute}"


@pytest.mark.parametrize(
    ("question", "criterion"),
    [
        ("Worst sites: clipping / D", 'meaning="range"'),
        ("Worst sites: resolution / C", 'meaning="resolution", format="int8"'),
    ],
)
def test_where_is_still_told_of_a_flag_whose_sidecar_died_long_ago(
    question: str, criterion: str, tmp_path: Path
) -> None:
    series = replica("s1", up="1x9 0x30", flag="0x4 1x4 stale") | replica("s2", up="1x40", flag="0x40")
    series = {name.replace('meaning="range"', criterion): values for name, values in series.items()}
    assert answers(f"count({QUERIES[question]} == 1)", 1, series, 38, tmp_path)


def test_safe_is_not_said_while_a_sidecar_is_down(tmp_path: Path) -> None:
    series = replica("s1", up="1x9 0x10 1x10", flag="0x9 stale _x9 0x10") | replica("s2", up="1x40", flag="0x40")
    for minute, value in ((5, 0), (12, UNKNOWN), (18, UNKNOWN), (25, 0)):
        assert answers(CLIPPING, value, series, minute, tmp_path), f"minute {minute}"


def test_safe_is_not_said_of_a_replica_that_is_not_judged(tmp_path: Path) -> None:
    series = replica("s1", up="1x20", flag="0x20")
    assert answers(CLIPPING, 0, series, 12, tmp_path)
    assert answers(CLIPPING, UNKNOWN, series | replica("s2", up="1x20", flag=""), 12, tmp_path)
    engine = 'maxact_rank_up{job="maxact", instance="s1", model_name="m", engine="1", rank="pp0tp0"}'
    assert answers(CLIPPING, UNKNOWN, series | {engine: "1x20"}, 12, tmp_path)


def test_the_margins_of_embedding_and_final_norm_are_on_the_model_board(tmp_path: Path) -> None:
    where = "maxact-model / Margins outside the layers / A"
    (expr,) = [query.runnable for query in all_queries() if query.where == where]
    final = {f'maxact_headroom_ratio{{{PLACE}, site="final_norm", meaning="range"}}': "1.8x20"}
    assert answers(f"min({expr})", 2, SERIES | final, 2, tmp_path)
    assert answers(f"count({expr})", 1, SERIES | final, 2, tmp_path)


FP16_SITE = f'{{{PLACE}, layer="9", site="hidden", meaning="fp16"}}'
ESTIMATED = f'{{{PLACE}, layer="9", site="hidden", format="int8"}}'


@pytest.mark.parametrize(
    ("where", "series", "rule", "other", "values"),
    [
        (
            "maxact-overview / Drift, last hour / A",
            {f"maxact_headroom_ratio{FLAGGED}": "1.25x20"},
            "vector(0.9)",
            "vector(0.8)",
            (0.8 / 0.9, 1.0),
        ),
        (
            "maxact-model / Rounded to zero in $format, over its limit: site by layer / A",
            {f"maxact_zeroed_ratio{ESTIMATED}": "0.25x20"},
            "vector(0.5)",
            "vector(0.25)",
            (0.5, 1.0),
        ),
        (
            "maxact-model / Signal to quantization noise in $format, above its floor: site by layer / A",
            {f"maxact_sqnr_decibels{ESTIMATED}": "12x20"},
            "vector(10)",
            "vector(12)",
            (2.0, 0.0),
        ),
    ],
    ids=["drift", "zeroed", "noise"],
)
def test_the_colours_turn_at_the_threshold_that_a_rule_records(
    where: str, series: dict[str, str], rule: str, other: str, values: tuple[float, float], tmp_path: Path
) -> None:
    (expr,) = [query.runnable for query in all_queries() if query.where == where]
    edited = tmp_path / "edited.rules.yaml"
    text = RULES.read_text()
    assert text.count(rule) == 1
    edited.write_text(text.replace(rule, other))
    for rules, value in zip((RULES, edited), values, strict=True):
        given = {"series": series, "at_seconds": 600, "scrape": 60, "folder": tmp_path, "rules": [rules]}
        assert gives(f"max({expr})", value, **given), rules.name


def test_the_margins_turn_at_the_threshold_of_the_sidecar(tmp_path: Path) -> None:
    threshold = 'maxact_headroom_threshold_ratio{job="maxact", instance="s", meaning="fp16"}'
    for value in ("1.25", "2.5"):
        series = {f"maxact_headroom_ratio{FP16_SITE}": "2.5x20", threshold: f"{value}x20"}
        assert answers(f"min({QUERIES['Smallest margin / A']})", 2.5 / float(value), series, 10, tmp_path)


OF_SITES = {query.where.removeprefix("maxact-site / "): query.runnable for query in queries(DASHBOARDS["maxact-site"])}


@pytest.mark.parametrize(("reading", "share"), [("max", 0.875), ("min", 0.125), ("sum", 1)])
def test_the_shape_of_several_sites_is_their_mean(reading: str, share: float, tmp_path: Path) -> None:
    ratios = {("0", "1"): "0.75x3", ("0", "2"): "0.25x3", ("1", "1"): "1x3"}
    series = {
        f'maxact_magnitude_octave_ratio{{{PLACE}, layer="{layer}", site="hidden", octave="{octave}"}}': samples
        for (layer, octave), samples in ratios.items()
    }
    expr = f"{reading}({OF_SITES['Shape: share of elements by magnitude / A']})"
    assert answers(expr, share, series, 2, tmp_path)


@pytest.mark.parametrize(("column", "value"), [("A", 50), ("B", 40), ("C", 60), ("D", 1.2)])
def test_the_limit_of_a_card_stands_beside_what_is_seen(column: str, value: float, tmp_path: Path) -> None:
    judged, stranger = (f'{{{PLACE}, layer="{layer}", site="hidden", phase="decode"}}' for layer in (0, 1))
    limit = judged.replace('phase="decode"', 'meaning="range"')
    series = {
        f"maxact_headroom_limit{limit}": "50x3",
        f"maxact_headroom_limit{limit.replace('range', 'fp16')}": "65504x3",
        **{f"maxact_absmax{judged}": "40x3", f"maxact_absmax_high_water{judged}": "60x3"},
        **{f"maxact_absmax{stranger}": "900x3", f"maxact_absmax_high_water{stranger}": "900x3"},
    }
    expr = OF_SITES[f"The card's limit and what is seen / {column}"]
    assert answers(f"max({expr})", value, series, 2, tmp_path)
