"""Dashboard ``maxact-self``: maxact itself. Lag, drops, cost."""

from __future__ import annotations

from typing import Any

from grafana.board import board, place
from grafana.panels import Column, Query, Text, lines, rows, states, verdict
from grafana.query import quantile, select
from grafana.scales import NONE_GOOD, UP

_RATE = "$__rate_interval"


def _stats() -> list[tuple[Any, int]]:
    sidecars = Text(
        id=1, title="Sidecars up", description="Share of the selected sidecars that can be scraped.", unit="percentunit"
    )
    engines = Text(id=2, title="Engines", description="Engines whose series are shown by these sidecars.", unit="short")
    series = Text(id=3, title="Series", description="Series of the last scrape, all selected sidecars.", unit="short")
    dropped = Text(
        id=4,
        title="Series dropped, 1 h",
        description="Series left out of scrapes by the cap (max_series of the sidecar) in the last hour.",
        unit="short",
    )
    rejected = Text(
        id=5,
        title="Messages rejected, 1 h",
        description="Messages that broke the wire's limits in the last hour: usually two maxact versions that differ.",
        unit="short",
    )
    fleet = Text(
        id=6,
        title="Up in the fleet",
        description="Sidecars that can be scraped and workers that are connected, all of the selected jobs, whatever "
        "else is selected here.",
        unit="short",
    )
    everywhere = [
        Query(expr=f'sum({series}{{job=~"$job"}})', legend=legend)
        for series, legend in (("fleet:maxact_sidecars:up", "sidecars"), ("fleet:maxact_ranks:up", "workers"))
    ]
    up = Query(expr=f"avg({select('instance:maxact_sidecar:up', 'target')})")
    drops = Query(expr=f"sum(increase({select('maxact_series_dropped_total', 'target')}[1h]))")
    rejects = f"sum(increase({select('maxact_windows_rejected_total', 'target')}[1h]))"
    # The counter has no series before the first rejection.
    none = f"0 * sum({select('maxact_engines', 'target')})"
    return [
        (verdict(sidecars, [up], steps=[(None, "dark-red"), (1, "dark-green")], empty="none"), 4),
        (verdict(fleet, everywhere, empty="no rules loaded"), 4),
        (verdict(engines, [Query(expr=f"sum({select('maxact_engines', 'target')})")], empty="none"), 4),
        (verdict(series, [Query(expr=f"sum({select('maxact_series', 'target')})")], empty="none"), 4),
        (verdict(dropped, [drops], steps=NONE_GOOD, empty="none"), 4),
        (verdict(rejected, [Query(expr=f"{rejects} or {none}")], steps=NONE_GOOD, empty="none"), 4),
    ]


def _windows() -> Any:
    text = Text(
        id=10,
        title="Windows merged per second",
        description="Windows that workers sent and sidecars merged. Each worker closes one per interval, busy or idle.",
        unit="cps",
    )
    rate = f"sum by (instance, model_name, engine) (rate({select('maxact_windows_total', 'engine')}[{_RATE}]))"
    return lines(text, [Query(expr=rate, legend="{{model_name}} {{engine}} at {{instance}}")])


def _coalesced() -> Any:
    text = Text(
        id=11,
        title="Windows coalesced per second",
        description="Windows that workers merged into the next because the sidecar had not acknowledged them. No "
        "extremum is lost, only resolution in time.",
        unit="cps",
    )
    metric = select("maxact_windows_coalesced_total", "engine")
    rate = f"sum by (instance, model_name, engine) (rate({metric}[{_RATE}]))"
    return lines(text, [Query(expr=rate, legend="{{model_name}} {{engine}} at {{instance}}")])


def _age() -> Any:
    text = Text(
        id=12,
        title="Age of the last window",
        description="How long ago a worker's last window arrived. Dashed: from there on MaxactStreamDown calls it "
        "silent.",
        unit="s",
    )
    age = f"time() - {select('maxact_rank_last_window_timestamp_seconds', 'engine')}"
    queries = [
        Query(expr=age, legend="{{model_name}} {{engine}} {{rank}}"),
        Query(expr="maxact:window_age_seconds:limit", legend="silent"),
    ]
    return lines(text, queries, log=True, dashed="silent")


