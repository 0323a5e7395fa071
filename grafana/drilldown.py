"""Dashboard ``maxact-site``: the history of one or more sites, their limits, and the workers behind them."""

from __future__ import annotations

from typing import Any

from grafana.board import board, place
from grafana.panels import Column, Query, Text, lines, rows, shape, states, verdict
from grafana.query import MOST_LINES, extreme, select, worst_margin
from grafana.reference import SERIES
from grafana.scales import DECADES, FLAG, UP, margin_steps

from maxact_proto.stats import PHASES

_NAME = "{{layer}} {{site}}"
_CRITERION = "{{meaning}} {{format}}"
_WORKER = "{{engine}} {{rank}}"
_ON_REQUEST = (
    "No data? Then the scrape job in Prometheus does not ask for it: params: {{detail: [{detail}]}} does, as in "
    "grafana/prometheus.yml."
)


def _phased(*metrics: tuple[str, str]) -> list[Query]:
    """A query per (metric, word of the legend)."""
    return [
        Query(
            expr=extreme(select(metric, "site"), lowest=metric == "maxact_min"),
            legend=f"{_NAME} {{{{phase}}}} {word}",
        )
        for metric, word in metrics
    ]


def _stats() -> list[tuple[Any, int]]:
    margins = Text(
        id=1,
        title="Margin",
        description="Headroom ratio over its threshold, the smallest of the selected sites, per meaning and format. "
        "Below 1 the flag is raised.",
        unit="none",
    )
    absmax = Text(id=2, title="Absmax now", description="Largest magnitude over the hold horizon.", unit="short")
    ever = Text(
        id=3, title="Absmax ever", description="Largest magnitude since the sidecar's state began.", unit="short"
    )
    limit = Text(
        id=4,
        title="Smallest limit",
        description="Smallest limit of the selected sites, per meaning and format: the card's absmax for range, 65504 "
        "for fp16.",
        unit="short",
    )
    since = Text(
        id=5,
        title="Flagged since",
        description="When the oldest raised flag of the selected sites went up, per meaning and format.",
        unit="dateTimeFromNow",
    )
    flagged = f"1000 * min by (meaning, format) ({select('maxact_headroom_flag_since_timestamp_seconds', 'site')})"
    margins_of = Query(expr=f"min by (meaning, format) ({worst_margin()})", legend=_CRITERION)
    limits = Query(expr=f"min by (meaning, format) ({select('maxact_headroom_limit', 'site')})", legend=_CRITERION)
    return [
        (verdict(margins, [margins_of], steps=margin_steps(), empty="no traffic"), 7),
        (verdict(absmax, [Query(expr=f"max({select('maxact_absmax', 'site')})")], empty="no traffic"), 4),
        (verdict(ever, [Query(expr=f"max({select('maxact_absmax_high_water', 'site')})")], empty="no traffic"), 4),
        (verdict(limit, [limits], empty="not judged"), 5),
        (verdict(since, [Query(expr=flagged, legend=_CRITERION)], empty="not flagged"), 4),
    ]


def _absmax() -> Any:
    text = Text(
        id=10,
        title="Absmax against its limits",
        description="Largest magnitude per phase, over the hold horizon and ever. Dashed: the limits the site is "
        "judged against.",
        unit="short",
    )
    limit = Query(
        expr=extreme(select("maxact_headroom_limit", "site"), lowest=True), legend=f"limit {_NAME} {_CRITERION}"
    )
    queries = [*_phased(("maxact_absmax", "now"), ("maxact_absmax_high_water", "ever")), limit]
    return lines(text, queries, log=True, dashed="/^limit/")


def _headroom() -> Any:
    text = Text(
        id=11,
        title="Headroom ratio",
        description="Limit over absmax. Below 1 the value is beyond the limit. Dashed: the threshold that raises a "
        "flag.",
        unit="none",
    )
    queries = [
        Query(expr=extreme(select("maxact_headroom_ratio", "site"), lowest=True), legend=f"{_NAME} {_CRITERION}"),
        Query(
            expr='max by (meaning, format) (meaning:maxact_headroom_threshold_ratio:max{job=~"$job"})',
            legend=f"threshold {_CRITERION}",
        ),
    ]
    return lines(text, queries, log=True, dashed="/^threshold/")


