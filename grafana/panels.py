"""Panels in the house style, on the typed builders of the Grafana Foundation SDK.

Every panel has an id, a title, a description and a unit; ids are given, not counted, so that a panel keeps its id (and
links to it keep working) when another is added before it. Grid positions are set by `board.place`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grafana.links import ALL, to_site
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE: Final = common.DataSourceRef(type_val="prometheus", uid="${datasource}")

Steps = Sequence[tuple[float | None, str]]
"""Threshold steps, ascending: (from this value on, colour). The first starts at None."""

PLAIN: Final[Steps] = [(None, "text")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What every panel has. ``unit`` is an identifier of Grafana's unit table."""

    id: int
    title: str
    description: str
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """One expression of a panel. ``legend`` is a Grafana legend template."""

    expr: str
    legend: str = ""


def _described(panel: Any, text: Text) -> Any:
    return panel.id(text.id).title(text.title).description(text.description).unit(text.unit).datasource(DATASOURCE)


def _steps(steps: Steps) -> Any:
    models = [dashboard.Threshold(value=value, color=color) for value, color in steps]
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(models)


def _target(query: Query, index: int) -> Any:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend or "__auto")
    return target.ref_id(chr(ord("A") + index)).datasource(DATASOURCE)


def _with_ranges(panel: Any, queries: Sequence[Query]) -> Any:
    for index, query in enumerate(queries):
        panel.with_target(_target(query, index).range())
    return panel


def _with_tables(panel: Any, queries: Sequence[Query]) -> Any:
    for index, query in enumerate(queries):
        panel.with_target(_target(query, index).instant().format(PromQueryFormat.TABLE))
    return panel


def value_mapping(results: Mapping[str, tuple[str, str]]) -> Any:
    """Values shown as (text, colour)."""
    options = {
        value: dashboard.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(results.items())
    }
    return dashboard.ValueMap(options=options)


def _no_cell() -> Any:
    """A matrix cell without a series: no colour, so that it does not look like the lowest value."""
    result = dashboard.ValueMappingResult(text="", color="transparent", index=0)
    match = dashboard.DashboardSpecialValueMapOptions(match=dashboard.SpecialValueMatch.NULL_AND_NAN, result=result)
    return dashboard.SpecialValueMap(options=match)


def verdict(
    text: Text, queries: Sequence[Query], *, empty: str, steps: Steps = PLAIN, mappings: Sequence[Any] = ()
) -> Any:
    """One big number per series, coloured by ``steps``; ``empty`` is shown without data."""
    panel = _with_ranges(_described(stat.Panel(), text), queries)
    panel.thresholds(_steps(steps)).mappings(list(mappings)).no_value(empty)
    panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    panel.color_mode(common.BigValueColorMode.BACKGROUND if len(steps) > 1 else common.BigValueColorMode.NONE)
    return panel.graph_mode(common.BigValueGraphMode.NONE).justify_mode(common.BigValueJustifyMode.CENTER)


def lines(text: Text, queries: Sequence[Query], *, log: bool = False, dashed: str = "", legend: bool = True) -> Any:
    """Series over time. ``log``: logarithmic axis; ``dashed``: regular expression of the names of threshold lines."""
    panel = _with_ranges(_described(timeseries.Panel(), text), queries)
    panel.line_width(1).fill_opacity(0).show_points(common.VisibilityMode.AUTO).decimals(
        3 if text.unit == "none" else 1
    )
    panel.tooltip(
        common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    )
    panel.legend(
        common_builders.VizLegendOptions()
        .display_mode(common.LegendDisplayMode.LIST)
        .placement(common.LegendPlacement.BOTTOM)
        .show_legend(legend)
    )
    if log:
        panel.scale_distribution(common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10))
    if dashed:
        panel.override_by_regexp(
            dashed,
            [
                dashboard.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
                dashboard.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "red"}),
            ],
        )
    return panel


def states(text: Text, queries: Sequence[Query], mappings: Sequence[Any]) -> Any:
    """States over time, one row per series."""
    panel = _with_ranges(_described(statetimeline.Panel(), text), queries)
    panel.mappings(list(mappings)).show_value(common.VisibilityMode.NEVER).row_height(0.8).merge_values(True)
    return panel.legend(common_builders.VizLegendOptions().show_legend(False))


def shape(text: Text, query: Query) -> Any:
    """A heat map over time, a row per series; legends are numbers, where each row begins."""
    panel = _with_ranges(_described(heatmap.Panel(), text), [query])
    panel.calculate(False).rows_frame(heatmap.RowsHeatmapOptions().layout(common.HeatmapCellLayout.GE).value("share"))
    panel.cell_values(heatmap.CellValues().unit(text.unit)).y_axis(heatmap.YAxisConfig().unit("short"))
    # By the root of the share: the few outliers far from the bulk are what one looks for.
    color = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return panel.color(color.scale(heatmap_models.HeatmapColorScale.EXPONENTIAL).exponent(0.5))