def _rejected() -> Any:
    text = Text(
        id=13,
        title="Messages rejected, state not written, per second",
        description="Messages that broke a limit of the wire, by reason; windows that came twice, merged once.",
        unit="cps",
    )
    rate = f"sum by (reason) (rate({select('maxact_windows_rejected_total', 'target')}[{_RATE}]))"
    unwritten = f"sum by (instance) (rate({select('maxact_state_errors_total', 'target')}[{_RATE}]))"
    repeated = f"sum by (instance) (rate({select('maxact_windows_repeated_total', 'target')}[{_RATE}]))"
    queries = [
        Query(expr=rate, legend="{{reason}}"),
        Query(expr=unwritten, legend="state not written at {{instance}}"),
        Query(expr=repeated, legend="came twice at {{instance}}"),
    ]
    return lines(text, queries)


def _latency(id: int, metric: str, title: str, description: str) -> Any:
    text = Text(id=id, title=title, description=description, unit="s")
    queries = [
        Query(expr=quantile(0.5, metric, "target"), legend="median"),
        Query(expr=quantile(0.99, metric, "target"), legend="99 %"),
    ]
    return lines(text, queries, log=True)


def _cost() -> Any:
    text = Text(
        id=16,
        title="Busy share of a core",
        description="Seconds per second that sidecars spend on merging windows, on rendering scrapes, and on all.",
        unit="percentunit",
    )
    queries = [
        Query(expr=f"sum(rate({select(f'maxact_{name}_seconds_sum', 'target')}[{_RATE}]))", legend=name)
        for name in ("ingest", "render")
    ]
    whole = f"rate({select('process_cpu_seconds_total', 'target')}[{_RATE}])"
    sidecars = f"{whole} and on (job, instance) {select('maxact_engines', 'target')}"
    return lines(text, [*queries, Query(expr=f"sum({sidecars})", legend="all")])


def _memory() -> Any:
    text = Text(id=21, title="Memory", description="Resident memory of each sidecar process.", unit="bytes")
    resident = select("process_resident_memory_bytes", "target")
    expr = f"{resident} and on (job, instance) {select('maxact_engines', 'target')}"
    return lines(text, [Query(expr=expr, legend="{{instance}}")])


def _series() -> Any:
    text = Text(
        id=17,
        title="Series per scrape",
        description="Series rendered by each sidecar, and those left out by the cap per second.",
        unit="short",
    )
    dropped = f"rate({select('maxact_series_dropped_total', 'target')}[{_RATE}])"
    queries = [
        Query(expr=select("maxact_series", "target"), legend="{{instance}}"),
        Query(expr=dropped, legend="dropped per second at {{instance}}"),
    ]
    return lines(text, queries, dashed="/^dropped/")


def _scrape() -> Any:
    text = Text(
        id=18,
        title="Scrape duration",
        description="How long Prometheus waits for a scrape of each sidecar.",
        unit="s",
    )
    scraped = select("scrape_duration_seconds", "target")
    expr = f"{scraped} and on (job, instance) {select('instance:maxact_sidecar:up', 'target')}"
    return lines(text, [Query(expr=expr, legend="{{instance}}")])


def _up() -> Any:
    text = Text(id=19, title="Sidecars", description="Green while Prometheus can scrape the sidecar.", unit="none")
    return states(text, [Query(expr=select("instance:maxact_sidecar:up", "target"), legend="{{instance}}")], [UP])


def _versions() -> Any:
    text = Text(id=20, title="Versions", description="Version of each sidecar.", unit="none")
    columns = [
        Column(field="job", title="Job"),
        Column(field="instance", title="Sidecar"),
        Column(field="version", title="Version"),
    ]
    return rows(text, [Query(expr=select("maxact_build_info", "target"))], columns, sort="Sidecar")


def own() -> Any:
    """The dashboard."""
    ingest = _latency(
        14, "maxact_ingest_seconds", "Time to take in a window", "Time to decode, merge and judge one window."
    )
    render = _latency(15, "maxact_render_seconds", "Time to render a scrape", "Time to render one scrape of /metrics.")
    lag = _latency(
        22,
        "maxact_window_lag_seconds",
        "Lag of windows",
        "From the end of a window, by the worker's clock, until it was merged: the two clocks may differ.",
    )
    panels = place(
        [
            (3, _stats()),
            (8, [(_windows(), 6), (_coalesced(), 6), (lag, 6), (_age(), 6)]),
            (8, [(ingest, 6), (render, 6), (_cost(), 6), (_memory(), 6)]),
            (8, [(_series(), 8), (_scrape(), 8), (_rejected(), 8)]),
            (6, [(_up(), 12), (_versions(), 12)]),
        ]
    )
    description = "maxact itself: lag of the workers' windows, what was dropped or rejected, and what watching costs."
    # Nothing that is measured of maxact itself is of a layer or of a site.
    return board("self", "maxact / maxact itself", description, depth=4, panels=panels)