def _drift() -> Any:
    text = Text(
        id=12,
        title="Calibrated range used",
        description="Share of the calibrated absmax that the largest magnitude of the last hour used. Dashed: from "
        "there on growth is worth an alert (MaxactDriftRising).",
        unit="percentunit",
    )
    queries = [
        Query(expr=extreme(select("site:maxact_drift_ratio:max1h", "site")), legend=_NAME),
        Query(expr="maxact:drift_ratio:floor", legend="near the end of the range"),
    ]
    return lines(text, queries, dashed="/^near/")


def _signed() -> Any:
    text = Text(
        id=13,
        title="Signed extrema",
        description="Largest and smallest value over the hold horizon. One-sided outliers are typical of massive "
        "activations.",
        unit="short",
    )
    return lines(text, _phased(("maxact_max", "max"), ("maxact_min", "min")))


def _bulk() -> Any:
    text = Text(
        id=14,
        title="Rms and mean magnitude",
        description="The bulk that the outliers tower over, per phase, over the hold horizon.",
        unit="short",
    )
    return lines(text, _phased(("maxact_rms", "rms"), ("maxact_mean_abs", "mean |x|")), log=True)


def _crest() -> Any:
    text = Text(
        id=15,
        title="Crest factor",
        description="Absmax over rms, per phase. Large: a per-tensor INT-8 scale rounds most of the bulk to zero.",
        unit="none",
    )
    return lines(text, _phased(("maxact_crest_ratio", "")), log=True)


def _noise() -> Any:
    text = Text(
        id=21,
        title="Signal to quantization noise",
        description="Per format, with one scale of absmax / qmax for the whole tensor (NVFP4: a scale per 16 "
        "elements), estimated from a sample of the last minutes.",
        unit="dB",
    )
    name = f"{_NAME} {{{{format}}}}"
    return lines(text, [Query(expr=extreme(select("maxact_sqnr_decibels", "site"), lowest=True), legend=name)])


def _zeroed() -> Any:
    text = Text(
        id=22,
        title="Rounded to zero",
        description="Share of elements that become zero, per format, with one scale of absmax / qmax for the whole "
        "tensor (NVFP4: a scale per 16 elements), estimated from a sample of the last minutes.",
        unit="percentunit",
    )
    name = f"{_NAME} {{{{format}}}}"
    return lines(text, [Query(expr=extreme(select("maxact_zeroed_ratio", "site")), legend=name)])


def _exceeded() -> Any:
    text = Text(
        id=23,
        title="Windows beyond the threshold",
        description="Share of the windows with tokens that exceeded a threshold. A spike stays near zero; drift climbs "
        "and stays. Empty for sites that never exceeded one.",
        unit="percentunit",
    )
    counters = ("maxact_headroom_windows_exceeded_total", "maxact_headroom_windows_total")
    exceeded, windows = (f"rate({select(name, 'site')}[$__rate_interval])" for name in counters)
    most = _most(select(counters[0], "site"))
    query = Query(expr=f"{exceeded} / {windows} and {most}", legend=f"{_NAME} {_CRITERION}")
    return lines(text, [query])


def _most(counter: str) -> str:
    """The series that grew most over the time shown."""
    return f"topk({MOST_LINES}, increase({counter}[$__range] @ end()))"


def _first_exceeded() -> Any:
    text = Text(
        id=24,
        title="Thresholds exceeded: since when, and in which windows, 1 h",
        description="Sites whose threshold was ever exceeded, the newest first: when that first was, and the share of "
        "the windows of the last hour that exceeded it, in all and in each phase.",
        unit="none",
    )
    by = "max by (model_name, engine, layer, site, meaning, format)"
    newest = f"topk(15, {select('maxact_headroom_first_exceeded_timestamp_seconds', 'site')})"
    windows = f"increase({select('maxact_headroom_windows_total', 'site')}[1h])"
    share = f"increase({select('maxact_headroom_windows_exceeded_total', 'site')}[1h]) / {windows}"
    in_phase = [
        f"increase({select('maxact_headroom_phase_windows_exceeded_total', 'site', phase=phase)}[1h]) "
        f"/ ignoring (phase) {windows}"
        for phase in PHASES
    ]
    queries = [Query(expr=f"{by} (1000 * {newest})"), *(Query(expr=f"{by} ({each})") for each in (share, *in_phase))]
    columns = [
        Column(field="layer", title="Layer", width=55),
        Column(field="site", title="Site"),
        Column(field="meaning", title="Against", width=95),
        Column(field="format", title="Format", width=75),
        Column(field="A", title="First", unit="dateTimeFromNow", width=120),
        Column(field="B", title="Exceeded", unit="percentunit", width=85),
        *(
            Column(field=letter, title=phase.capitalize(), unit="percentunit", width=75)
            for letter, phase in zip("CDE", PHASES, strict=True)
        ),
    ]
    return rows(text, queries, columns, sort="First", descending=True)


