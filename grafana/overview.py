"""Dashboard ``maxact-overview``: is INT-8 safe right now, and if not, where. Fits a 1080p screen without scrolling."""

from __future__ import annotations

from typing import Any, Final

from grafana.board import board, place
from grafana.links import to_site
from grafana.panels import Column, Query, Text, lines, matrix, rows, states, value_mapping, verdict
from grafana.query import INT8, LAYERED, margin, select, worst_margin, worst_ratio
from grafana.scales import FLAG, NEAR, NONE_GOOD, UP, margin_steps

_SITE_LINKS: Final = to_site(
    model_name="${__data.fields.Model}",
    engine="${__data.fields.Engine}",
    layer="${__data.fields.Layer}",
    site="${__data.fields.Site}",
)

_DOWN: Final = f"{select('instance:maxact_sidecar:up', 'target')} == 0"

_PLACE: Final = (
    Column(field="model_name", title="Model"),
    Column(field="engine", title="Engine", width=60),
    Column(field="layer", title="Layer", width=55),
    Column(field="site", title="Site", width=150, links=_SITE_LINKS),
)


def _int8() -> Any:
    text = Text(
        id=1,
        title="Is INT-8 safe now?",
        description="Sites with a raised flag. Clipping: activations leave the calibrated range, so that a static "
        "INT-8 scale made from the card in use clips, or they leave the range of the deployed scale. Resolution: one "
        "INT-8 scale for the whole tensor rounds most of it to zero. A flag of a sidecar that is down counts with its "
        "last state. Unknown: a selected engine is not judged (no card, too few tokens), a selected sidecar is down, "
        "none is scraped, or the rules are not loaded.",
        unit="suffix: sites",
    )
    said = value_mapping({"0": ("SAFE", "dark-green"), "-1": ("unknown", "#6e6e6e")})
    queries = [
        Query(expr=_unsafe("range|saturation"), legend="clipping"),
        Query(expr=_unsafe("resolution"), legend="resolution"),
    ]
    return verdict(text, queries, steps=NONE_GOOD, mappings=[said], empty="unknown")


def _unsafe(meanings: str) -> str:
    """Raised flags of these meanings; -1: unknown.

    One flag is enough for no, whether its sidecar lives or not. One engine of one sidecar that is not judged, or one
    sidecar that is down, is enough for unknown.
    """
    flags = select("site:maxact_headroom_flag:held", "site", f'meaning=~"{meanings}"', 'format=~"|int8"')
    engine = "job, instance, model_name, engine"
    unjudged = f"count by ({engine}) ({select('maxact_rank_up', 'engine')}) unless on ({engine}) {flags}"
    return f"sum({flags}) > 0 or sum({flags}) unless on () ({unjudged} or {_DOWN}) or vector(-1)"


def _worst() -> Any:
    text = Text(
        id=2,
        title="Smallest margin",
        description="Smallest headroom ratio over its threshold, per meaning and format; while a flag is raised, the "
        "worst of the last ten minutes. Below 1 a flag is raised. range: against the calibration card; fp16: against "
        "the largest finite half.",
        unit="none",
    )
    query = Query(expr=f"min by (meaning, format) ({worst_margin()})", legend="{{meaning}} {{format}}")
    return verdict(text, [query], steps=margin_steps(), empty="no traffic")


def _drift() -> Any:
    text = Text(
        id=3,
        title="Drift, last hour",
        description="Largest share of the calibrated absmax that a site reached in the last hour, over the share that "
        "counts as near the end of the range: site:maxact_drift_ratio:max1h over maxact:drift_ratio:floor. From 1 on "
        "growth is worth an alert (MaxactDriftRising).",
        unit="none",
    )
    used = f"max({select('site:maxact_drift_ratio:max1h', 'site')})"
    return verdict(text, [Query(expr=f"{used} / on () maxact:drift_ratio:floor")], steps=NEAR, empty="no card")


def _nonfinite() -> Any:
    text = Text(
        id=4,
        title="Non-finite token rows, 1 h",
        description="Token rows that held a NaN or an infinity in the last hour, over the selected sites.",
        unit="short",
    )
    query = Query(expr=f"sum(increase({select('maxact_nonfinite_tokens_total', 'site')}[1h]))")
    return verdict(text, [query], steps=[(None, "dark-green"), (0.5, "dark-red")], empty="no traffic")


def _streams() -> Any:
    text = Text(
        id=5,
        title="Workers streaming",
        description="Share of the known vLLM workers that are connected. Below 100 % some ranges are not seen.",
        unit="percentunit",
    )
    query = Query(expr=f"avg({select('maxact_rank_up', 'engine')})")
    return verdict(text, [query], steps=[(None, "dark-red"), (1, "dark-green")], empty="no worker")


def _fleet() -> list[tuple[Any, int]]:
    everywhere = "over all models and sidecars of the selected jobs, per meaning, whatever else is selected here"
    flags = Text(
        id=6,
        title="Flags in the fleet",
        description=f"Raised flags {everywhere}. A sidecar that cannot be scraped counts with its last state.",
        unit="short",
    )
    margins = Text(
        id=12,
        title="Margin in the fleet",
        description=f"Smallest margin {everywhere}. Below 1 a flag is raised.",
        unit="none",
    )
    raised = 'sum by (meaning, format) (fleet:maxact_headroom_flags:sum{job=~"$job"})'
    smallest = 'min by (meaning, format) (fleet:maxact_headroom_margin:min{job=~"$job"})'
    legend, empty = "{{meaning}} {{format}}", "no rules loaded"
    return [
        (verdict(flags, [Query(expr=raised, legend=legend)], steps=NONE_GOOD, empty=empty), 3),
        (verdict(margins, [Query(expr=smallest, legend=legend)], steps=margin_steps(), empty=empty), 3),
    ]


