"""What the dashboards share: variables, annotations, links between them, the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from grafana.links import UIDS
from grafana.panels import DATASOURCE
from grafana.query import newly, select
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.models import dashboard

COLUMNS: Final = 24
TAG: Final = "maxact"
STEP_SECONDS: Final = 60
"""Finest resolution of annotations. Grafana takes a coarser one for a longer range, and writes it for $__interval."""

_CHAIN: Final = (
    ("job", "Job", "maxact_build_info", "target", 0, dashboard.VariableSort.ALPHABETICAL_ASC),
    ("instance", "Instance", "maxact_build_info", "target", 1, dashboard.VariableSort.ALPHABETICAL_ASC),
    ("model_name", "Model", "maxact_rank_up", "engine", 2, dashboard.VariableSort.ALPHABETICAL_ASC),
    ("engine", "Engine", "maxact_rank_up", "engine", 3, dashboard.VariableSort.NUMERICAL_ASC),
    ("layer", "Layer", "maxact_absmax_high_water", "site", 4, dashboard.VariableSort.NUMERICAL_ASC),
    ("site", "Site", "maxact_absmax_high_water", "site", 5, dashboard.VariableSort.ALPHABETICAL_ASC),
)
"""(name, label, metric that has it, number of variables before it that narrow it, sort order)."""


def _variable(name: str, label: str, metric: str, depth: int, sort: Any) -> Any:
    before = ", ".join(f'{other}=~"${other}"' for other, *_ in _CHAIN[:depth])
    selector = f"{metric}{{{before}}}" if before else metric
    query = f"label_values({selector}, {name})"
    variable = builders.QueryVariable(name).label(label).datasource(DATASOURCE).query({"query": query, "refId": name})
    variable.definition(query).multi(True).include_all(True).sort(sort)
    # Embedding and final_norm have no layer: All must match its absence.
    variable.all_value(".*" if name == "layer" else ".+")
    everything = dashboard.VariableOption(text=["All"], value=["$__all"], selected=True)
    return variable.current(everything).refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)


def _format() -> Any:
    """The one number format whose cost is shown."""
    query = f"label_values({select('maxact_sqnr_decibels', 'site')}, format)"
    variable = builders.QueryVariable("format").label("Format").datasource(DATASOURCE)
    variable.query({"query": query, "refId": "format"}).definition(query).multi(False).include_all(False)
    usual = dashboard.VariableOption(text="int8", value="int8", selected=True)
    return variable.current(usual).refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)


def _variables(depth: int, one_format: bool) -> list[Any]:
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    chain = [_variable(name, label, metric, place, sort) for name, label, metric, _, place, sort in _CHAIN[:depth]]
    return [source, *chain, *([_format()] if one_format else [])]


def _annotation(name: str, expr: str, color: str, title: str, text: str, tags: str = "") -> Any:
    target = (
        prometheus.Dataquery().expr(expr).ref_id("Anno").range().interval(f"{STEP_SECONDS}s").datasource(DATASOURCE)
    )
    annotation = builders.AnnotationQuery().name(name).datasource(DATASOURCE).enable(True).icon_color(color)
    return (
        annotation.target(target)
        .expr(expr)
        .step(f"{STEP_SECONDS}s")
        .title_format(title)
        .text_format(text)
        .tag_keys(tags)
    )


def _annotations() -> list[Any]:
    # That no sidecar is scraped at all is an alert without job and instance.
    target = 'job=~"|$job", instance=~"|$instance"'
    firing = f'ALERTS{{{target}, alertname=~"Maxact.*", alertstate="firing"}}'
    cards = newly(select("maxact_card_info", "target"))
    return [
        _annotation("Alerts", firing, "red", "{{alertname}}", "{{model_name}} {{layer}} {{site}}", "severity"),
        _annotation("Card changes", cards, "purple", "Card {{card}} in use", "{{model_name}} at {{instance}}"),
        _annotation(
            "Engine starts", _started(), "blue", "Worker connected", "{{model_name}} engine {{engine}} {{rank}}"
        ),
    ]


def _started() -> str:
    """Workers that connected since the step before: for the first time, after a pause of at least one scrape, or to a
    sidecar that started since, which leaves no trace of a pause."""
    up = select("maxact_rank_up", "target")
    # The last scrape of a pause may lie at or before the step before.
    paused = f"(min_over_time({up}[$__interval]) == 0 or {up} offset $__interval == 0)"
    since = select("process_start_time_seconds", "target")
    restarted = f"(changes({since}[$__interval]) > 0 or {since} != {since} offset $__interval)"
    connected = f"({up} == 1)"
    return (
        f"{connected} and {paused} or {connected} and on (job, instance) {restarted} or {newly(connected, before=up)}"
    )


def _link(name: str) -> Any:
    title = {"overview": "Overview", "model": "Model", "site": "Site", "self": "maxact itself"}[name]
    link = builders.DashboardLink(title).type(dashboard.DashboardLinkType.LINK).url(f"/d/{UIDS[name]}")
    return link.icon("dashboard").include_vars(True).keep_time(True)


def place(rows: Sequence[tuple[int, Sequence[tuple[Any, int]]]]) -> list[Any]:
    """Panels with grid positions, from rows of (height, [(panel, width), ...]) that fill the 24 columns."""
    placed = []
    top = 0
    for height, row in rows:
        left = 0
        for panel, width in row:
            placed.append(panel.grid_pos(dashboard.GridPos(h=height, w=width, x=left, y=top)))
            left += width
        assert left == COLUMNS, f"row at {top} is {left} columns wide"
        top += height
    return placed


def board(
    name: str, title: str, description: str, *, depth: int, panels: Sequence[Any], one_format: bool = False
) -> Any:
    """A dashboard of placed panels, narrowed by the first ``depth`` variables of the chain, and by format."""
    made = builders.Dashboard(title).uid(UIDS[name]).description(description).tags([TAG]).readonly()
    made.time("now-1h", "now").refresh("10s").timezone("browser").tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    made.variables(_variables(depth, one_format)).annotations(_annotations())
    made.links([_link(other) for other in UIDS if other != name])
    for panel in panels:
        made.with_panel(panel)
    return made