def _saturated() -> Any:
    text = Text(
        id=25,
        title="Saturated by the deployed scale",
        description="Share of elements beyond the limit of the static scale that the served checkpoint has for the "
        "site, per phase, over the hold horizon; counted exactly. Empty without static scales.",
        unit="percentunit",
    )
    return lines(text, _phased(("maxact_saturation_ratio", "")))


def _lost() -> Any:
    text = Text(
        id=26,
        title="Lost to the deployed scale",
        description="Elements that the static scale of the served checkpoint saturates, and those that it rounds to "
        "zero, over all it was applied to; counted exactly. Empty without static scales.",
        unit="percentunit",
    )
    kinds = (("maxact_saturated_total", "saturated"), ("maxact_zeroed_total", "zeroed"))
    applied = f"rate({select('maxact_scaled_elements_total', 'site')}[$__rate_interval])"
    queries = [
        Query(
            expr=f"rate({select(name, 'site')}[$__rate_interval]) / {applied} and {_most(select(name, 'site'))}",
            legend=f"{_NAME} {{{{phase}}}} {kind}",
        )
        for name, kind in kinds
    ]
    return lines(text, queries)


def _nonfinite() -> Any:
    text = Text(
        id=16,
        title="Non-finite token rows per second",
        description="Token rows that held a NaN or an infinity; they are in no other panel.",
        unit="cps",
    )
    counter = select("maxact_nonfinite_tokens_total", "site")
    rate = f"rate({counter}[$__rate_interval]) and {_most(counter)}"
    return lines(text, [Query(expr=rate, legend=f"{_NAME} {{{{phase}}}}")])


def _flags() -> Any:
    text = Text(id=17, title="Flags", description="Red while the flag of a site is raised.", unit="none")
    query = Query(expr=extreme(select("maxact_headroom_flag", "site")), legend=f"{_NAME} {_CRITERION}")
    return states(text, [query], [FLAG])


def _ranks() -> Any:
    text = Text(
        id=18,
        title="Workers behind these sites",
        description="Streams of the selected engines' workers. While one is down its shard is missing from the "
        "values above.",
        unit="none",
    )
    return states(text, [Query(expr=select("maxact_rank_up", "engine"), legend=_WORKER)], [UP])


def _magnitudes() -> Any:
    text = Text(
        id=27,
        title="Shape: share of elements by magnitude",
        description="Histogram of |x| over time, a row per octave (factor of two) that begins at its label; the lowest "
        "holds zeros as well, 512 all above. From a sample of the last minutes, all phases; the mean of the selected "
        f"sites. Rows far above the bulk are what takes its resolution. {_ON_REQUEST.format(detail='histogram')}",
        unit="percentunit",
    )
    octaves = select("maxact_magnitude_octave_ratio", "site")
    # The shares of a site add up to 1, so the sum of all is the number of sites.
    return shape(text, Query(expr=f"sum by (octave) ({octaves}) / scalar(sum({octaves}))", legend="{{octave}}"))


def _rank_absmax() -> Any:
    text = Text(
        id=28,
        title="Absmax of each worker",
        description="Largest magnitude that each worker saw over the hold horizon, per phase. Workers that hold a "
        "site whole agree; of a sharded site each has its slice, and the one that stands out has the outlier channels. "
        f"{_ON_REQUEST.format(detail='rank')}",
        unit="short",
    )
    query = Query(expr=extreme(select("maxact_rank_absmax", "site")), legend=f"{_WORKER} {_NAME} {{{{phase}}}}")
    return lines(text, [query], log=True)


