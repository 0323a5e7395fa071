"""The committed dashboards: built from the code, readable, complete, and laid out to fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana.assets import (
    DASHBOARDS,
    GRAFANA,
    RECORDED,
    RECORDED_LABELS,
    ROOT,
    all_queries,
    catalogue,
    metric_names,
    queries,
    selectors,
)

from maxact_sidecar.families import DETAIL

VISIBLE_ROWS = 21
"""Grid rows of 38 px that a 1080p screen shows below browser, navigation and variables (about 280 px)."""

BOARDS = pytest.mark.parametrize("board", DASHBOARDS.values(), ids=DASHBOARDS)


def run_python(*arguments: str) -> str:
    """Output of Python in the repository; the builders warn on import that a later schema exists."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_committed_files_are_what_the_code_builds(tmp_path: Path) -> None:
    run_python("-m", "grafana.build", "--output", str(tmp_path))
    built = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.glob("*/*")}
    assert built == {name: (GRAFANA / name).read_text() for name in built}, "run: make dashboards"
    assert {name for name in built if name.startswith("rules/")} == {
        f"rules/{name}.{kind}.yaml" for name in ("maxact", "maxact-reference") for kind in ("rules", "prometheusrule")
    }
    assert {name for name in built if name.endswith(".json")} == {f"dashboards/{name}.json" for name in DASHBOARDS}


def test_the_models_of_the_sdk_read_the_committed_files() -> None:
    program = """
import json, sys
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

def given(part, whole, path=""):
    if isinstance(part, dict):
        for key, value in part.items():
            if value is not None:
                assert key in whole, f"{path}.{key} is lost"
                given(value, whole[key], f"{path}.{key}")
    elif isinstance(part, list):
        assert len(part) == len(whole), path
        for index, (one, other) in enumerate(zip(part, whole)):
            given(one, other, f"{path}[{index}]")
    else:
        assert part == whole, f"{path}: {part!r} became {whole!r}"

plugins.register_default_plugins()
for path in sys.argv[1:]:
    document = json.load(open(path))
    given(document, json.loads(json.dumps(Dashboard.from_json(document), cls=JSONEncoder)))
    print("read", path)
"""
    files = [str(path) for path in sorted((GRAFANA / "dashboards").iterdir())]
    assert run_python("-c", program, *files).count("read") == len(DASHBOARDS)