_ROW: Final = "${__data.fields.site}"
"""The name of a matrix' row, in a link."""


def matrix(text: Text, expr: str, *, steps: Steps, decimals: int) -> Any:
    """A layer x site heat map of now: a row per site, a column per layer; ``expr`` has exactly these two labels.

    A cell leads to its site in its layer, the name of a row to that site in all layers.
    """
    panel = _with_tables(_described(table.Panel(), text), [Query(expr=expr)])
    panel.thresholds(_steps(steps)).mappings([_no_cell()]).decimals(decimals).no_value("")
    panel.color_scheme(builders.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
    background = common.TableColoredBackgroundCellOptions(mode=common.TableCellBackgroundDisplayMode.BASIC)
    panel.cell_options(background).cell_height(common.TableCellHeight.SM).min_width(46).align(
        common.FieldTextAlignment.CENTER
    )
    corner = "site\\layer"
    transformations: list[tuple[str, dict[str, object]]] = [
        # Layers as numbers: 10 comes after 9.
        ("convertFieldType", {"conversions": [{"targetField": "layer", "destinationType": "number"}]}),
        ("sortBy", {"sort": [{"field": "layer"}]}),
        (
            "groupingToMatrix",
            {"columnField": "layer", "rowField": "site", "valueField": "Value", "emptyValue": "null"},
        ),
        ("sortBy", {"sort": [{"field": corner}]}),
        ("organize", {"renameByName": {corner: "site"}}),
    ]
    panel.transformations(
        [dashboard.DataTransformerConfig(id_val=name, options=options) for name, options in transformations]
    )
    names = [
        dashboard.DynamicConfigValue("custom.cellOptions", {"type": "auto"}),
        dashboard.DynamicConfigValue("custom.align", "left"),
        dashboard.DynamicConfigValue("custom.width", 150),
        dashboard.DynamicConfigValue("links", to_site(layer=ALL, site=_ROW)),
    ]
    cells = [dashboard.DynamicConfigValue("links", to_site(layer="${__field.name}", site=_ROW))]
    return panel.override_by_regexp("/^[0-9]+$/", cells).override_by_name("site", names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a site table. ``field`` is a label, or the ref id of a query for its value."""

    field: str
    title: str
    unit: str = "string"
    """``string`` for labels: a label that looks like a number must not be formatted as one."""
    width: int = 0
    steps: Steps | None = None
    mappings: tuple[Any, ...] = ()
    links: Sequence[dict[str, Any]] = ()


def rows(
    text: Text, queries: Sequence[Query], columns: Sequence[Column], *, sort: str, descending: bool = False
) -> Any:
    """A table of now: the queries joined by their labels, only the columns named, sorted by the column ``sort``."""
    panel = _with_tables(_described(table.Panel(), text), queries).cell_height(common.TableCellHeight.SM)
    fields = [_field(column, len(queries)) for column in columns]
    panel.transformations(
        [
            dashboard.DataTransformerConfig(id_val="merge", options={}),
            dashboard.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": fields}}),
            dashboard.DataTransformerConfig(
                id_val="organize",
                options={
                    "indexByName": {field: index for index, field in enumerate(fields)},
                    "renameByName": {field: column.title for field, column in zip(fields, columns, strict=True)},
                },
            ),
        ]
    )
    panel.sort_by([common_builders.TableSortByFieldState().display_name(sort).desc(descending)])
    for column in columns:
        panel.override_by_name(column.title, _column(column))
    return panel


def _field(column: Column, num_queries: int) -> str:
    """The name Grafana gives the column before it is renamed."""
    if len(column.field) > 1:
        return column.field
    return f"Value #{column.field}" if num_queries > 1 else "Value"


def _column(column: Column) -> list[Any]:
    values: dict[str, object] = {"unit": column.unit}
    if column.unit != "string":
        values["decimals"] = 2
    if column.width:
        values["custom.width"] = column.width
    if column.steps is not None:
        values["thresholds"] = {
            "mode": "absolute",
            "steps": [{"value": value, "color": color} for value, color in column.steps],
        }
    if column.mappings:
        values["mappings"] = [mapping.to_json() for mapping in column.mappings]
    if column.steps is not None or column.mappings:
        values["color"] = {"mode": "thresholds"}
        values["custom.cellOptions"] = {"type": "color-background", "mode": "basic"}
    if column.links:
        values["links"] = column.links
    return [dashboard.DynamicConfigValue(name, value) for name, value in values.items()]
