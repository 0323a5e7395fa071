"""The rules of Grafana's dashboard-linter, on the committed dashboards. Exceptions carry their reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
from grafana.assets import DASHBOARDS, Query, all_queries, children, selectors

BOARDS = pytest.mark.parametrize("board", DASHBOARDS.values(), ids=DASHBOARDS)
CHAIN = ["job", "instance", "model_name", "engine", "layer", "site"]
BOARDS_OF_SITES = ("maxact-overview", "maxact-model", "maxact-site")
QUERIES = pytest.mark.parametrize("query", all_queries(), ids=lambda query: query.where)

WITHOUT_TARGET = {
    "maxact:drift_ratio:floor": "a constant of the rules",
    "maxact:sqnr_decibels:floor": "a constant of the rules",
    "maxact:window_age_seconds:limit": "a constant of the rules",
    "maxact:zeroed_ratio:limit": "a constant of the rules",
    "reference:maxact_absmax:max": "a constant of the rules",
}
WITHOUT_INSTANCE = {
    **WITHOUT_TARGET,
    "fleet:maxact_headroom_flags:sum": "a series of the fleet has no instance",
    "fleet:maxact_headroom_margin:min": "a series of the fleet has no instance",
    "fleet:maxact_ranks:up": "a series of the fleet has no instance",
    "fleet:maxact_sidecars:up": "a series of the fleet has no instance",
    "meaning:maxact_headroom_threshold_ratio:max": "a threshold of all sidecars has no instance",
}


def variables(board: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in board["templating"]["list"]}


@BOARDS
def test_template_datasource(board: dict[str, Any]) -> None:
    sources = [variable for variable in board["templating"]["list"] if variable["type"] == "datasource"]
    assert [(source["name"], source["label"], source["query"]) for source in sources] == [
        ("datasource", "Data source", "prometheus")
    ]


@pytest.mark.parametrize("name", ["job", "instance"])
@BOARDS
def test_template_job_and_instance(board: dict[str, Any], name: str) -> None:
    variable = variables(board)[name]
    assert variable["label"] == name.title()
    assert variable["datasource"]["uid"] == "${datasource}"
    assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".+")


@BOARDS
def test_template_chain(board: dict[str, Any]) -> None:
    """Series of maxact itself have neither layer nor site."""
    chained = [name for name in variables(board) if name in CHAIN]
    assert chained == (CHAIN if board["uid"] in BOARDS_OF_SITES else CHAIN[:4])
    for name in chained:
        variable = variables(board)[name]
        assert (variable["multi"], variable["includeAll"]) == (True, True), name
        assert variable["current"]["value"] == ["$__all"], name
        # Without it Grafana lists every value: a regular expression of a thousand sites. No layer is a value, too.
        assert variable["allValue"] == (".*" if name == "layer" else ".+"), name


@BOARDS
def test_template_label_promql_and_reload(board: dict[str, Any]) -> None:
    earlier: list[str] = []
    for variable in board["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((\w+)(?:\{(.*)\})?, (\w+)\)", variable["query"]["query"])
        assert match, variable
        assert match[3] == variable["name"]
        assert match[2] == (", ".join(f'{name}=~"${name}"' for name in earlier) or None), "not chained"
        assert variable["refresh"] == 2, "reload when the time range changes"
        earlier.append(variable["name"])


@BOARDS
def test_panel_datasource(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@BOARDS
def test_panel_title_description_units_and_targets(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]


@QUERIES
def test_target_job_and_instance(query: Query) -> None:
    if query.label in ("job", "instance"):
        return  # these two do the narrowing
    for name, matchers in selectors(query.runnable):
        assert "job" in matchers or name in WITHOUT_TARGET, f"{name} is not narrowed by job"
        assert "instance" in matchers or name in WITHOUT_INSTANCE, f"{name} is not narrowed by instance"


@QUERIES
def test_target_rate_interval(query: Query) -> None:
    """A rate follows the panel's resolution; a fixed window is what the title names, the whole range makes a choice."""
    for function, window in re.findall(r"\b(rate|irate|increase)\([^\[]*\[([^\]]+)\]", query.expr):
        if function == "increase":
            assert query.panel is not None
            chooses = window == "$__range" and re.search(r"topk\(\d+, increase\([^()]*@ end\(\)\)\)", query.expr)
            assert chooses or (window == "1h" and query.panel["title"].endswith("1 h"))
        else:
            assert window == "$__rate_interval"


def bare_counters(node: promql_parser.Expr) -> Iterator[str]:
    """Counters that an expression reads as they are, place by place: not as what a rate or an increase is made of."""
    if isinstance(node, promql_parser.Call) and node.func.name in ("rate", "irate", "increase"):
        return
    if isinstance(node, promql_parser.VectorSelector):
        name = node.name or ""
        if name.endswith(("_total", "_bucket", "_sum", "_count")) and ":" not in name:
            yield name
    for child in children(node):
        yield from bare_counters(child)


@QUERIES
def test_target_counter_agg(query: Query) -> None:
    assert list(bare_counters(promql_parser.parse(query.runnable))) == [], query.where


def test_a_counter_beside_its_own_rate_is_seen() -> None:
    for expr, found in {
        "rate(a_total[1m]) / a_total": ["a_total"],
        "rate(a_total[1m]) and topk(3, a_total @ end())": ["a_total"],
        "histogram_quantile(0.5, sum by (le) (rate(a_bucket[1m])))": [],
        "(-a_sum) + max_over_time(a_count[5m])": ["a_sum", "a_count"],
        "max_over_time(rate(a_total[1m])[5m:1m])": [],
        "increase(a_total[5m] offset 1m)": [],
    }.items():
        assert list(bare_counters(promql_parser.parse(expr))) == found, expr


@BOARDS
def test_uneditable_dashboard(board: dict[str, Any]) -> None:
    assert board["editable"] is False