@BOARDS
def test_panels_fill_the_grid_without_overlap(board: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    height = 1 + max(y for _, y in taken)
    assert len(taken) == 24 * height, "the grid has a hole"


def test_the_overview_answers_without_scrolling() -> None:
    places = [panel["gridPos"] for panel in DASHBOARDS["maxact-overview"]["panels"]]
    assert max(place["y"] + place["h"] for place in places) <= VISIBLE_ROWS


@BOARDS
def test_ids_are_unique_and_ref_ids_are_set(board: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH"[: len(panel["targets"])])


def test_uids_are_the_file_names() -> None:
    assert {board["uid"]: board["uid"] for board in DASHBOARDS.values()} == {name: name for name in DASHBOARDS}
    assert len({board["title"] for board in DASHBOARDS.values()}) == len(DASHBOARDS)


@BOARDS
def test_links_lead_to_the_other_dashboards_and_carry_the_variables(board: dict[str, Any]) -> None:
    targets = {link["url"].removeprefix("/d/") for link in board["links"]}
    assert targets == set(DASHBOARDS) - {board["uid"]}
    assert all(link["includeVars"] and link["keepTime"] for link in board["links"])
    for url in re.findall(r'"/d/([\w-]+)\?[^"]*"', str(board).replace("'", '"')):
        assert url in DASHBOARDS


def data_links(panel: dict[str, Any]) -> dict[str, str]:
    """Column, or pattern of columns -> address of its data link."""
    return {
        override["matcher"]["options"]: entry["value"][0]["url"]
        for override in panel["fieldConfig"]["overrides"]
        for entry in override["properties"]
        if entry["id"] == "links"
    }


def check_site_link(url: str) -> None:
    """The link opens maxact / Site and says what each of its variables is."""
    assert url.startswith("/d/maxact-site?")
    variables = {variable["name"] for variable in DASHBOARDS["maxact-site"]["templating"]["list"]}
    assert set(re.findall(r"var-(\w+)=", url)) | set(re.findall(r"\$\{(\w+):queryparam\}", url)) == variables
    assert url.endswith("&${__url_time_range}")


def panels_with(board: str, transformation: str) -> list[dict[str, Any]]:
    """The panels of a board with a transformation of that name."""
    return [
        panel
        for panel in DASHBOARDS[board]["panels"]
        if transformation in {each["id"] for each in panel.get("transformations", ())}
    ]


@pytest.mark.parametrize(
    ("board", "title"),
    [
        ("maxact-overview", "Worst sites: clipping"),
        ("maxact-overview", "Worst sites: resolution"),
        ("maxact-model", "Margins outside the layers"),
    ],
)
def test_a_row_of_a_table_of_sites_opens_that_site(board: str, title: str) -> None:
    (panel,) = [panel for panel in panels_with(board, "merge") if panel["title"] == title]
    url = data_links(panel)["Site"]
    check_site_link(url)
    shown = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
    assert set(re.findall(r"__data\.fields\.(\w+)", url)) <= shown


@pytest.mark.parametrize("board", ["maxact-overview", "maxact-model"])
def test_a_cell_of_a_heat_map_opens_that_site_in_that_layer(board: str) -> None:
    heat_maps = panels_with(board, "groupingToMatrix")
    assert heat_maps
    for panel in heat_maps:
        links = data_links(panel)
        assert set(links) == {"/^[0-9]+$/", "site"}, panel["title"]
        for url in links.values():
            check_site_link(url)
            assert "var-site=${__data.fields.site}" in url
        assert "var-layer=${__field.name}" in links["/^[0-9]+$/"]
        assert "var-layer=$__all" in links["site"]


@BOARDS
def test_alerts_card_changes_and_engine_starts_are_annotated(board: dict[str, Any]) -> None:
    annotations = {annotation["name"]: annotation for annotation in board["annotations"]["list"]}
    assert set(annotations) == {"Alerts", "Card changes", "Engine starts"}
    assert all(annotation["enable"] for annotation in annotations.values())


@BOARDS
def test_threshold_steps_ascend(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        steps = panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
        values = [step["value"] for step in steps]
        assert values[:1] in ([], [None])
        assert values[1:] == sorted(values[1:]), panel["title"]


def test_a_threshold_is_read_where_the_rules_record_it() -> None:
    read = set().union(*(metric_names(query.runnable) for query in all_queries()))
    assert {name for name in RECORDED if name.startswith(("maxact:", "meaning:"))} - read == {
        "maxact:drift_ratio:growth"
    }
    assert "maxact_headroom_threshold_ratio" not in read


@pytest.mark.parametrize("query", all_queries(), ids=lambda query: query.where)
def test_every_query_reads_series_and_labels_that_exist(query: Any) -> None:
    known = catalogue()
    known |= {name: labels for name, labels in RECORDED_LABELS.items() if labels}
    for name, matchers in selectors(query.runnable):
        if name in known:
            labels = set(matchers) | ({query.label} if query.label else set())
            assert labels <= known[name], f"{name} has no label {labels - known[name]}"
        else:
            assert name in RECORDED or name in ("ALERTS", "scrape_duration_seconds"), f"{name} does not exist"


def test_variables_are_among_the_queries() -> None:
    asked = {query.where: query.runnable for query in all_queries() if query.label}
    assert len(asked) == sum(len(board["templating"]["list"]) - 1 for board in DASHBOARDS.values())
    assert asked["maxact-site / variable engine"] == 'maxact_rank_up{job=~".+", instance=~".+", model_name=~".+"}'


def test_what_the_sidecar_shows_on_request_is_asked_for_and_its_panels_say_so() -> None:
    (job,) = yaml.safe_load((GRAFANA / "prometheus.yml").read_bytes())["scrape_configs"]
    assert job["params"] == {"detail": [*DETAIL]}
    for detail, families in DETAIL.items():
        names = {family.name for family in families}
        panels = [query.panel for query in all_queries() if query.panel and metric_names(query.runnable) & names]
        assert panels
        for panel in panels:
            assert f"params: {{detail: [{detail}]}}" in panel["description"], panel["title"]


@BOARDS
def test_every_variable_narrows_a_panel(board: dict[str, Any]) -> None:
    text = " ".join(query.expr for query in queries(board) if query.panel)
    for variable in board["templating"]["list"][1:]:
        assert f'=~"${variable["name"]}"' in text, f"{variable['name']} changes nothing on {board['uid']}"