def _rank_nonfinite() -> Any:
    text = Text(
        id=29,
        title="Non-finite token rows of each worker per second",
        description="Token rows in which a worker's own slice held a NaN or an infinity: one worker alone points at "
        f"its shard or its card. {_ON_REQUEST.format(detail='rank')}",
        unit="cps",
    )
    counter = select("maxact_rank_nonfinite_tokens_total", "site")
    rate = f"rate({counter}[$__rate_interval]) and {_most(counter)}"
    return lines(text, [Query(expr=rate, legend=f"{_WORKER} {_NAME} {{{{phase}}}}")])


def _calibrated() -> Any:
    text = Text(
        id=30,
        title="The card's limit and what is seen",
        description="Sites by how much of the absmax of their card they ever used: the card's absmax, the largest "
        "magnitude over the hold horizon and ever, and the share; above 100 % it left the range. Empty without a card.",
        unit="short",
    )
    by = "max by (model_name, engine, layer, site)"
    limit = f"{by} ({select('maxact_headroom_limit', 'site', meaning='range')})"
    now, ever = (f"{by} ({select(name, 'site')})" for name in ("maxact_absmax", "maxact_absmax_high_water"))
    used = f"topk(15, {ever} / {limit})"
    columns = [
        Column(field="layer", title="Layer", width=60),
        Column(field="site", title="Site"),
        Column(field="A", title="Card", unit="short", width=85),
        Column(field="B", title="Now", unit="short", width=85),
        Column(field="C", title="Ever", unit="short", width=85),
        Column(field="D", title="Used", unit="percentunit", width=85),
    ]
    queries = [*(Query(expr=f"{each} and {used}") for each in (limit, now, ever)), Query(expr=used)]
    return rows(text, queries, columns, sort="Used", descending=True)


def _cards() -> Any:
    text = Text(
        id=19,
        title="Calibration cards in use",
        description="The cards whose absmax is the limit of the meaning range, and whether they were made with a "
        "BOS token.",
        unit="none",
    )
    expr = select("maxact_card_info", "target", 'model_name=~"$model_name"')
    columns = [
        Column(field="model_name", title="Model"),
        Column(field="card", title="Card"),
        Column(field="bos", title="BOS", width=90),
        Column(field="instance", title="Sidecar"),
    ]
    return rows(text, [Query(expr=expr)], columns, sort="Model")


def _reference() -> Any:
    text = Text(
        id=20,
        title="What other models carry at such sites",
        description="Largest absmax of 27 open checkpoints at sites of the selected kinds, and the layer it was found "
        "in: the reference census (arXiv 2605.15572). A peak over all layers, whatever layer is selected: these series "
        "do not hold the census layer by layer. Without data: maxact-reference.rules.yaml is not loaded, or the census "
        "has no such site (it has no inputs of linear layers).",
        unit="short",
    )
    columns = [
        Column(field="checkpoint", title="Checkpoint"),
        Column(field="site", title="Site", width=130),
        Column(field="layer", title="Layer", width=65),
        Column(field="A", title="Absmax", unit="short", width=110, steps=DECADES),
    ]
    query = Query(expr=f'{SERIES}{{site=~"$site"}}')
    return rows(text, [query], columns, sort="Absmax", descending=True)


def site() -> Any:
    """The dashboard."""
    panels = place(
        [
            (3, _stats()),
            (9, [(_absmax(), 24)]),
            (8, [(_headroom(), 12), (_drift(), 12)]),
            (6, [(_flags(), 12), (_ranks(), 12)]),
            (8, [(_magnitudes(), 8), (_rank_absmax(), 8), (_rank_nonfinite(), 8)]),
            (8, [(_signed(), 12), (_bulk(), 12)]),
            (8, [(_crest(), 12), (_nonfinite(), 12)]),
            (8, [(_noise(), 12), (_zeroed(), 12)]),
            (8, [(_saturated(), 12), (_lost(), 12)]),
            (8, [(_exceeded(), 12), (_first_exceeded(), 12)]),
            (9, [(_calibrated(), 9), (_cards(), 7), (_reference(), 8)]),
        ]
    )
    description = (
        "One site in depth: its history, shape, phases, limits, thresholds and flags, its workers and its card. "
        f"Where more are selected, a panel draws the {MOST_LINES} most extreme series of the time range."
    )
    return board("site", "maxact / Site", description, depth=6, panels=panels)