def _heat() -> Any:
    text = Text(
        id=7,
        title="Margin to the range flag: site by layer",
        description="Calibrated absmax over observed absmax, over the flag's threshold; the smallest of the selected "
        "engines; while a flag is raised, the worst of the last ten minutes. Red: below 1, the flag is raised. Orange: "
        "inside the hysteresis. Green: safe. Embedding and final_norm have no layer and are in the table of the worst "
        "sites.",
        unit="none",
    )
    expr = f"min by (layer, site) ({worst_margin(LAYERED, meaning='range')})"
    return matrix(text, expr, steps=margin_steps(), decimals=2)


_KEPT: Final = (
    "while a flag is raised, the worst of the last ten minutes. A raised flag of a sidecar that is down has no values."
)


def _with_raised(flags: str, keep: str, worst: str) -> str:
    """The flags of the worst sites, and those raised at sidecars that are down, whose sites have no margin."""
    return f"{flags} {keep} {worst} or topk(15, {flags} == 1 and on (job, instance) {_DOWN})"


def _clipping_sites() -> Any:
    text = Text(
        id=8,
        title="Worst sites: clipping",
        description="The fifteen sites with the smallest margin to a limit of magnitude (card, deployed scale, fp16); "
        f"{_KEPT} Click a site for its history.",
        unit="none",
    )
    magnitude = 'meaning!="resolution"'
    worst = f"bottomk(15, {worst_margin(magnitude)})"
    keep = "and on (job, instance, model_name, engine, layer, site, meaning)"
    limit = select("maxact_headroom_limit", "site", magnitude)
    flags = select("site:maxact_headroom_flag:held", "site", magnitude)
    queries = [
        Query(expr=worst),
        Query(expr=f"{limit} / {worst_ratio(magnitude)} {keep} {worst}"),
        # max without () drops the metric name, which would keep the tables from being joined.
        Query(expr=f"max without () ({limit}) {keep} {worst}"),
        Query(expr=f"max without () ({_with_raised(flags, keep, worst)})"),
    ]
    columns = [
        *_PLACE,
        Column(field="meaning", title="Against", width=85),
        Column(field="B", title="Absmax", unit="short", width=85),
        Column(field="C", title="Limit", unit="short", width=85),
        Column(field="A", title="Margin", unit="none", width=70, steps=margin_steps()),
        Column(field="D", title="Flag", unit="none", width=65, mappings=(FLAG,)),
    ]
    return rows(text, queries, columns, sort="Margin")


def _resolution_sites() -> Any:
    text = Text(
        id=11,
        title="Worst sites: resolution",
        description="The fifteen sites where one INT-8 scale for the whole tensor loses most: the share of elements "
        f"that become zero, and the margin to the flag. Below 1 it is raised; {_KEPT}",
        unit="none",
    )
    worst = f"min without (meaning) (bottomk(15, {worst_margin(INT8, meaning='resolution')}))"
    keep = "and on (job, instance, model_name, engine, layer, site)"
    flags = select("site:maxact_headroom_flag:held", "site", INT8, meaning="resolution")
    queries = [
        Query(expr=worst),
        Query(expr=f"max without () ({select('maxact_zeroed_ratio', 'site', INT8)}) {keep} {worst}"),
        Query(expr=f"max without (meaning) ({_with_raised(flags, keep, worst)})"),
    ]
    columns = [
        *_PLACE,
        Column(field="B", title="To zero", unit="percentunit", width=75),
        Column(field="A", title="Margin", unit="none", width=70, steps=margin_steps("resolution")),
        Column(field="C", title="Flag", unit="none", width=65, mappings=(FLAG,)),
    ]
    return rows(text, queries, columns, sort="Margin")


def _trend() -> Any:
    text = Text(
        id=9,
        title="Smallest margin over time",
        description="Smallest headroom ratio over its threshold, per model, meaning and format, on a logarithmic axis. "
        "The dashed line at 1 is where flags are raised.",
        unit="none",
    )
    queries = [
        Query(
            expr=f"min by (model_name, meaning, format) ({margin()})", legend="{{model_name}} {{meaning}} {{format}}"
        ),
        Query(expr="vector(1)", legend="flag"),
    ]
    return lines(text, queries, log=True, dashed="flag")


def _health() -> Any:
    text = Text(
        id=10,
        title="Workers and sidecars",
        description="Green while a worker's stream to its sidecar is connected, and while Prometheus can scrape a "
        "sidecar; red while not. Of a sidecar that is down no worker is shown.",
        unit="none",
    )
    queries = [
        Query(expr=select("instance:maxact_sidecar:up", "target"), legend="sidecar {{instance}}"),
        Query(expr=select("maxact_rank_up", "engine"), legend="{{model_name}} {{engine}} {{rank}}"),
    ]
    return states(text, queries, [UP])


def overview() -> Any:
    """The dashboard."""
    panels = place(
        [
            (3, [(_int8(), 5), (_worst(), 4), (_drift(), 3), (_nonfinite(), 3), (_streams(), 3), *_fleet()]),
            (9, [(_heat(), 20), (_health(), 4)]),
            (9, [(_clipping_sites(), 11), (_resolution_sites(), 8), (_trend(), 5)]),
        ]
    )
    description = (
        "Is INT-8 safe right now, and if not, where: fleet headroom, worst sites, flags, drift, stream health."
    )
    return board("overview", "maxact / Overview", description, depth=6, panels=panels)
